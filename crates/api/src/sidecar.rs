//! An agent and a proxy that it started: length-delimited [`SidecarOrder`]s and [`SidecarMessage`]s on an inherited
//! socket pair. The messages are documented in `proto/countersign/v1/sidecar.proto`.

use std::{io, marker::PhantomData};

use bytes::{Bytes, BytesMut};
use prost::Message;
use tokio_util::codec::{Decoder, Encoder, LengthDelimitedCodec};

pub use crate::mesh::{
    Configure, Drain, Endpoints, Fresh, Identity, Listening, Metrics, MetricsQuery, Probed, Sampling, ServiceEndpoints,
    SidecarMessage, SidecarOrder, Span, SpanDecision, Spans, Tokens, sidecar_message, sidecar_order,
};

/// Longest frame, in bytes: a view of the largest mesh fits.
pub const FRAME_BYTES_MAX: usize = 256 * 1024 * 1024;

/// The file descriptor on which a proxy finds its agent.
pub const AGENT_FD: i32 = 3;
/// The file descriptor on which the proxy of an isolated workload finds the broker of its namespace.
pub const BROKER_FD: i32 = 4;

/// Frames of `In` and `Out` with a four-byte big-endian length before each.
pub struct Frames<In, Out> {
    inner: LengthDelimitedCodec,
    kinds: PhantomData<fn(In) -> Out>,
}

impl<In, Out> Default for Frames<In, Out> {
    fn default() -> Self {
        let inner = LengthDelimitedCodec::builder().max_frame_length(FRAME_BYTES_MAX).new_codec();
        Self { inner, kinds: PhantomData }
    }
}

impl<In: Message + Default, Out> Decoder for Frames<In, Out> {
    type Item = In;
    type Error = io::Error;

    fn decode(&mut self, from: &mut BytesMut) -> io::Result<Option<In>> {
        let Some(frame) = self.inner.decode(from)? else { return Ok(None) };
        In::decode(frame.freeze()).map(Some).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
    }
}

impl<In, Out: Message> Encoder<Out> for Frames<In, Out> {
    type Error = io::Error;

    fn encode(&mut self, message: Out, to: &mut BytesMut) -> io::Result<()> {
        self.inner.encode(Bytes::from(message.encode_to_vec()), to)
    }
}

/// The agent's end of the socket pair.
pub type AgentFrames = Frames<SidecarMessage, SidecarOrder>;
/// The proxy's end.
pub type ProxyFrames = Frames<SidecarOrder, SidecarMessage>;
