//! The keys that sign tokens, of JWT-SVIDs and of access tokens apart: one that signs, one that will sign next and is published long before, and those that signed until
//! lately. So whoever verifies knows every key before it meets the first token of it.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _},
};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use zeroize::{Zeroize, Zeroizing};

use countersign_api::svid::JwtAuthority;
use countersign_core::{
    identity::SpiffeId,
    jws::{coordinates, thumbprint},
};

use super::{AuthorityError, seal::Sealer};
use crate::{
    clock::Clock,
    store::{Storage, Store, StoreError},
};

/// Where the keys of JWT-SVIDs are kept.
pub(super) const JWT_KEYS: &str = "authority/jwt/keys";
/// Where those of access tokens are.
pub(super) const TOKEN_KEYS: &str = "authority/tokens/keys";

/// How long a JWT-SVID lives (SPIFFE recommends minutes: whoever reads one can use it).
pub const JWT_SVID_LIFETIME: Duration = Duration::from_secs(5 * 60);
/// How long one key signs. The next one is published for as long before.
const SIGNS_FOR: Duration = Duration::from_secs(30 * 24 * 60 * 60);
/// How long the next key is published at least before it signs: until every proxy that hears of us has it.
const KNOWN_FOR: Duration = Duration::from_secs(60);
/// How long a key that signs no more is still published: longer than anything it signed, and than clocks are apart.
const RETIRED_FOR: Duration = Duration::from_secs(60 * 60);

/// The keys of one trust domain for one kind of token.
pub struct JwtKeys {
    place: &'static str,
    held: RwLock<Arc<Held>>,
    sealer: Arc<Sealer>,
    storage: Storage,
    clock: Clock,
}

struct Held {
    generation: Generation,
    pair: EcdsaKeyPair,
}

/// All of them at one time, as they lie sealed in the store.
#[derive(Serialize, Deserialize)]
struct Generation {
    /// Rises with each change of what is published.
    sequence: u64,
    signing: Stored,
    signs_until_ms: u64,
    next: Stored,
    #[serde(default)]
    next_since_ms: u64,
    retired: Vec<Retired>,
}

#[derive(Serialize, Deserialize, Clone)]
struct Stored {
    id: String,
    point: String, // uncompressed, base64url
    pkcs8: String, // base64url; erased on drop
}

#[derive(Serialize, Deserialize, Clone)]
struct Retired {
    id: String,
    point: String,
    until_ms: u64,
}

/// The next key has not been published for long enough: not every proxy may know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the next key has been published for less than {} seconds: not every sidecar may know it yet", KNOWN_FOR.as_secs())]
pub struct TooSoon {
    /// How long to wait, in seconds.
    pub seconds: u64,
}

/// A signed JWT-SVID.
#[derive(Debug, Clone)]
pub struct SignedJwtSvid {
    /// Compact JWS.
    pub token: String,
    /// When it was issued, in milliseconds since 1970.
    pub issued_at_ms: u64,
    /// When it expires, in milliseconds since 1970.
    pub expires_at_ms: u64,
}

impl Drop for Stored {
    fn drop(&mut self) {
        self.pkcs8.zeroize();
    }
}

impl Stored {
    fn generate() -> Self {
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)
            .expect("INVARIANT: the system's random source does not fail");
        let pkcs8 = pair.to_pkcs8v1().expect("INVARIANT: a key that was just made can be written");
        let point = pair.public_key().as_ref();
        Self {
            id: thumbprint(&coordinates(point)),
            point: URL_SAFE_NO_PAD.encode(point),
            pkcs8: URL_SAFE_NO_PAD.encode(pkcs8.as_ref()),
        }
    }

    fn pair(&self) -> Result<EcdsaKeyPair, AuthorityError> {
        let damaged = || AuthorityError::Damaged("a key that signs JWT-SVIDs cannot be read".into());
        let pkcs8 = Zeroizing::new(URL_SAFE_NO_PAD.decode(&self.pkcs8).map_err(|_| damaged())?);
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &pkcs8).map_err(|_| damaged())
    }
}

impl Generation {
    fn first(now_ms: u64) -> Self {
        Self {
            sequence: 1,
            signing: Stored::generate(),
            signs_until_ms: now_ms + SIGNS_FOR.as_millis() as u64,
            next: Stored::generate(),
            next_since_ms: 0, // nobody verifies anything yet
            retired: Vec::new(),
        }
    }

    /// What comes after it at `now_ms`; `None` while nothing does.
    fn after(&self, now_ms: u64) -> Option<Self> {
        let mut retired: Vec<Retired> = self.retired.iter().filter(|key| key.until_ms > now_ms).cloned().collect();
        let takes_over = now_ms >= self.signs_until_ms;
        if !takes_over && retired.len() == self.retired.len() {
            return None;
        }
        let sequence = self.sequence + 1;
        if !takes_over {
            let (signing, next, next_since_ms) = (self.signing.clone(), self.next.clone(), self.next_since_ms);
            return Some(Self { sequence, signing, signs_until_ms: self.signs_until_ms, next, next_since_ms, retired });
        }
        retired.push(self.retiring(now_ms));
        Some(self.followed(now_ms, retired))
    }

