//! Secrets at rest: a data key for each secret, wrapped by the key-encryption key. The purpose is authenticated with each, so
//! that a secret moved to another name does not open.
//!
//! The key-encryption key comes from a file, from a credential of systemd, or stays in a security module. It never stands in
//! the store. Every sealed secret names the key that wraps its data key, so that a wrong one is told from a damaged secret.
//!
//! | furniture | holds |
//! |---|---|
//! | `place` | reads key files and credentials |
//! | `token` | wraps in a security module, over PKCS#11 |
//! | `token_uri` | which module, token and object: RFC 7512 |

use std::{fmt, path::Path, sync::Arc};

use aws_lc_rs::{
    aead::{AES_256_GCM_SIV, Aad, NONCE_LEN, Nonce, RandomizedNonceKey},
    digest,
};
use parking_lot::RwLock;
use zeroize::Zeroizing;

use countersign_api::local::KeyPlace;
use countersign_core::canonical::Digest;

mod place;
mod token;
mod token_uri;

pub use place::SealingKeyError;
pub use token::TokenError;
pub use token_uri::{TokenUri, TokenUriError};

use token::Token;

/// The first byte of what was sealed before keys had names.
const NAMELESS: u8 = 1;
/// The first byte of everything that is sealed now.
const FORMAT: u8 = 2;
const KEY_BYTES: usize = 32;
const TAG_BYTES: usize = 16;
const WRAPPED_BYTES: usize = NONCE_LEN + KEY_BYTES + TAG_BYTES;
const NAME_BYTES: usize = 8;

/// Seals and opens secrets with the key-encryption key in force.
pub struct Sealer {
    key: RwLock<Arc<SealingKey>>,
}

/// A key-encryption key.
pub struct SealingKey {
    way: Way,
    fingerprint: Digest,
    place: KeyPlace,
}

enum Way {
    Held(RandomizedNonceKey),
    Token(Token),
}

/// The beginning of a fingerprint, as it stands in what the key sealed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyName([u8; NAME_BYTES]);

/// Why something sealed does not open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unopened {
    /// It was changed, moved to another name, or sealed with another key before keys had names.
    #[error("a sealed key does not open: it was changed, or sealed with another key")]
    Changed,
    /// Another key sealed it.
    #[error("a sealed key does not open: key {0} sealed it")]
    OtherKey(KeyName),
    /// The security module did not answer.
    #[error("a sealed key does not open: the security module failed: {0}")]
    Unavailable(String),
}

/// The security module did not wrap a data key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the security module failed: {0}")]
pub struct NotSealed(String);

impl Sealer {
    /// Reads the key-encryption key of a file. Makes one when there is none and `may_create` says that nothing is sealed yet.
    pub fn open(path: &Path, may_create: bool) -> Result<Self, SealingKeyError> {
        SealingKey::open(&KeyPlace::File(path.into()), may_create).map(Self::of)
    }

    /// Seals with `key`.
    pub fn of(key: SealingKey) -> Self {
        Self { key: RwLock::new(Arc::new(key)) }
    }

    /// The key in force.
    pub fn key(&self) -> Arc<SealingKey> {
        self.key.read().clone()
    }

    /// From now on `next` is the key in force. To be called where nothing seals meanwhile: on the thread of the store, with
    /// everything sealed anew.
    pub fn replace(&self, next: SealingKey) {
        *self.key.write() = Arc::new(next);
    }

    /// Where the key-encryption key comes from.
    pub fn place(&self) -> KeyPlace {
        self.key.read().place.clone()
    }

    /// Seals `secret` for `purpose`: format, name of the key, wrapped data key, sealed secret.
    ///
    /// What goes to the store is sealed on the thread that writes it: so nothing that this key sealed is written after everything
    /// was sealed anew by the next one.
    pub fn seal(&self, purpose: &str, secret: &[u8]) -> Result<Vec<u8>, NotSealed> {
        let key = self.key();
        let mut data_key = Zeroizing::new([0; KEY_BYTES]);
        aws_lc_rs::rand::fill(&mut *data_key).expect("INVARIANT: the system's random source does not fail");
        let mut sealed = key.wrapped(purpose, &data_key)?;
        sealed.extend(encrypt(&aead_key(&data_key), &secret_purpose(purpose), secret));
        Ok(sealed)
    }

