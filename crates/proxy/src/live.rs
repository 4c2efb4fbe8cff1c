//! The live table: every exchange that is judged here, from before its first judgement until its last byte. When the view
//! changes, all of them are judged again; when a signal comes, or the moment at which what they rest on may change by itself, those
//! that read it. Those whose answer turned are cut.
//!
//! INVARIANT (register-before-judge): an [`Exchange`] can only be judged once it is in the table, so no view can fall
//! between its first judgement and its first re-judgement.
//!
//! One table per worker, never shared: a walk and a judgement cannot run at the same time.

use std::{
    cell::{Cell, OnceCell, RefCell},
    rc::{Rc, Weak},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use countersign_api::sidecar::{Span, SpanDecision};
use countersign_core::{
    change::Revision,
    identity::SpiffeId,
    policy::{self, Action, Decision, Query, Reads},
    record::{End, Ended, Judged, Outcome, Reason},
    risk::Condition,
    service::Protocol,
    signal::{SignalSeq, statement::Subject},
};
use http::Method;
use slab::Slab;
use smallvec::SmallVec;

use crate::{
    authenticate::Token,
    decided::{Decided, DecisionId, Shed},
    identify::Peer,
    pool::Stream,
    route::Place,
    trace::{self, Trace},
    view::Compiled,
    workers::Worker,
};

/// Exchanges that are judged again before the worker serves others.
const SLICE: usize = 256;
/// Longest wait for a record that must be written first: a disk that hangs must not hold exchanges without end.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(3);

/// What makes an exchange end before its own end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The law's answer turned; the decision that says so.
    Denied(DecisionId),
    /// The view became too old to go on under.
    Stale,
    /// The caller's SVID expired or was revoked, or its authority is trusted no longer.
    Unproven,
    /// This proxy is closing and its time to drain is over.
    Closing,
}

/// What an exchange asks for: what of a question does not change while it is open.
pub(crate) struct Asked {
    pub(crate) kind: Kind,
    pub(crate) method: Method,
    pub(crate) path: Arc<str>, // normalized, without query
    pub(crate) host: Arc<str>, // without port, lower case
    pub(crate) size: Option<u64>,
    pub(crate) first_contact: bool,
    pub(crate) trace: Trace,
    /// It is an exchange of this sidecar with itself; no traffic, and counted by itself.
    pub(crate) is_probe: bool,
}

/// The action of an exchange but for its method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Http,
    Grpc,
    Tcp,
}

/// One exchange in the table.
pub(crate) struct Exchange {
    worker: Rc<Worker>,
    slot: usize,
    pub(crate) peer: Rc<Peer>,
    token: OnceCell<Token>,
    pub(crate) asked: Asked,
    began: Instant,
    judged: RefCell<Option<Judgement>>,
    cut: Cell<Option<Cut>>,
    wakers: RefCell<SmallVec<[Waker; 2]>>,
    recorded: Cell<bool>, // the judgement in `judged` is in the record
    pub(crate) status: Cell<u16>,
    pub(crate) refusal: Cell<&'static str>, // why the mesh answered; empty: it did not
    pub(crate) broke: Cell<bool>,
    pub(crate) bytes_in: Cell<u64>,
    pub(crate) bytes_out: Cell<u64>,
    pub(crate) place: RefCell<Option<Place>>, // under the limits of its caller
    stream: RefCell<Option<Stream>>,          // its stream to the workload, when that speaks HTTP/2
}

/// The last judgement of an exchange.
#[derive(Clone)]
struct Judgement {
    id: DecisionId,
    at_ms: u64,
    now: i64,
    revision: Revision,
    signals: SignalSeq,
    condition: Condition,
    decision: Decision,
    which: Judged,
    judge_ns: u64,
    // Of the latest time that it was judged, whichever decision is kept.
    view: Arc<Compiled>,
    reads: Reads,
}

