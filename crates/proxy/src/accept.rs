//! A connection comes in. Bounded before anything is read of it; what it may become is decided by its door.

use std::{
    net::{SocketAddr, TcpListener},
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

use crate::{serve, shared::Door, workers::Worker};

/// Connections one worker keeps open on all its listeners.
pub(crate) const CONNECTIONS_MAX: u64 = 16_384;
/// Unanswered bytes or probes for this long mean that the other end is gone.
const PEER_GONE_AFTER: Duration = Duration::from_secs(20);

/// A connection that came in by one of our listeners; nothing is known of the other end but where it says it is.
pub(crate) struct Accepted {
    stream: TcpStream,
    from: SocketAddr,
}

impl Accepted {
    pub(crate) fn into_parts(self) -> (TcpStream, SocketAddr) {
        (self.stream, self.from)
    }
}

/// Accepts at `door` until the task is aborted.
pub(crate) async fn accept(worker: Rc<Worker>, door: Door, listener: Arc<TcpListener>) {
    // Each worker has a descriptor of its own: its runtime's epoll then knows when it closes.
    let listener = listener.try_clone().and_then(|l| l.set_nonblocking(true).map(|()| l));
    let listener = match listener.and_then(tokio::net::TcpListener::from_std) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(?door, %error, "could not listen");
            return;
        }
    };
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: waiting is better than spinning, and connections that end help.
                tracing::warn!(?door, %error, "could not accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        if worker.counts.connections_open.get() >= CONNECTIONS_MAX {
            worker.counts.connections_refused.add(1);
            continue; // closing at once tells a client more than a connection that hangs
        }
        tune(&stream);
        let (worker, door) = (worker.clone(), door.clone());
        tokio::task::spawn_local(async move {
            worker.counts.connections_open.add(1);
            serve::connection(&worker, &door, Accepted { stream, from }).await;
            worker.counts.connections_open.sub(1);
        });
    }
}

/// Small writes leave at once, and a peer that vanished is noticed.
pub(crate) fn tune(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_nodelay(true); // each of these is an optimisation; without it the connection still works
    let _ = socket.set_tcp_user_timeout(Some(PEER_GONE_AFTER));
    let _ =
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(PEER_GONE_AFTER).with_interval(PEER_GONE_AFTER / 4));
}
