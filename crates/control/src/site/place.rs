//! Where the site listens, and the origin by which browsers know it. The origin is what passkeys are bound to: it is kept across
//! restarts, and no request under another one is served.

use std::{
    fs, io, iter,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
};

use tokio::net::TcpListener;
use webauthn_rs::{Webauthn, WebauthnBuilder, prelude::Url};

use countersign_core::{
    assurance::webauthn::{LOCAL_ORIGIN, RelyingParty},
    operator::EnrolledFactor,
    state::MeshState,
};

/// The file below the data directory that keeps the port of `http://localhost:PORT`.
pub const PORT_FILE: &str = "dashboard.port";

/// How the site is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SiteConfig {
    /// Where it listens. Port 0 takes the one that it had before, or picks one and keeps it.
    pub listen: SocketAddr,
    /// The origin that browsers see, `https://mesh.example:8443`; `http://localhost:PORT` when absent.
    pub origin: Option<String>,
    /// PEM files of the certificate chain and its key. Without them it speaks plain HTTP, on loopback only.
    pub tls: Option<TlsFiles>,
    /// A directory with a client secret for each sign-in whose provider gave the mesh one, in a file of its name.
    pub sign_in_secrets: Option<PathBuf>,
}

/// PEM files of a certificate chain and its private key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The chain, leaf first.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// The site as browsers know it.
pub struct Site {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Its origin, to the letter.
    pub origin: String,
    /// Host and port as a browser sends them.
    pub authority: String,
    /// Whether browsers reach it over HTTPS.
    pub is_https: bool,
    /// Where its ceremonies are held.
    pub relying_party: RelyingParty,
    /// Verifies what authenticators say of new credentials.
    pub webauthn: Webauthn,
    /// Where client secrets of sign-ins lie.
    pub sign_in_secrets: Option<PathBuf>,
}

/// Why the site is not served.
#[derive(Debug, thiserror::Error)]
pub enum SiteError {
    /// The address is taken or not ours.
    #[error("could not listen on {address} for browsers")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The port of the origin that passkeys were enrolled at is taken.
    #[error("port {port} of the dashboard is taken, and passkeys of this mesh were enrolled at it")]
    PortTaken {
        /// Which.
        port: u16,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read or written.
    #[error("could not use `{path}`")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The certificate or its key are of no use.
    #[error("the certificate in `{path}` cannot be used: {what}")]
    Certificate {
        /// Which.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// An origin that is none, or one at which no passkey works.
    #[error("`{origin}` cannot be the dashboard's origin: {what}")]
    Origin {
        /// As given.
        origin: String,
        /// Why.
        what: &'static str,
    },
    /// Plain HTTP where others could listen.
    #[error("plain HTTP on {0}, which others can reach")]
    PlainHttp(SocketAddr),
}

impl SiteError {
    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Listen { address, .. } => {
                format!("see what uses port {} with `ss -ltnp`, or choose another with --dashboard", address.port())
            }
            Self::PortTaken { port, .. } => {
                format!("free it (`ss -ltnp` shows who has it): a passkey works only at http://localhost:{port}")
            }
            Self::File { path, .. } => format!("check that {} exists and is readable for this user", path.display()),
            Self::Certificate { .. } => "give PEM files: the chain with the leaf first, and its private key".into(),
            Self::Origin { .. } => "give it as `https://mesh.example` or `https://mesh.example:8443`".into(),
            Self::PlainHttp(_) => {
                "give --dashboard-cert and --dashboard-key, or listen on 127.0.0.1, behind a proxy that speaks TLS if need be"
                    .into()
            }
        }
    }
}

impl Site {
    /// Binds the address. `state` says whether passkeys depend on the port that it had before.
    pub async fn bind(
        config: &SiteConfig,
        data_dir: &Path,
        state: &MeshState,
    ) -> Result<(Self, TcpListener), SiteError> {
        if config.tls.is_none() && !config.listen.ip().is_loopback() {
            return Err(SiteError::PlainHttp(config.listen));
        }
        let listener = match (config.listen.port(), &config.origin) {
            (0, None) => bind_kept(config.listen.ip(), data_dir, state).await?,
            _ => bound(config.listen).await?,
        };
        let listen = listener.local_addr().map_err(|source| SiteError::Listen { address: config.listen, source })?;
        let scheme = if config.tls.is_some() { "https" } else { "http" };
        let own = || format!("{scheme}://localhost:{}", listen.port());
        let site = Self::at(config.origin.clone().unwrap_or_else(own), listen)?;
        Ok((Self { sign_in_secrets: config.sign_in_secrets.clone(), ..site }, listener))
    }

