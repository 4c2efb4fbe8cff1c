//! A proxy and the broker of its workload's network namespace: one [`Request`] per packet of an inherited
//! `SOCK_SEQPACKET` pair, one [`Answer`] per request, in order. A granted answer carries the socket (`SCM_RIGHTS`); a
//! socket stays in the namespace it was made in, whoever holds it. Nothing here decides what may be asked: whoever holds
//! the other end was given it by the agent.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    net::SocketAddr,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

pub use crate::sidecar::BROKER_FD;

/// Longest packet, in bytes.
pub const PACKET_BYTES_MAX: usize = 4096;
/// Connections that wait to be accepted on a listener that the broker makes.
pub const BACKLOG: i32 = 1024;

/// What a proxy asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Repeated in the answer. A proxy that replaces a dead one starts from another number, and drops what it did not ask for.
    pub id: u64,
    /// The socket it wants.
    pub ask: Ask,
}

/// A socket inside the namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// A TCP socket that listens on this address.
    ListenTcp(SocketAddr),
    /// A UDP socket bound to this address.
    BindUdp(SocketAddr),
    /// A TCP socket over IPv4, not yet connected: the proxy connects it.
    SocketTcp,
}

/// The broker's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The request's number.
    pub id: u64,
    /// Why there is no socket in this packet; absent when there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
}

/// The operating system refused, or the request made no sense.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{reason}")]
pub struct Refused {
    /// The number of the system's error, when there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub os_error: Option<i32>,
    /// What was tried and how it failed.
    pub reason: String,
}

impl From<Refused> for io::Error {
    fn from(refused: Refused) -> Self {
        let kind = refused.os_error.map_or(io::ErrorKind::Other, |code| io::Error::from_raw_os_error(code).kind());
        io::Error::new(kind, refused)
    }
}

/// Sends one packet, with a descriptor beside it or none. Never raises `SIGPIPE`; blocks as the socket does.
pub fn send(to: impl AsFd, message: &impl Serialize, with: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let packet = serde_json::to_vec(message)?;
    if packet.len() > PACKET_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a packet of more than 4096 bytes"));
    }
    let fds: Vec<BorrowedFd<'_>> = with.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("no room for a descriptor"));
    }
    rustix::io::retry_on_intr(|| sendmsg(&to, &[IoSlice::new(&packet)], &mut beside, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Receives one packet and the descriptor beside it. `None`: the other end is closed. Blocks as the socket does.
pub fn receive<T: DeserializeOwned>(from: impl AsFd) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut packet = [0; PACKET_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let got = rustix::io::retry_on_intr(|| {
        recvmsg(&from, &mut [IoSliceMut::new(&mut packet)], &mut beside, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut fd = None;
    for message in beside.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.last();
        }
    }
    if got.bytes == 0 {
        return Ok(None);
    }
    if got.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a packet that was too long"));
    }
    Ok(Some((serde_json::from_slice(&packet[..got.bytes])?, fd)))
}

/// A connected pair for packets; both ends close on exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_socket_crosses_beside_its_answer() {
        let (broker, proxy) = pair().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ask = Request { id: 7, ask: Ask::ListenTcp(listener.local_addr().unwrap()) };
        send(&proxy, &ask, None).unwrap();
        let (asked, none) = receive::<Request>(&broker).unwrap().unwrap();
        assert_eq!(asked, ask);
        assert!(none.is_none());
        send(&broker, &Answer { id: asked.id, refused: None }, Some(listener.as_fd())).unwrap();
        let (answer, fd) = receive::<Answer>(&proxy).unwrap().unwrap();
        assert_eq!(answer.id, 7);
        assert_eq!(TcpListener::from(fd.unwrap()).local_addr().unwrap(), listener.local_addr().unwrap());
    }

    #[test]
    fn a_closed_end_is_no_packet_and_a_long_packet_is_refused() {
        let (broker, proxy) = pair().unwrap();
        assert!(send(&proxy, &"x".repeat(PACKET_BYTES_MAX), None).is_err());
        drop(proxy);
        assert!(receive::<Request>(&broker).unwrap().is_none());
    }

    #[test]
    fn a_refusal_keeps_the_kind_of_the_systems_error() {
        let in_use = Refused { os_error: Some(98), reason: "could not listen".into() };
        assert_eq!(io::Error::from(in_use).kind(), io::ErrorKind::AddrInUse);
        assert_eq!(io::Error::from(Refused { os_error: None, reason: "odd".into() }).kind(), io::ErrorKind::Other);
    }
}
