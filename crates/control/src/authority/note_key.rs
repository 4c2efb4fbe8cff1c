//! An Ed25519 key that signs notes under a name: that of the log, or of a witness. Its seed leaves this room once, when it is made,
//! to be sealed by whoever keeps it.

use std::convert::Infallible;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
use zeroize::Zeroizing;

use countersign_core::ledger::{Accepted, KeyError, Signature, SignatureKind, VerifierKey};

const SEED_BYTES: usize = 32;

/// A key pair and its name.
pub struct NoteKey {
    verifier: VerifierKey,
    pair: Ed25519KeyPair,
}

impl NoteKey {
    /// Makes a new one, and the seed to seal.
    pub fn generate(name: &str, kind: SignatureKind) -> Result<(Self, Zeroizing<[u8; SEED_BYTES]>), KeyError> {
        let mut seed = Zeroizing::new([0; SEED_BYTES]);
        aws_lc_rs::rand::fill(&mut *seed).expect("INVARIANT: the system's random source does not fail");
        Ok((Self::from_seed(name, kind, &*seed)?, seed))
    }

    /// That of a seed that was sealed here.
    pub fn from_seed(name: &str, kind: SignatureKind, seed: &[u8]) -> Result<Self, KeyError> {
        let seed = <&[u8; SEED_BYTES]>::try_from(seed).map_err(|_| KeyError::Shape)?;
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| KeyError::Shape)?;
        let public = pair.public_key().as_ref().try_into().map_err(|_| KeyError::Shape)?;
        Ok(Self { verifier: VerifierKey::new(name, kind, public)?, pair })
    }

    /// What verifies its signatures.
    pub fn verifier(&self) -> &VerifierKey {
        &self.verifier
    }

    /// Signs the text of a note as a log does.
    pub fn sign(&self, text: &str) -> Signature {
        let Ok(signed) = self.verifier.sign(text, 0, |message| self.raw(message));
        signed
    }

    /// Signs what a witness accepted.
    pub fn cosign(&self, accepted: &Accepted, now_seconds: u64) -> Signature {
        let Ok(signed) = accepted.cosign(&self.verifier, now_seconds, |message| self.raw(message));
        signed
    }

    fn raw(&self, message: &[u8]) -> Result<[u8; 64], Infallible> {
        let signature = self.pair.sign(message);
        Ok(signature.as_ref().try_into().expect("INVARIANT: an Ed25519 signature has 64 bytes"))
    }
}

impl std::fmt::Debug for NoteKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NoteKey").field("verifier", &self.verifier).finish_non_exhaustive()
    }
}
