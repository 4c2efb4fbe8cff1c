//! Who is who: trust domains, SPIFFE IDs, services and instances.
//!
//! Standard: SPIFFE-ID (<https://github.com/spiffe/spiffe/blob/main/standards/SPIFFE-ID.md>), sections 2.1 to 2.4.
//! Nothing here looks at a certificate; a parsed id proves only its shape.

use std::{fmt, str::FromStr, sync::Arc};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Longest SPIFFE ID we read, in bytes (SPIFFE-ID 2.3: implementations must support 2048).
pub const SPIFFE_ID_BYTES_MAX: usize = 2048;
/// First path segment of the mesh's own identities: `spiffe://<td>/countersign/agent/<host>`. No service may take it.
pub const RESERVED_SEGMENT: &str = "countersign";

/// The namespace one authority speaks for: lower case, `[a-z0-9.-_]`, at most 255 bytes (SPIFFE-ID 2.1).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// The name of a workload, `spiffe://<trust domain>/<path>`. The path is empty for the trust domain itself.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    uri: Arc<str>,
    path_at: usize, // where the path begins in `uri`
}

/// The name of a service in its own trust domain: one DNS label, `[a-z0-9-]`, at most 63 bytes, not `countersign`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName(Arc<str>);

/// One running process of a workload: `<service>/<suffix>`, unique in the mesh. Not a secret.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId(Arc<str>);

/// The name of an operator: what their sign-in calls them, `[a-z0-9@._+-]`, at most 128 bytes. `local` is nobody's: it is who acts
/// while there is no operator.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OperatorName(Arc<str>);

/// One factor of an operator, unique in the mesh: the base64url of its credential id where it has one.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FactorId(Arc<str>);

/// A name that does not have the shape its type demands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not a {what}: {why}")]
pub struct NameError {
    /// The kind of name that was asked for.
    pub what: &'static str,
    /// What was given, shortened to 100 characters.
    pub given: String,
    /// The rule that it breaks.
    pub why: &'static str,
}

fn refuse(what: &'static str, given: &str, why: &'static str) -> NameError {
    NameError { what, given: given.chars().take(100).collect(), why }
}

impl TrustDomain {
    /// Parses a trust domain name, without scheme.
    pub fn parse(given: &str) -> Result<Self, NameError> {
        let no = |why| Err(refuse("trust domain", given, why));
        if given.is_empty() || given.len() > 255 {
            return no("it must have 1 to 255 characters");
        }
        if !given.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_')) {
            return no("only `a`-`z`, `0`-`9`, `.`, `-` and `_` are allowed");
        }
        Ok(Self(given.into()))
    }

    /// The name, without scheme.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id of the trust domain itself, `spiffe://<td>`, as its signing certificates carry it.
    pub fn id(&self) -> SpiffeId {
        let uri: Arc<str> = format!("spiffe://{}", self.0).into();
        SpiffeId { path_at: uri.len(), uri }
    }

    /// The id of the workload of `service` in this trust domain.
    pub fn workload(&self, service: &ServiceName) -> SpiffeId {
        SpiffeId { uri: format!("spiffe://{}/{}", self.0, service.0).into(), path_at: "spiffe://".len() + self.0.len() }
    }

    /// The id of the agent on `host` (one label; see [`ServiceName`] for its shape).
    pub fn agent(&self, host: &ServiceName) -> SpiffeId {
        self.reserved(&format!("agent/{}", host.0))
    }

    /// The id of the control plane.
    pub fn control(&self) -> SpiffeId {
        self.reserved("control")
    }

    /// The id of a client of the token service (one label; see [`ServiceName`] for its shape). Nobody gets a certificate of it.
    pub fn client(&self, name: &ServiceName) -> SpiffeId {
        self.reserved(&format!("client/{}", name.0))
    }

    fn reserved(&self, rest: &str) -> SpiffeId {
        SpiffeId {
            uri: format!("spiffe://{}/{RESERVED_SEGMENT}/{rest}", self.0).into(),
            path_at: "spiffe://".len() + self.0.len(),
        }
    }
}

impl SpiffeId {
    /// Parses a SPIFFE ID. Scheme and trust domain compare case-insensitively (2.4) and are kept in lower case.
    pub fn parse(given: &str) -> Result<Self, NameError> {
        let no = |why| Err(refuse("SPIFFE ID", given, why));
        if given.len() > SPIFFE_ID_BYTES_MAX {
            return no("it is longer than 2048 bytes");
        }
        let Some(rest) = given.get(..9).filter(|s| s.eq_ignore_ascii_case("spiffe://")).map(|_| &given[9..]) else {
            return no("it must begin with `spiffe://`");
        };
        let (td, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let td = TrustDomain::parse(&td.to_ascii_lowercase())?;
        for segment in path.split('/').skip(1) {
            if segment.is_empty() {
                return no("a path segment is empty");
            }
            if segment == "." || segment == ".." {
                return no("`.` and `..` are not path segments");
            }
            if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) {
                return no("a path segment may hold only letters, digits, `.`, `-` and `_`");
            }
        }
        Ok(Self { uri: format!("spiffe://{}{path}", td.0).into(), path_at: "spiffe://".len() + td.0.len() })
    }

