//! Outcome to status: the only place where what went wrong becomes what the caller sees. `docs/answers.txt` is written
//! from this table.
//!
//! Every answer of the mesh's own carries `countersign-reason`; that header is taken from whatever applications or
//! strangers send, so only the mesh can set it.

use std::{
    cell::Cell,
    mem::discriminant,
    time::{Duration, Instant},
};

use http::{HeaderName, HeaderValue, Response, StatusCode, header};

use crate::{
    decided::DecisionId,
    flow::Watched,
    live::{Cut, Kind},
    route::Limited,
    workers::Worker,
};

/// The header that says why the mesh, and not the application, answered.
pub(crate) const REASON: HeaderName = HeaderName::from_static("countersign-reason");

/// Why the mesh answers instead of the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    Denied(DecisionId),
    NotInContract(DecisionId),
    TokenMissing(DecisionId),
    TokenRefused(DecisionId),
    TokenScope(DecisionId),
    EdgeHeld(DecisionId),
    Malformed(&'static str),
    HeadTooLarge,
    UnknownService,
    WrongAuthority,
    WrongProtocol,
    RateLimited,
    ConcurrencyLimited,
    NoView,
    NoIdentity,
    Stale,
    Overloaded,
    Draining,
    Unrecorded,
    NoInstance,
    Unreachable,
    AppUnreachable,
    AppBroke,
    UpstreamBroke,
    TimedOut,
    Unproven,
    CertificateRefused,
    FirstContact(&'static str),
    NoToken,
}

/// One of each kind, in the order in which they are counted.
pub(crate) const ALL: [Refusal; 29] = [
    Refusal::Denied(DecisionId(0)),
    Refusal::Malformed("framing"),
    Refusal::HeadTooLarge,
    Refusal::UnknownService,
    Refusal::WrongAuthority,
    Refusal::WrongProtocol,
    Refusal::RateLimited,
    Refusal::ConcurrencyLimited,
    Refusal::NoView,
    Refusal::NoIdentity,
    Refusal::Stale,
    Refusal::Overloaded,
    Refusal::Draining,
    Refusal::Unrecorded,
    Refusal::NoInstance,
    Refusal::Unreachable,
    Refusal::AppUnreachable,
    Refusal::AppBroke,
    Refusal::UpstreamBroke,
    Refusal::TimedOut,
    Refusal::Unproven,
    Refusal::CertificateRefused,
    Refusal::NotInContract(DecisionId(0)),
    Refusal::FirstContact("headers"),
    Refusal::TokenMissing(DecisionId(0)),
    Refusal::TokenRefused(DecisionId(0)),
    Refusal::TokenScope(DecisionId(0)),
    Refusal::NoToken,
    Refusal::EdgeHeld(DecisionId(0)),
];

/// How long a worker says nothing more of a refusal that it has just logged: an outage is not as loud as its traffic.
const SAID_EVERY: Duration = Duration::from_secs(10);

/// When one worker last logged each refusal, and how many came since.
#[derive(Default)]
pub(crate) struct Said([Cell<Option<(Instant, u64)>>; ALL.len()]);

/// How loud a refusal is in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    Debug,
    Info,
    Warn,
}

/// One row of the table.
pub(crate) struct Row {
    pub(crate) status: StatusCode,
    pub(crate) grpc_status: u16,
    pub(crate) reason: &'static str,
    pub(crate) level: Level,
    /// Whether whoever forwarded the request may try it elsewhere: nothing of it was processed.
    pub(crate) unprocessed: bool,
    pub(crate) what_to_do: &'static str,
}

