//! Where sockets come from: this process's own network, or the workload's namespace through its broker. A socket stays
//! in the network it was made in, so everything after it is the same for both.
//!
//! Nothing here waits for a stranger: the broker is a local process, asked one thing at a time, and a broker that does
//! not answer within [`ANSWER_WITHIN`] is an error.

use std::{
    collections::VecDeque,
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
    os::fd::{FromRawFd, OwnedFd},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use countersign_api::broker::{self, Answer, Ask, BACKLOG, BROKER_FD, Request};
use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpSocket, TcpStream};

/// How long a broker may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Sockets fetched in advance: a burst of new connections to the workload takes no round trip each.
const IN_ADVANCE: usize = 16;

/// A source of sockets; clones share it.
#[derive(Clone)]
pub struct Sockets {
    broker: Option<Arc<Broker>>,
}

impl Sockets {
    /// Sockets of this process's own network.
    pub fn direct() -> Self {
        Self { broker: None }
    }

    /// Sockets of the namespace that `broker` serves.
    pub fn brokered(broker: OwnedFd) -> io::Result<Self> {
        rustix::net::sockopt::set_socket_timeout(&broker, rustix::net::sockopt::Timeout::Recv, Some(ANSWER_WITHIN))?;
        rustix::net::sockopt::set_socket_timeout(&broker, rustix::net::sockopt::Timeout::Send, Some(ANSWER_WITHIN))?;
        // Another sidecar may have died with questions open: its answers bear other numbers.
        let line = Arc::new(Mutex::new(Line { socket: broker, next_id: fastrand::u64(..) }));
        let ready = Arc::new(Mutex::new(VecDeque::with_capacity(IN_ADVANCE)));
        let (low, wanted) = sync_channel(1);
        let (for_line, for_ready) = (line.clone(), ready.clone());
        thread::Builder::new().name("broker".into()).spawn(move || fetch(&wanted, &for_line, &for_ready))?;
        let broker = Broker { line, ready, low };
        broker.fetch_soon();
        Ok(Self { broker: Some(Arc::new(broker)) })
    }

    /// Sockets of the namespace whose broker this process was started with. To be called once.
    #[allow(unsafe_code, reason = "a descriptor that was inherited is known by its number only")]
    pub fn inherited() -> io::Result<Self> {
        // SAFETY: the agent starts the sidecar of an isolated workload with this descriptor, and nothing else uses it.
        let broker = unsafe { OwnedFd::from_raw_fd(BROKER_FD) };
        rustix::io::fcntl_setfd(&broker, rustix::io::FdFlags::CLOEXEC)?;
        Self::brokered(broker)
    }

    /// A TCP listener, non-blocking.
    pub fn listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let socket = match &self.broker {
            Some(broker) => broker.ask(Ask::ListenTcp(address))?,
            None => {
                let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
                socket.set_reuse_address(true)?; // what the last process left in TIME_WAIT
                socket.bind(&address.into())?;
                socket.listen(BACKLOG)?;
                socket
            }
        };
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    }

    /// A bound UDP socket, non-blocking.
    pub fn bind_udp(&self, address: SocketAddr) -> io::Result<UdpSocket> {
        let socket = match &self.broker {
            Some(broker) => broker.ask(Ask::BindUdp(address))?,
            None => UdpSocket::bind(address)?.into(),
        };
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    }

    /// A TCP socket over IPv4, non-blocking, not yet connected. One that was fetched in advance, if there is one.
    pub fn socket(&self) -> io::Result<Socket> {
        let socket = match &self.broker {
            Some(broker) => broker.socket()?,
            None => Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?,
        };
        socket.set_nonblocking(true)?;
        Ok(socket)
    }

    /// Connects over IPv4. The stream belongs to the runtime this is called on.
    pub async fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        TcpSocket::from_std_stream(self.socket()?.into()).connect(address).await
    }
}

/// The conversation with a broker.
struct Line {
    socket: OwnedFd,
    next_id: u64,
}

struct Broker {
    line: Arc<Mutex<Line>>,
    ready: Arc<Mutex<VecDeque<Socket>>>,
    /// Wakes the thread that fetches; dropped, it ends that thread.
    low: SyncSender<()>,
}

impl Broker {
    fn ask(&self, ask: Ask) -> io::Result<Socket> {
        self.line.lock().ask(ask)
    }

    fn socket(&self) -> io::Result<Socket> {
        let (socket, left) = {
            let mut ready = self.ready.lock();
            (ready.pop_front(), ready.len())
        };
        if left < IN_ADVANCE / 2 {
            self.fetch_soon();
        }
        match socket {
            Some(socket) => Ok(socket),
            None => self.ask(Ask::SocketTcp),
        }
    }

    fn fetch_soon(&self) {
        let _ = self.low.try_send(()); // full: it is about to fetch anyway
    }
}

impl Line {
    fn ask(&mut self, ask: Ask) -> io::Result<Socket> {
        self.next_id = self.next_id.wrapping_add(1);
        let id = self.next_id;
        broker::send(&self.socket, &Request { id, ask }, None)?;
        loop {
            match broker::receive::<Answer>(&self.socket).map_err(too_late)? {
                Some((answer, _)) if answer.id != id => {}
                Some((Answer { refused: Some(refused), .. }, _)) => return Err(refused.into()),
                Some((_, Some(socket))) => return Ok(socket.into()),
                Some((_, None)) => return Err(io::Error::new(io::ErrorKind::InvalidData, "the broker sent no socket")),
                None => return Err(io::Error::new(io::ErrorKind::NotConnected, "the broker of the workload is gone")),
            }
        }
    }
}

