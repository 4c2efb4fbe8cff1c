//! What a process gives up before it holds secrets or runs what it was told to run. Each step is one-way; none opens a
//! file, and none can be undone by what is executed afterwards.

use std::io;

use landlock::{CompatLevel, Compatible, Ruleset, RulesetAttr, Scope};
use nix::sys::prctl;
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
};

/// Shuts this process to debuggers, `/proc/<pid>/mem` and core dumps: other processes of the same user cannot read the
/// keys it holds. To be called before the first secret arrives; a program it executes is open again.
pub fn non_dumpable() -> io::Result<()> {
    prctl::set_dumpable(false)?;
    Ok(())
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
