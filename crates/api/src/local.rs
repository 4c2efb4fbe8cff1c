//! Commands and the control plane on one machine: JSON over the unix socket `control.sock` (mode 0600). Whoever can
//! open it is the mesh's own uid: operator `local` until an owner has enrolled, and nobody in particular after that. Errors are [`Problem`]s (RFC 9457).
//!
//! | request | body | answer |
//! |---|---|---|
//! | `GET /v1/status` | | [`Status`] |
//! | `GET /v1/mesh` | | [`Mesh`] |
//! | `POST /v1/changes` | [`ApplyAs`] | [`Applied`]; 403 when the gate refuses, 409 when the base moved, 422 when the law refuses |
//! | `GET /v1/changes?limit=N` | | `[`[`ChangeSummary`]`]`, newest first |
//! | `GET /v1/changes/{revision}` | | [`ChangeDetail`] |
//! | `GET /v1/changes/{revision}/wait?timeout_ms=N` | | [`Waited`] |
//! | `GET /v1/decisions?…` | query string of [`RecordFilter`] | `[`core DecisionRecord`]`, newest first; asks the hosts |
//! | `GET /v1/decisions/{id}` | | [`DecisionDetail`] |
//! | `GET /v1/decisions/tail?…` | query string of [`RecordFilter`] | newline-delimited [`TailEvent`]s, until the client leaves |
//! | `GET /v1/services/{service}/callers` | | `[`[`Caller`]`]`, most permitted first |
//! | `GET /v1/services/{service}/checklist` | | `[`[`Checked`]`]`: what has to be there before it is let in |
//! | `POST /v1/hosts/evict` | [`EvictAs`] | [`Evicted`] |
//! | `GET /v1/edges` | | list of [`EdgeView`] |
//! | `GET /v1/authority` | | [`AuthorityView`] |
//! | `POST /v1/authority/steps` | [`StepAs`] | [`Stepped`] |
//! | `POST /v1/authority/keys` | [`ReplaceKeyAs`] | [`KeyReplaced`] |
//! | `POST /v1/authority/request` | [`AskAbove`] | [`AskedAbove`] |
//! | `POST /v1/authority/accept` | [`AcceptAbove`] | [`AcceptedAbove`] |
//! | `GET /v1/identities?…` | query string of [`IdentityFilter`] | `[`[`IdentityView`]`]`: X.509-SVIDs that have not expired, newest first |
//! | `POST /v1/identities/revoke` | [`RevokeAs`] | [`Revoked`] |
//! | `GET /v1/tokens?…` | query string of [`TokenFilter`] | `[`[`TokenView`]`]`: access tokens that have not expired, newest first |
//! | `POST /v1/tokens/inspect` | [`InspectToken`] | [`TokenInspected`] |
//! | `POST /v1/tokens/revoke` | [`RevokeTokensAs`] | [`TokensRevoked`] |
//! | `GET /v1/signals?…` | query string of [`SignalFilter`] | `[`[`SignalView`]`]`: what is said, newest first |
//! | `POST /v1/signals` | [`SendSignalAs`] | [`SignalSent`] |
//! | `POST /v1/signals/clear` | [`ClearSignalsAs`] | [`SignalSent`]; 404 when nothing is said |
//! | `GET /v1/risks?…` | query string of [`RiskFilter`] | `[`[`RiskView`]`]`, the highest first |
//! | `GET /v1/signals/{number}/wait?timeout_ms=N` | | [`SignalWaited`] |
//! | `GET /v1/ledger` | | newline-delimited [`LedgerLine`]s, all entries in order |
//! | `GET /v1/ledger/bodies` | | newline-delimited JSON strings: every text that an entry ever referred to |
//! | `GET /v1/ledger/checkpoint` | | [`CheckpointView`] |
//! | `GET /v1/ledger/proofs/{index}` | | [`ProofView`]: a C2SP tlog-proof in the newest checkpoint |
//! | `GET /v1/ledger/consistency/{size}` | | [`ProofView`]: from that size to the newest checkpoint |
//! | `GET /v1/proposals` | | `[`[`Proposal`]`]`, newest first |
//! | `GET /v1/proposals/{id}` | | [`ProposalDetail`] |
//! | `GET /v1/proposals/{id}/wait?timeout_ms=N` | | [`Proposal`], once it is decided or the time is over |
//! | `POST /v1/proposals/{id}/ceremony` | [`Shown`]: the operator | [`Ceremony`]: what makes their signature good once |
//! | `POST /v1/proposals/{id}/apply` | [`Shown`] | [`Applied`]: its author shows what the gate asks for |
//! | `POST /v1/proposals/{id}/countersign` | [`Shown`] | [`AnsweredProposal`]; applied when it was the last that was missing |
//! | `POST /v1/proposals/{id}/reject` | [`Shown`] | [`Proposal`] |
//! | `POST /v1/proposals/{id}/withdraw` | [`Shown`] | [`Proposal`] |
//! | `POST /v1/enrolments` | [`Enrol`] | [`Enrolment`]: what an authenticator app is to be told |
//! | `POST /v1/enrolments/{id}` | [`Confirm`] | [`Enrolled`] |
//! | `POST /v1/enrolments/link` | | [`EnrolmentLink`]; 409 once the mesh is protected |
//! | `GET /v1/sessions` | | `[`[`SessionView`]`]`: who is signed in |
//! | `POST /v1/sessions/end` | [`EndSessions`] | [`SessionsEnded`] |
//! | `POST /v1/hosts/invitations` | [`InviteAs`] | [`Invitation`]; 403 when the gate refuses |
//! | `POST /v1/acts/{act}` | [`Shown`] | [`Opened`]: what the gate opens for reading; 403 when it asks for more |
//!
//! In a protected mesh `/v1/decisions…` answers what the gate opened for the operator in [`OPERATOR_HEADER`].
//!
//! Of it, [`crate::device`] answers commands on other machines.
//!
//! `GET /v1/workloads` on `agent.sock` answers `[`[`WorkloadView`]`]`, `GET /v1/processes` `[`[`ProcessView`]`]`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use countersign_core::{
    assurance::challenge::Purpose,
    canonical::Digest,
    change::{Bodies, ChangeSet, Edge, Revision},
    countersignature::{Bytes, Countersignature},
    gate::{Author, Requires, act::Act},
    identity::{FactorId, InstanceId, OperatorName, ServiceName, SpiffeId, TrustDomain},
    record::{DecisionRecord, EdgeCount, Outcome},
    registration::Selector,
    signal::{
        Serial, SignalSeq, TokensMeant,
        statement::{Kind, Source, Statement, Subject},
    },
    state::MeshState,
    token::{Scope, Thumbprint, TokenFault, TokenId},
};

