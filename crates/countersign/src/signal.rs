//! A signal that a command gave: waits until every connected proxy enforces it, and says so.

use std::time::Duration;

use countersign_api::local::SignalWaited;
use countersign_core::{identity::InstanceId, signal::SignalSeq};

use crate::{
    client::{Client, query},
    error::{Done, Failure},
    render::{Output, Paint},
};

/// Waits until every connected proxy enforces `signal`, at most for so long.
pub async fn wait(control: &Client, signal: SignalSeq, within: Duration) -> Result<SignalWaited, Failure> {
    let timeout = query([("timeout_ms", Some(within.as_millis().to_string()))]);
    control.get(&format!("/v1/signals/{}/wait{timeout}", signal.0)).await
}

/// Says how the wait for a revocation ended: a failure while some proxy does not enforce it.
pub fn say(waited: &SignalWaited, output: Output) -> Done {
    if waited.enforced {
        if output == Output::Text {
            println!("{} all {} proxies enforce it", Paint::stdout().good("enforced:"), waited.connected);
        }
        return Ok(());
    }
    let missing: Vec<&str> = waited.missing.iter().take(10).map(InstanceId::as_str).collect();
    let what = format!("{} of {} proxies do not enforce it yet", waited.missing.len(), waited.connected);
    Err(Failure::new(what)
        .cause(missing.join(", "))
        .help("the revocation stands; proxies that are cut off answer 503 when what they hold is too old"))
}