    /// The whole URI.
    pub fn as_str(&self) -> &str {
        &self.uri
    }

    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        &self.uri["spiffe://".len()..self.path_at]
    }

    /// The path with its leading slash; empty for a trust domain's own id.
    pub fn path(&self) -> &str {
        &self.uri[self.path_at..]
    }

    /// The service this id names, when it is the workload of one: a path of a single, unreserved segment.
    pub fn service(&self) -> Option<ServiceName> {
        self.service_str().map(|name| ServiceName(name.into()))
    }

    /// [`SpiffeId::service`], borrowed.
    pub fn service_str(&self) -> Option<&str> {
        self.path().strip_prefix('/').filter(|name| ServiceName::refusal(name).is_none())
    }

    /// The host this id names, when it is the agent of one.
    pub fn agent_host(&self) -> Option<ServiceName> {
        ServiceName::parse(self.path().strip_prefix("/countersign/agent/")?).ok()
    }

    /// The client of the token service that this id names, when it is one.
    pub fn client(&self) -> Option<ServiceName> {
        ServiceName::parse(self.path().strip_prefix("/countersign/client/")?).ok()
    }
}

impl ServiceName {
    /// Parses a service name: one DNS label (RFC 1123), lower case.
    pub fn parse(given: &str) -> Result<Self, NameError> {
        match Self::refusal(given) {
            Some(why) => Err(refuse("service name", given, why)),
            None => Ok(Self(given.into())),
        }
    }

    fn refusal(given: &str) -> Option<&'static str> {
        if given.is_empty() || given.len() > 63 {
            return Some("it must have 1 to 63 characters");
        }
        if !given.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-')) {
            return Some("only `a`-`z`, `0`-`9` and `-` are allowed");
        }
        if given.starts_with('-') || given.ends_with('-') {
            return Some("it must begin and end with a letter or a digit");
        }
        (given == RESERVED_SEGMENT).then_some("`countersign` is the mesh's own")
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of the environment variable that holds this upstream's address: `COUNTERSIGN_UPSTREAM_<SERVICE>`.
    pub fn upstream_variable(&self) -> String {
        format!("COUNTERSIGN_UPSTREAM_{}", self.0.to_ascii_uppercase().replace('-', "_"))
    }
}

impl InstanceId {
    /// Names an instance of `service`; `suffix` is what makes it unique (random or counted by the caller).
    pub fn new(service: &ServiceName, suffix: &str) -> Self {
        Self(format!("{}/{suffix}", service.0).into())
    }

    /// Parses `<service>/<suffix>`.
    pub fn parse(given: &str) -> Result<Self, NameError> {
        let no = |why| Err(refuse("instance id", given, why));
        let Some((service, suffix)) = given.split_once('/') else { return no("it must be `<service>/<suffix>`") };
        ServiceName::parse(service)?;
        if suffix.is_empty() || suffix.len() > 64 || !suffix.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            return no("the suffix must have 1 to 64 letters, digits or `-`");
        }
        Ok(Self(given.into()))
    }

    /// The whole id.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The service it runs.
    pub fn service(&self) -> ServiceName {
        ServiceName(self.0.split_once('/').map_or(&*self.0, |(s, _)| s).into())
    }
}

/// Who acts while a mesh has no operator: whoever owns the data directory.
pub const LOCAL_OPERATOR: &str = "local";
/// Longest factor id, in characters: a credential id has at most 1023 bytes.
const FACTOR_ID_CHARS_MAX: usize = 1364;