/// RFC 9457 problem details, as `application/problem+json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{title}")]
pub struct Problem {
    /// What went wrong, in one line.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// More about this occurrence; may have several lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// What the change gate asks for, when it was the gate that refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<Box<GateRefusal>>,
}

/// The change gate's refusal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GateRefusal {
    /// In one word.
    pub outcome: GateOutcome,
    /// The pending change that waits for what is missing.
    pub change: Option<String>,
    /// The digest of the change-set, when it is about one.
    pub digest: Option<Digest>,
    /// What was asked for, when it changes nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub act: Option<Act>,
    /// What is missing.
    pub requires: Option<Requires>,
    /// Where it can be signed in a browser, when there are pages.
    pub url: Option<String>,
}

impl GateRefusal {
    /// Whether its author has shown enough, and only others are missing.
    pub fn waits_for_others(&self) -> bool {
        self.outcome == GateOutcome::NeedsCountersign
    }
}

impl ProposalState {
    /// The revision that it made, once it is in the ledger.
    pub fn revision(&self) -> Option<Revision> {
        match self {
            Self::Applied { revision } => Some(*revision),
            _ => None,
        }
    }
}

/// The change gate's refusal in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateOutcome {
    /// Its author has to show a factor.
    StepUp,
    /// Others have to countersign.
    NeedsCountersign,
    /// Nothing would help.
    Denied,
}

/// A code that someone typed. It is not shown again.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Code(pub String);

/// Who asks, and what they show for it. Nobody is named while the mesh is unprotected.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Shown {
    /// The operator; the only one that has enrolled when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub operator: Option<OperatorName>,
    /// A code of an authenticator app.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub otp: Option<Code>,
    /// A recovery code, which opens the way to a new factor and to nothing else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovery_code: Option<Code>,
    /// What a passkey or a security key signed for the very change-set; it goes into the ledger's entry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub countersignature: Option<Box<Countersignature>>,
}

/// The header of a request that names the operator who reads; the only one that has enrolled when absent.
pub const OPERATOR_HEADER: &str = "countersign-operator";

/// What the gate opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// For whom; nobody in particular while the mesh is unprotected.
    pub operator: Option<OperatorName>,
    /// For what.
    pub act: Act,
    /// Until when at most, in milliseconds since 1970, where a factor opened it.
    pub until_ms: Option<u64>,
}

/// A header of every answer while a recovery is recent: the operator whom somebody made owner past the gate.
pub const RECOVERED_HEADER: &str = "countersign-recovered";

/// Where a key-encryption key comes from. It is never the key, nor a PIN.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyPlace {
    /// A file of mode 0600.
    File(PathBuf),
    /// A credential that systemd decrypts for the service.
    Credential(String),
    /// A key in a security module, as a PKCS#11 URI (RFC 7512).
    Pkcs11(String),
}

impl KeyPlace {
    /// How a serving command is told of it.
    pub fn flag(&self) -> String {
        match self {
            Self::File(path) => format!("--key-file {}", path.display()),
            Self::Credential(name) => format!("--key-credential {name}"),
            Self::Pkcs11(uri) => format!("--key-pkcs11 '{uri}'"),
        }
    }
}

impl fmt::Display for KeyPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file {}", path.display()),
            Self::Credential(name) => write!(f, "credential {name}"),
            Self::Pkcs11(uri) => f.write_str(uri),
        }
    }
}

/// Asks for another key-encryption key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reseal {
    /// Where the next one comes from; a file that is not there is made.
    pub next: KeyPlace,
    /// Who asks, and what they show for it.
    pub shown: Shown,
}

/// Every key is sealed with another key-encryption key now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedAnew {
    /// What tells it from others.
    pub fingerprint: Digest,
    /// Where it comes from, and how the next start is told.
    pub place: KeyPlace,
    /// The revision whose change chose it; absent when it was chosen before.
    pub revision: Option<Revision>,
    /// How many secrets were sealed anew.
    pub resealed: usize,
}

