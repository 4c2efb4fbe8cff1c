//! Facts of the moment that decisions rest on and that the ledger does not hold: they hold at once, for a while, and end by
//! themselves. Every host keeps all of them that hold; they are counted, so that it is known who knows which.
//!
//! INVARIANT (revoked-stays-revoked): whatever is taken in, and from whomever, no certificate ceases to be revoked before it has
//! expired.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize, de};

/// How many signals a control plane has given out: the number of the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SignalSeq(pub u64);

/// The serial number of a certificate of our own authority: 16 bytes (RFC 5280, 4.1.2.2).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Serial([u8; 16]);

/// Text that is no serial number of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no serial number: 32 hexadecimal digits, as `countersign identity list` shows them")]
pub struct SerialError(String);

/// One certificate that is good for nothing any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revocation {
    /// Which.
    pub serial: Serial,
    /// When it expires by itself, in milliseconds since 1970: from then on nobody need know that it was revoked.
    pub expires_at_ms: u64,
}

/// All signals that hold. Clones share what they hold.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Signals {
    sequence: SignalSeq,
    revoked: Arc<BTreeMap<Serial, u64>>,
}

/// Signals that do not follow those that are held: some are missing in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("signals after {after} came where {held} are held: some are missing")]
pub struct Gap {
    /// What they follow.
    pub after: u64,
    /// What is held.
    pub held: u64,
}

impl Serial {
    /// The contents of a certificate's INTEGER; `None` when it is none of ours.
    pub fn from_der(integer: &[u8]) -> Option<Self> {
        integer.try_into().ok().map(Self)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Serial({self})")
    }
}

impl FromStr for Serial {
    type Err = SerialError;
    fn from_str(given: &str) -> Result<Self, SerialError> {
        let mut bytes = [0; 16];
        // Other tools write serial numbers in capitals, and with colons.
        let digits: String = given.chars().filter(|c| *c != ':').collect();
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| SerialError(given.to_owned()))?;
        Ok(Self(bytes))
    }
}

impl Serialize for Serial {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Serial {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

impl Signals {
    /// The number of the last one that is held.
    pub fn sequence(&self) -> SignalSeq {
        self.sequence
    }

    /// Whether a certificate is revoked.
    pub fn is_revoked(&self, serial: &Serial) -> bool {
        self.revoked.contains_key(serial)
    }

    /// Whether any certificate is.
    pub fn is_empty(&self) -> bool {
        self.revoked.is_empty()
    }

    /// The certificates that are revoked.
    pub fn revoked(&self) -> impl ExactSizeIterator<Item = Revocation> {
        self.revoked.iter().map(|(serial, expires_at_ms)| Revocation { serial: *serial, expires_at_ms: *expires_at_ms })
    }

    /// Takes in all that a control plane holds. What is held here beyond it stays: a control plane can be behind another, or have
    /// been restored from an older copy.
    pub fn welcome(&mut self, sequence: SignalSeq, revoked: impl IntoIterator<Item = Revocation>) {
        self.add(revoked);
        self.sequence = sequence;
    }

    /// Takes in what follows `after`, up to `sequence`.
    pub fn extend(
        &mut self,
        after: SignalSeq,
        sequence: SignalSeq,
        revoked: impl IntoIterator<Item = Revocation>,
    ) -> Result<(), Gap> {
        if after > self.sequence {
            return Err(Gap { after: after.0, held: self.sequence.0 });
        }
        self.add(revoked);
        self.sequence = self.sequence.max(sequence);
        Ok(())
    }

    /// Forgets what has ended by itself at `now_ms`.
    pub fn forget_ended(&mut self, now_ms: u64) {
        if self.revoked.values().any(|expires_at_ms| *expires_at_ms < now_ms) {
            Arc::make_mut(&mut self.revoked).retain(|_, expires_at_ms| *expires_at_ms >= now_ms);
        }
    }

    fn add(&mut self, revoked: impl IntoIterator<Item = Revocation>) {
        let mut revoked = revoked.into_iter().peekable();
        if revoked.peek().is_some() {
            let held = Arc::make_mut(&mut self.revoked);
            revoked.for_each(|one| _ = held.insert(one.serial, one.expires_at_ms));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revoked(number: u8, expires_at_ms: u64) -> Revocation {
        Revocation { serial: Serial([number; 16]), expires_at_ms }
    }

    #[test]
    fn a_serial_number_reads_as_other_tools_write_it() {
        let serial = Serial([0x4a; 16]);
        assert_eq!(serial.to_string().parse(), Ok(serial));
        assert_eq!(vec!["4A"; 16].join(":").parse(), Ok(serial));
        for wrong in ["", "4a", &"4a".repeat(17), &"zz".repeat(16), "é"] {
            assert!(wrong.parse::<Serial>().is_err(), "{wrong}");
        }
        assert_eq!(Serial::from_der(&[1; 20]), None, "of another authority");
    }

    /// PROVES (revoked-stays-revoked)
    #[test]
    fn whatever_a_control_plane_says_nothing_comes_back_before_it_expired() {
        let mut signals = Signals::default();
        signals.welcome(SignalSeq(7), [revoked(1, 100), revoked(2, 50)]);
        assert_eq!(signals.extend(SignalSeq(7), SignalSeq(8), [revoked(3, 100)]), Ok(()));
        let gap = signals.extend(SignalSeq(9), SignalSeq(10), [revoked(4, 100)]);
        assert_eq!(gap, Err(Gap { after: 9, held: 8 }));
        assert!(!signals.is_revoked(&revoked(4, 0).serial));
        signals.extend(SignalSeq(6), SignalSeq(7), []).unwrap();
        assert_eq!(signals.sequence(), SignalSeq(8), "what was said before is no news");
        signals.welcome(SignalSeq(2), []);
        assert_eq!((signals.sequence(), signals.revoked().len()), (SignalSeq(2), 3), "a restored one has forgotten it");
        signals.forget_ended(51);
        assert!(!signals.is_revoked(&revoked(2, 0).serial));
        assert!(signals.is_revoked(&revoked(1, 0).serial) && signals.is_revoked(&revoked(3, 0).serial));
        signals.forget_ended(100);
        assert_eq!(signals.revoked().len(), 2, "in its last millisecond it is still a certificate");
    }
}
