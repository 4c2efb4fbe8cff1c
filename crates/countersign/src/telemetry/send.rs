//! One export: OTLP over gRPC or over HTTP, in plaintext or over TLS 1.3 and 1.2 with the roots that the system trusts.

use std::{io, path::Path, sync::Arc};

use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::collector::{
    metrics::v1::{
        ExportMetricsServiceRequest, ExportMetricsServiceResponse, metrics_service_client::MetricsServiceClient,
    },
    trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse, trace_service_client::TraceServiceClient},
};
use prost::Message;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::TlsConnector;
use tonic::{
    Code,
    metadata::MetadataMap,
    transport::{Channel, Endpoint},
};
use tower::service_fn;

use countersign_api::svid;

use super::settings::{Protocol, Signal};
use crate::error::Failure;

/// Where systems keep the certificates they trust: Debian, Fedora, Alpine.
const SYSTEM_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];
/// Longest answer of a collector, in bytes.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// The way to a collector for one kind of telemetry.
pub struct Collector {
    signal: Signal,
    dial: Dial,
    channel: Option<Channel>, // for gRPC
}

/// What one export sends.
#[derive(Clone)]
pub enum Payload {
    /// Spans.
    Traces(ExportTraceServiceRequest),
    /// Metrics.
    Metrics(ExportMetricsServiceRequest),
}

/// An export that did not arrive.
#[derive(Debug)]
pub struct Unsent {
    /// Why.
    pub why: String,
    /// Whether it may arrive later: OTLP says which refusals are for good.
    pub later: bool,
}

/// Connects.
#[derive(Clone)]
struct Dial {
    host: String,
    port: u16,
    tls: Option<(Arc<ClientConfig>, ServerName<'static>)>,
}

trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

impl Collector {
    /// Makes ready; connects when there is something to send. Needs a runtime.
    pub fn new(signal: Signal) -> Result<Self, Failure> {
        let dial = Dial::new(&signal)?;
        let channel = (signal.protocol == Protocol::Grpc).then(|| {
            let connector = dial.clone();
            let connector = service_fn(move |_: Uri| {
                let dial = connector.clone();
                async move { dial.connect().await.map(TokioIo::new) }
            });
            // The scheme is ours to hide: tonic refuses `https` unless its own TLS is compiled in.
            let mut parts = signal.url.clone().into_parts();
            parts.scheme = Some(http::uri::Scheme::HTTP);
            let uri = Uri::from_parts(parts).unwrap_or_default();
            Endpoint::from(uri).timeout(signal.timeout).connect_with_connector_lazy(connector)
        });
        Ok(Self { signal, dial, channel })
    }

    /// Where it is.
    pub fn url(&self) -> &Uri {
        &self.signal.url
    }

    /// Sends `payload` within the time limit. Returns how many items the collector refused of those it took.
    pub async fn send(&self, payload: Payload) -> Result<u64, Unsent> {
        let sent = async {
            match &self.channel {
                Some(channel) => self.over_grpc(channel.clone(), payload).await,
                None => self.over_http(&payload).await,
            }
        };
        let late = || Unsent { why: format!("no answer within {:?}", self.signal.timeout), later: true };
        timeout(self.signal.timeout, sent).await.unwrap_or_else(|_| Err(late()))
    }

    async fn over_grpc(&self, channel: Channel, payload: Payload) -> Result<u64, Unsent> {
        let metadata = MetadataMap::from_headers(self.signal.headers.clone());
        let refused = |status: tonic::Status| Unsent {
            why: in_words(&status),
            // OTLP, "Failures": these may succeed when tried again.
            later: matches!(
                status.code(),
                Code::Cancelled
                    | Code::DeadlineExceeded
                    | Code::Aborted
                    | Code::OutOfRange
                    | Code::Unavailable
                    | Code::DataLoss
            ),
        };
        match payload {
            Payload::Traces(traces) => {
                let request = tonic::Request::from_parts(metadata, Default::default(), traces);
                let answer = TraceServiceClient::new(channel).export(request).await.map_err(refused)?;
                Ok(refused_spans(answer.into_inner()))
            }
            Payload::Metrics(metrics) => {
                let request = tonic::Request::from_parts(metadata, Default::default(), metrics);
                let answer = MetricsServiceClient::new(channel).export(request).await.map_err(refused)?;
                Ok(refused_points(answer.into_inner()))
            }
        }
    }