impl Refusal {
    pub(crate) fn row(self) -> Row {
        use Level::{Debug, Info, Warn};
        use Refusal::*;
        let (status, grpc_status, reason, level, unprocessed, what_to_do) = match self {
            Denied(_) => (403, 7, "denied", Info, false, "`countersign decision show ID` says which policies decided"),
            NotInContract(_) => (
                403,
                7,
                "not-in-contract",
                Info,
                false,
                "the service has a contract without such an operation: correct the request or the contract",
            ),
            TokenMissing(_) => (
                401,
                16,
                "token-missing",
                Info,
                false,
                "the service demands an access token: callers declare it in `upstreams`, and their sidecars attach one",
            ),
            TokenRefused(_) => (
                401,
                16,
                "token-refused",
                Warn,
                false,
                "`countersign decision show ID` says what is wrong with the token; an honest sidecar never shows one like it",
            ),
            TokenScope(_) => (
                403,
                7,
                "token-scope",
                Info,
                false,
                "the caller's token is not for this operation yet: its sidecar gets one as soon as a policy permits it",
            ),
            EdgeHeld(_) => (
                403,
                7,
                "edge-held",
                Info,
                false,
                "the service holds callers, in ways, that nobody has approved: `countersign edge list --held`, then `edge approve`",
            ),
            NoToken => (
                503,
                14,
                "no-token",
                Warn,
                false,
                "this sidecar holds no access token that is good: no control plane signed one in time, see the agent's log",
            ),
            Malformed(_) => (400, 13, "malformed", Info, false, "the body names the defect; send it otherwise"),
            FirstContact(_) => (
                400,
                13,
                "first-contact",
                Info,
                false,
                "the first exchange of a caller is held to 64 headers of 16 KiB and a body of 1 MiB that says length and type; the body names what is not so",
            ),
            HeadTooLarge => (431, 8, "head-too-large", Info, false, "send fewer or shorter headers"),
            UnknownService => (404, 12, "unknown-service", Info, false, "no such service is declared in mesh.toml"),
            WrongAuthority => (
                421,
                14,
                "wrong-authority",
                Warn,
                true,
                "the callee's sidecar stands for another service: look for an instance that moved",
            ),
            WrongProtocol => {
                (400, 12, "wrong-protocol", Info, false, "the service declares another `protocol` in mesh.toml")
            }
            RateLimited => (429, 8, "rate-limited", Info, false, "wait, or raise `rate_per_second` in routes.toml"),
            ConcurrencyLimited => {
                (429, 8, "concurrency-limited", Info, false, "wait, or raise `concurrent_max` in routes.toml")
            }
            NoView => {
                (503, 14, "no-view", Warn, true, "the sidecar has just started, or its agent reaches no control plane")
            }
            NoIdentity => (503, 14, "no-identity", Warn, true, "the sidecar has no SVID yet; see the agent's log"),
            Stale => (503, 14, "stale", Warn, true, "no control plane was heard for `max_staleness`: look after it"),
            Overloaded => (503, 14, "overloaded", Warn, true, "more instances, or a higher `exchanges_max`"),
            Draining => (503, 14, "draining", Debug, true, "the instance is stopping; another one will answer"),
            Unrecorded => (
                503,
                14,
                "unrecorded",
                Warn,
                true,
                "the record is full and the service asks to be `recorded = \"always\"`",
            ),
            NoInstance => {
                (503, 14, "no-instance", Warn, false, "no instance of the service is ready: see `countersign status`")
            }
            Unreachable => (
                503,
                14,
                "unreachable",
                Warn,
                true,
                "no instance's sidecar could be reached: see the network between the hosts",
            ),
            AppUnreachable => {
                (503, 14, "app-unreachable", Warn, true, "the workload does not accept connections on its port")
            }
            AppBroke => (502, 14, "app-broke", Warn, false, "the workload closed or garbled its answer: see its log"),
            UpstreamBroke => (
                502,
                14,
                "upstream-broke",
                Warn,
                false,
                "the connection to the callee's sidecar broke while it answered",
            ),
            TimedOut => (
                504,
                4,
                "timed-out",
                Warn,
                false,
                "the callee did not begin to answer in time: see `timeout_ms` in routes.toml",
            ),
            Unproven => (
                503,
                16,
                "unproven",
                Warn,
                false,
                "the caller's SVID expired or was revoked, or its authority is trusted no longer: see the agent's log on its host",
            ),
            CertificateRefused => (
                503,
                14,
                "certificate-refused",
                Warn,
                true,
                "the callee's sidecar refused this sidecar's certificate: compare clocks and `authority show` of both hosts",
            ),
        };
        let status = StatusCode::from_u16(status).expect("INVARIANT: the statuses above are valid");
        Row { status, grpc_status, reason, level, unprocessed, what_to_do }
    }