/// An open exchange, as the admin page shows it.
#[derive(Debug, serde::Serialize)]
pub(crate) struct LiveExchange {
    principal: SpiffeId,
    method: String,
    path: Arc<str>,
    pub(crate) open_ms: u64,
    bytes_in: u64,
    bytes_out: u64,
    decision: Option<String>,
    revision: Option<Revision>,
    is_cut: bool,
}

/// The exchanges of one worker.
#[derive(Default)]
pub(crate) struct Live {
    table: RefCell<Slab<Weak<Exchange>>>,
}

impl Live {
    /// Puts an exchange into the table. It leaves when its last owner drops it.
    pub(crate) fn register(&self, worker: &Rc<Worker>, peer: &Rc<Peer>, asked: Asked, began: Instant) -> Rc<Exchange> {
        let mut table = self.table.borrow_mut();
        let entry = table.vacant_entry();
        let exchange = Rc::new(Exchange {
            worker: worker.clone(),
            slot: entry.key(),
            peer: peer.clone(),
            token: OnceCell::new(),
            asked,
            began,
            judged: RefCell::default(),
            cut: Cell::new(None),
            wakers: RefCell::default(),
            recorded: Cell::new(false),
            status: Cell::new(0),
            refusal: Cell::new(""),
            broke: Cell::new(false),
            bytes_in: Cell::new(0),
            bytes_out: Cell::new(0),
            place: RefCell::default(),
            stream: RefCell::default(),
        });
        if !exchange.asked.is_probe {
            worker.counts.inbound.started.add(1);
            worker.counts.inbound.open.add(1);
        }
        entry.insert(Rc::downgrade(&exchange));
        exchange
    }

    /// What is open, at most `max`, for the admin page.
    pub(crate) fn show(&self, max: usize) -> Vec<LiveExchange> {
        let table = self.table.borrow();
        table.iter().filter_map(|(_, exchange)| exchange.upgrade()).take(max).map(|exchange| exchange.show()).collect()
    }

    fn open(&self) -> Vec<Rc<Exchange>> {
        self.table.borrow().iter().filter_map(|(_, exchange)| exchange.upgrade()).collect()
    }

    /// Judges everything that is open by `view`, a slice at a time so that the worker goes on serving in between.
    pub(crate) async fn rejudge(&self, view: &Arc<Compiled>) {
        for slice in self.open().chunks(SLICE) {
            for exchange in slice {
                exchange.rejudge(view);
            }
            tokio::task::yield_now().await;
        }
    }

    /// Cuts everything that is open.
    pub(crate) fn cut_all(&self, cut: Cut) {
        for exchange in self.open() {
            exchange.end_by(cut);
        }
    }

    /// Cuts everything that `peer` has open on the connection on which it proved itself.
    pub(crate) fn cut_of_peer(&self, peer: &Rc<Peer>, cut: Cut) {
        for exchange in self.open().iter().filter(|exchange| Rc::ptr_eq(&exchange.peer, peer)) {
            exchange.end_by(cut);
        }
    }

    /// Cuts everything of peers whose SVID is revoked, and what was permitted with an access token that is; judges what rests on what is
    /// said of its caller.
    pub(crate) fn heed(&self) {
        for exchange in self.open() {
            if exchange.peer.proof().is_revoked(&exchange.worker.shared) {
                exchange.end_by(Cut::Unproven);
            } else {
                exchange.end_if_token_is_lost();
                exchange.rejudge_if_it_read(Reads::CONDITION);
                exchange.end_if_contained();
            }
        }
    }

    /// Judges what may have become something else by the mere passing of time.
    pub(crate) async fn rejudge_by_time(&self) {
        for slice in self.open().chunks(SLICE) {
            for exchange in slice {
                exchange.rejudge_if_it_read(Reads::TIME.and(Reads::CONDITION));
            }
            tokio::task::yield_now().await;
        }
    }

    /// Records the permits of exchanges that have been open for a while, so that a long stream is seen while it lives.
    pub(crate) fn record_open(&self, now: Instant) {
        const UNRECORDED_MAX: Duration = Duration::from_secs(1);
        for exchange in self.open() {
            if !exchange.recorded.get() && now.duration_since(exchange.began) > UNRECORDED_MAX {
                let _ = exchange.record(None); // what finds no room is counted by the recorder
            }
        }
    }
}