    fn at(origin: String, listen: SocketAddr) -> Result<Self, SiteError> {
        let wrong = |what| SiteError::Origin { origin: origin.clone(), what };
        let url = Url::parse(&origin).map_err(|_| wrong("it is no URL"))?;
        let host =
            url.domain().ok_or_else(|| wrong("it needs a name: passkeys are not bound to addresses"))?.to_owned();
        let is_https = url.scheme() == "https";
        let is_own = url.scheme() == "http" && host == "localhost";
        if !is_https && !is_own {
            return Err(wrong("browsers use passkeys over https only, or at http://localhost"));
        }
        if url.origin().ascii_serialization() != origin {
            return Err(wrong("it must be a scheme, a name and a port, and nothing else"));
        }
        let authority = origin.split_once("://").map(|(_, authority)| authority.to_owned()).unwrap_or_default();
        let webauthn = WebauthnBuilder::new(&host, &url)
            .and_then(|builder| builder.rp_name("Countersign").build())
            .map_err(|_| wrong("passkeys cannot be bound to it"))?;
        // A key of this machine also signs on the page that a command serves here, where it verified the ledger itself.
        let commands = (host == "localhost").then(|| LOCAL_ORIGIN.to_owned());
        let relying_party = RelyingParty { id: host, origins: iter::once(origin.clone()).chain(commands).collect() };
        Ok(Self { listen, authority, is_https, relying_party, webauthn, origin, sign_in_secrets: None })
    }
}

async fn bound(address: SocketAddr) -> Result<TcpListener, SiteError> {
    TcpListener::bind(address).await.map_err(|source| SiteError::Listen { address, source })
}

/// The port is a part of the origin: the same one again after a restart, as long as it can be had.
async fn bind_kept(ip: IpAddr, data_dir: &Path, state: &MeshState) -> Result<TcpListener, SiteError> {
    let path = data_dir.join(PORT_FILE);
    let kept = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u16>().ok()).filter(|port| *port > 0);
    if let Some(port) = kept {
        match bound(SocketAddr::new(ip, port)).await {
            Ok(listener) => return Ok(listener),
            Err(SiteError::Listen { source, .. }) if depends_on(state, port) => {
                return Err(SiteError::PortTaken { port, source });
            }
            Err(_) => {}
        }
    }
    let listener = bound(SocketAddr::new(ip, 0)).await?;
    let port = listener.local_addr().map(|address| address.port()).unwrap_or(0);
    fs::write(&path, format!("{port}\n")).map_err(|source| SiteError::File { path, source })?;
    Ok(listener)
}

fn depends_on(state: &MeshState, port: u16) -> bool {
    let origin = format!("http://localhost:{port}");
    let factors = state.operators.values().flat_map(|operator| operator.factors.values());
    factors.filter_map(EnrolledFactor::signing_key).any(|key| key.relying_party.origins.contains(&origin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_at_which_no_passkey_would_work_is_refused() {
        let listen = "127.0.0.1:7440".parse().unwrap();
        for (origin, why) in [
            ("mesh.example", Some("it is no URL")),
            ("http://mesh.example", Some("browsers use passkeys over https only, or at http://localhost")),
            ("http://127.0.0.1:7440", Some("it needs a name: passkeys are not bound to addresses")),
            ("https://mesh.example/", Some("it must be a scheme, a name and a port, and nothing else")),
            ("https://mesh.example:443", Some("it must be a scheme, a name and a port, and nothing else")),
            ("https://user@mesh.example", Some("it must be a scheme, a name and a port, and nothing else")),
            ("https://mesh.example", None),
            ("https://mesh.example:8443", None),
            ("http://localhost:7440", None),
        ] {
            let found = match Site::at(origin.into(), listen) {
                Ok(site) => {
                    let commands = origin.starts_with("http://localhost:").then_some(LOCAL_ORIGIN);
                    let expected: Vec<_> = iter::once(origin).chain(commands).collect();
                    assert_eq!(site.relying_party.origins, expected);
                    None
                }
                Err(SiteError::Origin { what, .. }) => Some(what),
                Err(other) => panic!("{other}"),
            };
            assert_eq!(found, why, "{origin}");
        }
    }

    #[tokio::test]
    async fn the_port_stays_the_same_and_is_given_up_only_where_no_passkey_depends_on_it() {
        let dir = tempfile::tempdir().unwrap();
        let config =
            SiteConfig { listen: "127.0.0.1:0".parse().unwrap(), origin: None, tls: None, sign_in_secrets: None };
        let state = MeshState::default();
        let (site, held) = Site::bind(&config, dir.path(), &state).await.unwrap();
        let (other, _listener) = Site::bind(&config, dir.path(), &state).await.unwrap();
        assert_ne!(other.origin, site.origin, "the port was taken");
        drop((held, _listener));
        let (again, _listener) = Site::bind(&config, dir.path(), &state).await.unwrap();
        assert_eq!(again.origin, other.origin);
    }

    #[tokio::test]
    async fn plain_http_is_for_loopback_only() {
        let dir = tempfile::tempdir().unwrap();
        let config =
            SiteConfig { listen: "0.0.0.0:0".parse().unwrap(), origin: None, tls: None, sign_in_secrets: None };
        let refused = Site::bind(&config, dir.path(), &MeshState::default()).await;
        assert!(matches!(refused, Err(SiteError::PlainHttp(_))));
    }
}