/// Asks for one change-set, with what is shown for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplyAs {
    /// The change-set with its texts.
    #[serde(flatten)]
    pub apply: Apply,
    /// Who asks.
    #[serde(default)]
    pub shown: Shown,
}

/// A change-set that waits for a factor or for other operators, or did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// What commands call it: `p` and hexadecimal digits.
    pub id: String,
    /// Who asked for it: an operator by name, or a pipeline with what was verified of it.
    pub author: Author,
    /// The digest of the change-set.
    pub digest: Digest,
    /// The revision that it was planned on.
    pub base: Revision,
    /// The ledger's root at that revision.
    pub root: Digest,
    /// What it waits for, or what became of it.
    pub state: ProposalState,
    /// What the gate asked for when it was last asked.
    pub requires: Requires,
    /// Who countersigned.
    pub approvals: BTreeSet<OperatorName>,
    /// One line for each change.
    pub changes: Vec<String>,
    /// When it was asked for, in milliseconds since 1970.
    pub asked_at_ms: u64,
    /// When it is void, in milliseconds since 1970.
    pub expires_at_ms: u64,
}

/// A proposal after somebody has answered for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnsweredProposal {
    /// As it stands now.
    #[serde(flatten)]
    pub proposal: Proposal,
    /// When it was applied: what the operators that it invites are to be handed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub invitations: Vec<OperatorInvitation>,
}

/// What a proposal waits for, or what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum ProposalState {
    /// Its author has to show a factor.
    StepUp,
    /// Others have to countersign.
    NeedsCountersign,
    /// It is in the ledger.
    Applied {
        /// The revision it made.
        revision: Revision,
    },
    /// An operator said no.
    Rejected {
        /// Who.
        by: OperatorName,
    },
    /// Its author took it back.
    Withdrawn,
    /// Its time is over.
    Expired,
    /// The mesh has changed since it was planned.
    Void {
        /// The revision that came first.
        revision: Revision,
    },
}

/// A proposal with what it asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProposalDetail {
    /// As in the list.
    pub proposal: Proposal,
    /// The change-set.
    pub change_set: ChangeSet,
    /// The texts that it brings.
    pub bodies: Bodies,
}

/// A ceremony in which an operator signs a change that waits. All else that is signed, they know themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ceremony {
    /// Who signs.
    pub operator: OperatorName,
    /// What for: whoever asked for the change steps up, others countersign.
    pub purpose: Purpose,
    /// The number that makes the signature good once.
    pub nonce: Digest,
    /// Until when, in milliseconds since 1970.
    pub expires_at_ms: u64,
}

/// Asks for the enrolment of an authenticator app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Enrol {
    /// Whose.
    pub operator: OperatorName,
    /// What an invited operator was handed; absent for the first of all, and for one more factor.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invitation: Option<Code>,
    /// For one more factor: what is shown by a factor that is there.
    #[serde(default)]
    pub shown: Shown,
}

/// An enrolment that waits for the first code.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolment {
    /// Where to send the code.
    pub id: String,
    /// Whose.
    pub operator: OperatorName,
    /// What the authenticator app reads. It holds the secret and is told this once.
    pub otpauth: String,
}

/// The first code of a new authenticator app.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Confirm {
    /// The code.
    pub code: Code,
}

/// A factor that is enrolled.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolled {
    /// Whose.
    pub operator: OperatorName,
    /// Its id.
    pub factor: FactorId,
    /// The revision with it; absent while it waits to be signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<Revision>,
    /// Whether it is the anchor: from it on the mesh is protected.
    pub anchor: bool,
    /// Codes that work once, for the day the factor is lost. They are told this once.
    pub recovery_codes: Vec<String>,
    /// The pending change that adds it, when it waits to be signed with a factor that is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub change: Option<String>,
}

/// Asks for the enrolment of a passkey or a security key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnrolKey {
    /// Whose, and by what right.
    pub enrol: Enrol,
    /// Whether it is to be part of the device (`platform`) or to move between devices (`cross-platform`); either when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attachment: Option<String>,
}

/// An enrolment of a key that waits for the authenticator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeyEnrolment {
    /// Where to send its answer.
    pub id: String,
    /// What the browser passes to `navigator.credentials.create`, in WebAuthn's JSON.
    pub options: serde_json::Value,
}

/// An authenticator's answer to an enrolment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfirmKey {
    /// Of which.
    pub id: String,
    /// What `navigator.credentials.create` gave, in WebAuthn's JSON.
    pub credential: serde_json::Value,
}

/// What the browser passes to `navigator.credentials.get`, in WebAuthn's JSON, with the number that makes it good once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeyChallenge {
    /// The number.
    pub nonce: Digest,
    /// The options.
    pub options: serde_json::Value,
}

/// An authenticator's answer to a challenge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedChallenge {
    /// The number of the challenge.
    pub nonce: Digest,
    /// Base64url, as all that follows: the credential's id.
    pub credential: FactorId,
    /// What the authenticator said.
    pub authenticator_data: Bytes,
    /// What the browser said.
    pub client_data_json: Bytes,
    /// Over both.
    pub signature: Bytes,
    /// Whose the authenticator says it is, when it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_handle: Option<Bytes>,
}

/// What holds a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionKind {
    /// A browser, with a cookie.
    #[default]
    Browser,
    /// A command on some machine, with a token and a key.
    CommandLine,
}

