//! The enforcement point: one sidecar in front of one workload. Every request is judged before it is forwarded and again,
//! while it lives, whenever the view changes.
//!
//! Holds no key that issues anything, keeps no state that outlives the process but the record, and never forwards what
//! it could not judge.
//!
//! Threads: each worker is one single-threaded runtime with its own listeners (duplicated descriptors), pools, live table
//! and counters; an exchange never leaves its worker, so the path takes no lock.
//!
//! | room, in reading order | holds |
//! |---|---|
//! | `exchange` | the story of one exchange, in both directions |
//! | `accept`, `serve` | a connection comes in; HTTP/1.1, HTTP/2 or plain bytes are served on it |
//! | `guard` | what two HTTP/1.1 parsers could read in two ways does not get through |
//! | `identify` | mutual TLS: who is at the other end |
//! | `route` | which way a request takes, and the limits of the way |
//! | `authenticate`, `authorize` | from whom a request is; the law is asked |
//! | `forward` | the request goes on, to the workload or to another sidecar |
//! | `balance`, `pool` | which instance, and the connection to it |
//! | `flow`, `tunnel`, `websocket` | bodies frame by frame; byte streams joined; where a WebSocket frame ends |
//! | `contact` | which edges are known, and what the first exchange of one has to be |
//! | `hygiene` | what may cross from one connection to the next |
//! | `trace` | the W3C trace goes on; the spans of those that are kept |
//! | `live` | the live table: judged before it begins, judged again while it lives |
//! | `answer` | outcome to status |
//! | [`decided`], [`record`] | one decision; kept, reported, read back |
//! | [`counts`], [`admin`] | what a worker counts; metrics and pages for operators |
//! | [`probe`] | the exchange of this sidecar with itself |
//! | [`workers`], [`shared`], [`view`] | the threads; what the agent told this proxy; a view made ready for the path |
//! | [`link`], `sidecar` | the conversation with the agent; the process: what it gives up, where its log goes |
//! | [`listen`], [`dns`] | sockets, of this host's network or of the workload's namespace; `*.mesh` inside that namespace |

mod accept;
pub mod admin;
mod answer;
#[cfg(any(test, fuzzing))]
pub mod arbitrary_bytes;
mod authenticate;
mod authorize;
mod balance;
mod contact;
pub mod counts;
pub mod decided;
pub mod dns;
mod exchange;
mod families;
mod flow;
mod forward;
mod guard;
mod hygiene;
mod identify;
pub mod link;
pub mod listen;
mod live;
mod pool;
pub mod probe;
pub mod record;
mod route;
mod serve;
pub mod shared;
mod sidecar;
mod trace;
mod tunnel;
pub mod view;
mod websocket;
pub mod workers;

pub use shared::{App, AttachedToken, Door, Endpoint, Setup, Shared, TokensByService};
pub use sidecar::sidecar_main;
pub use trace::{Sampling, Tracing};
