//! Codes that follow the clock: RFC 6238 with what authenticator apps know, SHA-1, six digits, 30 seconds.
//!
//! A code proves little: whoever looks over a shoulder or puts up a false page has it too. So it is accepted only where the gate
//! says so. The clock, the secret and the last step that was used are arguments; how often one may guess is for the caller.

use std::fmt::Write as _;

use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    hmac::{HMAC_SHA1_FOR_LEGACY_USE_ONLY, Key, sign},
};

/// Bytes of a new secret: as many as the hash has (RFC 4226, section 4, R6 recommends 160 bits).
pub const SECRET_BYTES: usize = 20;
/// Seconds of a step.
pub const STEP_SECONDS: u64 = 30;
const DIGITS: usize = 6;

/// The step of a code that was accepted. None up to it is accepted again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Step(pub u64);

/// Why a code is not accepted. A stranger is told no more than that it was not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodeRefused {
    /// Not six digits.
    #[error("a code has six digits")]
    Shape,
    /// Of another secret or another time.
    #[error("the code is wrong, or of another time")]
    Wrong,
    /// "The verifier MUST NOT accept the second attempt of the OTP" (RFC 6238, 5.2).
    #[error("the code was used already; wait for the next one")]
    Used,
}

/// Accepts `code` when it is of the step of `now_seconds` or of one beside it (5.2, one step of delay either way), and of a later
/// one than `last`. The step returned is to be kept before anything is done with it.
pub fn verify(secret: &[u8], code: &str, now_seconds: u64, last: Option<Step>) -> Result<Step, CodeRefused> {
    if code.len() != DIGITS || !code.bytes().all(|b| b.is_ascii_digit()) {
        return Err(CodeRefused::Shape);
    }
    let key = Key::new(HMAC_SHA1_FOR_LEGACY_USE_ONLY, secret);
    let now = now_seconds / STEP_SECONDS;
    // All three are computed, whichever fits: the time it takes tells nothing.
    let fits = |step: u64| verify_slices_are_equal(code_of(&key, step, DIGITS).as_bytes(), code.as_bytes()).is_ok();
    let matching = [now.saturating_sub(1), now, now.saturating_add(1)].map(|step| fits(step).then_some(Step(step)));
    match matching.into_iter().flatten().max() {
        None => Err(CodeRefused::Wrong),
        Some(step) if last.is_some_and(|last| step <= last) => Err(CodeRefused::Used),
        Some(step) => Ok(step),
    }
}

/// What an authenticator app reads from a QR code. It holds the secret.
pub fn uri(secret: &[u8], issuer: &str, account: &str) -> String {
    let encode =
        |text: &str| percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string();
    let (issuer, account, secret) = (encode(issuer), encode(account), base32(secret));
    format!("otpauth://totp/{issuer}:{account}?secret={secret}&issuer={issuer}")
}

/// HOTP (RFC 4226, 5.3): the last four bits of the hash say where the 31 bits stand that make the number.
fn code_of(key: &Key, step: u64, digits: usize) -> String {
    let tag = sign(key, &step.to_be_bytes());
    let hash = tag.as_ref();
    let at = usize::from(hash[hash.len() - 1] & 0xf);
    let number = u32::from_be_bytes([hash[at] & 0x7f, hash[at + 1], hash[at + 2], hash[at + 3]]);
    format!("{:0digits$}", u64::from(number) % 10u64.pow(digits as u32))
}

