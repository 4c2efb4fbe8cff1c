//! The exchange that a sidecar makes with itself when its agent says so: through its own mutual TLS listener, with its own SVID,
//! judged as any other. What it leaves behind, a record, a count and a span, shows control that the telemetry of this sidecar arrives.

use std::{net::SocketAddr, time::Duration};

use countersign_api::svid::server_name;
use http::Request;
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::TlsConnector;

use crate::{accept::tune, decided::TraceId, hygiene, shared::Shared, workers::ALPN};

/// The path that a probe asks for.
const PATH: &str = "/.countersign/probe";
/// How long all of it may take.
const WITHIN: Duration = Duration::from_secs(5);

/// Why there was no exchange.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// A nonce of another length.
    #[error("a nonce is 16 bytes, not {0}")]
    Nonce(usize),
    /// It cannot prove itself.
    #[error("this sidecar has no identity yet")]
    NoIdentity,
    /// Nobody, or somebody else, is where it listens.
    #[error("could not connect to its own listener {0}: {1}")]
    Connect(SocketAddr, std::io::Error),
    /// The connection broke.
    #[error("could not ask itself: {0}")]
    Http2(#[from] h2::Error),
    /// It is stuck.
    #[error("it did not answer itself within {WITHIN:?}")]
    TimedOut,
}

/// Makes the exchange, by the listener at `inbound`. Whatever it is answered, it was one.
pub async fn probe(shared: &Shared, inbound: SocketAddr, nonce: &[u8]) -> Result<(), ProbeError> {
    let nonce = TraceId(u128::from_be_bytes(nonce.try_into().map_err(|_| ProbeError::Nonce(nonce.len()))?));
    timeout(WITHIN, exchange(shared, inbound, nonce)).await.unwrap_or(Err(ProbeError::TimedOut))
}

async fn exchange(shared: &Shared, inbound: SocketAddr, nonce: TraceId) -> Result<(), ProbeError> {
    let identity = shared.identity().ok_or(ProbeError::NoIdentity)?;
    let config = identity.client_config(identity.svid().id().clone(), ALPN);
    shared.expect_probe(nonce);
    let connect = |error| ProbeError::Connect(inbound, error);
    let tcp = TcpStream::connect(inbound).await.map_err(connect)?;
    tune(&tcp);
    let tls = TlsConnector::from(config).connect(server_name(), tcp).await.map_err(connect)?;
    let (mut sender, connection) = h2::client::handshake(tls).await?;
    let asked = async {
        let request = Request::get(format!("https://{}.mesh{PATH}", shared.setup.instance.service()))
            .header(hygiene::PROBE, nonce.to_string())
            .body(())
            .expect("INVARIANT: a service's name is a host, and a nonce a header");
        std::future::poll_fn(|cx| sender.poll_ready(cx)).await?;
        sender.send_request(request, true)?.0.await
    };
    tokio::select! {
        // Whatever the answer: it was judged, and that is in the record.
        answered = asked => answered.map(drop)?,
        ended = connection => ended?,
    }
    Ok(())
}
