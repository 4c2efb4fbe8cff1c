//! The names of the mesh inside the workload's own namespace: `<service>.mesh` means a loopback address of its own for each
//! service that the view shows, and this sidecar listens there. Only an isolated workload has them: elsewhere these
//! addresses would be shared with everybody on the host.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::Arc,
};

use countersign_core::{identity::ServiceName, view::View};
use tracing::warn;

use crate::{
    dns,
    listen::Sockets,
    shared::{Door, Shared},
};

/// Where the namespace's `resolv.conf` sends questions.
const DNS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(127, 81, 0, 53)), 53);
/// Most services that are listened for by name; more are reached through the forward proxy.
const NAMES_MAX: usize = 2048;

/// The listeners that follow the view.
pub(super) struct Names {
    sockets: Sockets,
    shared: Arc<Shared>,
    /// The listener of each declared upstream. It has the same door as its name, so it is opened again when a name closes.
    upstreams: BTreeMap<ServiceName, TcpListener>,
    open: BTreeMap<ServiceName, (SocketAddr, TcpListener)>,
}

impl Names {
    /// Serves the DNS, and keeps what [`Self::follow`] needs. To be called on the runtime of the link.
    pub fn start(
        sockets: Sockets,
        shared: Arc<Shared>,
        upstreams: BTreeMap<ServiceName, TcpListener>,
    ) -> io::Result<Self> {
        let lookup = {
            let shared = shared.clone();
            move |service: &str| {
                let service = ServiceName::parse(service).ok()?;
                Some(shared.view()?.visible(&service)?.address)
            }
        };
        let udp = tokio::net::UdpSocket::from_std(sockets.bind_udp(DNS)?)?;
        let tcp = tokio::net::TcpListener::from_std(sockets.listen(DNS)?)?;
        tokio::spawn(dns::serve_udp(udp, lookup.clone()));
        tokio::spawn(dns::serve_tcp(tcp, lookup));
        Ok(Self { sockets, shared, upstreams, open: BTreeMap::new() })
    }

    /// Listens for the services that `view` shows, and for no other. Waits for the broker, so not for a thread that carries
    /// traffic. An address that cannot be listened on is said and tried again with the next view.
    pub fn follow(&mut self, view: &View) {
        let wanted: BTreeMap<&ServiceName, SocketAddr> = view
            .services
            .iter()
            .take(NAMES_MAX)
            .map(|(service, visible)| (service, SocketAddr::from((visible.address, visible.port))))
            .collect();
        let gone: Vec<ServiceName> = self
            .open
            .iter()
            .filter(|(name, (at, _))| wanted.get(name) != Some(at))
            .map(|(name, _)| name.clone())
            .collect();
        for service in gone {
            let door = Door::Upstream(service.clone());
            self.shared.close(&door);
            self.open.remove(&service);
            if let Some(Ok(listener)) = self.upstreams.get(&service).map(TcpListener::try_clone) {
                self.shared.open(door, listener);
            }
        }
        for (service, address) in wanted {
            if self.open.contains_key(service) {
                continue;
            }
            match self.sockets.listen(address).and_then(|listener| Ok((listener.try_clone()?, listener))) {
                Ok((ours, theirs)) => {
                    self.shared.open(Door::Upstream(service.clone()), theirs);
                    self.open.insert(service.clone(), (address, ours));
                }
                Err(error) => warn!(%error, %service, %address, "could not listen for a service by its name"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use countersign_core::{
        change::Revision,
        identity::{InstanceId, TrustDomain},
        service::{Protocol, Tokens},
        view::VisibleService,
    };

    use super::*;
    use crate::shared::Setup;

    fn view(services: &[(&str, [u8; 4], u16)]) -> View {
        let visible = |(name, address, port): &(&str, [u8; 4], u16)| {
            let visible = VisibleService {
                protocol: Protocol::Http,
                address: (*address).into(),
                port: *port,
                tokens: Tokens::Optional,
            };
            (ServiceName::parse(name).unwrap(), visible)
        };
        View {
            revision: Revision(1),
            trust_domain: TrustDomain::parse("shop.example").unwrap(),
            service: ServiceName::parse("web").unwrap(),
            spec: None,
            contract: None,
            policies: Vec::new(),
            roles: BTreeMap::new(),
            services: services.iter().map(visible).collect(),
            routes: BTreeMap::new(),
            barred: [].into(),
            edges: [].into(),
        }
    }

    #[test]
    fn a_name_that_left_the_view_or_moved_is_not_listened_for_any_more() {
        let instance = InstanceId::parse("web/1").unwrap();
        let shared = Arc::new(Shared::new(Setup { instance, app: None, worker_count: 1, tracing: None }));
        let (sockets, upstreams) = (Sockets::direct(), BTreeMap::new());
        let mut names = Names { sockets, shared, upstreams, open: BTreeMap::new() };
        let [port, other] = [0, 1].map(|_| TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port());
        let (catalog, orders) = ([127, 81, 250, 1], [127, 81, 250, 2]);
        let is_open = |address, port| TcpStream::connect((Ipv4Addr::from(address), port)).is_ok();
        for (services, expected) in [
            (&[("catalog", catalog, port)][..], [true, false, false]),
            (&[("catalog", catalog, port), ("orders", orders, port)], [true, true, false]),
            (&[("catalog", catalog, other), ("orders", orders, port)], [false, true, true]),
            (&[("orders", catalog, port)], [true, false, false]),
            (&[], [false, false, false]),
        ] {
            names.follow(&view(services));
            let open = [is_open(catalog, port), is_open(orders, port), is_open(catalog, other)];
            assert_eq!(open, expected, "{services:?}");
        }
    }
}
