//! The W3C trace of an exchange: continued or begun, kept or not; and the spans of those that are kept, on their way to
//! the agent.
//!
//! A proxy that is told of no sampling takes no part: what came with a request goes on as it came. So it does for a trace
//! that is not kept, because a span id that nobody will ever tell of would break the chain between the spans of others.
//!
//! Nothing here waits. Spans have one bounded queue; what finds no room is counted and gone.

use std::{
    fmt::Write as _,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use countersign_api::sidecar::{self, SidecarMessage, Spans, sidecar_message};
use http::{HeaderMap, HeaderName, header::HeaderValue};
use tokio::sync::{mpsc, oneshot};

use crate::{counts::Counts, decided::TraceId, live::Kind, workers::Worker};

/// Spans that wait for the agent at most, of all workers.
const WAITING_MAX: usize = 2048;
/// Spans in one message to the agent.
const SPANS_PER_MESSAGE: usize = 256;
/// Time in which spans gather before they are handed over.
const GATHER: Duration = Duration::from_millis(100);
/// Bytes of a path that a span tells; a stranger chooses their number.
const PATH_BYTES_MAX: usize = 1024;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// The bit of the flags that says: this trace is kept (W3C Trace Context 3.2.2.5.1).
const SAMPLED: u8 = 1;

/// Which traces are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampling {
    follow_parent: bool,
    below: u64, // of 2^63: a trace is kept when the lower half of its id, halved, is below
}

/// What a proxy that tells of exchanges needs for it.
#[derive(Debug)]
pub struct Tracing {
    sampling: Option<Sampling>,
    waiting: mpsc::Sender<sidecar::Span>,
}

/// Where one exchange stands in its trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trace {
    id: TraceId,
    span_id: u64,
    parent_id: u64, // 0: this proxy began the trace
    flags: u8,
    kept: bool,
}

impl Sampling {
    /// Follows the decision of whoever began a trace when `follow_parent`, and keeps `ratio` (0 to 1) of the others.
    pub fn new(follow_parent: bool, ratio: f64) -> Self {
        // As OpenTelemetry's TraceIdRatioBased: every SDK that is told the same ratio decides the same.
        Self { follow_parent, below: (ratio.clamp(0.0, 1.0) * (1u64 << 63) as f64) as u64 }
    }

    fn keeps(self, id: TraceId, parent_flags: Option<u8>) -> bool {
        match parent_flags {
            Some(flags) if self.follow_parent => flags & SAMPLED != 0,
            _ => (id.0 as u64) >> 1 < self.below,
        }
    }
}

impl Tracing {
    /// The queue and what comes out of it.
    pub fn new(sampling: Option<Sampling>) -> (Self, mpsc::Receiver<sidecar::Span>) {
        let (waiting, spans) = mpsc::channel(WAITING_MAX);
        (Self { sampling, waiting }, spans)
    }

    /// Which traces are kept; `None` when this proxy takes no part in any but those of its own probes.
    pub fn sampling(&self) -> Option<Sampling> {
        self.sampling
    }

    fn tell(&self, span: sidecar::Span, counts: &Counts) {
        match self.waiting.try_send(span) {
            Ok(()) => counts.spans.add(1),
            Err(_) => counts.spans_shed.add(1),
        }
    }
}

impl Trace {
    /// Continues the trace that `headers` name, or begins one.
    pub(crate) fn of(headers: &HeaderMap, sampling: Option<Sampling>) -> Self {
        let mut given = headers.get_all(TRACEPARENT).iter();
        let parent = match (given.next(), given.next()) {
            (Some(value), None) => parse_traceparent(value.as_bytes()),
            _ => None,
        };
        let (id, parent_id, given_flags) = match parent {
            Some((id, parent_id, flags)) => (id, parent_id, Some(flags)),
            None => (TraceId(fastrand::u128(1..)), 0, None),
        };
        let kept = sampling.is_some_and(|sampling| sampling.keeps(id, given_flags));
        let flags = given_flags.unwrap_or(0) | if kept { SAMPLED } else { 0 };
        Self { id, span_id: fastrand::u64(1..), parent_id, flags, kept }
    }

    /// The trace of an exchange of this sidecar with itself: always kept.
    pub(crate) fn of_probe(nonce: TraceId) -> Self {
        Self { id: nonce, span_id: fastrand::u64(1..), parent_id: 0, flags: SAMPLED, kept: true }
    }

    /// Tells the next hop. A trace that is continued and not kept goes on as it came.
    pub(crate) fn write(&self, headers: &mut HeaderMap) {
        if !self.kept && self.parent_id != 0 {
            return;
        }
        if self.parent_id == 0 {
            headers.remove(TRACESTATE); // W3C Trace Context 3.3: without a valid parent it says nothing
        }
        let mut text = String::with_capacity(55);
        let _ = write!(text, "00-{}-{:016x}-{:02x}", self.id, self.span_id, self.flags);
        headers.insert(TRACEPARENT, HeaderValue::try_from(text).expect("INVARIANT: hexadecimal digits and dashes"));
    }