impl SessionKind {
    /// As people say it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Browser => "browser",
            Self::CommandLine => "command line",
        }
    }
}

/// A session of somebody who is signed in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionView {
    /// What it is called. It opens nothing.
    pub id: String,
    /// Whose: an operator's name, or `NAME:…` of somebody whom the provider of `[sign_in.NAME]` vouched for.
    pub who: String,
    /// What holds it.
    #[serde(default)]
    pub kind: SessionKind,
    /// The kind of the factor that it began with; `provider` where one vouched for them.
    pub factor: String,
    /// Where it began.
    pub address: String,
    /// What its browser or command said of itself.
    pub agent: String,
    /// When it began, in milliseconds since 1970.
    pub began_at_ms: u64,
    /// When it was last used, in milliseconds since 1970; a minute may be missing.
    pub used_at_ms: u64,
    /// When it ends unless it is used, in milliseconds since 1970.
    pub expires_at_ms: u64,
}

/// Which sessions are to end: those that a member names, and all when none does.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EndSessions {
    /// The one of this id, or of this beginning of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// All of one, named as in [`SessionView::who`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub who: Option<String>,
}

/// How many sessions ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionsEnded {
    /// So many.
    pub ended: usize,
}

/// Where the first operator enrols in a browser. It holds a secret and is told this once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolmentLink {
    /// The URL.
    pub url: String,
}

/// What an invited operator is handed. Shown once; only its hash is kept.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OperatorInvitation {
    /// Who was invited.
    pub operator: OperatorName,
    /// The token, secret.
    pub token: String,
    /// Where it is used in a browser, when there are pages; it holds the token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// When it expires, in milliseconds since 1970.
    pub expires_at_ms: u64,
}

/// The mesh at a glance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The namespace of the mesh; absent while nothing was applied.
    pub trust_domain: Option<TrustDomain>,
    /// The ledger's size.
    pub revision: Revision,
    /// The ledger's Merkle root.
    pub root: Digest,
    /// False until an owner is enrolled: whoever owns the data directory can change everything.
    pub protected: bool,
    /// The control plane's version.
    pub version: String,
    /// When it started, in milliseconds since 1970.
    pub started_at_ms: u64,
    /// Every agent it knows.
    pub hosts: Vec<HostView>,
    /// Every declared service.
    pub services: Vec<ServiceView>,
    /// Sealed keys, storage and other things that are not as they should be.
    pub warnings: Vec<String>,
}

/// An agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostView {
    /// The host's name.
    pub host: ServiceName,
    /// Whether its stream is open.
    pub connected: bool,
    /// The version of its binary.
    pub version: String,
    /// `namespace` when its workloads are separated from each other, `none` otherwise.
    pub isolation: String,
    /// Why, in words.
    pub isolation_note: String,
    /// When it was last heard, in milliseconds since 1970.
    pub heard_at_ms: u64,
    /// The services it may run, as it was invited; absent: every declared one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<BTreeSet<ServiceName>>,
    /// Why it does not follow this ledger, when it holds another history.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// A host is to be part of the mesh no longer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvictAs {
    /// Which.
    pub host: ServiceName,
    /// Why, in the words of whoever does it.
    pub reason: String,
    /// Who asks, and what the gate is shown for it.
    #[serde(default)]
    pub shown: Shown,
}

/// A host was evicted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Evicted {
    /// Which.
    pub host: ServiceName,
    /// The signal that says so; absent when it had no identity any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<SignalSeq>,
    /// Identities that are good for nothing from now on.
    pub identities: usize,
    /// Instances that nobody is told of from now on.
    pub instances: Vec<InstanceId>,
}

/// A declared service with its running instances.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceView {
    /// Its name.
    pub name: ServiceName,
    /// Its SPIFFE ID.
    pub id: SpiffeId,
    /// What it speaks: `http`, `grpc` or `tcp`.
    pub protocol: String,
    /// Its state: `active`.
    pub state: String,
    /// Running instances.
    pub instances: Vec<InstanceView>,
    /// Instances that are not let run.
    pub waiting: Vec<WaitingView>,
    /// The SHA-256 of each executable or image that may be an instance; any may when there is none.
    pub deployments: BTreeSet<Digest>,
    /// Policies that can concern requests to it.
    pub policies: Vec<String>,
    /// The services it declares to call.
    pub upstreams: Vec<ServiceName>,
    /// What is said of its contract, when it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contract: Option<ContractView>,
}

/// The contract of a service, in short.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContractView {
    /// The digest of its operations, as the ledger holds it.
    pub digest: Digest,
    /// How many there are.
    pub operations: usize,
}

/// A running instance and its proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceView {
    /// Its id.
    pub instance: InstanceId,
    /// The host it runs on.
    pub host: ServiceName,
    /// Its proxy's mutual TLS listener.
    pub address: String,
    /// Whether the workload accepts connections.
    pub ready: bool,
    /// The revision its proxy enforces.
    pub revision: Revision,
    /// Why it does not enforce a newer one.
    pub error: Option<String>,
    /// When its SVID expires, in milliseconds since 1970.
    pub svid_expires_at_ms: u64,
    /// `namespace` or `none`.
    pub isolation: String,
    /// Its proxy's admin pages.
    pub admin: String,
    /// The SHA-256 of what its command names, as its agent measured it.
    pub artifact: Option<Digest>,
    /// What arrives of its sidecar's telemetry.
    #[serde(default)]
    pub telemetry: TelemetryView,
}

