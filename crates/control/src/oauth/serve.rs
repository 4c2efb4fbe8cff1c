//! Connections of clients: TLS 1.3 alone, with a certificate that names the host and, if the client has one, its SVID; and a bound for
//! everything a stranger can hold open.

use std::{
    collections::HashMap,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use parking_lot::{Mutex, RwLock};
use rcgen::SanType;
use rustls::{
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use countersign_api::svid::{Bundle, ClientCertificate, VerifiedPeer, pem, provider};

use super::place::{CA_FILE, Place};
use crate::{
    Plane,
    agents::Proven,
    authority::{Authority, AuthorityError},
    site::{
        guard::network_of,
        serve::{HEAD_WITHIN, bounded},
    },
};

/// Connections that are open at the same time, and those of one address.
const CONNECTIONS_MAX: usize = 512;
const OF_ONE_ADDRESS_MAX: usize = 256;
/// How long a connection lasts at most.
const CONNECTION_WITHIN: Duration = Duration::from_secs(5 * 60);
/// Longest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 32 * 1024;
/// Requests at once on one HTTP/2 connection.
const STREAMS_MAX: u32 = 32;
/// How often it is looked whether the certificate is to be replaced.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// Whom a request is from: the address that the kernel says, and who is at the other end, if they showed it.
#[derive(Clone)]
pub struct Connected {
    /// The address.
    pub from: IpAddr,
    /// By what the other end proved who it is.
    pub(crate) peer: Option<Arc<Proven>>,
}

/// The certificate that clients are shown.
struct Shown {
    names: Vec<SanType>,
    ca: PathBuf,
    held: RwLock<Held>,
}

struct Held {
    key: Arc<CertifiedKey>,
    /// What it rests on.
    bundle: u64,
    renew_at_ms: u64,
}

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shown({:?})", self.names)
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.held.read().key.clone())
    }
}

impl Shown {
    async fn new(
        plane: &Plane,
        authority: &Authority,
        names: Vec<SanType>,
        data_dir: &Path,
    ) -> Result<Self, AuthorityError> {
        let ca = data_dir.join(CA_FILE);
        let held = RwLock::new(Self::issue(plane, authority, &names, &ca).await?);
        Ok(Self { names, ca, held })
    }

    async fn issue(plane: &Plane, authority: &Authority, names: &[SanType], ca: &Path) -> Result<Held, AuthorityError> {
        let bundle = authority.bundle();
        let (key, issued) = authority.issue_server(names.to_vec()).await?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let key = provider().key_provider.load_private_key(key);
        let key = key.map_err(|_| AuthorityError::Request("the key of the token service cannot be used"))?;
        let now_ms = plane.clock.now_ms();
        tell(&bundle, ca).await;
        Ok(Held {
            key: Arc::new(CertifiedKey::new(issued.chain, key)),
            bundle: bundle.sequence(),
            renew_at_ms: now_ms + issued.expires_at_ms.saturating_sub(now_ms) / 2,
        })
    }

    /// Replaces the certificate at half its life, and when what it rests on changes.
    async fn renew(&self, plane: &Plane, authority: &Authority) {
        let (bundle, renew_at_ms) = {
            let held = self.held.read();
            (held.bundle, held.renew_at_ms)
        };
        if plane.clock.now_ms() < renew_at_ms && bundle == authority.bundle().sequence() {
            return;
        }
        match Self::issue(plane, authority, &self.names, &self.ca).await {
            Ok(held) => *self.held.write() = held,
            Err(error) => tracing::warn!(%error, "the certificate of the token service could not be renewed"),
        }
    }
}

/// Writes down what clients verify the certificate with, for those who copy it.
async fn tell(bundle: &Bundle, ca: &Path) {
    let text: String = bundle.authorities().iter().map(|root| pem("CERTIFICATE", root)).collect();
    let new = ca.with_extension("new");
    let written = match tokio::fs::write(&new, text).await {
        Ok(()) => tokio::fs::rename(&new, ca).await,
        Err(error) => Err(error),
    };
    if let Err(error) = written {
        tracing::warn!(%error, path = %ca.display(), "the certificates of the token service could not be written");
    }
}

