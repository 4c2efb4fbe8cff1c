//! Proof that whoever sends a request holds a key (DPoP, RFC 9449): the key of a command, and what it signs for each request. What
//! is sent is of no use to whoever reads it, and a stolen token of none without the key.
//!
//! This file reads no clock: `now_seconds` is an argument. Who verifies proofs is the control plane.

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};

use countersign_core::{
    canonical::Digest,
    jws::{PROOF_TYP, coordinates, thumbprint},
};

/// The header of a proof.
pub const DPOP_HEADER: &str = "dpop";

/// A key of P-256 that never leaves whoever made it, and its file.
pub struct ProofKey {
    pair: EcdsaKeyPair,
}

/// What was kept is no key.
#[derive(Debug, thiserror::Error)]
#[error("it is no key of P-256")]
pub struct NoKey;

impl ProofKey {
    /// Makes one.
    pub fn generate() -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING);
        Self { pair: pair.expect("INVARIANT: the system's random source does not fail") }
    }

    /// Reads one from where it was kept, PKCS #8.
    pub fn from_pkcs8(bytes: &[u8]) -> Result<Self, NoKey> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, bytes).map_err(|_| NoKey)?;
        Ok(Self { pair })
    }

    /// As it is kept, PKCS #8.
    pub fn to_pkcs8(&self) -> Vec<u8> {
        let document = self.pair.to_pkcs8v1().expect("INVARIANT: a key that was made or read is written");
        document.as_ref().to_vec()
    }

    /// What tells it from every other key.
    pub fn thumbprint(&self) -> String {
        thumbprint(&coordinates(self.pair.public_key().as_ref()))
    }

    /// The proof for one request: `method` and `url` as they are sent, and the token that goes with it.
    pub fn prove(&self, method: &str, url: &str, token: Option<&str>, now_seconds: i64) -> String {
        self.prove_with_nonce(method, url, token, None, now_seconds)
    }

    /// The same, which says the number that the server gave (RFC 9449, 8).
    pub fn prove_with_nonce(
        &self,
        method: &str,
        url: &str,
        token: Option<&str>,
        nonce: Option<&str>,
        now_seconds: i64,
    ) -> String {
        let (x, y) = coordinates(self.pair.public_key().as_ref());
        let header = json!({
            "typ": PROOF_TYP,
            "alg": "ES256",
            "jwk": { "kty": "EC", "crv": "P-256", "x": x, "y": y },
        });
        let mut jti = [0; 16];
        aws_lc_rs::rand::fill(&mut jti).expect("INVARIANT: the system's random source does not fail");
        // "The HTTP target URI … without query and fragment parts" (RFC 9449, 4.2).
        let url = url.split(['?', '#']).next().unwrap_or(url);
        let mut claims = json!({ "jti": encode(jti), "htm": method, "htu": url, "iat": now_seconds });
        if let Some(token) = token {
            claims["ath"] = token_hash(token).into();
        }
        if let Some(nonce) = nonce {
            claims["nonce"] = nonce.into();
        }
        let part = |value: &Value| encode(value.to_string());
        let input = format!("{}.{}", part(&header), part(&claims));
        let signature = self.pair.sign(&SystemRandom::new(), input.as_bytes());
        let signature = signature.expect("INVARIANT: a key of P-256 signs");
        format!("{input}.{}", encode(signature.as_ref()))
    }
}

/// The `ath` of a token: "the base64url-encoded SHA-256 hash of the ASCII encoding of the associated access token's value".
pub fn token_hash(token: &str) -> String {
    encode(Digest::of(token.as_bytes()).0)
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thumbprint_is_that_of_the_standards_own_example() {
        // RFC 9449, 4.2 and 6.1: the key of the proof, and its `jkt`.
        let key = (
            "l8tFrhx-34tV3hRICRDY9zCkDlpBhF42UQUfWVAWBFs".to_owned(),
            "9VE4jf_Ok_o64zbTTlcuNJajHmt6v9TDVrU0CdvGRDA".to_owned(),
        );
        assert_eq!(thumbprint(&key), "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I");
    }

    #[test]
    fn the_hash_of_a_token_is_that_of_the_standards_own_example() {
        // RFC 9449, 7.1.
        let token = "Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU";
        assert_eq!(token_hash(token), "fUHyO2r2Z3DZ53EsNrWBb0xWXoaNy59IiKCAqksmQEo");
    }

    #[test]
    fn a_key_that_was_kept_is_the_same_key() {
        let key = ProofKey::generate();
        let read = ProofKey::from_pkcs8(&key.to_pkcs8()).unwrap();
        assert_eq!(read.thumbprint(), key.thumbprint());
        assert!(ProofKey::from_pkcs8(b"nothing").is_err());
    }
}