    pub(crate) fn id(&self) -> TraceId {
        self.id
    }

    pub(crate) fn is_kept(&self) -> bool {
        self.kept
    }

    /// The span of an exchange that ends now: where it stands in its trace and how long it took. The rest is for whoever
    /// knows the exchange.
    pub(crate) fn span(&self, took: Duration) -> sidecar::Span {
        let began = SystemTime::now() - took;
        sidecar::Span {
            trace_id: self.id.0.to_be_bytes().to_vec().into(),
            span_id: self.span_id,
            parent_id: self.parent_id,
            began_ns: nanoseconds(began),
            duration_ns: took.as_nanos() as u64,
            ..sidecar::Span::default()
        }
    }
}

/// Nanoseconds since 1970.
pub(crate) fn nanoseconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// A path as a span tells it.
pub(crate) fn shortened(path: &str) -> String {
    path[..path.floor_char_boundary(PATH_BYTES_MAX)].to_owned()
}

impl Kind {
    /// What the exchange speaks, as spans tell it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
            Self::Tcp => "tcp",
        }
    }
}

impl Worker {
    /// Which traces are kept; `None` when this proxy takes no part in any.
    pub(crate) fn sampling(&self) -> Option<Sampling> {
        self.shared.setup.tracing.as_ref().and_then(Tracing::sampling)
    }

    /// Hands a span over, or sheds it.
    pub(crate) fn tell(&self, span: sidecar::Span) {
        if let Some(tracing) = &self.shared.setup.tracing {
            tracing.tell(span, &self.counts);
        }
    }

    /// Tells of an exchange from the mesh that was refused before it could be judged.
    pub(crate) fn tell_refused(&self, trace: &Trace, kind: Kind, began: Instant, status: u16, refusal: &'static str) {
        if trace.is_kept() {
            self.tell(sidecar::Span {
                inbound: true,
                protocol: kind.as_str().into(),
                service: self.shared.setup.instance.service().to_string(),
                status: status.into(),
                refusal: refusal.into(),
                end: "completed".into(),
                ..trace.span(began.elapsed())
            });
        }
    }
}

/// Hands spans to the agent as fast as it takes them, and once more what is left when told to `end`.
pub(crate) async fn pass_on(
    mut spans: mpsc::Receiver<sidecar::Span>,
    say: mpsc::WeakSender<SidecarMessage>,
    mut end: oneshot::Receiver<()>,
) {
    let mut ending = false;
    while !ending {
        let mut gathered = Vec::new();
        tokio::select! {
            biased;
            _ = &mut end => ending = true,
            count = spans.recv_many(&mut gathered, 1) => if count == 0 { return },
        }
        if !ending {
            tokio::select! {
                biased;
                _ = &mut end => ending = true,
                () = tokio::time::sleep(GATHER) => {}
            }
        }
        loop {
            while gathered.len() < SPANS_PER_MESSAGE
                && let Ok(span) = spans.try_recv()
            {
                gathered.push(span);
            }
            if gathered.is_empty() {
                break;
            }
            let message = sidecar_message::Message::Spans(Spans { spans: std::mem::take(&mut gathered) });
            let Some(say) = say.upgrade() else { return };
            if say.send(SidecarMessage { message: Some(message) }).await.is_err() {
                return;
            }
        }
    }
}