    /// Opens what was sealed for `purpose`.
    pub fn unseal(&self, purpose: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Unopened> {
        let (data_key, secret) = self.key().data_key(purpose, sealed)?;
        decrypt(&aead_key(&data_key), &secret_purpose(purpose), secret)
    }
}

impl SealingKey {
    /// Opens the key at `place`. Makes one when there is none, `may_create` says that nothing is sealed yet, and it is a file.
    pub fn open(place: &KeyPlace, may_create: bool) -> Result<Self, SealingKeyError> {
        let (way, fingerprint) = match place {
            KeyPlace::File(path) => held(&*place::of_file(path, may_create)?),
            KeyPlace::Credential(name) => held(&*place::of_credential(name)?),
            KeyPlace::Pkcs11(uri) => {
                let failed = |error| SealingKeyError::Token { uri: uri.clone(), error };
                let parsed = uri.parse::<TokenUri>().map_err(|error| failed(TokenError::Uri(error)))?;
                let token = Token::open(parsed).map_err(failed)?;
                let fingerprint = token.fingerprint().map_err(failed)?;
                (Way::Token(token), fingerprint)
            }
        };
        Ok(Self { way, fingerprint, place: place.clone() })
    }

    /// What tells it from other keys, and says nothing else about it.
    pub fn fingerprint(&self) -> Digest {
        self.fingerprint
    }

    /// As it stands in what it sealed.
    pub fn name(&self) -> KeyName {
        KeyName::of(&self.fingerprint)
    }

    /// Where it comes from.
    pub fn place(&self) -> &KeyPlace {
        &self.place
    }

    /// `sealed`, with its data key wrapped by `next` instead. The secret itself is not opened.
    pub fn rewrap(&self, next: &SealingKey, purpose: &str, sealed: &[u8]) -> Result<Vec<u8>, Unopened> {
        let (data_key, secret) = self.data_key(purpose, sealed)?;
        let mut again = next.wrapped(purpose, &data_key).map_err(|NotSealed(why)| Unopened::Unavailable(why))?;
        again.extend(secret);
        Ok(again)
    }

    fn wrapped(&self, purpose: &str, data_key: &[u8; KEY_BYTES]) -> Result<Vec<u8>, NotSealed> {
        let mut sealed = vec![FORMAT];
        sealed.extend(self.name().0);
        sealed.extend(match &self.way {
            Way::Held(key) => encrypt(key, &wrap_purpose(purpose), data_key),
            Way::Token(token) => token.wrap(&wrap_purpose(purpose), data_key).map_err(NotSealed)?,
        });
        Ok(sealed)
    }

    /// The data key of `sealed`, and what it opens.
    fn data_key<'a>(
        &self,
        purpose: &str,
        sealed: &'a [u8],
    ) -> Result<(Zeroizing<[u8; KEY_BYTES]>, &'a [u8]), Unopened> {
        let (format, rest) = sealed.split_first().ok_or(Unopened::Changed)?;
        let rest = match *format {
            NAMELESS => rest,
            FORMAT => {
                let (name, rest) = rest.split_first_chunk::<NAME_BYTES>().ok_or(Unopened::Changed)?;
                if KeyName(*name) != self.name() {
                    return Err(Unopened::OtherKey(KeyName(*name)));
                }
                rest
            }
            _ => return Err(Unopened::Changed),
        };
        let (wrapped, secret) = rest.split_at_checked(WRAPPED_BYTES).ok_or(Unopened::Changed)?;
        let data_key = match &self.way {
            Way::Held(key) => decrypt(key, &wrap_purpose(purpose), wrapped)?,
            Way::Token(token) => token.unwrap(&wrap_purpose(purpose), wrapped)?,
        };
        let mut kept = Zeroizing::new([0; KEY_BYTES]);
        kept.copy_from_slice(
            data_key.get(..KEY_BYTES).filter(|key| key.len() == data_key.len()).ok_or(Unopened::Changed)?,
        );
        Ok((kept, secret))
    }
}

impl KeyName {
    /// The beginning of `fingerprint`.
    pub fn of(fingerprint: &Digest) -> Self {
        let mut name = [0; NAME_BYTES];
        name.copy_from_slice(&fingerprint.0[..NAME_BYTES]);
        Self(name)
    }

    /// Which key sealed this; `None` when it was sealed before keys had names.
    pub fn in_sealed(sealed: &[u8]) -> Option<Self> {
        match sealed.split_first() {
            Some((&FORMAT, rest)) => rest.first_chunk::<NAME_BYTES>().map(|name| Self(*name)),
            _ => None,
        }
    }
}

fn held(key: &[u8; KEY_BYTES]) -> (Way, Digest) {
    let mut named = digest::Context::new(&digest::SHA256);
    named.update(b"countersign/v1/key-encryption-key/");
    named.update(key);
    (Way::Held(aead_key(key)), digest_of(named.finish()))
}

fn digest_of(digest: digest::Digest) -> Digest {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.as_ref());
    Digest(bytes)
}

