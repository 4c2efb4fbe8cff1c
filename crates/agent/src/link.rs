//! The way to control: a gRPC channel over mutual TLS that reaches `spiffe://<trust domain>/countersign/control` and no
//! one else. A channel keeps the certificate it was opened with; a renewed identity means a new channel.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use countersign_api::svid::server_name;
use http::{Uri, uri::Authority};
use hyper_util::rt::TokioIo;
use rustls::{CertificateError, ClientConfig, OtherError};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint};

/// How long a connection may take to be made, TLS included.
pub(crate) const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// Longest message taken from control, in bytes: the snapshot of the largest mesh fits.
pub(crate) const MESSAGE_BYTES_MAX: usize = 256 * 1024 * 1024;
/// The protocol of gRPC.
pub(crate) const ALPN: &[&[u8]] = &[b"h2"];

/// Where the control planes of the mesh listen, and which of them is spoken to. Clones agree on that.
#[derive(Debug, Clone)]
pub(crate) struct ControlAddress {
    authorities: Vec<Authority>, // at least one
    current: Arc<AtomicUsize>,
}

/// The address given for control is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not the address of a control plane: {why}")]
pub struct ControlAddressError {
    /// What was given.
    pub given: String,
    /// The rule that it breaks.
    pub why: &'static str,
}

impl ControlAddress {
    /// Parses `https://host:port`, or several of them with commas between.
    pub(crate) fn parse(given: &str) -> Result<Self, ControlAddressError> {
        let authorities = given.split(',').map(|one| Self::parse_one(one.trim())).collect::<Result<_, _>>()?;
        Ok(Self { authorities, current: Arc::default() })
    }

    fn parse_one(given: &str) -> Result<Authority, ControlAddressError> {
        let no = |why| ControlAddressError { given: given.chars().take(200).collect(), why };
        let uri: Uri = given.parse().map_err(|_| no("it is not a URL"))?;
        if uri.scheme_str() != Some("https") {
            return Err(no("it must begin with `https://`"));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(no("it must end after the port"));
        }
        let authority = uri.authority().cloned().ok_or(no("it names no host"))?;
        if authority.as_str().contains('@') || authority.port_u16().is_none() {
            return Err(no("it must be `https://host:port`"));
        }
        Ok(authority)
    }

    fn current(&self) -> &Authority {
        &self.authorities[self.current.load(Ordering::Relaxed) % self.authorities.len()]
    }

    /// The one that was spoken to is gone, or of no use: the next time it is another one's turn.
    pub(crate) fn move_on(&self) {
        self.current.fetch_add(1, Ordering::Relaxed);
    }

    /// The address of this host from which control is reached, which is where the rest of the mesh finds this host.
    /// Asks the kernel which way a packet would take and sends none.
    pub(crate) async fn own_address(&self) -> io::Result<IpAddr> {
        let host = self.current().host().trim_start_matches('[').trim_end_matches(']');
        let port = self.current().port_u16().unwrap_or_default();
        let mut last = io::Error::other("the name has no address");
        for to in tokio::net::lookup_host((host, port)).await? {
            let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            match std::net::UdpSocket::bind((any, 0)).and_then(|socket| {
                socket.connect(to)?;
                socket.local_addr()
            }) {
                Ok(own) => return Ok(own.ip()),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Opens a channel with `tls`, which says who we are and whom we accept, to the first that answers.
    pub(crate) async fn connect(&self, tls: Arc<ClientConfig>) -> Result<Channel, tonic::transport::Error> {
        let mut others = self.authorities.len() - 1;
        loop {
            match self.connect_to(self.current().clone(), tls.clone()).await {
                Err(_) if others > 0 => {
                    others -= 1;
                    self.move_on();
                }
                Err(error) => {
                    self.move_on();
                    return Err(error);
                }
                Ok(channel) => return Ok(channel),
            }
        }
    }

    async fn connect_to(
        &self,
        authority: Authority,
        tls: Arc<ClientConfig>,
    ) -> Result<Channel, tonic::transport::Error> {
        let address = authority.as_str().to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let (address, tls) = (address.clone(), tls.clone());
            async move { dial(&address, tls).await.map(TokioIo::new) }
        });
        // The scheme is ours to hide: tonic refuses `https` unless its own TLS is compiled in.
        let uri = Uri::builder()
            .scheme("http")
            .authority(authority)
            .path_and_query("/")
            .build()
            .expect("INVARIANT: scheme, authority and path make a URI");
        Endpoint::from(uri)
            .connect_timeout(CONNECT_WITHIN)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5))
            .keep_alive_while_idle(true)
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20)
            .connect_with_connector(connector)
            .await
    }
}

async fn dial(address: &str, tls: Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    TlsConnector::from(tls).connect(server_name(), tcp).await.map_err(in_words)
}

/// What our own verifiers have against a peer, in their words: rustls shows it as a value.
fn in_words(error: io::Error) -> io::Error {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(why)))) => {
            io::Error::new(error.kind(), why.to_string())
        }
        _ => error,
    }
}

impl std::fmt::Display for ControlAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "https://{}", self.current())
    }
}

/// An error with everything that caused it, on one line: what goes into events and acknowledgements.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_control_is_https_with_a_port_and_nothing_else() {
        for (given, good) in [
            ("https://127.0.0.1:7443", true),
            ("https://control.example:7443/", true),
            ("https://[::1]:7443", true),
            ("http://127.0.0.1:7443", false),
            ("https://127.0.0.1", false),
            ("https://me@127.0.0.1:7443", false),
            ("https://127.0.0.1:7443/path", false),
            ("127.0.0.1:7443", false),
            ("https://10.0.0.1:7443,https://10.0.0.2:7443", true),
            ("https://10.0.0.1:7443, https://10.0.0.2:7443", true),
            ("https://10.0.0.1:7443,", false),
            ("https://10.0.0.1:7443,10.0.0.2:7443", false),
            ("", false),
        ] {
            assert_eq!(ControlAddress::parse(given).is_ok(), good, "{given}");
        }
    }
}
