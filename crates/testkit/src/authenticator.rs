//! An authenticator app, as on the phone of an operator: it reads the enrolment URI and shows codes (RFC 6238). Written from the
//! standard and not from the code that it tests.

use aws_lc_rs::hmac;

/// One account of the app.
pub struct App {
    /// Whose it is.
    pub account: String,
    /// What it shares with the mesh.
    pub secret: Vec<u8>,
}

impl App {
    /// Reads the URI that an enrolment prints.
    pub fn read(account: &str, otpauth: &str) -> Self {
        let secret = otpauth.split("secret=").nth(1).and_then(|rest| rest.split('&').next()).expect("a secret");
        let (mut bits, mut count, mut bytes) = (0u32, 0, Vec::new());
        for letter in secret.bytes() {
            let value = if letter.is_ascii_digit() { letter - b'2' + 26 } else { letter - b'A' };
            (bits, count) = (bits << 5 | u32::from(value), count + 5);
            if count >= 8 {
                count -= 8;
                bytes.push((bits >> count & 0xff) as u8);
            }
        }
        Self { account: account.into(), secret: bytes }
    }

    /// What it shows at this time, in seconds since 1970.
    pub fn code(&self, now_seconds: u64) -> String {
        let key = hmac::Key::new(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, &self.secret);
        let tag = hmac::sign(&key, &(now_seconds / 30).to_be_bytes());
        let tag = tag.as_ref();
        let at = usize::from(tag[19] & 15);
        let number = u32::from_be_bytes(tag[at..at + 4].try_into().expect("four bytes")) & 0x7fff_ffff;
        format!("{:06}", number % 1_000_000)
    }
}
