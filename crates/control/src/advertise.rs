//! Where other hosts find this control plane: what an invitation names. Listening on every address says nothing of where
//! that is. Nothing is resolved and nothing is sent here.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket},
    str::FromStr,
};

/// Where operators say that other hosts find it: a name or an address, with a port or that of the listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertise {
    host: String, // IPv6 in brackets
    port: Option<u16>,
}

/// What was given is no such place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a host or `host:port`, for example `mesh.example.org:7443`")]
pub struct AdvertiseError(String);

impl FromStr for Advertise {
    type Err = AdvertiseError;

    fn from_str(given: &str) -> Result<Self, AdvertiseError> {
        if let Ok(ip) = given.parse::<IpAddr>() {
            return Ok(Self { host: bracketed(ip), port: None });
        }
        let wrong = || AdvertiseError(given.chars().take(200).collect());
        let authority: http::uri::Authority = given.parse().map_err(|_| wrong())?;
        let has_port = authority.as_str() != authority.host();
        if authority.host().is_empty() || authority.as_str().contains('@') || has_port && authority.port_u16().is_none()
        {
            return Err(wrong());
        }
        Ok(Self { host: authority.host().to_owned(), port: authority.port_u16() })
    }
}

/// What invitations name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Advertised {
    /// `https://host:port`.
    pub url: String,
    /// Why that may not be where another host finds it, and what to do.
    pub note: Option<String>,
}

/// What to name of a control plane that listens on `listen`. `own` is what this machine calls itself.
pub fn advertised(given: Option<&Advertise>, listen: SocketAddr, own: impl FnOnce() -> Own) -> Advertised {
    let url = |host: &str, port: u16| format!("https://{host}:{port}");
    if let Some(Advertise { host, port }) = given {
        return Advertised { url: url(host, port.unwrap_or(listen.port())), note: None };
    }
    if !listen.ip().is_unspecified() {
        let note = listen.ip().is_loopback().then(|| {
            format!(
                "the control plane listens on {listen}, which only this machine reaches; for other hosts start it with \
                 `--listen IP:PORT`"
            )
        });
        return Advertised { url: url(&bracketed(listen.ip()), listen.port()), note };
    }
    let (host, what) = match own() {
        Own { address: Some(ip), .. } => (bracketed(ip), "the address of this machine on its way out"),
        Own { address: None, name } => (name, "the name of this machine"),
    };
    let note = format!(
        "the control plane listens on every address, and {host} is {what}; where other hosts must use another, start it \
         with `--advertise HOST`"
    );
    Advertised { url: url(&host, listen.port()), note: Some(note) }
}

/// What a machine calls itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    /// Its address on the way out.
    pub address: Option<IpAddr>,
    /// Its host name.
    pub name: String,
}

impl Own {
    /// Asks the kernel.
    pub fn look() -> Self {
        let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
        // Connecting a datagram socket sends nothing: it only picks the route, and with it the address. Those asked for are
        // reserved for documentation.
        let ways: [(IpAddr, IpAddr); 2] = [
            (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into()),
            (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()),
        ];
        let address = ways.into_iter().find_map(|(any, there)| {
            let socket = UdpSocket::bind((any, 0)).ok()?;
            socket.connect((there, 9)).ok()?;
            Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_loopback() && !ip.is_unspecified())
        });
        Self { address, name }
    }
}

fn bracketed(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invitation_never_names_an_address_that_is_none() {
        let addressed = || Own { address: Some("192.0.2.7".parse().unwrap()), name: "alpha".into() };
        let alone = || Own { address: None, name: "alpha".into() };
        for (given, listen, own, url, noted) in [
            (None, "192.0.2.1:7443", addressed(), "https://192.0.2.1:7443", None),
            (None, "127.0.0.1:7443", addressed(), "https://127.0.0.1:7443", Some("only this machine reaches")),
            (None, "0.0.0.0:7443", addressed(), "https://192.0.2.7:7443", Some("listens on every address")),
            (None, "[::]:7443", addressed(), "https://192.0.2.7:7443", Some("listens on every address")),
            (None, "0.0.0.0:7443", alone(), "https://alpha:7443", Some("the name of this machine")),
            (None, "[2001:db8::5]:7443", alone(), "https://[2001:db8::5]:7443", None),
            (Some("mesh.example.org"), "0.0.0.0:7443", alone(), "https://mesh.example.org:7443", None),
            (Some("mesh.example.org:443"), "0.0.0.0:7443", alone(), "https://mesh.example.org:443", None),
            (Some("2001:db8::5"), "127.0.0.1:7443", alone(), "https://[2001:db8::5]:7443", None),
            (Some("[2001:db8::5]:1"), "127.0.0.1:7443", alone(), "https://[2001:db8::5]:1", None),
        ] {
            let given: Option<Advertise> = given.map(|given| given.parse().unwrap());
            let told = advertised(given.as_ref(), listen.parse().unwrap(), || own);
            assert_eq!(told.url, url, "{given:?} {listen}");
            match noted {
                None => assert_eq!(told.note, None, "{given:?} {listen}"),
                Some(noted) => assert!(told.note.as_ref().unwrap().contains(noted), "{told:?}"),
            }
        }
    }

    #[test]
    fn a_place_that_is_none_is_refused() {
        for given in ["", ":7443", "a b", "user@host", "host:", "host:99999", "https://host:1", "host/path"] {
            assert!(given.parse::<Advertise>().is_err(), "{given}");
        }
    }
}
