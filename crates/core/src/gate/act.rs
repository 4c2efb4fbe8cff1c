//! What an operator does that changes nothing in the ledger, and is judged by the change gate all the same: reading what the mesh
//! recorded, taking the ledger along, letting a host in, revoking identities, letting another root sign.
//!
//! Nothing is countersigned here: there is no change-set that somebody could stand behind. What was shown is
//! shown for one act; being signed in says who asks, and meets no obligation.

use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{Answer, Asked, Author, ChangeGate, Origin, Questions, Requires, nobody, uid};
use crate::{
    assurance::Assurance,
    change::{ChangeSet, Revision},
    policy::Factor,
    state::MeshState,
};

/// What is asked for; in the schema an action of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// The entries of the ledger, and their proofs.
    ReadLedger,
    /// The decisions about requests, one by one: who asked for what, when, from where.
    ReadDecisions,
    /// The whole ledger, with all texts, as files.
    ExportLedger,
    /// A join token for one more host.
    InviteHost,
    /// Certificates that are good for nothing from now on.
    RevokeIdentity,
    /// Another root of the trust domain, or one fewer.
    RotateAuthority,
    /// The access tokens that were issued: who may ask whom for what.
    ReadTokens,
    /// Access tokens that are good for nothing from now on.
    RevokeToken,
    /// What is said of workloads, hosts and operators, by whom and why.
    ReadSignals,
    /// A statement about one of them, or taking one back.
    SendSignal,
    /// A host that is part of the mesh no longer.
    EvictHost,
}

/// Why what a factor opens is closed to whom a provider vouched for.
const NEEDS_FACTOR: &str =
    "it takes a factor of this mesh, and who signs in with a provider has none here: only operators do it";

/// The question put to the change gate.
#[derive(Debug, Clone, Copy)]
pub struct AskedTo<'a> {
    /// Who asks.
    pub author: &'a Author,
    /// To do what.
    pub act: Act,
    /// The mesh now.
    pub state: &'a MeshState,
    /// What the operator has shown for this act.
    pub assurance: &'a Assurance,
    /// Whether they are signed in: it proves that it is they, and nothing else does of whom a provider vouched for.
    pub signed_in: bool,
    /// Where it came in.
    pub origin: Origin,
    /// The risk of the operator, 0 to 100, as signals say.
    pub risk: u8,
    /// Now, in seconds since 1970.
    pub now_seconds: i64,
}

impl Act {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::ReadLedger,
        Self::ReadDecisions,
        Self::ExportLedger,
        Self::InviteHost,
        Self::RevokeIdentity,
        Self::RotateAuthority,
        Self::ReadTokens,
        Self::RevokeToken,
        Self::ReadSignals,
        Self::SendSignal,
        Self::EvictHost,
    ];

    /// The act as the gate spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ReadLedger => "read_ledger",
            Self::ReadDecisions => "read_decisions",
            Self::ExportLedger => "export_ledger",
            Self::InviteHost => "invite_host",
            Self::RevokeIdentity => "revoke_identity",
            Self::RotateAuthority => "rotate_authority",
            Self::ReadTokens => "read_tokens",
            Self::RevokeToken => "revoke_token",
            Self::ReadSignals => "read_signals",
            Self::SendSignal => "send_signal",
            Self::EvictHost => "evict_host",
        }
    }

    /// Whether it only reads. What was shown for reading is good for some minutes; what was shown for anything else, once.
    pub fn only_reads(self) -> bool {
        matches!(
            self,
            Self::ReadLedger | Self::ReadDecisions | Self::ExportLedger | Self::ReadTokens | Self::ReadSignals
        )
    }
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadLedger => "reading the ledger",
            Self::ReadDecisions => "reading decisions",
            Self::ExportLedger => "exporting the ledger",
            Self::InviteHost => "inviting a host",
            Self::RevokeIdentity => "revoking an identity",
            Self::RotateAuthority => "rotating the authority",
            Self::ReadTokens => "reading which access tokens there are",
            Self::RevokeToken => "revoking access tokens",
            Self::ReadSignals => "reading what signals say",
            Self::SendSignal => "sending a signal",
            Self::EvictHost => "evicting a host",
        })
    }
}

impl FromStr for Act {
    type Err = String;
    fn from_str(given: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|act| act.as_str() == given);
        known.ok_or_else(|| format!("`{given}` is nothing that the gate judges"))
    }
}

impl ChangeGate {
    /// Judges one act. The answer is never that others have to countersign.
    ///
    /// INVARIANT (no-act-unproven): no policy lets somebody act who is no operator, or who has neither signed in nor shown a factor
    /// for it, whatever it says.
    pub fn decide_act(&self, asked: &AskedTo<'_>) -> Answer {
        let AskedTo { author, act, state, assurance, signed_in, origin, risk, now_seconds } = *asked;
        let unfit = match author {
            Author::Operator(name) if state.operators.contains_key(name) => None,
            Author::Person(person) if person.roles(state).is_empty() || !signed_in => Some(nobody(person)),
            Author::Person(_) if act != Act::ReadLedger => Some(NEEDS_FACTOR.to_owned()),
            Author::Person(_) => None,
            Author::Operator(_) | Author::Pipeline(_) => Some(format!("`{author}` is no operator")),
        };
        if let Some(why) = unfit {
            return Answer::Deny(vec![why]);
        }
        let nothing = ChangeSet { base: Revision(0), changes: Vec::new() };
        let asked = Asked {
            author,
            change_set: &nothing,
            state,
            assurance,
            asked_at_seconds: now_seconds,
            approvals: &BTreeSet::new(),
            origin,
            risk,
            now_seconds,
        };
        let mesh = uid("Mesh", state.trust_domain.as_ref().map_or("", |name| name.as_str()));
        let judged = Questions::of(&asked)
            .and_then(|questions| self.decide_on(&asked, &questions, act.as_str(), &mesh, &questions.after));
        let mut requires = match judged {
            Ok(requires) => requires,
            Err(why) => return Answer::Deny(vec![format!("{act}: {why}")]),
        };
        if author.person().is_some() && requires != Requires::default() {
            return Answer::Deny(vec![NEEDS_FACTOR.to_owned()]);
        }
        if requires.countersign > 0 {
            return Answer::Deny(vec![format!(
                "{act}: the gate asks for countersignatures, and only changes have them"
            )]);
        }
        if !requires.asks_author() && !signed_in && assurance.strongest(now_seconds, None).is_none() {
            requires.factor = Some(Factor::Mfa);
        }
        if requires.asks_author() { Answer::StepUp(requires) } else { Answer::Permit }
    }
}