/// What arrived of the telemetry of an instance's sidecar: of the exchanges that it makes with itself, by their nonces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct TelemetryView {
    /// When a record, a metric and a span of one such exchange were last all there, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified_at_ms: Option<u64>,
    /// Since when they are missing, once that is longer than five minutes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silent_since_ms: Option<u64>,
}

/// An instance that is not let run, because no deployment of its service admits what its command names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingView {
    /// Its id.
    pub instance: InstanceId,
    /// Its host.
    pub host: ServiceName,
    /// The SHA-256 of what its command names; none where that could not be measured.
    pub artifact: Option<Digest>,
    /// Why it waits.
    pub reason: String,
}

/// The state of the mesh with the texts it refers to: all that planning and explaining need.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Mesh {
    /// The revision of `state`.
    pub revision: Revision,
    /// The state.
    pub state: MeshState,
    /// Every text in force.
    pub bodies: Bodies,
}

/// Asks for one change-set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Apply {
    /// The change-set, planned on its base.
    pub change_set: ChangeSet,
    /// The texts it refers to.
    pub bodies: Bodies,
}

/// A change-set that is in the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// The revision it made.
    pub revision: Revision,
    /// Its digest.
    pub digest: Digest,
    /// Whether the mesh is protected by an enrolled owner.
    pub protected: bool,
    /// What the operators that it invites are to be handed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub invitations: Vec<OperatorInvitation>,
}

/// One revision in a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeSummary {
    /// The revision it made.
    pub revision: Revision,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// Who.
    pub actor: String,
    /// The digest of its change-set.
    pub digest: Digest,
    /// One line for each change: `set_policy policy web-reads-catalog`.
    pub changes: Vec<String>,
    /// Proxies that enforce this revision or a later one.
    pub acknowledged: u32,
    /// Proxies connected.
    pub connected: u32,
}

/// One revision in full.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeDetail {
    /// As in the list.
    pub summary: ChangeSummary,
    /// The change-set.
    pub change_set: ChangeSet,
    /// The texts it refers to.
    pub bodies: Bodies,
    /// The exact ledger entry, as hashed.
    pub entry: String,
    /// What each connected proxy enforces.
    pub proxies: Vec<ProxyRevision>,
}

/// What one connected proxy enforces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProxyRevision {
    /// The instance.
    pub instance: InstanceId,
    /// The revision it enforces.
    pub revision: Revision,
    /// The signals it enforces: the number of the last one.
    #[serde(default)]
    pub signals: SignalSeq,
    /// Why it does not enforce a newer revision.
    pub error: Option<String>,
}

/// The end of waiting for a revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waited {
    /// Whether every connected proxy enforces the revision or a later one.
    pub enforced: bool,
    /// The revision waited for.
    pub revision: Revision,
    /// Proxies connected.
    pub connected: u32,
    /// Those that do not enforce it yet.
    pub missing: Vec<ProxyRevision>,
}

/// Which records are asked for. All given members must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct RecordFilter {
    /// The id or its beginning.
    pub id: Option<String>,
    /// The service called.
    pub service: Option<ServiceName>,
    /// The caller's SPIFFE ID, or its service name.
    pub principal: Option<String>,
    /// The outcome.
    pub outcome: Option<Outcome>,
    /// Not before, in milliseconds since 1970.
    pub since_ms: Option<u64>,
    /// Those of exchanges that sidecars make with themselves as well.
    pub probes: bool,
    /// Those only of the first exchange of a caller in one way.
    pub first_contact: bool,
    /// At most so many, the newest; 100 unless given.
    pub limit: Option<u32>,
}

/// One record with what is needed to judge it again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecisionDetail {
    /// The record.
    pub record: DecisionRecord,
    /// The mesh at the record's revision.
    pub mesh: Mesh,
}

/// What `decision tail` shows as it happens.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(clippy::large_enum_variant, reason = "one at a time, read and dropped")]
pub enum TailEvent {
    /// A denial or a step-up, in full.
    Record(DecisionRecord),
    /// Permits of an edge since the last report.
    Edge(EdgeCount),
    /// Records that found no room.
    Shed(u64),
}

/// Who called a service, and how: permitted calls of one edge since it was first seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// Who called.
    pub principal: SpiffeId,
    /// How: `http:GET`.
    pub action: String,
    /// Permitted calls.
    pub permits: u64,
    /// The revision of the last one.
    pub revision: Revision,
    /// When they were last reported, in milliseconds since 1970.
    pub seen_at_ms: u64,
}

/// An edge to a service, as it was used or asked for, or as an operator approved it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EdgeView {
    /// The service that is called.
    pub service: ServiceName,
    /// Who calls, in which way.
    #[serde(flatten)]
    pub edge: Edge,
    /// Whether it is let through.
    pub standing: EdgeStanding,
    /// When it was reported first, in milliseconds since 1970; absent when it never was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_ms: Option<u64>,
    /// When it was reported last: used for the first time at a sidecar, or held.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_ms: Option<u64>,
}

/// Whether an edge is let through, as far as policies permit it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EdgeStanding {
    /// Its service holds what is not approved, and it is not.
    Held,
    /// Its service lets every edge through.
    Open,
    /// An operator approved it.
    Approved,
}