fn wrap_purpose(purpose: &str) -> String {
    format!("countersign/v1/data-key/{purpose}")
}

fn secret_purpose(purpose: &str) -> String {
    format!("countersign/v1/secret/{purpose}")
}

fn aead_key(key: &[u8; KEY_BYTES]) -> RandomizedNonceKey {
    RandomizedNonceKey::new(&AES_256_GCM_SIV, key).expect("INVARIANT: a key of AES-256 has 32 bytes")
}

/// Nonce, then ciphertext and tag.
fn encrypt(key: &RandomizedNonceKey, purpose: &str, plain: &[u8]) -> Vec<u8> {
    // With room for the tag: growing would leave a copy of the secret behind.
    let mut buffer = Vec::with_capacity(plain.len() + TAG_BYTES);
    buffer.extend(plain);
    let nonce = key
        .seal_in_place_append_tag(Aad::from(purpose.as_bytes()), &mut buffer)
        .expect("INVARIANT: sealing a bounded secret does not fail");
    let mut out = nonce.as_ref().to_vec();
    out.append(&mut buffer);
    out
}

fn decrypt(key: &RandomizedNonceKey, purpose: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Unopened> {
    let (nonce, sealed) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(Unopened::Changed)?;
    let mut buffer = Zeroizing::new(sealed.to_vec());
    let opened = key.open_in_place(Nonce::from(nonce), Aad::from(purpose.as_bytes()), &mut buffer);
    let length = opened.map_err(|_| Unopened::Changed)?.len();
    buffer.truncate(length);
    Ok(buffer)
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.key().fmt(f)
    }
}

impl fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SealingKey").field("name", &self.name()).field("place", &self.place).finish_non_exhaustive()
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_changed_moved_to_another_name_or_sealed_by_another_key_does_not_open() {
        let dir = tempfile::tempdir().unwrap();
        let sealer = Sealer::open(&dir.path().join("keys/kek"), true).unwrap();
        let other = Sealer::open(&dir.path().join("keys/other"), true).unwrap();
        let sealed = sealer.seal("root", b"secret").unwrap();
        assert_eq!(sealer.unseal("issuing", &sealed), Err(Unopened::Changed));
        assert_eq!(other.unseal("root", &sealed), Err(Unopened::OtherKey(sealer.key().name())));
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            let named = (1..=NAME_BYTES).contains(&at);
            let refused = sealer.unseal("root", &changed).unwrap_err();
            assert_eq!(matches!(refused, Unopened::OtherKey(_)), named, "byte {at}: {refused}");
            assert_eq!(sealer.unseal("root", &sealed[..at]), Err(Unopened::Changed), "cut at {at}");
        }
        assert_eq!(sealer.unseal("root", &sealed).unwrap().as_slice(), b"secret");
        let again = Sealer::open(&dir.path().join("keys/kek"), false).unwrap();
        assert_eq!(again.unseal("root", &sealed).unwrap().as_slice(), b"secret");
    }

    #[test]
    fn what_was_sealed_before_keys_had_names_still_opens_and_is_named_when_it_is_wrapped_anew() {
        let dir = tempfile::tempdir().unwrap();
        let [first, next] = ["first", "next"].map(|name| Sealer::open(&dir.path().join(name), true).unwrap());
        let mut nameless = first.seal("root", b"secret").unwrap();
        nameless.drain(1..=NAME_BYTES);
        nameless[0] = NAMELESS;
        assert_eq!(first.unseal("root", &nameless).unwrap().as_slice(), b"secret");
        assert_eq!(next.unseal("root", &nameless), Err(Unopened::Changed));
        assert_eq!(KeyName::in_sealed(&nameless), None);
        assert_eq!(first.key().rewrap(&next.key(), "issuing", &nameless), Err(Unopened::Changed));
        let again = first.key().rewrap(&next.key(), "root", &nameless).unwrap();
        assert_eq!(KeyName::in_sealed(&again), Some(next.key().name()));
        assert_eq!(next.unseal("root", &again).unwrap().as_slice(), b"secret");
        assert_eq!(first.unseal("root", &again), Err(Unopened::OtherKey(next.key().name())));
    }

    #[test]
    fn neither_a_key_nor_a_sealer_prints_what_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kek");
        let sealer = Sealer::open(&path, true).unwrap();
        let key = std::fs::read_to_string(&path).unwrap();
        let printed = format!("{sealer:?} {:?}", sealer.key());
        assert!(!printed.contains(&key[..8]) && printed.contains("SealingKey"), "{printed}");
        assert!(!sealer.key().fingerprint().to_string().contains(&key[..8]));
    }
}
