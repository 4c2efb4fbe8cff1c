//! Countersignatures: an operator's signature over one change-set, kept in the ledger entry that the change-set became.
//!
//! Anyone verifies one with the ledger and the operators' public keys alone, years later: [`verify`] asks no one and reads no
//! clock. How long a challenge lived and that it was used once is for the gate to see to while it is there; here the signature
//! counts for one entry only, since its base, its history and its change-set are part of what was signed.
//!
//! A signature is made on a base, and the ledger may have grown since. [`touches`] says what the two have in common: an entry
//! that wrote nothing the change-set reads or writes leaves the signature valid, any other voids it ([`StillHolds`]).

use std::{collections::BTreeSet, fmt};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use crate::{
    assurance::{
        FactorKind,
        challenge::{Challenge, Nonce, Purpose},
        webauthn::{self, AssertionRefused, PresentedAssertion, VerifiedAssertion},
    },
    canonical::Digest,
    change::{Change, ChangeSet, Member, PolicyId, Revision, RouteName},
    identity::{FactorId, OperatorName, ServiceName},
    keyring::Keyring,
};

/// Countersignatures of one entry at most.
pub const COUNTERSIGNATURES_MAX: usize = 32;

/// Bytes that are written as base64url without padding, in JSON.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Bytes(pub Vec<u8>);

/// One operator's signature over one change-set, with all that was signed beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Countersignature {
    /// Who signed.
    pub operator: OperatorName,
    /// With which factor: the base64url of its credential id.
    pub credential: FactorId,
    /// What for.
    pub purpose: Purpose,
    /// The revision that the change-set was planned on.
    pub base: Revision,
    /// The ledger's root at that revision.
    pub root: Digest,
    /// The number that made it good for one ceremony.
    pub nonce: Nonce,
    /// What the authenticator said.
    pub authenticator_data: Bytes,
    /// What the browser said.
    pub client_data_json: Bytes,
    /// Over both.
    pub signature: Bytes,
}

/// What a countersignature must be over, and who asked for it.
#[derive(Debug, Clone, Copy)]
pub struct Signed<'a> {
    /// SHA-256 of the anchor's entry.
    pub anchor: Digest,
    /// Who asked for the change.
    pub author: &'a str,
    /// SHA-256 of the canonical change-set.
    pub change_set: Digest,
    /// The revision that it was planned on.
    pub base: Revision,
    /// The ledger's root at that revision, as the verifier knows it.
    pub root: Digest,
}

/// A countersignature that counts. Only [`verify`] makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Countersigned {
    operator: OperatorName,
    kind: FactorKind,
    assertion: VerifiedAssertion,
}

/// Why a countersignature counts for nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CountersignatureRefused {
    /// No operator of that name, or not with that factor.
    #[error("operator `{0}` has no such factor")]
    UnknownFactor(OperatorName),
    /// A code signs nothing.
    #[error("a factor of kind `{0}` cannot sign")]
    CannotSign(&'static str),
    /// The author countersigned, or another stepped up for them.
    #[error("`{signer}` cannot {purpose} what `{author}` asked for")]
    Role {
        /// Who signed.
        signer: OperatorName,
        /// As what.
        purpose: &'static str,
        /// Who asked.
        author: String,
    },
    /// It was made on another base, or on another history.
    #[error("it was made on revision {0} of another history, or on another base")]
    OtherHistory(Revision),
    /// The authenticator's answer proves nothing.
    #[error(transparent)]
    Assertion(#[from] AssertionRefused),
}

/// Proof that a change-set planned on `base` means at `held` what it meant when it was signed. Only [`StillHolds::over`] makes one.
///
/// INVARIANT (signed-base-holds): no entry between the two wrote anything that the change-set reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StillHolds {
    base: Revision,
    held: Revision,
}

/// A part of the mesh that a change reads or writes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The mesh itself: nothing else exists before it.
    Mesh,
    /// The change gate, operators, pipelines, who has which role, and the seal: what every admission reads.
    Gate,
    /// One service.
    Service(ServiceName),
    /// All of them: a policy names services in ways that only the engine knows, such as by namespace.
    Services,
    /// One policy of the request gate.
    Policy(PolicyId),
    /// One traffic rule.
    Route(RouteName),
    /// What may run as one service.
    Deployment(ServiceName),
    /// Whether one service is part of the mesh.
    Standing(ServiceName),
    /// The approved edges to one service.
    Edges(ServiceName),
    /// The key that seals the control plane's own keys.
    SealingKey,
}

