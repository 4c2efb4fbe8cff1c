//! The numbers that proofs have to say (RFC 9449, 8): a proof that was made before cannot. Nothing is kept for them: a number is the time
//! at which it was given, and a MAC of it with a key that all control planes of one store have: what one gave out, each of them takes.

use std::sync::Arc;

use aws_lc_rs::hmac;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

use crate::{
    authority::{AuthorityError, seal::Sealer},
    store::{Storage, Store},
};

/// Where the key is kept, sealed.
const KEY: &str = "oauth/nonce-key";

/// A number is the same for so long, and good for as long again, in milliseconds.
const GIVEN_FOR_MS: u64 = 2 * 60 * 1000;
/// Bytes of the MAC that are shown.
const MAC_BYTES: usize = 16;

/// Gives numbers out, and knows them again.
pub struct Nonces(hmac::Key);

impl Nonces {
    /// With the stored key; makes it where there is none.
    pub async fn open(storage: &Storage, sealer: Arc<Sealer>) -> Result<Self, AuthorityError> {
        let seals = sealer.clone();
        let read = move |store: &mut dyn Store| {
            if store.key(KEY)?.is_none() {
                let mut new = Zeroizing::new([0; 32]);
                aws_lc_rs::rand::fill(&mut *new).expect("INVARIANT: the system's random source does not fail");
                // Of two that make one at the same time, one does.
                store.create_keys(&[(KEY, &seals.seal(KEY, &*new)?)])?;
            }
            Ok(store.key(KEY)?.unwrap_or_default())
        };
        let sealed = storage.run("authority_keys", read).await?;
        Ok(Self::of(&sealer.unseal(KEY, &sealed)?))
    }

    /// With this key.
    pub fn of(key: &[u8]) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key))
    }

    /// The one that is given at `now_ms`.
    pub fn now(&self, now_ms: u64) -> String {
        self.at(now_ms / GIVEN_FOR_MS)
    }

    fn at(&self, turn: u64) -> String {
        let mac = hmac::sign(&self.0, &turn.to_be_bytes());
        URL_SAFE_NO_PAD.encode([&turn.to_be_bytes()[..], &mac.as_ref()[..MAC_BYTES]].concat())
    }

    /// Whether it was given here, and lately.
    pub fn is_good(&self, given: &str, now_ms: u64) -> bool {
        let turn = now_ms / GIVEN_FOR_MS;
        let is = |turn| aws_lc_rs::constant_time::verify_slices_are_equal(self.at(turn).as_bytes(), given.as_bytes());
        is(turn).is_ok() || turn.checked_sub(1).is_some_and(|before| is(before).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_good_for_a_while_where_it_was_given() {
        let (nonces, others) = (Nonces::of(&[1; 32]), Nonces::of(&[2; 32]));
        let at = 100 * GIVEN_FOR_MS;
        let given = nonces.now(at);
        for (now_ms, expected) in
            [(at, true), (at + GIVEN_FOR_MS, true), (at + 2 * GIVEN_FOR_MS, false), (at - 1, false), (0, false)]
        {
            assert_eq!(nonces.is_good(&given, now_ms), expected, "{now_ms}");
        }
        assert_eq!(nonces.now(at + GIVEN_FOR_MS - 1), given);
        assert!(!others.is_good(&given, at));
        assert!(Nonces::of(&[1; 32]).is_good(&given, at), "another control plane of the same store");
        assert!(!nonces.is_good("", at) && !nonces.is_good(&given[1..], at));
    }
}
