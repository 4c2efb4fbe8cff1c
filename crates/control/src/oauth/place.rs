//! Where the token service listens, and the URL that it issues as. It stands in every token and every client holds it to the letter, so
//! it stays the same across restarts.

use std::{
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use rcgen::SanType;
use tokio::net::TcpListener;
use webauthn_rs::prelude::Url;

/// The file below the data directory that keeps the port, where none was named.
pub const PORT_FILE: &str = "token.port";
/// The file below the data directory with the certificates that clients verify the listener with.
pub const CA_FILE: &str = "token-ca.pem";

/// How the token service is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OauthConfig {
    /// Where it listens. Port 0 takes the one that it had before, or picks one and keeps it.
    pub listen: SocketAddr,
    /// The URL that it issues as, `https://tokens.example:8443`; `https://IP:PORT` when absent.
    pub issuer: Option<String>,
}

/// Why the token service is not served.
#[derive(Debug, thiserror::Error)]
pub enum OauthError {
    /// The address is taken or not ours.
    #[error("could not listen on {address} for clients of the token service")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("could not write `{path}`")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A URL that no client could hold on to.
    #[error("`{issuer}` cannot be the issuer of tokens: {what}")]
    Issuer {
        /// As given.
        issuer: String,
        /// Why.
        what: &'static str,
    },
}

impl OauthError {
    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Listen { address, .. } => {
                format!("see what uses port {} with `ss -ltnp`, or choose another with --oauth", address.port())
            }
            Self::File { path, .. } => format!("check that {} can be written by this user", path.display()),
            Self::Issuer { .. } => {
                "give --oauth-url as `https://tokens.example` or `https://tokens.example:8443`".into()
            }
        }
    }
}

/// The address, bound; the URL, and the names that its certificate needs.
pub struct Place {
    /// Where it listens.
    pub listener: TcpListener,
    /// The URL.
    pub issuer: String,
    /// What its certificate names.
    pub names: Vec<SanType>,
}

impl Place {
    /// Binds the address.
    pub async fn bind(config: &OauthConfig, data_dir: &Path) -> Result<Self, OauthError> {
        let listener = match (config.listen.port(), &config.issuer) {
            (0, None) => bind_kept(config.listen, data_dir).await?,
            _ => bound(config.listen).await?,
        };
        let listen = listener.local_addr().map_err(|source| OauthError::Listen { address: config.listen, source })?;
        let issuer = match &config.issuer {
            Some(given) => given.clone(),
            None if listen.ip().is_unspecified() => {
                let what = "the token service listens on every address, and has no name";
                return Err(OauthError::Issuer { issuer: format!("https://{listen}"), what });
            }
            None => format!("https://{listen}"),
        };
        let names = names(&issuer, listen)?;
        Ok(Self { listener, issuer, names })
    }
}

/// What the certificate of a listener at `listen` names, so that clients who know it as `issuer` recognise it.
fn names(issuer: &str, listen: SocketAddr) -> Result<Vec<SanType>, OauthError> {
    let wrong = |what| OauthError::Issuer { issuer: issuer.to_owned(), what };
    let url = Url::parse(issuer).map_err(|_| wrong("it is no URL"))?;
    if url.scheme() != "https" {
        return Err(wrong("tokens go over https only"));
    }
    // Clients compare it to the letter (RFC 8414, 3.3), and the metadata stand at the root of the host.
    if url.origin().ascii_serialization() != issuer {
        return Err(wrong("it must be a scheme, a host and a port that is not the usual one, and nothing else"));
    }
    let host = url.host_str().ok_or_else(|| wrong("it has no host"))?;
    let host = match host.trim_start_matches('[').trim_end_matches(']').parse() {
        Ok(address) => SanType::IpAddress(address),
        Err(_) => SanType::DnsName(host.try_into().map_err(|_| wrong("its host is no name of DNS"))?),
    };
    let own = SanType::IpAddress(listen.ip());
    let mut names = vec![host];
    if !listen.ip().is_unspecified() && !names.contains(&own) {
        names.push(own);
    }
    Ok(names)
}

async fn bound(address: SocketAddr) -> Result<TcpListener, OauthError> {
    TcpListener::bind(address).await.map_err(|source| OauthError::Listen { address, source })
}

/// The port that it had before, as long as it can be had: it is a part of the issuer.
async fn bind_kept(listen: SocketAddr, data_dir: &Path) -> Result<TcpListener, OauthError> {
    let path = data_dir.join(PORT_FILE);
    let kept = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u16>().ok()).filter(|port| *port > 0);
    if let Some(port) = kept
        && let Ok(listener) = bound(SocketAddr::new(listen.ip(), port)).await
    {
        return Ok(listener);
    }
    let listener = bound(listen).await?;
    let port = listener.local_addr().map(|address| address.port()).unwrap_or(0);
    fs::write(&path, format!("{port}\n")).map_err(|source| OauthError::File { path, source })?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_issuer_that_clients_could_not_hold_to_the_letter_is_refused() {
        let listen: SocketAddr = "10.0.0.7:8443".parse().unwrap();
        for (issuer, why) in [
            ("https://tokens.example", None),
            ("https://tokens.example:8443", None),
            ("https://10.0.0.7:8443", None),
            ("https://[::1]:8443", None),
            ("https://tokens.example/", Some("nothing else")),
            ("https://tokens.example/mesh", Some("nothing else")),
            ("https://tokens.example:443", Some("nothing else")),
            ("https://Tokens.example", Some("nothing else")),
            ("https://a@tokens.example", Some("nothing else")),
            ("https://tokens.example?a=b", Some("nothing else")),
            ("http://tokens.example", Some("https only")),
            ("tokens.example", Some("no URL")),
        ] {
            let found = names(issuer, listen).err().map(|error| error.to_string());
            assert_eq!(found.is_some(), why.is_some(), "{issuer}: {found:?}");
            assert!(found.is_none_or(|found| found.contains(why.unwrap_or_default())), "{issuer}");
        }
        assert_eq!(names("https://10.0.0.7:8443", listen).unwrap().len(), 1);
        assert_eq!(names("https://tokens.example", listen).unwrap().len(), 2);
    }

    #[tokio::test]
    async fn the_port_stays_the_same_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let config = OauthConfig { listen: "127.0.0.1:0".parse().unwrap(), issuer: None };
        let first = Place::bind(&config, dir.path()).await.unwrap().issuer;
        assert_eq!(Place::bind(&config, dir.path()).await.unwrap().issuer, first);
        let everywhere = OauthConfig { listen: "0.0.0.0:0".parse().unwrap(), issuer: None };
        assert!(Place::bind(&everywhere, dir.path()).await.is_err(), "it has no name");
    }
}