// W3C Trace Context 3.2: version, 16 bytes of trace id, 8 of parent id, flags; later versions may add fields.
fn parse_traceparent(value: &[u8]) -> Option<(TraceId, u64, u8)> {
    let text = std::str::from_utf8(value.get(..55)?).ok()?;
    let lower_hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let mut parts = text.split('-');
    let (version, trace, parent, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let shape = (version.len(), trace.len(), parent.len(), flags.len()) == (2, 32, 16, 2) && parts.next().is_none();
    let longer = value.len() > 55 && (version == "00" || value[55] != b'-');
    if !shape || longer || version == "ff" || ![version, trace, parent, flags].iter().all(|part| lower_hex(part)) {
        return None;
    }
    let trace = u128::from_str_radix(trace, 16).ok().filter(|id| *id != 0)?;
    let parent = u64::from_str_radix(parent, 16).ok().filter(|id| *id != 0)?;
    Some((TraceId(trace), parent, u8::from_str_radix(flags, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const ALL: Sampling = Sampling { follow_parent: true, below: 1 << 63 };

    fn given(traceparents: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in traceparents {
            headers.append(TRACEPARENT, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers.insert(TRACESTATE, HeaderValue::from_static("a=b"));
        headers
    }

    #[test]
    fn a_trace_goes_on_and_a_broken_one_begins_anew() {
        let good = format!("00-{ID}-00f067aa0ba902b7-01");
        for (given_values, continued) in [
            (vec![good.as_str()], true),
            (vec![&format!("01-{ID}-00f067aa0ba902b7-01-more")], true),
            (vec![&format!("00-{ID}-00f067aa0ba902b7-01-more")], false),
            (vec![&format!("ff-{ID}-00f067aa0ba902b7-01")], false),
            (vec![&format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32))], false),
            (vec![&format!("00-{ID}-0000000000000000-01")], false),
            (vec![&format!("00-{}-00f067aa0ba902b7-01", ID.to_uppercase())], false),
            (vec![""], false),
            (vec![&"é".repeat(40)], false),
            (vec![&good, &good], false),
            (vec![], false),
        ] {
            for sampling in [None, Some(ALL), Some(Sampling::new(true, 0.0))] {
                let mut headers = given(&given_values);
                let trace = Trace::of(&headers, sampling);
                trace.write(&mut headers);
                assert_eq!(trace.id.to_string() == ID, continued, "{given_values:?}");
                assert_eq!(headers.contains_key(TRACESTATE), continued, "{given_values:?}");
                assert_eq!(headers.get_all(TRACEPARENT).iter().count(), 1, "{given_values:?}");
                let (id, parent, _) = parse_traceparent(headers[TRACEPARENT].as_bytes()).unwrap();
                assert_eq!(id, trace.id, "{given_values:?}");
                // Whoever tells of no span does not stand between those that do.
                let own = trace.kept || !continued;
                assert_eq!(parent, if own { trace.span_id } else { 0x00f0_67aa_0ba9_02b7 }, "{given_values:?}");
            }
        }
    }

    #[test]
    fn the_parent_decides_when_it_is_followed_and_the_trace_id_when_not() {
        let (low, high) = (TraceId(1), TraceId(u128::from(u64::MAX)));
        for (follow_parent, ratio, id, parent_flags, kept) in [
            (true, 0.0, low, Some(1), true),
            (true, 1.0, low, Some(0), false),
            (true, 1.0, low, Some(2), false), // another flag: the id is random
            (true, 1.0, high, None, true),
            (true, 0.5, low, None, true),
            (true, 0.5, high, None, false),
            (true, 0.0, low, None, false),
            (false, 1.0, high, Some(0), true),
            (false, 0.0, low, Some(1), false),
            (false, 0.5, high, Some(1), false),
            (false, 7.0, high, None, true),
            (false, f64::NAN, low, None, false),
        ] {
            let sampling = Sampling::new(follow_parent, ratio);
            assert_eq!(sampling.keeps(id, parent_flags), kept, "{follow_parent} {ratio} {id} {parent_flags:?}");
        }
    }

    #[test]
    fn about_as_many_traces_begin_kept_as_the_ratio_says() {
        let kept = (0..10_000).filter(|_| Trace::of(&HeaderMap::new(), Some(Sampling::new(true, 0.2))).kept).count();
        assert!((1_700..2_300).contains(&kept), "{kept} of 10000");
    }

    #[test]
    fn a_kept_trace_says_so_to_the_next_hop_and_a_proxy_without_sampling_changes_nothing() {
        let unsampled = format!("00-{ID}-00f067aa0ba902b7-00");
        for (sampling, flags) in [(Some(Sampling::new(false, 1.0)), "01"), (Some(ALL), "00"), (None, "00")] {
            let mut headers = given(&[&unsampled]);
            Trace::of(&headers, sampling).write(&mut headers);
            let passed = headers[TRACEPARENT].to_str().unwrap();
            assert!(passed.ends_with(flags), "{passed}");
            assert_eq!(passed == unsampled, flags == "00", "{passed}");
        }
    }

    #[test]
    fn a_path_is_cut_where_a_character_ends() {
        let path = format!("/{}", "é".repeat(PATH_BYTES_MAX));
        assert_eq!(shortened(&path).len(), PATH_BYTES_MAX - 1);
        assert_eq!(shortened("/short"), "/short");
    }

    #[test]
    fn a_span_that_finds_no_room_is_shed_and_counted() {
        let (tracing, mut spans) = Tracing::new(Some(ALL));
        let counts = Counts::default();
        for _ in 0..WAITING_MAX + 3 {
            tracing.tell(sidecar::Span::default(), &counts);
        }
        assert_eq!((counts.spans.get(), counts.spans_shed.get()), (WAITING_MAX as u64, 3));
        spans.try_recv().unwrap();
        tracing.tell(sidecar::Span::default(), &counts);
        assert_eq!((counts.spans.get(), counts.spans_shed.get()), (WAITING_MAX as u64 + 1, 3));
    }

    #[tokio::test]
    async fn what_waits_is_handed_over_when_the_proxy_ends() {
        let (tracing, spans) = Tracing::new(Some(ALL));
        let (say, mut said) = mpsc::channel(64);
        let (end, ending) = oneshot::channel();
        for _ in 0..300 {
            tracing.waiting.try_send(sidecar::Span::default()).unwrap();
        }
        end.send(()).unwrap();
        pass_on(spans, say.downgrade(), ending).await;
        drop(say);
        let mut count = 0;
        while let Some(SidecarMessage { message: Some(sidecar_message::Message::Spans(spans)) }) = said.recv().await {
            assert!(spans.spans.len() <= SPANS_PER_MESSAGE);
            count += spans.spans.len();
        }
        assert_eq!(count, 300);
    }
}