/// Verifies one countersignature against the keys that were in force before its entry.
///
/// INVARIANT (countersigned): only an operator of the keyring, with a factor of their own, over this mesh, purpose, history and
/// change-set, counts; the author never as another.
pub fn verify(
    countersignature: &Countersignature,
    keyring: &Keyring,
    signed: &Signed<'_>,
) -> Result<Countersigned, CountersignatureRefused> {
    let signer = &countersignature.operator;
    let factor = keyring
        .factor(signer, &countersignature.credential)
        .ok_or_else(|| CountersignatureRefused::UnknownFactor(signer.clone()))?;
    let cannot_sign = || CountersignatureRefused::CannotSign(factor.kind().as_str());
    let signing = factor.signing_key().ok_or_else(cannot_sign)?;
    let credential_id = countersignature.credential.credential().ok_or_else(cannot_sign)?;
    let own = signer.as_str() == signed.author;
    if own != (countersignature.purpose == Purpose::StepUp) {
        let purpose = countersignature.purpose.as_str();
        let author = signed.author.chars().take(100).collect();
        return Err(CountersignatureRefused::Role { signer: signer.clone(), purpose, author });
    }
    if (countersignature.base, countersignature.root) != (signed.base, signed.root) {
        return Err(CountersignatureRefused::OtherHistory(countersignature.base));
    }
    let challenge = Challenge {
        anchor: signed.anchor,
        purpose: countersignature.purpose,
        base: signed.base,
        root: signed.root,
        change_set: signed.change_set,
        nonce: countersignature.nonce,
    };
    let assertion = PresentedAssertion {
        credential_id: &credential_id,
        authenticator_data: &countersignature.authenticator_data.0,
        client_data_json: &countersignature.client_data_json.0,
        signature: &countersignature.signature.0,
    };
    // Nobody keeps count across years: two signatures may enter the ledger in another order than they were made in.
    let credential = webauthn::Credential {
        id: &credential_id,
        key: &signing.key,
        backup_eligible: signing.backup_eligible,
        sign_count: None,
    };
    let assertion = webauthn::verify(&assertion, &credential, &signing.relying_party, &challenge)?;
    Ok(Countersigned { operator: signer.clone(), kind: factor.kind(), assertion })
}

impl Countersigned {
    /// Who signed.
    pub fn operator(&self) -> &OperatorName {
        &self.operator
    }

    /// With what.
    pub fn kind(&self) -> FactorKind {
        self.kind
    }

    /// What the authenticator said. Its count of signatures is compared with nothing yet.
    pub fn assertion(&self) -> &VerifiedAssertion {
        &self.assertion
    }
}

/// The operators who signed, each once, and why the other countersignatures count for nothing.
pub fn signers(
    countersignatures: &[Countersignature],
    keyring: &Keyring,
    signed: &Signed<'_>,
) -> (BTreeSet<OperatorName>, Vec<CountersignatureRefused>) {
    let (mut signers, mut refused) = (BTreeSet::new(), Vec::new());
    for countersignature in countersignatures.iter().take(COUNTERSIGNATURES_MAX) {
        match verify(countersignature, keyring, signed) {
            Ok(counted) => {
                signers.insert(counted.operator);
            }
            Err(why) => refused.push(why),
        }
    }
    (signers, refused)
}

impl StillHolds {
    /// Whether `change_set` still means what it meant on its base, after `later`: what each entry since then wrote, in order.
    /// The error is the first revision that voids what was signed, and what it wrote.
    pub fn over<'a>(
        change_set: &ChangeSet,
        later: impl IntoIterator<Item = &'a BTreeSet<Part>>,
    ) -> Result<Self, (Revision, Part)> {
        let touched = touches(change_set);
        let mut held = change_set.base;
        for written in later {
            held.0 += 1;
            if let Some(part) = written.iter().find(|part| touched.iter().any(|touched| overlap(part, touched))) {
                return Err((held, part.clone()));
            }
        }
        Ok(Self { base: change_set.base, held })
    }

    /// The revision that the change-set was planned on.
    pub fn base(&self) -> Revision {
        self.base
    }

    /// The revision that it can be appended to.
    pub fn held(&self) -> Revision {
        self.held
    }
}

