//! The broker: makes the sockets that a sidecar asks for in the network namespace of the workload, and gives them away.
//! It keeps none, so what a sidecar may hold is what bounds them.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use countersign_api::broker::{self, Answer, Ask, BACKLOG, Refused, Request};
use socket2::{Domain, Protocol, Socket, Type};

/// Answers one request; `false` when the sidecar's end is closed.
pub(super) fn answer(sidecar: BorrowedFd<'_>) -> io::Result<bool> {
    let request = match broker::receive::<Request>(sidecar) {
        Ok(Some((request, _))) => request,
        Ok(None) => return Ok(false),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(true),
        // A packet that is none of ours has no number to answer to.
        Err(e) if e.kind() == io::ErrorKind::InvalidData => return Ok(true),
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
        Err(e) => return Err(e),
    };
    let made = make(request.ask);
    let refused = made.as_ref().err().cloned();
    let socket = made.as_ref().ok().map(AsFd::as_fd);
    match broker::send(sidecar, &Answer { id: request.id, refused }, socket) {
        // It asked for more than it reads: it loses this answer.
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        sent => sent.map(|()| true),
    }
}

fn make(ask: Ask) -> Result<OwnedFd, Refused> {
    let (tried, made) = match ask {
        Ask::ListenTcp(address) => (format!("listen on {address}"), listen(address)),
        Ask::BindUdp(address) => (format!("bind {address}/udp"), bind(address)),
        Ask::SocketTcp => ("make a socket".to_owned(), Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))),
    };
    made.map(OwnedFd::from)
        .map_err(|e| Refused { os_error: e.raw_os_error(), reason: format!("could not {tried} for the workload: {e}") })
}

fn listen(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // Connections of a sidecar that was replaced may still be in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn bind(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.bind(&address.into())?;
    Ok(socket)
}
