//! One question over HTTPS to somebody who is no part of the mesh, or to the control plane from outside of it: bounded in time and
//! in bytes, verified by the certificates that the system trusts. No redirect is followed, no connection kept, and nothing is
//! said in the clear but to this machine itself.

use std::{fs, io, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

use crate::svid;

/// Where systems keep the certificates that they trust.
const SYSTEM_ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// Asks, and verifies who answers.
#[derive(Clone)]
pub struct Https {
    config: Arc<ClientConfig>,
}

/// How long an answer may take, and how long it may be.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// From the first packet to the last byte.
    pub within: Duration,
    /// The body, in bytes.
    pub body_bytes_max: usize,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpsError {
    /// The certificates that are trusted cannot be read.
    #[error("could not read certificates from `{path}`")]
    Roots {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It would go over the network in the clear, or nowhere.
    #[error("`{0}` is not an https URL (http is for this machine itself)")]
    Url(String),
    /// It took too long.
    #[error("no answer came within {} s", .0.as_secs())]
    Late(Duration),
    /// It cannot be reached, or is not who it should be.
    #[error("it cannot be reached")]
    Lost(#[source] io::Error),
    /// What came is no HTTP, or ended too early.
    #[error("its answer broke off, or is no HTTP")]
    Broken(#[source] hyper::Error),
    /// What came is too long.
    #[error("its answer has more than {0} bytes, or broke off")]
    TooLong(usize),
}

impl Https {
    /// Trusts what the system trusts, and the certificates of `more`.
    pub fn new(more: Option<&Path>) -> Result<Self, HttpsError> {
        let mut roots = RootCertStore::empty();
        // A system without certificates still asks over http on this machine, or those of `more`.
        if let Some(system) = SYSTEM_ROOTS.iter().map(Path::new).find(|path| path.exists()) {
            take(&mut roots, system)?;
        }
        if let Some(more) = more {
            take(&mut roots, more)?;
        }
        let config = ClientConfig::builder_with_provider(svid::provider())
            .with_safe_default_protocol_versions()
            .expect("INVARIANT: the provider has the versions that rustls was built with")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self { config: Arc::new(config) })
    }

    /// Sends one request to the absolute URL that it names, and reads the answer whole.
    pub async fn ask(&self, request: Request<Bytes>, bounds: Bounds) -> Result<(StatusCode, Bytes), HttpsError> {
        let answer = tokio::time::timeout(bounds.within, self.answer(request, bounds.body_bytes_max)).await;
        answer.map_err(|_| HttpsError::Late(bounds.within))?
    }

    /// Sends one request to the absolute URL that it names; returns once the head of the answer is there, whose body is still to be read.
    pub async fn open(&self, request: Request<Bytes>, within: Duration) -> Result<Response<Incoming>, HttpsError> {
        tokio::time::timeout(within, self.send(request)).await.map_err(|_| HttpsError::Late(within))?
    }

    async fn answer(&self, request: Request<Bytes>, body_bytes_max: usize) -> Result<(StatusCode, Bytes), HttpsError> {
        let response = self.send(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), body_bytes_max).collect().await;
        Ok((status, body.map_err(|_| HttpsError::TooLong(body_bytes_max))?.to_bytes()))
    }

    async fn send(&self, request: Request<Bytes>) -> Result<Response<Incoming>, HttpsError> {
        let (mut parts, body) = request.into_parts();
        let stream = self.connect(&parts.uri).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(HttpsError::Broken)?;
        // It ends when the answer was read, or with whoever asked.
        tokio::spawn(connection);
        let authority = parts.uri.authority().map(|authority| authority.as_str().to_owned()).unwrap_or_default();
        let host = authority.parse().map_err(|_| HttpsError::Url(authority))?;
        parts.headers.insert(header::HOST, host);
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str()).to_owned();
        parts.uri = path.parse().map_err(|_| HttpsError::Url(path))?;
        let request = Request::from_parts(parts, Full::new(body));
        sender.send_request(request).await.map_err(HttpsError::Broken)
    }

    async fn connect(&self, uri: &Uri) -> Result<Box<dyn Stream>, HttpsError> {
        let no = || HttpsError::Url(uri.to_string());
        let host = uri.host().ok_or_else(no)?.trim_start_matches('[').trim_end_matches(']').to_owned();
        let is_secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") if is_loopback(&host) => false,
            _ => return Err(no()),
        };
        let port = uri.port_u16().unwrap_or(if is_secure { 443 } else { 80 });
        let tcp = TcpStream::connect((host.as_str(), port)).await.map_err(HttpsError::Lost)?;
        if !is_secure {
            return Ok(Box::new(tcp));
        }
        let name = ServerName::try_from(host).map_err(|_| no())?;
        let tls = TlsConnector::from(self.config.clone()).connect(name, tcp).await.map_err(HttpsError::Lost)?;
        Ok(Box::new(tls))
    }
}

/// Whether a host is this machine: nobody stands between.
pub fn is_loopback(host: &str) -> bool {
    matches!(host, "localhost" | "127.0.0.1" | "::1" | "[::1]")
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

fn take(roots: &mut RootCertStore, path: &Path) -> Result<(), HttpsError> {
    let unread = |source| HttpsError::Roots { path: path.display().to_string(), source };
    let text = fs::read(path).map_err(unread)?;
    let mut count = 0;
    for certificate in CertificateDer::pem_slice_iter(&text) {
        let certificate = certificate.map_err(|error| unread(io::Error::other(error)))?;
        // A system holds some that webpki does not take; it trusts the others.
        count += usize::from(roots.add(certificate).is_ok());
    }
    if count == 0 {
        return Err(unread(io::Error::new(io::ErrorKind::InvalidData, "it holds no certificate")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { within: Duration::from_secs(5), body_bytes_max: 10 };

    #[tokio::test]
    async fn nothing_goes_over_the_network_in_the_clear_and_no_answer_is_longer_than_asked_for() {
        let https = Https::new(None).unwrap();
        let ask = |url: &str| https.ask(Request::get(url).body(Bytes::new()).unwrap(), BOUNDS);
        for url in ["http://ci.example/", "http://localhost.ci.example/", "ftp://localhost/", "/a"] {
            assert!(matches!(ask(url).await, Err(HttpsError::Url(_))), "{url}");
        }
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/a?b", listener.local_addr().unwrap());
        tokio::spawn(async move {
            for answer in
                ["HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n0123456789", "HTTP/1.1 200 OK\r\n\r\n01234567890"]
            {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = [0; 1024];
                let read = tokio::io::AsyncReadExt::read(&mut stream, &mut head).await.unwrap();
                assert!(head[..read].starts_with(b"GET /a?b HTTP/1.1\r\n"));
                tokio::io::AsyncWriteExt::write_all(&mut stream, answer.as_bytes()).await.unwrap();
            }
        });
        assert_eq!(ask(&url).await.unwrap(), (StatusCode::OK, Bytes::from_static(b"0123456789")));
        assert!(matches!(ask(&url).await, Err(HttpsError::TooLong(10))));
    }
}
