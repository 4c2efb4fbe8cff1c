//! A way to PostgreSQL that a test can cut: bytes are passed on until it is told not to, or until a COMMIT passes. Whoever uses it
//! sees what a partition shows: a connection that breaks, with or without the other side having heard.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    time::Duration,
};

/// What happens at the next COMMIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Cut {
    /// It is not passed on.
    BeforeCommit = 1,
    /// It is passed on, and its answer is not.
    AfterCommit = 2,
}

/// A port of loopback that leads to another one.
pub struct Partition {
    port: u16,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    closed: AtomicBool,
    cut: AtomicU8,
}

impl Partition {
    /// Leads to `to`.
    pub fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let state = Arc::new(State::default());
        let of = state.clone();
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                if of.closed.load(Ordering::Relaxed) {
                    continue;
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", to)) else { continue };
                let (up, down) = (of.clone(), of.clone());
                let (from, back) = (client.try_clone().expect("a socket"), server.try_clone().expect("a socket"));
                std::thread::spawn(move || pass(from, server, &up, true));
                std::thread::spawn(move || pass(back, client, &down, false));
            }
        });
        Self { port, state }
    }

    /// The port to connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Passes nothing on any more, in either direction, and takes nobody in.
    pub fn close(&self) {
        self.state.closed.store(true, Ordering::Relaxed);
    }

    /// Takes connections in again. Those of before stay cut.
    pub fn open(&self) {
        self.state.closed.store(false, Ordering::Relaxed);
    }

    /// Cuts the connection on which the next COMMIT passes.
    pub fn cut_once(&self, cut: Cut) {
        self.state.cut.store(cut as u8, Ordering::Relaxed);
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, state: &State, is_up: bool) {
    let mut buffer = [0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let bytes = &buffer[..length];
        if state.closed.load(Ordering::Relaxed) {
            break;
        }
        if is_up && bytes.windows(6).any(|window| window == b"COMMIT") {
            match state.cut.swap(0, Ordering::Relaxed) {
                1 => break,
                2 => {
                    // The answer goes nowhere: whoever asked is cut off first.
                    let _ = from.shutdown(Shutdown::Both);
                    let _ = to.write_all(bytes);
                    std::thread::sleep(Duration::from_millis(200));
                    break;
                }
                _ => {}
            }
        }
        if to.write_all(bytes).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
