//! Pairs of sidecars in one process, real sockets between them: what a request may expect on its way.

mod contract;
mod hostile;
mod limits;
mod mesh;
mod plain;
mod probe;
mod proof;
mod signals;
mod streams;
mod tokens;
mod upstream;
mod workload;
