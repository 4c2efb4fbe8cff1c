//! What a process gives up before it holds secrets or runs what it was told to run. Each step is one-way; none opens a
//! file, and none can be undone by what is executed afterwards.

use std::io;

use landlock::{CompatLevel, Compatible, Ruleset, RulesetAttr, Scope};
use nix::sys::{
    mman::{MlockAllFlags, mlockall},
    prctl,
};
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
        set_capabilities,
    },
};

/// `MCL_ONFAULT` of mlockall(2), which the binding does not name.
const MCL_ONFAULT: i32 = 4;

/// Shuts this process to debuggers, `/proc/<pid>/mem` and core dumps: other processes of the same user cannot read the
/// keys it holds. To be called before the first secret arrives; a program it executes is open again.
pub fn non_dumpable() -> io::Result<()> {
    prctl::set_dumpable(false)?;
    Ok(())
}

/// No core dump of this process, whatever else allows one. What it starts can raise the limit again up to where it was.
pub fn no_core_dumps() -> io::Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Core);
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum })?;
    Ok(())
}

/// Keeps all memory of this process, now and later, out of swap. False where the kernel does not let it: without
/// CAP_IPC_LOCK a limit (RLIMIT_MEMLOCK) that is not infinite would let an allocation fail some day.
pub fn lock_memory() -> io::Result<bool> {
    let may = capabilities(None)?.effective.contains(CapabilitySet::IPC_LOCK);
    if !may && getrlimit(Resource::Memlock).current.is_some() {
        return Ok(false);
    }
    // Pages are locked when they are first used, and not read in for it.
    let on_fault = MlockAllFlags::from_bits_retain(MCL_ONFAULT);
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE | on_fault)?;
    Ok(true)
}

/// Keeps `kept` of the capabilities this process has, and none for what it executes.
pub(crate) fn keep_capabilities(kept: CapabilitySet) -> io::Result<()> {
    for bit in 0..u64::BITS {
        // EINVAL: past the last capability this kernel knows. EPERM: no right to shrink the bounding set, so there is
        // nothing in the other sets either that an execution could bring back under no_new_privs.
        if remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)).is_err() {
            break;
        }
    }
    clear_ambient_capability_set()?;
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable })?;
    Ok(())
}

/// Executing a set-user-id program raises nothing any more.
pub(crate) fn no_new_privileges() -> io::Result<()> {
    prctl::set_no_new_privs()?;
    Ok(())
}

/// From here on this process and its descendants can signal and trace only each other. Kernels without Landlock's
/// scopes (before 6.12) leave signals as they are. Needs [`no_new_privileges`].
pub(crate) fn scope_to_descendants() -> io::Result<()> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .scope(Scope::Signal)
        .and_then(Ruleset::create)
        .and_then(|ruleset| ruleset.restrict_self())
        .map_err(io::Error::other)?;
    Ok(())
}