impl OperatorName {
    /// Parses the name of an operator.
    pub fn parse(given: &str) -> Result<Self, NameError> {
        let no = |why| Err(refuse("operator name", given, why));
        if given.is_empty() || given.len() > 128 {
            return no("it must have 1 to 128 characters");
        }
        let allowed = |b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'@' | b'.' | b'_' | b'+' | b'-');
        if !given.bytes().all(allowed) || !given.as_bytes()[0].is_ascii_alphanumeric() {
            return no("only `a`-`z`, `0`-`9`, `@`, `.`, `_`, `+` and `-` are allowed, and a letter or digit first");
        }
        if given == LOCAL_OPERATOR || given == RESERVED_SEGMENT {
            return no("`local` and `countersign` are the mesh's own");
        }
        Ok(Self(given.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FactorId {
    /// Parses a factor id.
    pub fn parse(given: &str) -> Result<Self, NameError> {
        if (1..=FACTOR_ID_CHARS_MAX).contains(&given.len())
            && given.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
        {
            return Ok(Self(given.into()));
        }
        Err(refuse("factor id", given, "it must have 1 to 1364 letters, digits, `-` or `_`"))
    }

    /// The id of the factor with this WebAuthn credential id.
    pub fn of_credential(id: &[u8]) -> Result<Self, NameError> {
        Self::parse(&URL_SAFE_NO_PAD.encode(id))
    }

    /// The WebAuthn credential id that it stands for.
    pub fn credential(&self) -> Option<Vec<u8>> {
        URL_SAFE_NO_PAD.decode(&*self.0).ok()
    }

    /// The id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

macro_rules! text {
    ($($name:ident)*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.as_str())
            }
        }
        impl FromStr for $name {
            type Err = NameError;
            fn from_str(given: &str) -> Result<Self, NameError> {
                Self::parse(given)
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                self.as_str()
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.serialize_str(self.as_str())
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(from)?;
                Self::parse(&text).map_err(de::Error::custom)
            }
        }
    )*};
}
text!(TrustDomain SpiffeId ServiceName InstanceId OperatorName FactorId);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spiffe_id_keeps_to_the_standard() {
        for (given, expected) in [
            ("spiffe://shop.example/web", Some("spiffe://shop.example/web")),
            ("SPIFFE://Shop.Example/Web", Some("spiffe://shop.example/Web")),
            ("spiffe://shop.example", Some("spiffe://shop.example")),
            ("spiffe://shop.example/a/...", Some("spiffe://shop.example/a/...")),
            ("spiffe://shop.example/", None),
            ("spiffe://shop.example//web", None),
            ("spiffe://shop.example/a/../b", None),
            ("spiffe://shop.example/a%2fb", None),
            ("spiffe://shop.example:80/web", None),
            ("spiffe://me@shop.example/web", None),
            ("spiffe://shop.example/web?x", None),
            ("spiffe://shop.example/web#x", None),
            ("spiffe:///web", None),
            ("https://shop.example/web", None),
            ("spiffe:/é/web", None),
            ("", None),
        ] {
            assert_eq!(SpiffeId::parse(given).ok().as_ref().map(SpiffeId::as_str), expected, "{given}");
        }
    }

    #[test]
    fn only_a_single_unreserved_segment_names_a_service() {
        for (given, expected) in [
            ("spiffe://shop.example/web", Some("web")),
            ("spiffe://shop.example/countersign", None),
            ("spiffe://shop.example/countersign/agent/a", None),
            ("spiffe://shop.example", None),
        ] {
            let id = SpiffeId::parse(given).unwrap();
            assert_eq!(id.service().as_ref().map(ServiceName::as_str), expected, "{given}");
        }
        assert_eq!(
            SpiffeId::parse("spiffe://t/countersign/agent/h1").unwrap().agent_host(),
            Some(ServiceName::parse("h1").unwrap())
        );
        let own = TrustDomain::parse("t").unwrap();
        let client = own.client(&ServiceName::parse("billing").unwrap());
        assert_eq!(client.as_str(), "spiffe://t/countersign/client/billing");
        assert_eq!((client.client().unwrap().as_str(), client.service(), client.agent_host()), ("billing", None, None));
        assert_eq!(own.workload(&ServiceName::parse("billing").unwrap()).client(), None);
    }

    #[test]
    fn a_service_name_is_one_dns_label() {
        for (given, good) in [
            ("web", true),
            ("orders-db", true),
            ("0", true),
            ("", false),
            ("-a", false),
            ("a-", false),
            ("A", false),
            ("a.b", false),
            ("a_b", false),
            ("countersign", false),
        ] {
            assert_eq!(ServiceName::parse(given).is_ok(), good, "{given}");
        }
        assert!(ServiceName::parse(&"a".repeat(64)).is_err());
        assert_eq!(ServiceName::parse("orders-db").unwrap().upstream_variable(), "COUNTERSIGN_UPSTREAM_ORDERS_DB");
    }

    #[test]
    fn an_operator_is_named_in_one_way_and_never_like_the_mesh_itself() {
        for (given, expected) in [
            ("alice", true),
            ("alice@shop.example", true),
            ("a+b_c-d.e", true),
            ("", false),
            ("Alice", false),
            ("-alice", false),
            ("al ice", false),
            ("ali\u{441}e", false),
            ("local", false),
            ("countersign", false),
            (&"a".repeat(129), false),
        ] {
            assert_eq!(OperatorName::parse(given).is_ok(), expected, "{given}");
        }
        let id = FactorId::of_credential(&[0xff; 1023]).unwrap();
        assert_eq!(id.credential(), Some(vec![0xff; 1023]));
        assert!(FactorId::of_credential(&[]).is_err() && FactorId::of_credential(&[0; 1024]).is_err());
        assert!(FactorId::parse("a=").is_err());
    }
}
