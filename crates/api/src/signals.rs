//! Signals as they travel.

use countersign_core::signal::{
    Gap, Revocation, Serial, Signal, SignalSeq, Signals, TokenRevocation, TokensMeantError, statement::Statement,
};

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
    /// It is not understood which tokens were revoked, and it is not passed over either.
    #[error(transparent)]
    Tokens(#[from] TokensMeantError),
    /// It is not understood what was said of whom, and it is not passed over either.
    #[error("a statement is not understood: {0}")]
    Statement(String),
}

/// The message that says all that hold.
pub fn all(signals: &Signals) -> mesh::Signals {
    mesh::Signals { full: true, ..message(0, signals.sequence().0, signals.all()) }
}

/// The message that says what came after `after`, up to `sequence`.
pub fn new(after: SignalSeq, sequence: SignalSeq, new: impl IntoIterator<Item = Signal>) -> mesh::Signals {
    message(after.0, sequence.0, new)
}

/// Takes in what a message says.
pub fn take_in(signals: &mut Signals, message: &mesh::Signals) -> Result<(), SignalsRefused> {
    let revoked = message.revoked.iter().map(|one| {
        let serial = Serial::from_der(&one.serial).ok_or(SignalsRefused::Serial(one.serial.len()))?;
        Ok(Signal::Certificate(Revocation { serial, expires_at_ms: one.expires_at_ms }))
    });
    let tokens = message.tokens_revoked.iter().map(|one| {
        let meant = one.meant.parse()?;
        let (issued_until_ms, expires_at_ms) = (one.issued_until_ms, one.expires_at_ms);
        Ok(Signal::Tokens(TokenRevocation { meant, issued_until_ms, expires_at_ms }))
    });
    let stated = message.stated.iter().map(|one| {
        let statement: Result<Statement, _> = serde_json::from_str(&one.json);
        statement.map(Signal::Stated).map_err(|error| SignalsRefused::Statement(error.to_string()))
    });
    let said = revoked.chain(tokens).chain(stated).collect::<Result<Vec<_>, SignalsRefused>>()?;
    match message.full {
        true => signals.welcome(SignalSeq(message.sequence), said),
        false => signals.extend(SignalSeq(message.after), SignalSeq(message.sequence), said)?,
    }
    Ok(())
}

fn message(after: u64, sequence: u64, signals: impl IntoIterator<Item = Signal>) -> mesh::Signals {
    let mut message = mesh::Signals { after, sequence, ..mesh::Signals::default() };
    for signal in signals {
        match signal {
            Signal::Certificate(Revocation { serial, expires_at_ms }) => {
                let serial = serial.as_bytes().to_vec().into();
                message.revoked.push(mesh::Revocation { serial, expires_at_ms });
            }
            Signal::Stated(statement) if !statement.concerns_proxies() => {}
            Signal::Stated(statement) => {
                let json = serde_json::to_string(&statement).expect("INVARIANT: a statement is plain JSON");
                message.stated.push(mesh::Statement { json });
            }
            Signal::Tokens(TokenRevocation { meant, issued_until_ms, expires_at_ms }) => {
                let meant = meant.to_string();
                message.tokens_revoked.push(mesh::TokenRevocation { meant, issued_until_ms, expires_at_ms });
            }
        }
    }
    message
}
