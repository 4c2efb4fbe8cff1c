//! Operators as the ledger knows them: their roles, their factors, and the public keys that anyone verifies with. Secrets (the seed
//! of a code, a recovery code) are never here: the ledger says that there is such a factor and no more.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use crate::{
    assurance::{
        FactorKind,
        authenticators::Aaguid,
        webauthn::{PublicKey, RelyingParty},
    },
    change::RoleName,
    identity::{FactorId, OperatorName},
};

/// Factors of one operator at most.
pub const FACTORS_MAX: usize = 32;
/// Longest reason of a recovery, in bytes.
pub const REASON_BYTES_MAX: usize = 500;
/// Most operators whose countersignatures a seal can ask for.
pub const QUORUM_MAX: u32 = 16;

/// A person who may change the mesh, as far as the gate lets them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Operator {
    /// What the gate knows them as.
    pub roles: BTreeSet<RoleName>,
    /// How they prove who they are. None until they have enrolled.
    pub factors: BTreeMap<FactorId, EnrolledFactor>,
}

/// A factor that was enrolled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum EnrolledFactor {
    /// A passkey.
    Platform(SigningKey),
    /// A security key.
    Roaming(SigningKey),
    /// Codes that follow the clock.
    Totp,
    /// Codes that work once.
    Recovery,
}

/// What verifies the signatures of a WebAuthn credential.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigningKey {
    /// Its public key.
    pub key: PublicKey,
    /// Whether the private one may be backed up.
    pub backup_eligible: bool,
    /// Where it was enrolled, and where alone it is used.
    pub relying_party: RelyingParty,
    /// The model of its authenticator, where the authenticator had to prove it when the key was enrolled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<Aaguid>,
}

/// That the mesh was recovered: its gate was passed by with the control plane's files and key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    /// Who was made owner.
    pub operator: OperatorName,
    /// Why, in the words of whoever did it.
    pub reason: Arc<str>,
    /// When, in seconds since 1970.
    pub at_seconds: i64,
}

/// What a sealed mesh asks of every change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// How many operators must have signed it, its author among them.
    pub quorum: u32,
}

impl EnrolledFactor {
    /// Its kind.
    pub fn kind(&self) -> FactorKind {
        match self {
            Self::Platform(_) => FactorKind::Platform,
            Self::Roaming(_) => FactorKind::Roaming,
            Self::Totp => FactorKind::Totp,
            Self::Recovery => FactorKind::Recovery,
        }
    }

    /// What verifies its signatures, when it can sign.
    pub fn signing_key(&self) -> Option<&SigningKey> {
        match self {
            Self::Platform(key) | Self::Roaming(key) => Some(key),
            Self::Totp | Self::Recovery => None,
        }
    }
}

impl Operator {
    /// Whether they can countersign.
    pub fn can_sign(&self) -> bool {
        self.factors.values().any(|factor| factor.signing_key().is_some())
    }
}
