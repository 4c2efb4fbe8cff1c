//! Signals as they travel.

use countersign_core::signal::{Gap, Revocation, Serial, SignalSeq, Signals};

use crate::mesh;

/// Why signals that came are not taken in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignalsRefused {
    /// Some are missing.
    #[error(transparent)]
    Gap(#[from] Gap),
    /// A serial number is none. It is not passed over: something was revoked.
    #[error("a revoked serial number has {0} bytes, not 16")]
    Serial(usize),
}

/// The message that says all that hold.
pub fn all(signals: &Signals) -> mesh::Signals {
    let sequence = signals.sequence().0;
    mesh::Signals { after: 0, sequence, full: true, revoked: signals.revoked().map(to_message).collect() }
}

/// The message that says what came after `after`, up to `sequence`.
pub fn new(after: SignalSeq, sequence: SignalSeq, revoked: impl IntoIterator<Item = Revocation>) -> mesh::Signals {
    let revoked = revoked.into_iter().map(to_message).collect();
    mesh::Signals { after: after.0, sequence: sequence.0, full: false, revoked }
}

/// Takes in what a message says.
pub fn take_in(signals: &mut Signals, message: &mesh::Signals) -> Result<(), SignalsRefused> {
    let revoked = message.revoked.iter().map(|one| {
        let serial = Serial::from_der(&one.serial).ok_or(SignalsRefused::Serial(one.serial.len()))?;
        Ok(Revocation { serial, expires_at_ms: one.expires_at_ms })
    });
    let revoked = revoked.collect::<Result<Vec<_>, SignalsRefused>>()?;
    match message.full {
        true => signals.welcome(SignalSeq(message.sequence), revoked),
        false => signals.extend(SignalSeq(message.after), SignalSeq(message.sequence), revoked)?,
    }
    Ok(())
}

fn to_message(one: Revocation) -> mesh::Revocation {
    mesh::Revocation { serial: one.serial.as_bytes().to_vec().into(), expires_at_ms: one.expires_at_ms }
}
