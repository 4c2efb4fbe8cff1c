//! The binary: one noun per command. It parses the command line, finds the mesh, asks the control plane or composes it
//! with an agent, and renders what comes back. No rule of the mesh is decided here.
//!
//! `launch` and `sidecar`, which agents start, are taken before anything else: `launch` makes namespaces and must be the
//! only thread of its process.

mod agent;
mod apply;
mod authority;
mod change;
mod cli;
mod client;
mod control;
mod decision;
mod declare;
mod deploy;
mod diff;
mod difference;
mod doctor;
mod edge;
mod error;
mod exec;
mod glance;
mod host;
mod identity;
mod init;
mod ledger;
mod login;
mod mesh_directory;
mod mesh_finder;
mod mistake;
mod onboard;
mod operator;
mod policy;
mod propose;
mod qr;
mod recover;
mod render;
mod run;
mod sealing_key;
mod serve;
mod service;
mod session;
mod sign;
mod signal;
mod status;
mod store;
mod telemetry;
mod tell;
mod token;
mod up;
mod watch;
mod workload;
mod workloads;

use std::{ffi::OsString, process::ExitCode};

/// Returns memory to the system after a burst, which the proxy is measured by.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    match arguments.get(1).and_then(|first| first.to_str()) {
        Some("launch") => countersign_agent::launch::launch_main(arguments.into_iter().skip(2)),
        Some("sidecar") => countersign_proxy::sidecar_main(),
        _ => cli::main(arguments),
    }
}