impl fmt::Display for EdgeStanding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Held => "held",
            Self::Open => "open",
            Self::Approved => "approved",
        })
    }
}

/// The keys of the trust domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AuthorityView {
    /// The trust domain.
    pub trust_domain: TrustDomain,
    /// Rises when the bundle changes.
    pub bundle_sequence: u64,
    /// Root certificates, PEM; that of the root that signs is first.
    pub bundle_pem: String,
    /// The roots, in the order in which they were prepared.
    pub roots: Vec<RootView>,
    /// How SVIDs are issued.
    pub svid_lifetime_seconds: u64,
    /// When an authority above was asked to sign a key, if it has not answered, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_at_ms: Option<u64>,
    /// Where the key that seals the keys comes from.
    pub sealed_by: String,
    /// What verifies the ledger's checkpoints: a C2SP vkey. Its name is the ledger's origin.
    pub log_key: String,
}

/// A root of the trust domain and what signs below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootView {
    /// What commands call it. Rises, and is never given again.
    pub number: u32,
    /// How far it is on its way.
    pub state: AuthorityState,
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
    /// Its certificate.
    pub root: CertificateView,
    /// Where its key is that of an authority above: what that signed of ours, and what leads from there to the root.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub above: Vec<CertificateView>,
    /// Its intermediate.
    pub issuing: CertificateView,
}

/// What a root of the trust domain does. One that is revoked is not there any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AuthorityState {
    /// It verifies, so that everybody knows it before it signs; it signs nothing.
    Prepared,
    /// It signs.
    Active,
    /// It signed before, and verifies what it signed.
    Old,
    /// The same, and whoever has an identity that rests on it asks for another at once.
    Tainted,
}

impl fmt::Display for AuthorityState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Prepared => "prepared",
            Self::Active => "active",
            Self::Old => "old",
            Self::Tainted => "tainted",
        })
    }
}

/// One step of the rotation of roots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum AuthorityStep {
    /// Whichever comes next: prepare, or activate what is prepared.
    Next,
    /// Make another root, which verifies and signs nothing.
    Prepare,
    /// Let the prepared root of this number sign.
    Activate(u32),
    /// Let nothing new rest on the old root of this number.
    Taint(u32),
    /// Take the root of this number out of the bundle.
    Revoke(u32),
}

/// A step that somebody asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepAs {
    /// Which.
    pub step: AuthorityStep,
    /// Whether a root is revoked on which identities still rest.
    #[serde(default)]
    pub force: bool,
    /// Who asks, and what the gate is shown for it.
    #[serde(default)]
    pub shown: Shown,
}

/// The keys that sign one kind of token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SigningKeys {
    /// Access tokens.
    Tokens,
    /// JWT-SVIDs.
    JwtSvids,
}

impl SigningKeys {
    /// As it travels, and as the audit trail says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::JwtSvids => "jwt_svids",
        }
    }
}

/// Asks that another key sign from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplaceKeyAs {
    /// Which.
    pub keys: SigningKeys,
    /// Whether somebody else may have the key that signs now: nothing that it signed is believed any more.
    #[serde(default)]
    pub compromised: bool,
    /// Who asks, and what the gate is shown for it.
    #[serde(default)]
    pub shown: Shown,
}

/// Another key signs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyReplaced {
    /// Which kind of token it signs.
    pub keys: SigningKeys,
    /// The `kid` of the key that signs now.
    pub key_id: String,
    /// The `kid` of the one that signed before.
    pub replaced: String,
    /// Whether that one verifies nothing any more.
    pub compromised: bool,
    /// The signal by which what it signed was revoked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signal: Option<SignalSeq>,
}

/// A step that was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stepped {
    /// Which; never [`AuthorityStep::Next`].
    pub step: AuthorityStep,
    /// The root that it was about.
    pub number: u32,
    /// Identities that rested on it and are cut.
    pub cut: usize,
    /// The roots after it.
    pub roots: Vec<RootView>,
}

/// Somebody asks for a request that an authority above is to sign.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AskAbove {
    /// Whether it is of another key than the one that waits for an answer.
    #[serde(default)]
    pub fresh: bool,
    /// Who asks, and what the gate is shown for it.
    #[serde(default)]
    pub shown: Shown,
}

/// What an authority above is to sign.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AskedAbove {
    /// PKCS #10, PEM.
    pub csr_pem: String,
    /// Whether it was made now, and not shown again.
    pub is_new: bool,
}

/// What an authority above answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcceptAbove {
    /// PEM: the certificate of our key, then each that signed the one before, up to the root.
    pub chain_pem: String,
    /// Who asks, and what the gate is shown for it.
    #[serde(default)]
    pub shown: Shown,
}

/// It was taken up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptedAbove {
    /// The root that it leads to.
    pub number: u32,
    /// Whether that signs already, and goes on by the new certificate; else it is prepared.
    pub renewed: bool,
    /// The roots now.
    pub roots: Vec<RootView>,
}

/// One certificate, for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateView {
    /// Subject.
    pub subject: String,
    /// Serial number, hexadecimal.
    pub serial: String,
    /// First second of validity, in milliseconds since 1970.
    pub not_before_ms: u64,
    /// Last second of validity, in milliseconds since 1970.
    pub not_after_ms: u64,
    /// SHA-256 of the certificate.
    pub sha256: Digest,
}

