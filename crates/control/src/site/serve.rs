//! Connections of browsers and distant commands: TLS where there is a certificate, and a bound for everything a stranger can hold
//! open.

use std::{net::IpAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use parking_lot::RwLock;
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use super::place::{SiteError, TlsFiles};

/// Connections that are open at the same time.
const CONNECTIONS_MAX: usize = 512;
/// How long a handshake, and the head of a request, may take.
pub(crate) const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// Requests at once on one HTTP/2 connection.
const STREAMS_MAX: u32 = 64;
/// Longest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// How often the certificate is read again.
const READ_CERTIFICATE_EVERY: Duration = Duration::from_secs(60);

/// Whom a request is from, as the kernel says.
#[derive(Debug, Clone, Copy)]
pub struct From(pub IpAddr);

/// The certificate as it was last read.
pub struct Certificate {
    files: TlsFiles,
    config: RwLock<Arc<ServerConfig>>,
}

impl Certificate {
    /// Reads it.
    pub fn read(files: TlsFiles) -> Result<Self, SiteError> {
        let config = RwLock::new(config_of(&files)?);
        Ok(Self { files, config })
    }

    fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.config.read().clone())
    }

    /// A renewed certificate is taken up; one that cannot be used is told, and the last good one stays.
    fn renew(&self) {
        match config_of(&self.files) {
            Ok(config) => *self.config.write() = config,
            Err(error) => tracing::warn!(%error, "the dashboard's certificate could not be read again"),
        }
    }
}

fn config_of(files: &TlsFiles) -> Result<Arc<ServerConfig>, SiteError> {
    let wrong = |path: &std::path::Path| {
        let path = path.to_owned();
        move |what: &dyn std::fmt::Display| SiteError::Certificate { path, what: what.to_string() }
    };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_file_iter(&files.certificate).and_then(Iterator::collect);
    let chain = chain.map_err(|error| wrong(&files.certificate)(&error))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| wrong(&files.key)(&error))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map(|builder| builder.with_no_client_auth())
        .and_then(|builder| builder.with_single_cert(chain, key))
        .map_err(|error| wrong(&files.certificate)(&error))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Serves until the task is dropped.
pub async fn serve(listener: TcpListener, certificate: Option<Certificate>, router: Router) {
    let (certificate, room) = (certificate.map(Arc::new), Arc::new(Semaphore::new(CONNECTIONS_MAX)));
    let mut read_again = tokio::time::interval(READ_CERTIFICATE_EVERY);
    loop {
        let (stream, address) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection of a browser could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            _ = read_again.tick(), if certificate.is_some() => {
                certificate.iter().for_each(|certificate| certificate.renew());
                continue;
            }
        };
        // Without room it is closed at once: whoever waits in line could wait for ever.
        let Ok(held) = room.clone().try_acquire_owned() else { continue };
        tokio::spawn(connection(stream, From(address.ip()), certificate.clone(), router.clone(), held));
    }
}

async fn connection(
    stream: TcpStream,
    from: From,
    certificate: Option<Arc<Certificate>>,
    router: Router,
    _held: OwnedSemaphorePermit,
) {
    let _ = stream.set_nodelay(true);
    match certificate {
        None => speak(stream, from, router).await,
        Some(certificate) => {
            if let Ok(Ok(stream)) = timeout(HEAD_WITHIN, certificate.acceptor().accept(stream)).await {
                speak(stream, from, router).await;
            }
        }
    }
}

/// HTTP with a stranger: heads of at most `head_bytes`, which come in time, and so many requests at once on one connection.
pub(crate) fn bounded(head_bytes: usize, streams: u32) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_WITHIN).max_buf_size(head_bytes);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(streams)
        .max_header_list_size(u32::try_from(head_bytes).unwrap_or(u32::MAX))
        .max_pending_accept_reset_streams(20)
        .keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}

async fn speak(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, from: From, router: Router) {
    let service = router.map_request(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(from);
        request
    });
    // What a browser that leaves says about it concerns nobody.
    let _ = bounded(HEAD_BYTES_MAX, STREAMS_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
        .await;
}
