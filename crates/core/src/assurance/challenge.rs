//! What an authenticator signs when an operator steps up or countersigns.
//!
//! The challenge is the SHA-256 of seven fields, each behind its length in bytes as 32 bits big-endian, so that no two lists of
//! fields have the same bytes:
//!
//! | field | bytes |
//! |---|---|
//! | `countersign/v1` | 14 |
//! | anchor: SHA-256 of the exact bytes of the anchor's entry | 32 |
//! | purpose: `step_up` or `countersign` | 7 or 11 |
//! | base: the revision the change-set was planned on, big-endian | 8 |
//! | base root: the ledger's root at that revision | 32 |
//! | SHA-256 of the canonical change-set | 32 |
//! | nonce | 32 |
//!
//! Signing in is no change, and has a challenge of three fields: `countersign/sign-in/v1`, anchor, nonce. What an operator does
//! without changing anything has one of four: `countersign/act/v1`, anchor, the act as the gate spells it, nonce.
//!
//! So nothing that was signed for one mesh, one history, one purpose or one change-set is good for another. The nonce makes it
//! good for one ceremony: whoever hands it out takes it back once. That, and how long it lives, is not decided here.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};

use crate::{canonical::Digest, change::Revision, gate::act::Act};

const CONTEXT: &[u8] = b"countersign/v1";
const SIGN_IN_CONTEXT: &[u8] = b"countersign/sign-in/v1";
const ACT_CONTEXT: &[u8] = b"countersign/act/v1";

/// What the signature is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// The author shows, over their own change-set, that it is they who ask.
    StepUp,
    /// Another operator stands behind it.
    Countersign,
}

/// A number used once, 32 random bytes; written as 64 hexadecimal digits.
pub type Nonce = Digest;

/// Everything that a signature is bound to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Challenge {
    /// SHA-256 of the anchor's entry: which mesh.
    pub anchor: Digest,
    /// What for.
    pub purpose: Purpose,
    /// The revision the change-set was planned on.
    pub base: Revision,
    /// The ledger's root at that revision: which history.
    pub root: Digest,
    /// SHA-256 of the canonical change-set.
    pub change_set: Digest,
    /// One ceremony.
    pub nonce: Nonce,
}

/// What an operator signs to sign in. It approves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignIn {
    /// SHA-256 of the anchor's entry: which mesh.
    pub anchor: Digest,
    /// One ceremony.
    pub nonce: Nonce,
}

impl SignIn {
    /// The bytes to be signed as a browser writes them into the client data: base64url without padding.
    pub fn encode(&self) -> String {
        encoded(&digest_of(&[SIGN_IN_CONTEXT, &self.anchor.0, &self.nonce.0]))
    }
}

/// What an operator signs to do something that changes nothing. It approves no change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acting {
    /// SHA-256 of the anchor's entry: which mesh.
    pub anchor: Digest,
    /// What for.
    pub act: Act,
    /// One ceremony.
    pub nonce: Nonce,
}

impl Acting {
    /// The bytes to be signed as a browser writes them into the client data: base64url without padding.
    pub fn encode(&self) -> String {
        encoded(&digest_of(&[ACT_CONTEXT, &self.anchor.0, self.act.as_str().as_bytes(), &self.nonce.0]))
    }
}

impl Purpose {
    /// The purpose as it is hashed and written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::StepUp => "step_up",
            Self::Countersign => "countersign",
        }
    }
}

impl Challenge {
    /// The 32 bytes to be signed.
    pub fn digest(&self) -> Digest {
        let base = self.base.0.to_be_bytes();
        let fields: [&[u8]; 7] = [
            CONTEXT,
            &self.anchor.0,
            self.purpose.as_str().as_bytes(),
            &base,
            &self.root.0,
            &self.change_set.0,
            &self.nonce.0,
        ];
        digest_of(&fields)
    }

    /// The same as a browser writes it into the client data: base64url without padding.
    pub fn encode(&self) -> String {
        encoded(&self.digest())
    }
}

/// SHA-256 of the fields, each behind its length.
fn digest_of(fields: &[&[u8]]) -> Digest {
    let mut bytes = Vec::with_capacity(256);
    for field in fields {
        bytes.extend((field.len() as u32).to_be_bytes());
        bytes.extend(*field);
    }
    Digest::of(&bytes)
}

fn encoded(digest: &Digest) -> String {
    URL_SAFE_NO_PAD.encode(digest.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenge() -> Challenge {
        Challenge {
            anchor: Digest::of(b"anchor"),
            purpose: Purpose::StepUp,
            base: Revision(41),
            root: Digest::of(b"root"),
            change_set: Digest::of(b"change-set"),
            nonce: Digest::of(b"nonce"),
        }
    }

    #[test]
    fn the_bytes_of_a_challenge_never_change() {
        // printf '\0\0\0\x0ecountersign/v1\0\0\0\x20…' | sha256sum
        expect_test::expect!["3595ccc2371fb7a0a927ab2caa8f7e79d03859e09a754d8801ae3ae36d51d134"]
            .assert_eq(&challenge().digest().to_string());
        let bytes = URL_SAFE_NO_PAD.decode(challenge().encode()).unwrap();
        assert_eq!(bytes, challenge().digest().0);
    }

    #[test]
    fn whatever_differs_makes_another_challenge() {
        let (one, other) = (challenge(), Digest::of(b"other"));
        for (what, changed) in [
            ("another mesh", Challenge { anchor: other, ..one }),
            ("another purpose", Challenge { purpose: Purpose::Countersign, ..one }),
            ("another base", Challenge { base: Revision(42), ..one }),
            ("another history", Challenge { root: other, ..one }),
            ("another change-set", Challenge { change_set: other, ..one }),
            ("another ceremony", Challenge { nonce: other, ..one }),
            ("two fields in each other's place", Challenge { root: one.change_set, change_set: one.root, ..one }),
        ] {
            assert_ne!(changed.digest(), one.digest(), "{what}");
        }
        let sign_in = SignIn { anchor: one.anchor, nonce: one.nonce };
        assert_ne!(sign_in.encode(), one.encode(), "signing in approves nothing");
        for (what, changed) in [
            ("another mesh", SignIn { anchor: other, ..sign_in }),
            ("another ceremony", SignIn { nonce: other, ..sign_in }),
        ] {
            assert_ne!(changed.encode(), sign_in.encode(), "{what}");
        }
        let acting = Acting { anchor: one.anchor, act: Act::ReadDecisions, nonce: one.nonce };
        assert_ne!(acting.encode(), one.encode(), "an act approves no change");
        assert_ne!(acting.encode(), sign_in.encode(), "being signed in is no act");
        for (what, changed) in [
            ("another mesh", Acting { anchor: other, ..acting }),
            ("another act", Acting { act: Act::ExportLedger, ..acting }),
            ("another ceremony", Acting { nonce: other, ..acting }),
        ] {
            assert_ne!(changed.encode(), acting.encode(), "{what}");
        }
    }
}