/// Connections of each address, counted.
#[derive(Default)]
struct Counted(Mutex<HashMap<IpAddr, usize>>);

/// One that is counted until it is dropped.
struct Counting(Arc<Counted>, IpAddr);

impl Counted {
    fn enter(self: &Arc<Self>, from: IpAddr) -> Option<Counting> {
        let from = network_of(from);
        let mut counted = self.0.lock();
        let count = counted.entry(from).or_default();
        (*count < OF_ONE_ADDRESS_MAX).then(|| {
            *count += 1;
            Counting(self.clone(), from)
        })
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        let mut counted = self.0.0.lock();
        if let Some(count) = counted.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                counted.remove(&self.1);
            }
        }
    }
}

/// Serves until the task is dropped, from when the mesh has an authority.
pub async fn serve(plane: Arc<Plane>, place: Place, router: Router) {
    let identity = plane.identity().await;
    let Some(authority) = plane.authority() else { return };
    let shown = loop {
        match Shown::new(&plane, &authority, place.names.clone(), &plane.data_dir).await {
            Ok(shown) => break Arc::new(shown),
            Err(error) => tracing::warn!(%error, "the token service has no certificate yet"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    };
    let config = identity.server_config_that_shows(shown.clone(), ClientCertificate::Optional, &[b"h2", b"http/1.1"]);
    let acceptor = TlsAcceptor::from(config);
    let (room, counted) = (Arc::new(Semaphore::new(CONNECTIONS_MAX)), Arc::new(Counted::default()));
    let accept = async {
        loop {
            let (stream, address) = match place.listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "a connection to the token service could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            // Without room it is closed at once: whoever waits in line could wait for ever.
            let Ok(held) = room.clone().try_acquire_owned() else { continue };
            let Some(counted) = counted.enter(address.ip()) else { continue };
            // From before the handshake: it is looked at again if this one is not in force any more.
            let bundle = identity.bundle();
            tokio::spawn(connection(stream, address.ip(), acceptor.clone(), bundle, router.clone(), (held, counted)));
        }
    };
    let renew = async {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            shown.renew(&plane, &authority).await;
        }
    };
    tokio::select! {
        () = accept => {}
        () = renew => {}
    }
}

async fn connection(
    stream: TcpStream,
    from: IpAddr,
    acceptor: TlsAcceptor,
    bundle: Arc<Bundle>,
    router: Router,
    _held: (OwnedSemaphorePermit, Counting),
) {
    let _ = stream.set_nodelay(true);
    let Ok(Ok(stream)) = timeout(HEAD_WITHIN, acceptor.accept(stream)).await else { return };
    let peer = VerifiedPeer::of_connection(stream.get_ref().1).map(|verified| {
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default().to_vec();
        Arc::new(Proven::new(verified, chain, bundle))
    });
    let connected = Connected { from, peer };
    let service = router.map_request(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(connected.clone());
        request
    });
    let http = bounded(HEAD_BYTES_MAX, STREAMS_MAX);
    let serving = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    // A stranger's broken connection is nobody's business.
    let _ = timeout(CONNECTION_WITHIN, serving).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_does_not_take_all_the_room() {
        let counted = Arc::new(Counted::default());
        let from: IpAddr = "192.0.2.1".parse().unwrap();
        let held: Vec<_> = (0..OF_ONE_ADDRESS_MAX).map(|_| counted.enter(from).unwrap()).collect();
        assert!(counted.enter(from).is_none());
        assert!(counted.enter("192.0.2.2".parse().unwrap()).is_some());
        drop(held);
        assert!(counted.enter(from).is_some());
        assert!(counted.0.lock().is_empty(), "nothing is kept of who is gone");
    }
}