/// Which X.509-SVIDs are meant. All given members must hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(default, deny_unknown_fields)]
pub struct IdentityFilter {
    /// The one with this serial number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<Serial>,
    /// Those that name this workload, agent or control plane.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<SpiffeId>,
    /// Those of this instance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
    /// Those that were issued to this host: its workloads' and its agent's own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<ServiceName>,
    /// Those of this key: the SHA-256 of its SubjectPublicKeyInfo.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<Digest>,
    /// Those that rest on this root, by its number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authority: Option<u32>,
}

impl IdentityFilter {
    /// Whether it leaves nothing out.
    pub fn is_everything(&self) -> bool {
        *self == Self::default()
    }
}

/// One X.509-SVID that has not expired.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityView {
    /// Its serial number.
    pub serial: Serial,
    /// Whom it names.
    pub id: SpiffeId,
    /// For which instance; absent for an agent's and the control plane's.
    pub instance: Option<InstanceId>,
    /// The host it was issued to; absent for the control plane's, and for those of earlier versions.
    pub host: Option<ServiceName>,
    /// SHA-256 of its key's SubjectPublicKeyInfo; absent for those of earlier versions.
    pub key: Option<Digest>,
    /// When it was issued, in milliseconds since 1970.
    pub issued_at_ms: u64,
    /// When it expires, in milliseconds since 1970.
    pub expires_at_ms: u64,
    /// The number of the root that it rests on.
    pub authority: u32,
    /// When, by whom and why it was revoked, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked: Option<RevokedBy>,
}

/// When, by whom and why something was revoked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokedBy {
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// By whom.
    pub by: String,
    /// Why, in their words.
    pub reason: String,
}

/// Asks that X.509-SVIDs be good for nothing from now on, and shows what the gate asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokeAs {
    /// Which. Everything is never meant.
    pub identities: IdentityFilter,
    /// Why: at most 256 characters.
    pub reason: String,
    /// Who asks.
    #[serde(default)]
    pub shown: Shown,
}

/// What was revoked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// The signal that says so, or the last one when all of them were revoked before.
    pub signal: SignalSeq,
    /// The SVIDs that the request meant, whether they were revoked now or before.
    pub identities: Vec<IdentityView>,
}

/// Which access tokens are asked for: those for which all of it holds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenFilter {
    /// The one with this id.
    pub id: Option<TokenId>,
    /// Those about this service, as the caller.
    pub subject: Option<ServiceName>,
    /// Those for this service, as the callee.
    pub service: Option<ServiceName>,
    /// Those of this instance.
    pub instance: Option<InstanceId>,
    /// Those that this host holds.
    pub host: Option<ServiceName>,
}

/// An access token that was issued and has not expired. The token itself is kept nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenView {
    /// Its id.
    pub id: TokenId,
    /// The first token of those that each were renewed from the one before.
    pub family: TokenId,
    /// Whom it is about.
    pub subject: SpiffeId,
    /// The service it is for.
    pub service: ServiceName,
    /// The instance that it was issued for; absent when the token service issued it to a client.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
    /// The host that it was issued to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<ServiceName>,
    /// What it is for.
    pub scope: Scope,
    /// The certificate that it is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Thumbprint>,
    /// The key that it is bound to, by which proofs are signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Thumbprint>,
    /// When it was issued, in milliseconds since 1970.
    pub issued_at_ms: u64,
    /// When it expires, in milliseconds since 1970.
    pub expires_at_ms: u64,
    /// Whether it was revoked.
    pub revoked: bool,
}

/// A token that somebody wants explained. It is looked at, and kept nowhere.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InspectToken {
    /// The token, whatever it is.
    pub token: String,
}

/// What a token says, and whether it would be believed now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenInspected {
    /// Its header (RFC 7515) as it stands there; `null` when it is none. Nothing in it need be true.
    pub header: serde_json::Value,
    /// Its claims, likewise.
    pub claims: serde_json::Value,
    /// Why nobody believes it now; absent when the service that it is for believes it of whoever holds the key it is bound to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<TokenFault>,
    /// What is known of it, when it was issued here and has not expired.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub issued: Option<TokenView>,
}

/// Asks that access tokens be good for nothing from now on, and shows what the gate asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokeTokensAs {
    /// Which: those that were issued until now.
    pub meant: TokensMeant,
    /// Why: at most 256 characters.
    pub reason: String,
    /// Who asks.
    #[serde(default)]
    pub shown: Shown,
}

/// What was revoked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokensRevoked {
    /// The signal that says so.
    pub signal: SignalSeq,
    /// What it means: more than was asked for when too many revocations hold at the same time.
    pub meant: TokensMeant,
}

/// Asks that something be said of a subject for a while, and shows what the gate asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendSignalAs {
    /// Of whom.
    pub subject: Subject,
    /// About what.
    pub kind: Kind,
    /// What: of `risk` a number from 0 to 100, of `posture` `compliant` or `not_compliant`, of `management` `managed` or `unmanaged`.
    pub value: String,
    /// In which time a risk falls by half; absent: it stays until it ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub half_life_ms: Option<u64>,
    /// For how long: one second to 30 days.
    pub lifetime_ms: u64,
    /// Why: at most 256 characters.
    pub reason: String,
    /// Who asks.
    #[serde(default)]
    pub shown: Shown,
}