    async fn over_http(&self, payload: &Payload) -> Result<u64, Unsent> {
        let broke = |e: &dyn std::error::Error| Unsent { why: in_words(e), later: true };
        let io = TokioIo::new(self.dial.connect().await.map_err(|e| broke(&e))?);
        let (mut sender, connection) = http1::handshake(io).await.map_err(|e| broke(&e))?;
        let served = tokio::spawn(connection);
        let body = match payload {
            Payload::Traces(traces) => traces.encode_to_vec(),
            Payload::Metrics(metrics) => metrics.encode_to_vec(),
        };
        let path = self.signal.url.path_and_query().map_or("/", |path| path.as_str());
        let mut request = Request::post(path).body(Full::new(Bytes::from(body))).map_err(|e| broke(&e))?;
        let host = self.signal.url.authority().map_or("", |authority| authority.as_str());
        *request.headers_mut() = self.signal.headers.clone();
        let of_connection = [(header::HOST, host), (header::CONTENT_TYPE, "application/x-protobuf")];
        for (name, value) in of_connection {
            let value = value.try_into().map_err(|e: header::InvalidHeaderValue| broke(&e))?;
            request.headers_mut().insert(name, value);
        }
        let answer = sender.send_request(request).await.map_err(|e| broke(&e))?;
        let status = answer.status();
        let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
        served.abort();
        match status {
            status if status.is_success() => {
                let body = body.map(|body| body.to_bytes()).unwrap_or_default();
                // What was taken was taken, whatever the answer says of it.
                Ok(match payload {
                    Payload::Traces(_) => {
                        ExportTraceServiceResponse::decode(body).map(refused_spans).unwrap_or_default()
                    }
                    Payload::Metrics(_) => {
                        ExportMetricsServiceResponse::decode(body).map(refused_points).unwrap_or_default()
                    }
                })
            }
            status => Err(Unsent {
                why: format!("it answered {status}"),
                later: matches!(
                    status,
                    StatusCode::TOO_MANY_REQUESTS
                        | StatusCode::BAD_GATEWAY
                        | StatusCode::SERVICE_UNAVAILABLE
                        | StatusCode::GATEWAY_TIMEOUT
                ),
            }),
        }
    }
}

fn refused_spans(answer: ExportTraceServiceResponse) -> u64 {
    answer.partial_success.map_or(0, |part| part.rejected_spans.try_into().unwrap_or(0))
}

fn refused_points(answer: ExportMetricsServiceResponse) -> u64 {
    answer.partial_success.map_or(0, |part| part.rejected_data_points.try_into().unwrap_or(0))
}

impl Dial {
    fn new(signal: &Signal) -> Result<Self, Failure> {
        let secure = signal.url.scheme_str() == Some("https");
        let host = signal.url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
        let default_port = match (signal.protocol, secure) {
            (Protocol::Grpc, _) => 4317,
            (Protocol::Http, true) => 443,
            (Protocol::Http, false) => 80,
        };
        let port = signal.url.port_u16().unwrap_or(default_port);
        let tls = secure
            .then(|| {
                let could_not = || Failure::new(format!("could not reach `{}` over TLS", signal.url));
                let name = ServerName::try_from(host.clone()).map_err(|e| could_not().because(&e))?;
                let mut config = ClientConfig::builder_with_provider(svid::provider())
                    .with_safe_default_protocol_versions()
                    .map_err(|e| could_not().because(&e))?
                    .with_root_certificates(roots(signal.certificate.as_deref())?)
                    .with_no_client_auth();
                if signal.protocol == Protocol::Grpc {
                    config.alpn_protocols = vec![b"h2".to_vec()];
                }
                Ok::<_, Failure>((Arc::new(config), name))
            })
            .transpose()?;
        Ok(Self { host, port, tls })
    }

    async fn connect(&self) -> io::Result<Box<dyn Io>> {
        let tcp = TcpStream::connect((self.host.as_str(), self.port)).await?;
        tcp.set_nodelay(true)?;
        Ok(match &self.tls {
            None => Box::new(tcp),
            Some((config, name)) => Box::new(TlsConnector::from(config.clone()).connect(name.clone(), tcp).await?),
        })
    }
}

/// The certificates that may have signed a collector's: those of `given`, or what the system trusts.
fn roots(given: Option<&Path>) -> Result<RootCertStore, Failure> {
    let system = || SYSTEM_ROOTS.iter().map(Path::new).find(|path| path.exists());
    let path = given.or_else(system).ok_or_else(|| {
        Failure::new("could not find the certificates that this system trusts")
            .help("name a file of PEM certificates with OTEL_EXPORTER_OTLP_CERTIFICATE")
    })?;
    let could_not = |e: &(dyn std::error::Error + 'static)| {
        Failure::new(format!("could not read certificates from `{}`", path.display()))
            .because(e)
            .help("OTEL_EXPORTER_OTLP_CERTIFICATE names a file of PEM certificates")
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(path).map_err(|e| could_not(&e))? {
        let added = roots.add(certificate.map_err(|e| could_not(&e))?);
        // The system's file may have one that we do not understand; a file that was named may not.
        if let (Err(error), true) = (added, given.is_some()) {
            return Err(could_not(&error));
        }
    }
    Ok(roots)
}

/// An error with its causes, on one line.
fn in_words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !words.contains(&text) {
            words.push_str(": ");
            words.push_str(&text);
        }
        cause = error.source();
    }
    words
}