    /// Its place in [`ALL`].
    pub(crate) fn place(self) -> usize {
        let place = ALL.iter().position(|one| discriminant(one) == discriminant(&self));
        debug_assert!(place.is_some(), "{self:?} is not counted");
        place.unwrap_or_default()
    }

    /// Which limit was full.
    pub(crate) fn of_limit(limited: Limited) -> Self {
        match limited {
            Limited::Rate => Self::RateLimited,
            Limited::Concurrency => Self::ConcurrencyLimited,
        }
    }

    /// Why it ended, when the head of the answer was not yet sent.
    pub(crate) fn of_cut(cut: Cut) -> Self {
        match cut {
            Cut::Denied(id) => Self::Denied(id),
            Cut::Stale => Self::Stale,
            Cut::Unproven => Self::Unproven,
            Cut::Closing => Self::Draining,
        }
    }

    fn body(self) -> String {
        match self {
            Self::Denied(id)
            | Self::NotInContract(id)
            | Self::TokenMissing(id)
            | Self::TokenRefused(id)
            | Self::TokenScope(id)
            | Self::EdgeHeld(id) => {
                format!(r#"{{"error":"{}","decision":"{id}"}}"#, self.row().reason)
            }
            Self::Malformed(defect) | Self::FirstContact(defect) => {
                format!(r#"{{"error":"{}","defect":"{defect}"}}"#, self.row().reason)
            }
            other => format!(r#"{{"error":"{}"}}"#, other.row().reason),
        }
    }
}

/// Counts, logs and answers a refused request.
pub(crate) fn answer(worker: &Worker, refusal: Refusal, kind: Kind) -> Response<Watched> {
    worker.counts.refusals[refusal.place()].add(1);
    if let Some(times) = worker.said.turn(refusal, Instant::now()) {
        log(refusal, times);
    }
    response(refusal, kind)
}

/// A caller who speaks gRPC gets a trailers-only answer.
fn response(refusal: Refusal, kind: Kind) -> Response<Watched> {
    let row = refusal.row();
    let response = Response::builder().header(REASON, HeaderValue::from_static(row.reason));
    let built = if kind == Kind::Grpc {
        let message = match refusal {
            Refusal::Denied(id)
            | Refusal::NotInContract(id)
            | Refusal::TokenMissing(id)
            | Refusal::TokenRefused(id)
            | Refusal::TokenScope(id)
            | Refusal::EdgeHeld(id) => format!("{}; decision {id}", row.reason),
            Refusal::Malformed(defect) | Refusal::FirstContact(defect) => format!("{}: {defect}", row.reason),
            _ => row.reason.to_owned(),
        };
        response
            .header(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"))
            .header("grpc-status", HeaderValue::from(row.grpc_status))
            .header("grpc-message", message)
            .body(Watched::own(""))
    } else {
        let body = refusal.body();
        response
            .status(row.status)
            .header(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .header(header::CONTENT_LENGTH, body.len()) // the mesh hop has no other way to say it
            .body(Watched::own(body))
    };
    built.expect("INVARIANT: every part is a valid header value")
}

/// The refusal that `response`, which came from another sidecar, says that it made before anything was processed.
pub(crate) fn unprocessed<B>(response: &Response<B>) -> Option<Refusal> {
    use Refusal::*;
    let reason = response.headers().get(REASON)?;
    let of_callees = [WrongAuthority, NoView, NoIdentity, Stale, Overloaded, Draining, Unrecorded, AppUnreachable];
    of_callees.into_iter().find(|refusal| refusal.row().unprocessed && reason == refusal.row().reason)
}

/// Whether `response`, which came from another sidecar, is this refusal.
pub(crate) fn says<B>(response: &Response<B>, refusal: Refusal) -> bool {
    response.headers().get(REASON).is_some_and(|reason| reason == refusal.row().reason)
}

impl Said {
    /// Whether this refusal is to be logged now: then how many it stands for.
    fn turn(&self, refusal: Refusal, now: Instant) -> Option<u64> {
        let said = &self.0[refusal.place()];
        match said.get() {
            Some((at, unsaid)) if now.duration_since(at) < SAID_EVERY => {
                said.set(Some((at, unsaid + 1)));
                None
            }
            before => {
                said.set(Some((now, 0)));
                Some(before.map_or(0, |(_, unsaid)| unsaid) + 1)
            }
        }
    }
}

/// At a level that says who should care. Every refusal is counted; not every one is logged.
fn log(refusal: Refusal, times: u64) {
    let row = refusal.row();
    match row.level {
        Level::Debug => tracing::debug!(reason = row.reason, times, "exchange refused"),
        Level::Info => tracing::info!(reason = row.reason, times, ?refusal, "exchange refused"),
        Level::Warn => tracing::warn!(reason = row.reason, times, help = row.what_to_do, "exchange refused"),
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    #[test]
    fn the_document_of_answers_is_the_table() {
        let mut text = String::from(
            "What the mesh answers when the application does not. Written by a test from crates/proxy/src/answer.rs.\n\
             Retried: nothing of the request was processed, so the caller's sidecar tries another instance.\n\n",
        );
        let mut line = |columns: [&str; 6]| {
            let [reason, status, grpc, level, retried, help] = columns;
            writeln!(text, "{reason:<20} {status:>6} {grpc:>4}  {level:<5} {retried:<7} {help}").unwrap();
        };
        line(["countersign-reason", "status", "gRPC", "log", "retried", "what to do"]);
        for refusal in ALL {
            let row = refusal.row();
            let level = format!("{:?}", row.level).to_lowercase();
            let retried = if row.unprocessed { "yes" } else { "no" };
            line([row.reason, row.status.as_str(), &row.grpc_status.to_string(), &level, retried, row.what_to_do]);
        }
        expect_test::expect_file!["../../../docs/answers.txt"].assert_eq(&text);
    }

    #[test]
    fn a_denial_says_its_id_and_nothing_more() {
        assert_eq!(
            Refusal::Denied(DecisionId(10)).body(),
            r#"{"error":"denied","decision":"0000000000000000000000000000000a"}"#
        );
        let grpc = response(Refusal::Denied(DecisionId(10)), Kind::Grpc);
        assert_eq!((grpc.status().as_u16(), &grpc.headers()["grpc-status"]), (200, &"7".parse().unwrap()));
    }

    #[test]
    fn an_outage_is_logged_once_in_a_while_with_its_size() {
        let (said, began) = (Said::default(), Instant::now());
        let turns = |seconds, count| {
            let now = began + Duration::from_secs(seconds);
            (0..count).filter_map(|_| said.turn(Refusal::Stale, now)).collect::<Vec<_>>()
        };
        assert_eq!(turns(0, 100), [1]);
        assert_eq!(said.turn(Refusal::NoView, began), Some(1), "another reason is another story");
        assert!(turns(9, 100).is_empty());
        assert_eq!(turns(10, 100), [200]);
    }

    #[test]
    fn every_refusal_is_counted_in_a_place_of_its_own() {
        for (place, refusal) in ALL.into_iter().enumerate() {
            assert_eq!(refusal.place(), place, "{refusal:?}");
        }
    }
}