/// RFC 4648, section 6, without padding: apps take no other form.
fn base32(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let mut text = String::new();
    for chunk in bytes.chunks(5) {
        let mut block = [0; 8];
        block[3..3 + chunk.len()].copy_from_slice(chunk);
        let block = u64::from_be_bytes(block);
        for at in 0..(chunk.len() * 8).div_ceil(5) {
            let _ = write!(text, "{}", char::from(LETTERS[(block >> (35 - 5 * at) & 31) as usize]));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECRET: &[u8] = b"12345678901234567890";

    #[test]
    fn the_codes_are_those_of_the_standard() {
        let key = Key::new(HMAC_SHA1_FOR_LEGACY_USE_ONLY, SECRET);
        // RFC 6238, appendix B, the rows of SHA1.
        for (now, expected) in [
            (59, "94287082"),
            (1_111_111_109, "07081804"),
            (1_111_111_111, "14050471"),
            (1_234_567_890, "89005924"),
            (2_000_000_000, "69279037"),
            (20_000_000_000, "65353130"),
        ] {
            assert_eq!(code_of(&key, now / STEP_SECONDS, 8), expected, "{now}");
        }
        // RFC 4226, appendix D.
        for (step, expected) in [(0, "755224"), (1, "287082"), (2, "359152"), (9, "520489")] {
            assert_eq!(code_of(&key, step, 6), expected, "{step}");
        }
    }

    #[test]
    fn a_code_is_accepted_once_in_its_step_and_the_two_beside_it() {
        let (code, step) = ("287082", Step(1)); // from second 30 to second 59
        for (case, code, now, last, expected) in [
            ("in its step", code, 59, None, Ok(step)),
            ("a step later", code, 89, None, Ok(step)),
            ("a step early", code, 0, None, Ok(step)),
            ("two steps later", code, 90, None, Err(CodeRefused::Wrong)),
            ("again", code, 59, Some(step), Err(CodeRefused::Used)),
            ("after a later one", code, 59, Some(Step(2)), Err(CodeRefused::Used)),
            ("after an earlier one", code, 59, Some(Step(0)), Ok(step)),
            ("another", "287083", 59, None, Err(CodeRefused::Wrong)),
            ("too short", "28708", 59, None, Err(CodeRefused::Shape)),
            ("too long", "2870820", 59, None, Err(CodeRefused::Shape)),
            ("a sign", "+87082", 59, None, Err(CodeRefused::Shape)),
            ("other digits", "٢٨٧", 59, None, Err(CodeRefused::Shape)),
            ("nothing", "", 59, None, Err(CodeRefused::Shape)),
        ] {
            assert_eq!(verify(SECRET, code, now, last), expected, "{case}");
        }
    }

    #[test]
    fn an_app_reads_the_secret_and_whose_it_is() {
        assert_eq!(
            uri(SECRET, "shop.example", "alice@shop.example"),
            "otpauth://totp/shop%2Eexample:alice%40shop%2Eexample?secret=GEZDGNBVGY3TQOJQGEZDGNBVGY3TQOJQ&issuer=shop%2Eexample"
        );
        // RFC 4648, section 10.
        for (given, expected) in [
            ("", ""),
            ("f", "MY"),
            ("fo", "MZXQ"),
            ("foo", "MZXW6"),
            ("foob", "MZXW6YQ"),
            ("fooba", "MZXW6YTB"),
            ("foobar", "MZXW6YTBOI"),
        ] {
            assert_eq!(base32(given.as_bytes()), expected);
        }
    }

    proptest! {
        #[test]
        fn no_code_is_ever_accepted_twice(
            secret: [u8; SECRET_BYTES], start in 0..u64::MAX / 2, waits in prop::collection::vec(0..90u64, 1..20),
        ) {
            let key = Key::new(HMAC_SHA1_FOR_LEGACY_USE_ONLY, &secret);
            let (mut now, mut last, mut accepted) = (start, None, Vec::new());
            for wait in waits {
                now += wait;
                let code = code_of(&key, now / STEP_SECONDS, DIGITS);
                if let Ok(step) = verify(&secret, &code, now, last) {
                    prop_assert!(accepted.iter().all(|earlier| *earlier < step));
                    (last, _) = (Some(step), accepted.push(step));
                }
            }
            prop_assert!(!accepted.is_empty());
        }

        #[test]
        fn a_code_of_any_text_is_judged(secret: Vec<u8>, code: String, now: u64) {
            let _ = verify(&secret, &code, now, None);
        }
    }
}