/// Asks that what is said of a subject be taken back, and shows what the gate asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClearSignalsAs {
    /// Of whom.
    pub subject: Subject,
    /// About what.
    pub kind: Kind,
    /// By whom; by anybody when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// Why: at most 256 characters.
    pub reason: String,
    /// Who asks.
    #[serde(default)]
    pub shown: Shown,
}

/// What was said, or taken back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalSent {
    /// The number of the last signal of it.
    pub signal: SignalSeq,
    /// How many statements it was.
    pub statements: u32,
}

/// Which statements are asked for: those for which all of it holds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignalFilter {
    /// Of this subject.
    pub subject: Option<Subject>,
    /// Of this kind.
    pub kind: Option<Kind>,
}

/// A statement that holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalView {
    /// Its number.
    pub signal: SignalSeq,
    /// What is said, of whom, by whom and until when.
    #[serde(flatten)]
    pub statement: Statement,
    /// Why.
    pub reason: String,
}

/// Whose risk is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RiskFilter {
    /// Of this subject; of all of which some is said when absent.
    pub subject: Option<Subject>,
}

/// The risk of a subject.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RiskView {
    /// Of whom.
    pub subject: Subject,
    /// 0 to 100.
    pub risk: u8,
    /// Why, in a sentence with numbers.
    pub why: String,
}

/// The end of waiting for a signal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalWaited {
    /// Whether every connected proxy enforces the signal.
    pub enforced: bool,
    /// The signal waited for.
    pub signal: SignalSeq,
    /// Proxies connected.
    pub connected: u32,
    /// Those that do not enforce it yet.
    pub missing: Vec<InstanceId>,
}

/// One line of the checklist of a service that is to be let in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checked {
    /// What has to be there.
    pub what: String,
    /// What was found.
    pub found: String,
    /// What to do for it; absent when it is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

/// One entry with its change-set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerLine {
    /// The exact entry, as hashed.
    pub entry: String,
    /// The canonical change-set.
    pub change_set: String,
    /// On the last line only: the root the control plane claims.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub root: Option<Digest>,
}

/// The newest checkpoint of the ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointView {
    /// The signed note, with the cosignatures that there are.
    pub note: String,
    /// The number of entries that it names.
    pub size: u64,
    /// What verifies the log's signature: a C2SP vkey.
    pub log_key: String,
    /// How many witnesses must have cosigned for it to be called witnessed.
    pub quorum: usize,
    /// Who was asked.
    pub witnesses: Vec<WitnessView>,
}

/// What became of asking one witness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WitnessView {
    /// The name of its key.
    pub name: String,
    /// Where it is.
    pub url: String,
    /// What verifies its cosignatures: a C2SP vkey.
    pub key: String,
    /// Whether it cosigned this checkpoint.
    pub cosigned: bool,
    /// Why it has not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A proof that anyone can verify with the log's key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProofView {
    /// Of an entry, a C2SP tlog-proof; of consistency, the body of a C2SP add-checkpoint request.
    pub proof: String,
    /// The exact entry that is proven, as hashed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<String>,
}

/// Asks for a join token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invite {
    /// How long it can be used, in seconds: at most a day.
    pub ttl_seconds: u64,
    /// The only host name it is good for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<ServiceName>,
    /// The only services that the host may run; every declared one when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub services: Option<BTreeSet<ServiceName>>,
}

/// Asks for a join token, and shows what the gate asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InviteAs {
    /// For what.
    #[serde(flatten)]
    pub invite: Invite,
    /// Who asks.
    #[serde(default)]
    pub shown: Shown,
}

/// A join token. Shown once; only its hash is kept.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// The token, secret: `csj1.<secret>.<SHA-256 of the root certificate>`, each part in base64url.
    pub token: String,
    /// When it expires, in milliseconds since 1970.
    pub expires_at_ms: u64,
    /// Where to use it: `https://host:port`.
    pub control: String,
    /// Why that may not be where another host finds it, and what to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// One workload that an agent runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkloadView {
    /// The instance.
    pub instance: InstanceId,
    /// Its state: `waiting` to be admitted, `starting`, `running`, `restarting` or `stopped`.
    pub state: String,
    /// The process whose namespaces `exec` enters; absent when it is not isolated.
    pub namespace_pid: Option<u32>,
    /// The variables it was started with, beyond those of the agent.
    pub env: BTreeMap<String, String>,
    /// Its working directory.
    pub dir: String,
    /// How often it was restarted.
    pub restarts: u32,
    /// Why it is not running.
    pub last_exit: Option<String>,
}

/// One process that asked an agent for an identity and that the agent did not start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessView {
    /// Its number.
    pub pid: u32,
    /// The instance that it is; absent when no service registers it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
    /// What it is known by.
    pub selectors: BTreeSet<Selector>,
}

impl fmt::Debug for Invitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Invitation")
            .field("token", &"..")
            .field("expires_at_ms", &self.expires_at_ms)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Code(..)")
    }
}

impl fmt::Debug for Enrolment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Enrolment").field("id", &self.id).field("operator", &self.operator).finish_non_exhaustive()
    }
}

impl fmt::Debug for EnrolmentLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EnrolmentLink(..)")
    }
}

impl fmt::Debug for Enrolled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Enrolled")
            .field("operator", &self.operator)
            .field("factor", &self.factor)
            .field("revision", &self.revision)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for OperatorInvitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OperatorInvitation").field("operator", &self.operator).finish_non_exhaustive()
    }
}