impl Exchange {
    /// Judges this exchange by `view`. The answer is kept with it.
    pub(crate) fn judge(&self, view: &Arc<Compiled>, which: Judged) -> (Reason, DecisionId) {
        if cfg!(countersign_bench_lawless) {
            return (Reason::Permitted, DecisionId(0)); // what judging and recording cost is measured against this
        }
        let at_ms = self.worker.now_ms();
        let now = (at_ms / 1000) as i64;
        let began = Instant::now();
        let (signals, condition) = self.condition(at_ms);
        let decision = self.worker.decide(view, &self.query(view, now, condition));
        let judge_ns = began.elapsed().as_nanos() as u64;
        let id = DecisionId::new(at_ms);
        let reason = decision.reason;
        self.worker.counts.judged(which, decision.reason, judge_ns);
        self.recorded.set(false);
        self.worker.judge_again_at(self.holds_until(decision.reads, at_ms));
        let (revision, view, reads) = (view.revision(), view.clone(), decision.reads);
        *self.judged.borrow_mut() =
            Some(Judgement { id, at_ms, now, revision, signals, condition, decision, which, judge_ns, view, reads });
        (reason, id)
    }

    /// What signals can be about, of who asks.
    fn subjects(&self) -> impl Iterator<Item = &Subject> {
        self.peer.subjects().iter().chain(self.token.get().and_then(Token::family))
    }

    /// What signals say of the caller, and which was the last of them.
    fn condition(&self, now_ms: u64) -> (SignalSeq, Condition) {
        let signals = self.worker.shared.signals();
        let mut condition = signals.condition(self.subjects(), now_ms);
        condition.contained |= self.worker.shared.is_contained(now_ms);
        (signals.sequence(), condition)
    }

    /// Until when a decision that read this stays as it is, if nothing comes but time, in milliseconds since 1970.
    fn holds_until(&self, reads: Reads, now_ms: u64) -> Option<u64> {
        const HOUR_MS: u64 = 3_600_000;
        if !reads.changes_with_time() {
            return None;
        }
        let second = reads.any_of(Reads::NOW).then(|| (now_ms / 1000 + 1) * 1000);
        let hour = reads.any_of(Reads::CLOCK).then(|| (now_ms / HOUR_MS + 1) * HOUR_MS);
        let reads_condition = reads.any_of(Reads::CONDITION);
        let next_change = || self.worker.shared.signals().next_change(self.subjects(), now_ms);
        let said = reads_condition.then(next_change).flatten();
        [second, hour, said].into_iter().flatten().min()
    }

    /// Judges it again if what it read may have become something else: by what came of signals, or by time.
    fn rejudge_if_it_read(&self, parts: Reads) {
        let judged = self.judged.borrow().as_ref().map(|judged| (judged.view.clone(), judged.reads));
        if let Some((view, reads)) = judged
            && reads.any_of(parts)
            && self.cut.get().is_none()
        {
            self.judge_again(&view);
        }
    }

    fn rejudge(&self, view: &Arc<Compiled>) {
        let current = self.judged.borrow().as_ref().is_some_and(|judged| judged.view.is_same(view));
        // One that was never judged is about to be, by the view in force then; one that is denied is over.
        if current || self.cut.get().is_some() || self.judged.borrow().is_none() {
            return;
        }
        self.judge_again(view);
    }

    /// Takes note of the access token that came with it, before its first judgement.
    pub(crate) fn show_token(&self, token: Token) {
        let _ = self.token.set(token); // one is read of each request
    }

    /// Whatever its policies read: nothing of whoever is contained goes on.
    fn end_if_contained(&self) {
        let (_, condition) = self.condition(self.worker.now_ms());
        let view = self.judged.borrow().as_ref().map(|judged| judged.view.clone());
        if let Some(view) = view.filter(|_| condition.contained && self.cut.get().is_none()) {
            self.judge_again(&view);
        }
    }