    /// What comes after it when another key is to sign at once; the one that signed is still published, unless it is `compromised`.
    fn replaced(&self, now_ms: u64, compromised: bool) -> Result<Self, TooSoon> {
        self.may_be_replaced(now_ms)?;
        let mut retired: Vec<Retired> = self.retired.iter().filter(|key| key.until_ms > now_ms).cloned().collect();
        if !compromised {
            retired.push(self.retiring(now_ms));
        }
        Ok(self.followed(now_ms, retired))
    }

    fn may_be_replaced(&self, now_ms: u64) -> Result<(), TooSoon> {
        let known_at_ms = self.next_since_ms + KNOWN_FOR.as_millis() as u64;
        match known_at_ms.checked_sub(now_ms) {
            None | Some(0) => Ok(()),
            Some(left_ms) => Err(TooSoon { seconds: left_ms.div_ceil(1000) }),
        }
    }

    fn retiring(&self, now_ms: u64) -> Retired {
        let until_ms = now_ms + RETIRED_FOR.as_millis() as u64;
        Retired { id: self.signing.id.clone(), point: self.signing.point.clone(), until_ms }
    }

    fn followed(&self, now_ms: u64, retired: Vec<Retired>) -> Self {
        Self {
            sequence: self.sequence + 1,
            signing: self.next.clone(),
            signs_until_ms: now_ms + SIGNS_FOR.as_millis() as u64,
            next: Stored::generate(),
            next_since_ms: now_ms,
            retired,
        }
    }

    fn seal(&self, place: &str, sealer: &Sealer) -> Result<Vec<u8>, StoreError> {
        let json = serde_json::to_vec(self).expect("INVARIANT: a generation is plain JSON");
        Ok(sealer.seal(place, &Zeroizing::new(json))?)
    }

    fn open(place: &str, sealer: &Sealer, sealed: &[u8]) -> Result<Self, AuthorityError> {
        let json = sealer.unseal(place, sealed)?;
        serde_json::from_slice(&json).map_err(|error| AuthorityError::Damaged(format!("`{place}`: {error}")))
    }
}

impl Held {
    fn of(generation: Generation) -> Result<Self, AuthorityError> {
        Ok(Self { pair: generation.signing.pair()?, generation })
    }
}

/// Keys that are not kept yet, sealed.
pub(super) fn first(place: &str, sealer: &Sealer, now_ms: u64) -> Result<Vec<u8>, StoreError> {
    Generation::first(now_ms).seal(place, sealer)
}

impl JwtKeys {
    /// The stored keys; makes the first ones in a store of an earlier version.
    pub(super) async fn open(
        place: &'static str,
        storage: Storage,
        sealer: Arc<Sealer>,
        clock: Clock,
    ) -> Result<Self, AuthorityError> {
        let (seals, now_ms) = (sealer.clone(), clock.now_ms());
        let read = move |store: &mut dyn Store| {
            if let Some(stored) = store.key(place)? {
                return Ok(stored);
            }
            store.create_keys(&[(place, &first(place, &seals, now_ms)?)])?;
            Ok(store.key(place)?.unwrap_or_default())
        };
        let sealed = storage.run("authority_keys", read).await?;
        let held = Held::of(Generation::open(place, &sealer, &sealed)?)?;
        Ok(Self { place, held: RwLock::new(Arc::new(held)), sealer, storage, clock })
    }

    /// Rises with each change of what is published.
    pub fn sequence(&self) -> u64 {
        self.held.read().generation.sequence
    }

    /// What verifies what they sign, now and next.
    pub fn authorities(&self) -> Vec<JwtAuthority> {
        let held = self.held.read().clone();
        let Generation { signing, next, retired, .. } = &held.generation;
        let of = |id: &str, point: &str| JwtAuthority {
            key_id: id.to_owned(),
            point: URL_SAFE_NO_PAD.decode(point).unwrap_or_default(),
        };
        let now = [of(&signing.id, &signing.point), of(&next.id, &next.point)];
        now.into_iter().chain(retired.iter().map(|key| of(&key.id, &key.point))).collect()
    }

    /// Signs the name `id` for `audience` (JWT-SVID, 2 and 3).
    pub fn sign(&self, id: &SpiffeId, audience: &[String]) -> SignedJwtSvid {
        let issued_at_ms = self.clock.now_ms();
        let expires_at_ms = issued_at_ms + JWT_SVID_LIFETIME.as_millis() as u64;
        let claims = json!({
            "sub": id.as_str(),
            "aud": audience,
            "iat": issued_at_ms / 1000,
            "exp": expires_at_ms / 1000,
        });
        SignedJwtSvid { token: self.sign_as("JWT", &claims), issued_at_ms, expires_at_ms }
    }

