//! Pairs of sidecars in one process, real sockets between them: what a request may expect on its way.

mod hostile;
mod mesh;
mod plain;
mod streams;
mod workload;
