//! Clients of the token service that are no workloads of the mesh, as the ledger knows them: by which public keys they are recognised, and
//! which services they may ask tokens for. What they may do there policies say, as of everybody: a client is named by the SPIFFE ID that
//! [`crate::identity::TrustDomain::client`] gives it, which nobody gets a certificate of.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    identity::ServiceName,
    jws::{self, Key},
    pipeline::Refusal,
};

/// Keys of one client at most: the old one and the new one of a rotation, on a few machines.
pub const KEYS_MAX: usize = 8;
/// Longest key, in bytes: RSA with 8192 bits has less.
const KEY_BYTES_MAX: usize = 2 * 1024;
/// What is in a key that is private (RFC 7518, 6), or is no key of two at all.
const PRIVATE: [&str; 8] = ["d", "p", "q", "dp", "dq", "qi", "oth", "k"];

/// A client that is no workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Client {
    /// The services that it may ask tokens for.
    pub services: BTreeSet<ServiceName>,
    /// Its public keys, each a JWK (RFC 7517).
    pub keys: BTreeSet<String>,
}

impl Client {
    /// Everything that is wrong with it.
    ///
    /// INVARIANT (public-keys-only): no private key of a client comes into the ledger.
    pub fn refusals(&self) -> Vec<Refusal> {
        let mut refusals: Vec<Refusal> = self.keys.iter().filter_map(|key| key_refusal(key)).collect();
        let mut refuse = |what: String, help| refusals.push(Refusal { claim: None, what, help });
        if self.keys.is_empty() || self.keys.len() > KEYS_MAX {
            refuse(
                format!("a client has 1 to {KEYS_MAX} keys"),
                "give the public keys that it signs with, each as a JWK",
            );
        }
        if self.services.is_empty() {
            refuse("a client asks for nothing".to_owned(), "name the services that it may ask tokens for");
        }
        refusals
    }

    /// What verifies its assertions.
    pub fn keys(&self) -> Vec<Key> {
        let parsed = self.keys.iter().filter_map(|key| jws::object("key", key.as_bytes()).ok());
        parsed.filter_map(|jwk| Key::of_jwk(&Value::Object(jwk))).collect()
    }
}

/// Why this is no public key to recognise a client by.
pub fn key_refusal(key: &str) -> Option<Refusal> {
    let refuse = |what: String, help| Some(Refusal { claim: None, what, help });
    let help = "give it as one JWK: '{\"kty\":\"EC\",\"crv\":\"P-256\",\"x\":\"…\",\"y\":\"…\",\"kid\":\"…\"}'";
    if key.len() > KEY_BYTES_MAX {
        return refuse(format!("a key has at most {KEY_BYTES_MAX} bytes"), help);
    }
    let jwk = match jws::object("key", key.as_bytes()) {
        Ok(jwk) => jwk,
        Err(error) => return refuse(error.to_string(), help),
    };
    if PRIVATE.iter().any(|member| jwk.contains_key(*member)) {
        let help = "make another: whoever has read this file has it. Only the public key stands here";
        return refuse("the key is private".to_owned(), help);
    }
    match Key::of_jwk(&Value::Object(jwk)) {
        Some(_) => None,
        None => refuse(
            "no signature is verified by this key: EC P-256, Ed25519, or RSA of 2048 to 8192 bits".to_owned(),
            help,
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PUBLIC: &str = r#"{"kty":"EC","crv":"P-256","kid":"a","x":"l8tFrhx-34tV3hRICRDY9zCkDlpBhF42UQUfWVAWBFs","y":"9VE4jf_Ok_o64zbTTlcuNJajHmt6v9TDVrU0CdvGRDA"}"#;

    /// PROVES (public-keys-only)
    #[test]
    fn a_client_is_known_by_public_keys_alone() {
        let with = |member: &str| PUBLIC.replacen('{', &format!("{{{member},"), 1);
        let cases = [
            ("a public key", PUBLIC.to_owned(), None),
            ("a private one", with(r#""d":"AAAA""#), Some("private")),
            ("a symmetric one", r#"{"kty":"oct","k":"AAAA"}"#.to_owned(), Some("private")),
            ("one for something else", with(r#""use":"enc""#), Some("no signature")),
            ("another curve", PUBLIC.replace("P-256", "P-384"), Some("no signature")),
            ("half a key", r#"{"kty":"EC","crv":"P-256","x":"AA"}"#.to_owned(), Some("no signature")),
            ("one that says something twice", with(r#""kid":"b""#), Some("twice")),
            ("no JSON", "ssh-ed25519 AAAA".to_owned(), Some("cannot be read")),
            ("a huge one", with(&format!(r#""x5c":"{}""#, "a".repeat(KEY_BYTES_MAX))), Some("at most")),
        ];
        for (case, key, refused) in cases {
            let found = key_refusal(&key).map(|refusal| refusal.what);
            assert_eq!(found.is_some(), refused.is_some(), "{case}: {found:?}");
            assert!(found.is_none_or(|found| found.contains(refused.unwrap_or_default())), "{case}");
        }
        let services = [ServiceName::parse("payments").unwrap()].into();
        let of = |keys: usize| Client {
            services: [ServiceName::parse("payments").unwrap()].into(),
            keys: (0..keys).map(|n| PUBLIC.replace(r#""a""#, &format!("\"{n}\""))).collect(),
        };
        for (client, is_taken) in [
            (of(1), true),
            (of(KEYS_MAX), true),
            (of(KEYS_MAX + 1), false),
            (of(0), false),
            (Client { services: BTreeSet::new(), ..of(1) }, false),
            (Client { services, keys: ["{}".to_owned()].into() }, false),
        ] {
            assert_eq!(client.refusals().is_empty(), is_taken, "{client:?}");
        }
        assert_eq!(of(2).keys().len(), 2);
    }
}