/// What a change-set reads or writes: what it writes, what it names, and the gate that judges it.
pub fn touches(change_set: &ChangeSet) -> BTreeSet<Part> {
    let mut touched = writes(change_set);
    touched.insert(Part::Gate);
    for change in &change_set.changes {
        match change {
            Change::DeclareService { spec, .. } => touched.extend(spec.upstreams.iter().cloned().map(Part::Service)),
            Change::SetRole { members, .. } => {
                let services = members.iter().filter_map(|member| match member {
                    Member::Service(name) => Some(Part::Service(name.clone())),
                    Member::Workload(_) => None,
                });
                touched.extend(services);
            }
            Change::SetPolicy { .. } => {
                touched.insert(Part::Services);
            }
            Change::SetRoute { route, .. } => {
                touched.extend(std::iter::once(&route.service).chain(route.split.keys()).cloned().map(Part::Service));
            }
            Change::Deploy { service: name, .. }
            | Change::QuarantineService { name }
            | Change::ApproveService { name }
            | Change::SuspendService { name, .. }
            | Change::ResumeService { name } => {
                touched.insert(Part::Service(name.clone()));
            }
            Change::ApproveEdge { service, edge } | Change::RevokeEdge { service, edge } => {
                touched.insert(Part::Service(service.clone()));
                if let Member::Service(caller) = &edge.caller {
                    touched.insert(Part::Service(caller.clone()));
                }
            }
            Change::CreateMesh { .. }
            | Change::RemoveService { .. }
            | Change::RemoveRole { .. }
            | Change::RemovePolicy { .. }
            | Change::RemoveRoute { .. }
            | Change::InviteOperator { .. }
            | Change::EnrollOperator { .. }
            | Change::AddFactor { .. }
            | Change::RemoveFactor { .. }
            | Change::RemoveOperator { .. }
            | Change::SetOperatorRoles { .. }
            | Change::SetAuthenticators { .. }
            | Change::RemoveAuthenticators {}
            | Change::SetLifetimes { .. }
            | Change::RemoveLifetimes {}
            | Change::SetGatePolicy { .. }
            | Change::RemoveGatePolicy { .. }
            | Change::SealSettings { .. }
            | Change::SetIssuer { .. }
            | Change::RemoveIssuer { .. }
            | Change::SetPipeline { .. }
            | Change::RemovePipeline { .. }
            | Change::SetSignIn { .. }
            | Change::RemoveSignIn { .. }
            | Change::SetClient { .. }
            | Change::RemoveClient { .. }
            | Change::RotateSealingKey { .. }
            | Change::Recover { .. } => {}
        }
    }
    touched
}

/// What a change-set writes.
pub fn writes(change_set: &ChangeSet) -> BTreeSet<Part> {
    let mut written = BTreeSet::new();
    for change in &change_set.changes {
        let part = match change {
            Change::CreateMesh { .. } => Part::Mesh,
            Change::DeclareService { name, .. } => Part::Service(name.clone()),
            Change::RemoveService { name } => {
                written.extend([
                    Part::Deployment(name.clone()),
                    Part::Standing(name.clone()),
                    Part::Edges(name.clone()),
                ]);
                Part::Service(name.clone())
            }
            Change::QuarantineService { name }
            | Change::ApproveService { name }
            | Change::SuspendService { name, .. }
            | Change::ResumeService { name } => Part::Standing(name.clone()),
            Change::ApproveEdge { service, .. } | Change::RevokeEdge { service, .. } => Part::Edges(service.clone()),
            Change::SetPolicy { id, .. } | Change::RemovePolicy { id } => Part::Policy(id.clone()),
            Change::SetRoute { name, .. } | Change::RemoveRoute { name } => Part::Route(name.clone()),
            Change::Deploy { service, .. } => Part::Deployment(service.clone()),
            Change::RotateSealingKey { .. } => Part::SealingKey,
            Change::SetRole { .. }
            | Change::RemoveRole { .. }
            | Change::InviteOperator { .. }
            | Change::EnrollOperator { .. }
            | Change::AddFactor { .. }
            | Change::RemoveFactor { .. }
            | Change::RemoveOperator { .. }
            | Change::SetOperatorRoles { .. }
            | Change::SetAuthenticators { .. }
            | Change::RemoveAuthenticators {}
            | Change::SetLifetimes { .. }
            | Change::RemoveLifetimes {}
            | Change::SetGatePolicy { .. }
            | Change::RemoveGatePolicy { .. }
            | Change::SealSettings { .. }
            | Change::SetIssuer { .. }
            | Change::RemoveIssuer { .. }
            | Change::SetPipeline { .. }
            | Change::RemovePipeline { .. }
            | Change::SetSignIn { .. }
            | Change::RemoveSignIn { .. }
            | Change::SetClient { .. }
            | Change::RemoveClient { .. }
            | Change::Recover { .. } => Part::Gate,
        };
        written.insert(part);
    }
    written
}

fn overlap(one: &Part, other: &Part) -> bool {
    let service = |part: &Part| matches!(part, Part::Service(_) | Part::Services);
    let all = matches!(one, Part::Services) || matches!(other, Part::Services);
    one == other || matches!((one, other), (Part::Mesh, _) | (_, Part::Mesh)) || (all && service(one) && service(other))
}

impl TryFrom<String> for Bytes {
    type Error = base64::DecodeError;
    fn try_from(given: String) -> Result<Self, base64::DecodeError> {
        URL_SAFE_NO_PAD.decode(given).map(Self)
    }
}

impl From<Bytes> for String {
    fn from(bytes: Bytes) -> Self {
        URL_SAFE_NO_PAD.encode(bytes.0)
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bytes({})", URL_SAFE_NO_PAD.encode(&self.0))
    }
}
