//! The threads. Each runs one single-threaded runtime and obeys the same orders in the same order.

use std::{io, sync::Arc, thread};

use crate::{decided::Recorder, shared::Shared};

/// Starts the workers, one per recorder; they stop when [`Shared::drain`] is done. Nothing is accepted until
/// [`Shared::open`] gives them a listener.
pub fn start(
    shared: &Arc<Shared>,
    recorders: Vec<Box<dyn Recorder + Send>>,
) -> io::Result<Vec<thread::JoinHandle<()>>> {
    let numbered = recorders.into_iter().enumerate();
    numbered
        .map(|(number, recorder)| {
            let mut orders = shared.join();
            let runtime = move || {
                drop(recorder);
                while orders.blocking_recv().is_some() {}
            };
            thread::Builder::new().name(format!("worker-{number}")).spawn(runtime)
        })
        .collect()
}
