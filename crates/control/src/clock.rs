//! The one place of the control plane that reads the time. Every room gets it handed.

use std::{
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

/// Tells the time, in milliseconds since 1970.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> u64 + Send + Sync>);

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self::from_fn(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64))
    }

    /// A clock that `tell`s.
    pub fn from_fn(tell: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(tell))
    }

    /// Now, in milliseconds since 1970.
    pub fn now_ms(&self) -> u64 {
        (self.0)()
    }
}