    /// Signs what `claims` say as a token of this kind; compact JWS.
    pub(super) fn sign_as(&self, typ: &str, claims: &Value) -> String {
        let held = self.held.read().clone();
        let header = json!({ "alg": "ES256", "kid": held.generation.signing.id, "typ": typ });
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let input = format!("{}.{}", part(&header), part(claims));
        let signature = held.pair.sign(&SystemRandom::new(), input.as_bytes());
        let signature = signature.expect("INVARIANT: a key of P-256 signs");
        format!("{input}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }

    /// Lets the next key sign when the time of the one that signs is over, and takes up what another control plane did. Whether
    /// what is published changed.
    pub async fn rotate(&self) -> Result<bool, AuthorityError> {
        let before = self.sequence();
        loop {
            let (sealed, stored) = self.stored().await?;
            let Some(next) = stored.after(self.clock.now_ms()) else {
                if stored.sequence != before {
                    *self.held.write() = Arc::new(Held::of(stored)?);
                }
                return Ok(self.sequence() != before);
            };
            if self.swap(sealed, next).await? {
                return Ok(true);
            }
        }
    }

    /// Whether the next key is known to everybody who verifies.
    pub fn may_replace(&self) -> Result<(), TooSoon> {
        self.held.read().generation.may_be_replaced(self.clock.now_ms())
    }

    /// Lets the next key sign now. Returns the ids of that one and of the one before it, which is verified by nobody any more if it is
    /// `compromised`.
    pub async fn replace(&self, compromised: bool) -> Result<(String, String), AuthorityError> {
        loop {
            let (sealed, stored) = self.stored().await?;
            let next = stored.replaced(self.clock.now_ms(), compromised)?;
            let ids = (next.signing.id.clone(), stored.signing.id.clone());
            if self.swap(sealed, next).await? {
                return Ok(ids);
            }
        }
    }

    async fn stored(&self) -> Result<(Vec<u8>, Generation), AuthorityError> {
        let place = self.place;
        let sealed = self.storage.run("authority_keys", move |store| store.key(place)).await?;
        let sealed = sealed.ok_or_else(|| AuthorityError::Damaged(format!("`{place}` is missing")))?;
        let stored = Generation::open(place, &self.sealer, &sealed)?;
        Ok((sealed, stored))
    }

    /// Puts `next` in the place of what was read. False when another control plane was faster: what it did is to be looked at.
    async fn swap(&self, sealed: Vec<u8>, next: Generation) -> Result<bool, AuthorityError> {
        let (place, anew) = (self.place, next.seal(self.place, &self.sealer)?);
        let swap = move |store: &mut dyn Store| store.swap_key(place, &sealed, &[(place, &anew)]);
        let swapped = self.storage.run("authority_keys", swap).await?;
        if swapped {
            *self.held.write() = Arc::new(Held::of(next)?);
        }
        Ok(swapped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_published_long_before_it_signs_and_until_all_it_signed_has_ended() {
        let ids = |generation: &Generation| {
            let retired: Vec<&str> = generation.retired.iter().map(|key| &*key.id).collect();
            (generation.signing.id.clone(), generation.next.id.clone(), retired.join(" "))
        };
        let first = Generation::first(0);
        let until = first.signs_until_ms;
        assert!(first.after(until - 1).is_none());
        let second = first.after(until).unwrap();
        let ((one, two, _), (signs, next, retired)) = (ids(&first), ids(&second));
        assert_eq!((signs, retired, second.sequence), (two, one, 2));
        assert_ne!(next, second.signing.id);
        let retired_for = RETIRED_FOR.as_millis() as u64;
        assert!(second.after(until + retired_for - 1).is_none());
        let third = second.after(until + retired_for).unwrap();
        assert_eq!((third.retired.len(), third.sequence, third.signing.id.clone()), (0, 3, second.signing.id.clone()));
        assert!(RETIRED_FOR > JWT_SVID_LIFETIME);
    }

    #[test]
    fn another_key_signs_at_once_only_when_it_has_been_known_for_a_while() {
        let at_ms = 1_790_000_000_000;
        let first = Generation::first(at_ms);
        let second = first.replaced(at_ms, false).unwrap();
        assert_eq!((&second.signing.id, &*second.retired[0].id), (&first.next.id, &*first.signing.id));
        assert_eq!(
            second.replaced(at_ms + 1, true).err(),
            Some(TooSoon { seconds: 60 }),
            "nobody may know the next one yet"
        );
        let third = second.replaced(at_ms + 60_000, true).unwrap();
        assert_eq!(third.signing.id, second.next.id);
        let published: Vec<&str> = third.retired.iter().map(|key| &*key.id).collect();
        assert_eq!(published, [&*first.signing.id], "what is compromised verifies nothing");
    }
}