fn too_late(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => {
            io::Error::new(io::ErrorKind::TimedOut, "the broker of the workload did not answer within 2 s")
        }
        _ => error,
    }
}

/// Keeps sockets ready. A broker that refuses is asked again when the next one is taken, by whoever takes it.
fn fetch(wanted: &Receiver<()>, line: &Mutex<Line>, ready: &Mutex<VecDeque<Socket>>) {
    while wanted.recv().is_ok() {
        while ready.lock().len() < IN_ADVANCE {
            let fetched = line.lock().ask(Ask::SocketTcp);
            match fetched {
                Ok(socket) => ready.lock().push_back(socket),
                Err(error) => {
                    tracing::debug!(%error, "could not fetch a socket in advance");
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::fd::AsFd,
    };

    use countersign_api::broker::Refused;

    use super::*;

    /// A broker of this process's own network that can be told to refuse; the number of sockets it made.
    fn serve(socket: OwnedFd, refuse: bool) -> thread::JoinHandle<usize> {
        thread::spawn(move || {
            let mut made = 0;
            while let Ok(Some((request, _))) = broker::receive::<Request>(&socket) {
                let direct = Sockets::direct();
                let answer: io::Result<OwnedFd> = match request.ask {
                    _ if refuse => Err(io::Error::from_raw_os_error(98)),
                    Ask::ListenTcp(address) => direct.listen(address).map(Into::into),
                    Ask::BindUdp(address) => direct.bind_udp(address).map(Into::into),
                    Ask::SocketTcp => direct.socket().map(Into::into),
                };
                made += usize::from(answer.is_ok());
                let os_error = answer.as_ref().err().and_then(io::Error::raw_os_error);
                let refused = answer.is_err().then(|| Refused { os_error, reason: "taken".into() });
                let fd = answer.as_ref().ok().map(AsFd::as_fd);
                if broker::send(&socket, &Answer { id: request.id, refused }, fd).is_err() {
                    break;
                }
            }
            made
        })
    }

    fn loopback() -> SocketAddr {
        ([127, 0, 0, 1], 0).into()
    }

    #[test]
    fn a_broker_that_refuses_says_why_and_one_that_is_gone_is_not_waited_for() {
        let (ours, theirs) = broker::pair().unwrap();
        let serving = serve(theirs, true);
        let sockets = Sockets::brokered(ours).unwrap();
        assert_eq!(sockets.listen(loopback()).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(sockets);
        assert_eq!(serving.join().unwrap(), 0);

        let (ours, theirs) = broker::pair().unwrap();
        drop(theirs);
        assert!(Sockets::brokered(ours).unwrap().socket().is_err());
    }

    #[test]
    fn an_answer_to_a_sidecar_that_died_is_not_taken_for_ours() {
        let (ours, theirs) = broker::pair().unwrap();
        let stale = TcpListener::bind(loopback()).unwrap();
        broker::send(&theirs, &Answer { id: 1, refused: None }, Some(stale.as_fd())).unwrap();
        let serving = serve(theirs, false);
        let sockets = Sockets::brokered(ours).unwrap();
        let ours = sockets.listen(loopback()).unwrap();
        assert_ne!(ours.local_addr().unwrap(), stale.local_addr().unwrap());
        drop(sockets);
        serving.join().unwrap();
    }

    #[test]
    fn sockets_are_fetched_before_they_are_wanted_and_never_without_bound() {
        let (ours, theirs) = broker::pair().unwrap();
        let serving = serve(theirs, false);
        let sockets = Sockets::brokered(ours).unwrap();
        let ready = sockets.broker.as_ref().unwrap().ready.clone();
        let holds = |count: usize| {
            (0..4_000).any(|_| {
                ready.lock().len() >= count || {
                    thread::sleep(Duration::from_millis(5));
                    false
                }
            })
        };
        assert!(holds(IN_ADVANCE), "nothing was fetched in advance");
        for _ in 0..100 {
            sockets.socket().unwrap();
        }
        // They are fetched when half of them are gone: what is left may be any number above that.
        assert!(holds(IN_ADVANCE / 2));
        drop(sockets);
        drop(ready);
        assert!(serving.join().unwrap() <= 100 + 2 * IN_ADVANCE);
    }

    #[test]
    fn clones_serve_runtimes_of_several_threads_through_one_broker() {
        let (ours, theirs) = broker::pair().unwrap();
        let serving = serve(theirs, false);
        let sockets = Sockets::brokered(ours).unwrap();
        let listener = sockets.listen(loopback()).unwrap();
        listener.set_nonblocking(false).unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = thread::spawn(move || {
            for _ in 0..40 {
                listener.accept().unwrap().0.write_all(b"hello").unwrap();
            }
        });
        let callers: Vec<_> = (0..4)
            .map(|_| {
                let sockets = sockets.clone();
                thread::spawn(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                    for _ in 0..10 {
                        let stream = runtime.block_on(sockets.connect(address)).unwrap().into_std().unwrap();
                        stream.set_nonblocking(false).unwrap();
                        let mut heard = String::new();
                        (&stream).read_to_string(&mut heard).unwrap();
                        assert_eq!(heard, "hello");
                    }
                })
            })
            .collect();
        callers.into_iter().for_each(|caller| caller.join().unwrap());
        accepting.join().unwrap();
        drop(sockets);
        serving.join().unwrap();
    }
}
