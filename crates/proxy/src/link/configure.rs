//! The agent's first order, parsed, and the listeners it asks for. All of them are bound before the sidecar says where
//! it listens.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::{SocketAddr, TcpListener},
    path::PathBuf,
};

use countersign_api::sidecar::{Configure, Listening};
use countersign_core::identity::{InstanceId, NameError, ServiceName};
use socket2::{Domain, Socket, Type};

use crate::{
    listen::Sockets,
    shared::{App, Door, Shared},
    trace::Sampling,
};

/// Most threads of one sidecar.
const WORKERS_MAX: u32 = 256;

/// A `Configure`, parsed.
pub(super) struct Configuration {
    pub instance: InstanceId,
    pub worker_count: usize,
    app: Option<SocketAddr>,
    pub records_dir: PathBuf,
    pub records_bytes_max: u64,
    inbound: SocketAddr,
    outbound_http: SocketAddr,
    upstreams: BTreeMap<ServiceName, SocketAddr>,
    admin: SocketAddr,
    isolated: bool,
    pub transparent: bool,
    pub sampling: Option<Sampling>,
}

/// Every listener, bound and not yet open.
pub(super) struct Listeners {
    doors: Vec<(Door, TcpListener, SocketAddr)>,
    admin: (TcpListener, SocketAddr),
}

/// Why a sidecar cannot be as the agent wants it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigureError {
    /// A name that is none.
    #[error("`{member}` is wrong")]
    Name {
        /// The member of `Configure`.
        member: &'static str,
        /// The rule that it breaks.
        source: NameError,
    },
    /// An address that is none.
    #[error("`{member}` must be `ip:port`, not `{given}`")]
    Address {
        /// The member of `Configure`.
        member: &'static str,
        /// What was given.
        given: String,
    },
    /// A number of threads out of bounds.
    #[error("`workers` must be 1 to {WORKERS_MAX}, not {0}")]
    Workers(u32),
    /// The addresses of services by name would be shared with everybody on the host.
    #[error("`transparent` needs a workload that is `isolated`")]
    NotIsolated,
    /// The broker of the workload's namespace was not handed over.
    #[error("could not reach the broker of the workload's namespace")]
    NoBroker(#[source] io::Error),
    /// An address that is taken, or not of this host.
    #[error("could not listen on {address} for {door}")]
    Listen {
        /// What for.
        door: String,
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
}

impl Configuration {
    pub fn parse(given: Configure) -> Result<Self, ConfigureError> {
        if given.transparent && !given.isolated {
            return Err(ConfigureError::NotIsolated);
        }
        let app = (!given.app_address.is_empty()).then(|| address("app_address", &given.app_address)).transpose()?;
        Ok(Self {
            instance: InstanceId::parse(&given.instance)
                .map_err(|source| ConfigureError::Name { member: "instance", source })?,
            worker_count: match given.workers {
                workers @ 1..=WORKERS_MAX => workers as usize,
                workers => return Err(ConfigureError::Workers(workers)),
            },
            app,
            records_dir: given.records_dir.into(),
            records_bytes_max: given.records_bytes_max,
            inbound: address("inbound_listen", &given.inbound_listen)?,
            outbound_http: address("outbound_http_listen", &given.outbound_http_listen)?,
            upstreams: upstreams(&given.upstreams)?,
            admin: address("admin_listen", &given.admin_listen)?,
            isolated: given.isolated,
            transparent: given.transparent,
            sampling: given.sampling.map(|sampling| Sampling::new(sampling.follow_parent, sampling.ratio)),
        })
    }

    /// Where the workload's side has its sockets: in its own namespace when it is isolated.
    pub fn sockets(&self) -> Result<Sockets, ConfigureError> {
        if self.isolated { Sockets::inherited().map_err(ConfigureError::NoBroker) } else { Ok(Sockets::direct()) }
    }

    /// How to reach the workload.
    pub fn app(&self, sockets: &Sockets) -> Option<App> {
        let (address, isolated, sockets) = (self.app?, self.isolated, sockets.clone());
        let socket = move || {
            if isolated { sockets.socket() } else { Socket::new(Domain::for_address(address), Type::STREAM, None) }
        };
        Some(App { address, socket: Box::new(socket) })
    }
}

impl Listeners {
    /// Binds every listener, or says which one could not be.
    pub fn bind(wanted: &Configuration, of_workload: &Sockets) -> Result<Self, ConfigureError> {
        let of_host = Sockets::direct();
        let upstreams = wanted.upstreams.iter().map(|(service, address)| (Door::Upstream(service.clone()), *address));
        let doors = [(Door::Inbound, wanted.inbound), (Door::ForwardProxy, wanted.outbound_http)];
        let doors = doors.into_iter().chain(upstreams).map(|(door, address)| {
            let sockets = if door == Door::Inbound { &of_host } else { of_workload };
            let (listener, bound) = listen(&format!("{door:?}"), sockets, address)?;
            Ok((door, listener, bound))
        });
        let doors = doors.collect::<Result<_, ConfigureError>>()?;
        Ok(Self { doors, admin: listen("the admin pages", &of_host, wanted.admin)? })
    }

    /// Where other sidecars reach this one, and it itself.
    pub fn inbound(&self) -> SocketAddr {
        let inbound = self.doors.iter().find(|(door, ..)| *door == Door::Inbound);
        inbound.expect("INVARIANT: every sidecar has that door").2
    }

    /// Where everything listens.
    pub fn listening(&self) -> Listening {
        let mut listening = Listening { admin: format!("http://{}", self.admin.1), ..Listening::default() };
        for (door, _, address) in &self.doors {
            match door {
                Door::Inbound => listening.inbound = address.to_string(),
                Door::ForwardProxy => listening.outbound_http = address.to_string(),
                Door::Upstream(service) => {
                    listening.upstreams.insert(service.to_string(), address.to_string());
                }
            }
        }
        listening
    }

    /// A second handle to the listener of each upstream.
    pub fn upstreams(&self) -> io::Result<BTreeMap<ServiceName, TcpListener>> {
        let upstreams = self.doors.iter().filter_map(|(door, listener, _)| match door {
            Door::Upstream(service) => Some(listener.try_clone().map(|listener| (service.clone(), listener))),
            Door::Inbound | Door::ForwardProxy => None,
        });
        upstreams.collect()
    }

    /// Lets the workers accept; hands back the listener of the admin pages.
    pub fn open(self, shared: &Shared) -> TcpListener {
        for (door, listener, _) in self.doors {
            shared.open(door, listener);
        }
        self.admin.0
    }
}

fn upstreams(given: &HashMap<String, String>) -> Result<BTreeMap<ServiceName, SocketAddr>, ConfigureError> {
    let parse = |(service, listen): (&String, &String)| {
        let service =
            ServiceName::parse(service).map_err(|source| ConfigureError::Name { member: "upstreams", source })?;
        Ok((service, address("upstreams", listen)?))
    };
    given.iter().map(parse).collect()
}

fn address(member: &'static str, given: &str) -> Result<SocketAddr, ConfigureError> {
    given.parse().map_err(|_| ConfigureError::Address { member, given: given.chars().take(100).collect() })
}

fn listen(door: &str, sockets: &Sockets, address: SocketAddr) -> Result<(TcpListener, SocketAddr), ConfigureError> {
    let bound = || {
        let listener = sockets.listen(address)?;
        let bound = listener.local_addr()?;
        Ok((listener, bound))
    };
    bound().map_err(|source| ConfigureError::Listen { door: door.into(), address, source })
}
