//! Which processes are a service although no agent started them: a registration says by what an agent knows them. An agent observes
//! selectors of a process; the process is an instance of the service one of whose registrations names nothing that was not observed.
//!
//! Selectors are spelled as SPIRE spells them, where it has them.

use std::{collections::BTreeSet, fmt, mem::discriminant, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{canonical::Digest, identity::ServiceName, state::MeshState};

/// Selectors of one registration at most.
pub const SELECTORS_MAX: usize = 16;
/// Registrations of one service at most.
pub const REGISTRATIONS_MAX: usize = 16;
/// Longest selector, in bytes: the longest path of Linux with its name before it.
pub const SELECTOR_BYTES_MAX: usize = 4096 + 16;

/// A property of a process that an agent can observe.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Selector {
    /// `unix:uid:1000`: the user it runs as, and only as.
    Uid(u32),
    /// `unix:gid:1000`: the group it runs as, and only as.
    Gid(u32),
    /// `unix:path:/usr/bin/envoy`: the file of its program.
    Path(Arc<str>),
    /// `unix:sha256:…`: the content of that file.
    Sha256(Digest),
    /// `systemd:id:envoy.service`: the unit of the host's systemd that it belongs to.
    Unit(Arc<str>),
    /// `cgroup:/system.slice/envoy.service`: its control group.
    Cgroup(Arc<str>),
    /// `container:…`: the id of its container, 64 hexadecimal digits.
    Container(Arc<str>),
}

/// It is no selector.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a selector")]
pub struct SelectorError(String);

impl SelectorError {
    /// What one looks like.
    pub fn help(&self) -> &'static str {
        "write `unix:uid:1000`, `unix:gid:1000`, `systemd:id:envoy.service`, `cgroup:/…`, `container:…`, `unix:path:/usr/bin/envoy` or `unix:sha256:…`; `countersign workload list` shows those of who asked"
    }
}

/// "A process with all of these selectors is this service."
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Presented")]
pub struct Registration {
    selectors: BTreeSet<Selector>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<ServiceName>,
}

/// A registration as it is written, before it is looked at.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Presented {
    selectors: BTreeSet<Selector>,
    #[serde(default)]
    host: Option<ServiceName>,
}

/// Why nobody can be registered by these selectors.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistrationError {
    /// None, or too many.
    #[error("a registration has 1 to {SELECTORS_MAX} selectors")]
    Count,
    /// Anybody on the host could be it.
    #[error("a program alone is nobody: whoever may run it would be this service")]
    Anybody,
    /// No process has both.
    #[error("no process has both `{0}` and `{1}`")]
    Both(Selector, Selector),
}

impl RegistrationError {
    /// What to write instead.
    pub fn help(&self) -> &'static str {
        match self {
            Self::Count => "say what is known of such a process: `unix:uid:1000` and `unix:path:/usr/bin/envoy`",
            Self::Anybody => {
                "say who runs it as well: `unix:uid:`, `unix:gid:`, `systemd:id:`, `cgroup:` or `container:`"
            }
            Self::Both(..) => "write a registration for each",
        }
    }
}

impl Registration {
    /// INVARIANT (registered-by-who-runs-it): no registration is by a program alone, whatever its path and content: an interpreter runs
    /// everybody's code, and any other program is started by whoever may.
    pub fn new(selectors: BTreeSet<Selector>, host: Option<ServiceName>) -> Result<Self, RegistrationError> {
        if selectors.is_empty() || selectors.len() > SELECTORS_MAX {
            return Err(RegistrationError::Count);
        }
        if !selectors.iter().any(Selector::says_who) {
            return Err(RegistrationError::Anybody);
        }
        // Of one kind they lie beside each other.
        let pairs = selectors.iter().zip(selectors.iter().skip(1));
        for (one, other) in pairs {
            if discriminant(one) == discriminant(other) {
                return Err(RegistrationError::Both(one.clone(), other.clone()));
            }
        }
        Ok(Self { selectors, host })
    }

    /// What a process must have, all of it.
    pub fn selectors(&self) -> &BTreeSet<Selector> {
        &self.selectors
    }

    /// The only host on which it holds.
    pub fn host(&self) -> Option<&ServiceName> {
        self.host.as_ref()
    }