    fn end_if_token_is_lost(&self) {
        let is_lost = self.token.get().is_some_and(|token| token.is_lost(&self.worker.shared));
        let view = self.judged.borrow().as_ref().map(|judged| judged.view.clone());
        if let Some(view) = view.filter(|_| is_lost && self.cut.get().is_none()) {
            self.judge_again(&view);
        }
    }

    /// Judges what is open once more, and ends it when the answer turned.
    fn judge_again(&self, view: &Arc<Compiled>) {
        let before = self.judged.borrow().clone();
        let recorded = self.recorded.get();
        let (reason, id) = self.judge(view, Judged::WhileOpen);
        match reason.outcome() {
            Outcome::Permit => {
                // The same answer again is not a new decision: the record keeps the first and its ids.
                if let (Some(before), Some(now)) = (before, self.judged.borrow_mut().as_mut()) {
                    *now = Judgement { view: now.view.clone(), reads: now.reads, ..before };
                }
                self.recorded.set(recorded);
            }
            Outcome::Deny | Outcome::StepUp => {
                if let (Some(before), false) = (before, recorded) {
                    let _ = self.hand_over(&before, None); // both decisions are in the record
                }
                self.end_by(Cut::Denied(id));
            }
        }
    }

    fn end_by(&self, cut: Cut) {
        if self.cut.get().is_none() {
            self.cut.set(Some(cut));
            self.worker.counts.cut.add(1);
            for waker in self.wakers.take() {
                waker.wake();
            }
        }
    }

    /// Ready once the exchange must end now.
    pub(crate) fn poll_cut(&self, cx: &mut Context<'_>) -> Poll<Cut> {
        if let Some(cut) = self.cut.get() {
            return Poll::Ready(cut);
        }
        let mut wakers = self.wakers.borrow_mut();
        if !wakers.iter().any(|waker| waker.will_wake(cx.waker())) {
            // Two bodies and a tunnel at most, but a task may move: forget the oldest rather than grow.
            if wakers.len() == 8 {
                wakers.remove(0);
            }
            wakers.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// `future`, or the cut when that comes first.
    pub(crate) async fn until_cut<T>(&self, future: impl Future<Output = T>) -> Result<T, Cut> {
        let mut future = std::pin::pin!(future);
        std::future::poll_fn(|cx| match self.poll_cut(cx) {
            Poll::Ready(cut) => Poll::Ready(Err(cut)),
            Poll::Pending => future.as_mut().poll(cx).map(Ok),
        })
        .await
    }

    /// Keeps a stream to the workload counted for as long as this exchange lives.
    pub(crate) fn hold(&self, stream: Stream) {
        *self.stream.borrow_mut() = Some(stream);
    }

    /// Hands the judgement to the record.
    pub(crate) fn record(&self, ended: Option<Ended>) -> Result<(), Shed> {
        let judged = self.judged.borrow();
        let Some(judged) = &*judged else { return Ok(()) };
        self.recorded.set(true);
        self.hand_over(judged, ended)
    }

    /// Hands the judgement to the record and waits until it is written.
    pub(crate) async fn commit(&self) -> Result<(), Shed> {
        let written = {
            let judged = self.judged.borrow();
            let Some(judged) = &*judged else { return Ok(()) };
            self.recorded.set(true);
            self.worker.recorder.commit(&self.decided(judged, None))?
        };
        match tokio::time::timeout(COMMIT_TIMEOUT, written).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Shed),
        }
    }

    fn hand_over(&self, judged: &Judgement, ended: Option<Ended>) -> Result<(), Shed> {
        self.worker.recorder.record(&self.decided(judged, ended))
    }

    fn decided<'a>(&'a self, judged: &'a Judgement, ended: Option<Ended>) -> Decided<'a> {
        Decided {
            id: judged.id,
            at_ms: judged.at_ms,
            revision: judged.revision,
            signals: judged.signals,
            decision: &judged.decision,
            judged: judged.which,
            query: self.query(&judged.view, judged.now, judged.condition),
            trace_id: Some(self.asked.trace.id()),
            judge_ns: judged.judge_ns,
            ended,
        }
    }

