//! How long ago this host was in step with a control plane. What bounds staleness: a proxy whose agent's knowledge is
//! older than its service allows answers 503.
//!
//! INVARIANT (fresh-by-asking): a host was in step when it *asked* control what it holds, once it holds as much itself.
//! What arrives by itself makes nothing fresh: a delayed stream would look as if it were the present. No clocks of two
//! hosts are compared.
//!
//! Between restarts the moment is kept in a file by the wall clock, which can be wrong; within a run only the monotonic
//! clock counts.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;

/// How often the moment is written down while all is well.
pub(crate) const WRITE_EVERY: Duration = Duration::from_secs(10);

/// When this host was last in step.
#[derive(Debug)]
pub(crate) struct Fresh {
    in_step_at: Mutex<Option<Instant>>,
    file: PathBuf,
}

impl Fresh {
    /// Takes up the moment an earlier run of this agent left below `dir`, if it lies in the past.
    pub(crate) fn load(dir: &Path) -> Self {
        let file = dir.join("in-step");
        let age = fs::metadata(&file).and_then(|file| file.modified()).ok().and_then(|at| at.elapsed().ok());
        // A machine that booted after the moment has no `Instant` for it; then it counts as never.
        let in_step_at = age.and_then(|age| Instant::now().checked_sub(age));
        Self { in_step_at: Mutex::new(in_step_at), file }
    }

    /// All that control held at `moment`, this host holds now.
    pub(crate) fn in_step(&self, moment: Instant) {
        let mut in_step_at = self.in_step_at.lock();
        *in_step_at = (*in_step_at).max(Some(moment));
    }

    /// How long ago it was; `None` when it never was.
    pub(crate) fn age(&self) -> Option<Duration> {
        self.in_step_at.lock().map(|at| at.elapsed())
    }

    /// Writes the moment down for the next run.
    pub(crate) fn write(&self) -> io::Result<()> {
        let Some(at) = self.age().and_then(|age| SystemTime::now().checked_sub(age)) else { return Ok(()) };
        fs::File::create(&self.file)?.set_modified(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_outlives_the_agent() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = Fresh::load(dir.path());
        assert_eq!(fresh.age(), None, "an agent that never reached control is not fresh");
        fresh.in_step(Instant::now());
        fresh.in_step(Instant::now() - Duration::from_secs(3));
        assert!(fresh.age().unwrap() < Duration::from_secs(1), "an older moment than the known one is no news");
        fresh.write().unwrap();
        let moment = SystemTime::now() - Duration::from_secs(60);
        fs::File::options().write(true).open(dir.path().join("in-step")).unwrap().set_modified(moment).unwrap();
        let age = Fresh::load(dir.path()).age().unwrap();
        assert!(age >= Duration::from_secs(60) && age < Duration::from_secs(90), "{age:?}");
    }

    #[test]
    fn a_moment_in_the_future_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let moment = SystemTime::now() + Duration::from_secs(3600);
        fs::File::create(dir.path().join("in-step")).unwrap().set_modified(moment).unwrap();
        assert_eq!(Fresh::load(dir.path()).age(), None);
    }
}