    fn is_met(&self, observed: &BTreeSet<Selector>, host: &ServiceName) -> bool {
        self.host.as_ref().is_none_or(|only| only == host) && self.selectors.is_subset(observed)
    }
}

/// The service that a process with these selectors is, on `host`: of several the one whose registration says most, and of those that say as
/// much the first by its name.
pub fn service_of<'s>(
    state: &'s MeshState,
    observed: &BTreeSet<Selector>,
    host: &ServiceName,
) -> Option<&'s ServiceName> {
    let met = state.services.iter().filter_map(|(name, service)| {
        let met = service.spec.attest.iter().filter(|registration| registration.is_met(observed, host));
        Some((met.map(|registration| registration.selectors.len()).max()?, name))
    });
    // `max_by_key` takes the last of equals.
    met.rev().max_by_key(|(said, _)| *said).map(|(_, name)| name)
}

impl Selector {
    /// Whether it tells who runs a process, and not only what runs.
    fn says_who(&self) -> bool {
        match self {
            Self::Uid(_) | Self::Gid(_) | Self::Unit(_) | Self::Cgroup(_) | Self::Container(_) => true,
            Self::Path(_) | Self::Sha256(_) => false,
        }
    }
}

impl FromStr for Selector {
    type Err = SelectorError;
    fn from_str(given: &str) -> Result<Self, SelectorError> {
        let parse = || {
            if given.len() > SELECTOR_BYTES_MAX || given.chars().any(char::is_control) {
                return None;
            }
            let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten();
            let path = |text: &str| {
                let is_plain = text.starts_with('/') && !text.split('/').skip(1).any(|part| matches!(part, "." | ".."));
                is_plain.then(|| Arc::from(text))
            };
            if let Some(path_of) = given.strip_prefix("cgroup:") {
                return path(path_of).map(Self::Cgroup);
            }
            if let Some(id) = given.strip_prefix("container:") {
                let is_id = id.len() == 64 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
                return is_id.then(|| Self::Container(id.into()));
            }
            let (kind, value) = given.split_once(':').and_then(|(kind, rest)| Some((kind, rest.split_once(':')?)))?;
            match (kind, value) {
                ("unix", ("uid", uid)) => number(uid).map(Self::Uid),
                ("unix", ("gid", gid)) => number(gid).map(Self::Gid),
                ("unix", ("path", of)) => path(of).map(Self::Path),
                ("unix", ("sha256", digest)) => digest.parse().ok().map(Self::Sha256),
                ("systemd", ("id", unit)) => {
                    (unit.contains('.') && !unit.contains('/')).then(|| Self::Unit(unit.into()))
                }
                _ => None,
            }
        };
        parse().ok_or_else(|| SelectorError(given.chars().filter(|c| !c.is_control()).take(100).collect()))
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uid(uid) => write!(f, "unix:uid:{uid}"),
            Self::Gid(gid) => write!(f, "unix:gid:{gid}"),
            Self::Path(path) => write!(f, "unix:path:{path}"),
            Self::Sha256(digest) => write!(f, "unix:sha256:{digest}"),
            Self::Unit(unit) => write!(f, "systemd:id:{unit}"),
            Self::Cgroup(path) => write!(f, "cgroup:{path}"),
            Self::Container(id) => write!(f, "container:{id}"),
        }
    }
}

impl TryFrom<String> for Selector {
    type Error = SelectorError;
    fn try_from(given: String) -> Result<Self, SelectorError> {
        given.parse()
    }
}

impl From<Selector> for String {
    fn from(selector: Selector) -> Self {
        selector.to_string()
    }
}

impl TryFrom<Presented> for Registration {
    type Error = RegistrationError;
    fn try_from(given: Presented) -> Result<Self, RegistrationError> {
        Self::new(given.selectors, given.host)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        change::Change,
        identity::TrustDomain,
        service::{Protocol, ServiceSpec},
    };