    /// Tells of this exchange, which ends now, as a span.
    #[cold]
    fn tell(&self, how: End) {
        let judged = self.judged.borrow();
        let decision = judged.as_ref().map(|judged| SpanDecision {
            id: judged.id.to_string(),
            outcome: judged.decision.outcome.as_str().into(),
            reason: judged.decision.reason.as_str().into(),
            revision: judged.revision.0,
            policies: judged.decision.policies.iter().map(ToString::to_string).collect(),
            caller: self.peer.id().to_string(),
            operation: judged.decision.operation.as_deref().unwrap_or_default().into(),
        });
        let end = match how {
            End::Completed => "completed",
            End::Cut => "cut",
            End::Abandoned => "abandoned",
        };
        self.worker.tell(Span {
            inbound: true,
            protocol: self.asked.kind.as_str().into(),
            method: self.asked.method.to_string(),
            path: trace::shortened(&self.asked.path),
            service: self.worker.shared.setup.instance.service().to_string(),
            status: self.status.get().into(),
            refusal: self.refusal.get().into(),
            end: end.into(),
            origin: self.peer.origin().to_string(),
            decision,
            ..self.asked.trace.span(self.began.elapsed())
        });
    }

    fn show(&self) -> LiveExchange {
        let judged = self.judged.borrow();
        LiveExchange {
            principal: self.peer.id().clone(),
            method: self.asked.method.to_string(),
            path: self.asked.path.clone(),
            open_ms: self.began.elapsed().as_millis() as u64,
            bytes_in: self.bytes_in.get(),
            bytes_out: self.bytes_out.get(),
            decision: judged.as_ref().map(|judged| judged.id.to_string()),
            revision: judged.as_ref().map(|judged| judged.view.revision()),
            is_cut: self.cut.get().is_some(),
        }
    }

    fn query<'a>(&'a self, view: &'a Compiled, now: i64, condition: Condition) -> Query<'a> {
        let asked = &self.asked;
        Query {
            principal: self.peer.id(),
            action: match asked.kind {
                Kind::Http => Action::Http(asked.method.as_str()),
                Kind::Grpc => Action::GrpcCall,
                Kind::Tcp => Action::TcpConnect,
            },
            service: &view.view.service,
            path: &asked.path,
            context: policy::Context {
                method: asked.method.as_str(),
                host: &asked.host,
                protocol: match asked.kind {
                    Kind::Http => Protocol::Http,
                    Kind::Grpc => Protocol::Grpc,
                    Kind::Tcp => Protocol::Tcp,
                },
                size: asked.size,
                origin: self.peer.origin(),
                now,
                first_contact: asked.first_contact,
                token: self.token.get().map(Token::shown),
                condition,
            },
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.worker.live.table.borrow_mut().remove(self.slot);
        let duration_us = self.began.elapsed().as_micros() as u64;
        let (status, bytes_in, bytes_out) = (self.status.get(), self.bytes_in.get(), self.bytes_out.get());
        if self.asked.is_probe {
            self.worker.counts.probes.add(1);
            self.worker.shared.probed(self.asked.trace.id());
        } else {
            self.worker.counts.inbound.end(status, duration_us, bytes_in, bytes_out);
        }
        let how = match (self.cut.get(), status, self.broke.get()) {
            (Some(_), ..) => End::Cut,
            (None, 0, _) | (None, _, true) => End::Abandoned,
            (None, ..) => End::Completed,
        };
        if self.asked.trace.is_kept() {
            self.tell(how);
        }
        let ended = Ended { status, duration_us, bytes_in, bytes_out, how };
        match &*self.judged.borrow() {
            Some(judged) if self.recorded.get() => self.worker.recorder.amend(judged.id, &ended),
            Some(_) => _ = self.record(Some(ended)), // what finds no room is counted by the recorder
            None => {}
        }
    }
}
