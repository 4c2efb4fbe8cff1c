//! Caller to Permit: the law is asked. Nothing else in this crate makes a [`Permit`], and nothing is forwarded to the
//! workload without one.

use std::{rc::Rc, sync::Arc};

use countersign_core::{
    record::{Judged, Reason},
    service::Recorded,
};
use http::HeaderValue;

use crate::{answer::Refusal, authenticate::Caller, decided::Shed, live::Exchange, view::Compiled};

/// Proof that the law allows this exchange, now. Spent by forwarding.
///
/// INVARIANT (permit-before-forward): made only by [`authorize`], for an exchange that is in the live table.
pub(crate) struct Permit {
    exchange: Rc<Exchange>,
    caller: Caller,
}

/// Asks the law about `exchange`, which is in the live table. Where the service is `recorded = "always"` the permit comes
/// once the decision is written.
pub(crate) async fn authorize(
    caller: Caller,
    exchange: &Rc<Exchange>,
    view: &Arc<Compiled>,
) -> Result<Permit, Refusal> {
    let which = if exchange.asked.is_probe { Judged::AsProbe } else { Judged::AtStart };
    let (reason, id) = exchange.judge(view, which);
    match reason {
        Reason::Permitted => {}
        Reason::NotInContract => return Err(Refusal::NotInContract(id)),
        Reason::TokenMissing => return Err(Refusal::TokenMissing(id)),
        Reason::TokenRefused => return Err(Refusal::TokenRefused(id)),
        Reason::EdgeHeld => return Err(Refusal::EdgeHeld(id)),
        Reason::TokenScope => return Err(Refusal::TokenScope(id)),
        _ => return Err(Refusal::Denied(id)), // no caller can step up before tokens carry assurance
    }
    let always = view.view.spec.as_ref().is_some_and(|spec| spec.recorded == Recorded::Always);
    if always {
        let committed = exchange.until_cut(exchange.commit()).await.map_err(Refusal::of_cut)?;
        committed.map_err(|Shed| Refusal::Unrecorded)?;
    }
    Ok(Permit { exchange: exchange.clone(), caller })
}

impl Permit {
    pub(crate) fn exchange(&self) -> &Rc<Exchange> {
        &self.exchange
    }

    /// The verified caller, as the workload is told.
    pub(crate) fn caller_header(&self) -> HeaderValue {
        self.caller.peer().caller_header()
    }
}