    fn selectors(given: &[&str]) -> BTreeSet<Selector> {
        given.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn name(given: &str) -> ServiceName {
        ServiceName::parse(given).unwrap()
    }

    const DIGEST: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn a_selector_is_read_as_it_is_written_and_nothing_else_is_one() {
        for good in [
            "unix:uid:0",
            "unix:gid:4294967295",
            "unix:path:/usr/bin/envoy",
            "unix:path:/opt/with space:and colon",
            "systemd:id:envoy@1.service",
            "cgroup:/system.slice/envoy.service",
            "cgroup:/",
            &format!("unix:sha256:{DIGEST}"),
            &format!("container:{DIGEST}"),
        ] {
            assert_eq!(good.parse::<Selector>().unwrap().to_string(), *good);
        }
        for bad in [
            "",
            "unix:uid:",
            "unix:uid:-1",
            "unix:uid:+1",
            "unix:uid:4294967296",
            "unix:user:envoy",
            "unix:path:envoy",
            "unix:path:/usr/../bin/envoy",
            "unix:path:/usr/bin/envoy\n",
            "unix:sha256:ba78",
            "systemd:id:envoy",
            "systemd:id:../envoy.service",
            "cgroup:system.slice",
            "cgroup:/../..",
            "container:ba78",
            "docker:label:x",
            &format!("unix:path:/{}", "a".repeat(SELECTOR_BYTES_MAX)),
        ] {
            assert!(bad.parse::<Selector>().is_err(), "{bad}");
        }
    }

    /// PROVES (registered-by-who-runs-it)
    #[test]
    fn nobody_is_registered_by_a_program_alone() {
        let sha256 = format!("unix:sha256:{DIGEST}");
        let refused = |given: &[&str]| Registration::new(selectors(given), None).unwrap_err();
        for program in [&["unix:path:/usr/bin/python3"][..], &[&sha256], &["unix:path:/usr/bin/envoy", &sha256]] {
            assert_eq!(refused(program), RegistrationError::Anybody, "{program:?}");
        }
        assert_eq!(refused(&[]), RegistrationError::Count);
        assert!(matches!(refused(&["unix:uid:1", "unix:uid:2"]), RegistrationError::Both(..)));
        let written = r#"{"selectors":["unix:path:/usr/bin/envoy"]}"#;
        assert!(serde_json::from_str::<Registration>(written).is_err(), "nor by a ledger that says so");
        let written = r#"{"selectors":["unix:uid:1000","unix:path:/usr/bin/envoy"],"host":"edge-1"}"#;
        assert_eq!(serde_json::to_string(&serde_json::from_str::<Registration>(written).unwrap()).unwrap(), written);
    }

    #[test]
    fn a_process_is_the_service_whose_registration_says_most_of_it_and_nothing_else() {
        let mut state = MeshState::default();
        state.apply(&Change::CreateMesh { trust_domain: TrustDomain::parse("shop.example").unwrap() }).unwrap();
        let mut declare = |service: &str, given: &[(&[&str], Option<&str>)]| {
            let attest = given.iter().map(|(given, host)| Registration::new(selectors(given), host.map(name)).unwrap());
            let spec = ServiceSpec { attest: attest.collect(), ..ServiceSpec::new(Protocol::Http) };
            state.apply(&Change::DeclareService { name: name(service), spec }).unwrap();
        };
        declare("any", &[(&["unix:uid:7"], None)]);
        declare("also", &[(&["unix:gid:7"], None)]);
        declare("edge", &[(&["unix:uid:7", "unix:path:/e"], Some("h1")), (&["systemd:id:e.service"], None)]);
        declare("plain", &[]);
        for (observed, host, expected) in [
            (&["unix:uid:7", "unix:path:/e"][..], "h1", Some("edge")),
            (&["unix:uid:7", "unix:path:/e"], "h2", Some("any")),
            (&["unix:uid:7", "unix:path:/other"], "h1", Some("any")),
            (&["unix:uid:7", "unix:gid:7"], "h1", Some("also")),
            (&["unix:uid:8", "unix:path:/e", "systemd:id:e.service"], "h2", Some("edge")),
            (&["unix:uid:8", "unix:path:/e"], "h1", None),
            (&[], "h1", None),
        ] {
            let found = service_of(&state, &selectors(observed), &name(host));
            assert_eq!(found.map(ServiceName::as_str), expected, "{observed:?} on {host}");
        }
    }
}
