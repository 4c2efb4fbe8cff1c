//! The one normal form of a request's path and of its host. What is judged is what is forwarded.
//!
//! Two programs that read the same bytes as different paths are how a policy is walked around. So a path comes to one
//! form here (RFC 3986, section 6.2.2), and what software in the field reads in more than one way is refused with 400, not repaired:
//!
//! | in the path | becomes |
//! |---|---|
//! | an encoded unreserved character, `%41` | itself, `A` |
//! | another encoding in lower case, `%c3%a9` | upper case, `%C3%A9` |
//! | a raw character that browsers send but RFC 3986 does not know: `"` `<` `>` `[` `]` `^` `` ` `` `{` `\|` `}` | encoded |
//! | `.` and `..` as a segment, raw or encoded, also before an encoded `;` | refused: who resolves them, and when? |
//! | an empty segment, `//` | refused: some servers merge slashes, some do not. A slash at the end stays: it is part of the name |
//! | a raw `;` | refused: some frameworks cut parameters off before they match, some do not. `%3B` stays: it is text |
//! | an encoded slash or backslash, a raw backslash | refused: a separator to some |
//! | `%25` before two hexadecimal digits | refused: whoever decodes twice reads another path |
//! | control characters, raw or encoded; raw space, `#` and non-ASCII; encoded bytes that are no UTF-8 | refused |
//!
//! The query is not judged and is kept as it came, without control characters, spaces, `#` and non-ASCII bytes. There is no
//! routing and no service in here.

use std::{
    borrow::Cow,
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

use crate::identity::ServiceName;

/// Longest path with its query, in bytes.
pub const PATH_BYTES_MAX: usize = 16 << 10;
/// Longest host with its port, in bytes: a DNS name has at most 253.
pub const AUTHORITY_BYTES_MAX: usize = 261;

/// A path in normal form and the query as it came. Only [`parse`](Self::parse) makes one; a path that is normal already is
/// not copied.
///
/// INVARIANT (one-path): parsing a normal path gives the same path, and no number of further decodings makes a
/// separator, a dot segment or an empty segment appear in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NormalPath<'a> {
    path: Cow<'a, str>,
    query: Option<&'a str>,
}

/// Why a path has no normal form that everyone would read the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum PathRefused {
    /// Not in origin form.
    #[error("the path must begin with `/`")]
    NotRooted,
    /// Beyond its bound.
    #[error("path and query are longer than {PATH_BYTES_MAX} bytes")]
    TooLong,
    /// `%` without two hexadecimal digits.
    #[error("`%` must be followed by two hexadecimal digits")]
    Percent,
    /// `%2F` or `%5C`.
    #[error("an encoded slash or backslash is ambiguous")]
    EncodedSeparator,
    /// A raw backslash.
    #[error("a backslash is ambiguous")]
    Backslash,
    /// A control character, raw or encoded.
    #[error("control characters are not allowed")]
    Control,
    /// A raw byte beyond ASCII, or encoded bytes that are no UTF-8.
    #[error("characters beyond ASCII must be percent-encoded UTF-8")]
    NotUtf8,
    /// A raw space or `#`.
    #[error("a raw space or `#` is not allowed")]
    Raw,
    /// `.` or `..` as a segment.
    #[error("dot segments are ambiguous")]
    DotSegment,
    /// `//`.
    #[error("an empty path segment is ambiguous")]
    EmptySegment,
    /// A raw `;`.
    #[error("a path parameter is ambiguous; write a `;` that is text as `%3B`")]
    Parameter,
    /// An encoding inside an encoding.
    #[error("a path encoded twice is ambiguous")]
    EncodedTwice,
}

/// Segments of a path that its class tells apart.
const CLASS_SEGMENTS_MAX: usize = 8;
/// Bytes of a segment that is one of few.
const WORD_BYTES_MAX: usize = 32;

/// Appends the class of a normal path: what is one of many in it, a number, a UUID, a long token, becomes `*`, and what is deep `**`.
/// So `/items/4/parts` and `/items/5/parts` are one.
pub fn push_class(to: &mut String, path: &str) {
    for (place, segment) in path.split('/').skip(1).enumerate() {
        if place == CLASS_SEGMENTS_MAX {
            to.push_str("/**");
            return;
        }
        to.push('/');
        to.push_str(if is_one_of_many(segment) { "*" } else { segment });
    }
}

fn is_one_of_many(segment: &str) -> bool {
    let digits = segment.bytes().filter(u8::is_ascii_digit).count();
    let is_hexadecimal = segment.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    segment.len() > WORD_BYTES_MAX
        || digits > 0 && digits == segment.len()
        || digits > 0 && segment.len() >= 8 && is_hexadecimal
}

impl<'a> NormalPath<'a> {
    /// Brings the path of `raw`, a path with an optional query in origin form, to its normal form.
    pub fn parse(raw: &'a str) -> Result<Self, PathRefused> {
        if raw.len() > PATH_BYTES_MAX {
            return Err(PathRefused::TooLong);
        }
        let (path, query) = match raw.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (raw, None),
        };
        query.map_or(Ok(()), clean_query)?;
        if !path.starts_with('/') {
            return Err(PathRefused::NotRooted);
        }
        let path = decode_once(path)?;
        refuse_ambiguous(&path)?;
        Ok(Self { path, query })
    }

    /// The path, without query: what is judged.
    pub fn as_str(&self) -> &str {
        &self.path
    }

    /// The query, without its `?`.
    pub fn query(&self) -> Option<&'a str> {
        self.query
    }

    /// Path and query: what is forwarded.
    pub fn path_and_query(&self) -> Cow<'_, str> {
        match self.query {
            Some(query) => Cow::Owned(format!("{}?{query}", self.path)),
            None => Cow::Borrowed(&self.path),
        }
    }

    /// Whether it was normal as it came: then the request's own bytes can be forwarded.
    pub fn is_as_it_came(&self) -> bool {
        matches!(self.path, Cow::Borrowed(_))
    }
}

/// RFC 3986, 6.2.2.1 and 6.2.2.2: decodes what is unreserved, writes the rest in upper case. Copies from the first difference on.
fn decode_once(path: &str) -> Result<Cow<'_, str>, PathRefused> {
    let bytes = path.as_bytes();
    let mut rewritten: Option<String> = None;
    let mut at = 0;
    while at < bytes.len() {
        let byte = bytes[at];
        let (came, normal) = match byte {
            b'%' => {
                let came = path.get(at..at + 3).ok_or(PathRefused::Percent)?;
                (came, normal_encoding(encoded_byte(came.as_bytes()).ok_or(PathRefused::Percent)?)?)
            }
            b'\\' => return Err(PathRefused::Backslash),
            b';' => return Err(PathRefused::Parameter),
            b' ' | b'#' => return Err(PathRefused::Raw),
            0..=0x1f | 0x7f => return Err(PathRefused::Control),
            0x80.. => return Err(PathRefused::NotUtf8),
            b'"' | b'<' | b'>' | b'[' | b']' | b'^' | b'`' | b'{' | b'|' | b'}' => {
                (&path[at..=at], Normal::Encoded(byte))
            }
            _ => (&path[at..=at], Normal::Raw(byte)),
        };
        if rewritten.is_none() && !normal.is(came.as_bytes()) {
            rewritten = Some(path[..at].to_owned());
        }
        if let Some(rewritten) = &mut rewritten {
            normal.write(rewritten);
        }
        at += came.len();
    }
    Ok(rewritten.map_or(Cow::Borrowed(path), Cow::Owned))
}

/// A byte as the normal form spells it.
enum Normal {
    Raw(u8),
    Encoded(u8),
}

impl Normal {
    fn spelled(&self) -> ([u8; 3], usize) {
        const HEX: &[u8; 16] = b"0123456789ABCDEF";
        match *self {
            Self::Raw(byte) => ([byte, 0, 0], 1),
            Self::Encoded(byte) => ([b'%', HEX[usize::from(byte >> 4)], HEX[usize::from(byte & 15)]], 3),
        }
    }

    fn is(&self, came: &[u8]) -> bool {
        let (spelled, len) = self.spelled();
        spelled[..len] == *came
    }

    fn write(&self, to: &mut String) {
        let (spelled, len) = self.spelled();
        to.extend(spelled[..len].iter().map(|byte| char::from(*byte)));
    }
}

fn normal_encoding(byte: u8) -> Result<Normal, PathRefused> {
    match byte {
        b'/' | b'\\' => Err(PathRefused::EncodedSeparator),
        0..=0x1f | 0x7f => Err(PathRefused::Control),
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => Ok(Normal::Raw(byte)),
        _ => Ok(Normal::Encoded(byte)),
    }
}

/// The byte that `%XX` stands for.
fn encoded_byte(came: &[u8]) -> Option<u8> {
    let digit = |at: usize| char::from(*came.get(at)?).to_digit(16);
    Some((digit(1)? << 4 | digit(2)?) as u8)
}

/// Judges the form after decoding, so that no spelling of these hides from it.
fn refuse_ambiguous(path: &str) -> Result<(), PathRefused> {
    let mut segments = path[1..].split('/').peekable();
    while let Some(segment) = segments.next() {
        let name = segment.find("%3B").map_or(segment, |at| &segment[..at]);
        if name == "." || name == ".." {
            return Err(PathRefused::DotSegment);
        }
        if segment.is_empty() && segments.peek().is_some() {
            return Err(PathRefused::EmptySegment);
        }
    }
    let encodings = path.bytes().filter(|byte| *byte == b'%').count();
    if encodings == 0 {
        return Ok(());
    }
    let twice = |after: &[u8]| after.len() >= 2 && after[..2].iter().all(u8::is_ascii_hexdigit);
    if path.match_indices("%25").any(|(at, _)| twice(&path.as_bytes()[at + 3..])) {
        return Err(PathRefused::EncodedTwice);
    }
    // An overlong encoding, `%C0%AF`, is a slash to a careless decoder.
    match percent_encoding::percent_decode_str(path).decode_utf8() {
        Ok(_) => Ok(()),
        Err(_) => Err(PathRefused::NotUtf8),
    }
}

fn clean_query(query: &str) -> Result<(), PathRefused> {
    query.bytes().try_for_each(|byte| match byte {
        b' ' | b'#' => Err(PathRefused::Raw),
        0..=0x1f | 0x7f => Err(PathRefused::Control),
        0x80.. => Err(PathRefused::NotUtf8),
        _ => Ok(()),
    })
}

impl PathRefused {
    /// The reason as metrics and the answer's header spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotRooted => "path_not_rooted",
            Self::TooLong => "path_too_long",
            Self::Percent => "path_percent",
            Self::EncodedSeparator => "path_encoded_separator",
            Self::Backslash => "path_backslash",
            Self::Control => "path_control",
            Self::NotUtf8 => "path_not_utf8",
            Self::Raw => "path_raw",
            Self::DotSegment => "path_dot_segment",
            Self::EmptySegment => "path_empty_segment",
            Self::Parameter => "path_parameter",
            Self::EncodedTwice => "path_encoded_twice",
        }
    }
}

impl fmt::Display for NormalPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

/// `Host` or `:authority` in normal form: lower case, one trailing dot removed, the port apart, IPv6 as RFC 5952 writes it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Authority<'a> {
    host: Cow<'a, str>,
    port: Option<u16>,
}

/// Why an authority is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum AuthorityRefused {
    /// No host.
    #[error("the host is empty")]
    Empty,
    /// Beyond its bound.
    #[error("the host is longer than {AUTHORITY_BYTES_MAX} bytes")]
    TooLong,
    /// `user@host`: RFC 9110, 4.2.4 has senders leave it out and recipients treat it as an error.
    #[error("user information is not allowed in a host")]
    UserInformation,
    /// A character that no host name has, or an empty label.
    #[error("a host has labels of letters, digits, `-` and `_`, or is an IP address")]
    Name,
    /// Brackets around something else than an IPv6 address.
    #[error("`[` and `]` must enclose an IPv6 address")]
    Address,
    /// Not 1 to 65535 in plain digits.
    #[error("the port must be a number from 1 to 65535")]
    Port,
}

impl<'a> Authority<'a> {
    /// Parses `host`, `host:port`, `address`, `address:port`, `[address]` or `[address]:port`.
    pub fn parse(raw: &'a str) -> Result<Self, AuthorityRefused> {
        if raw.is_empty() {
            return Err(AuthorityRefused::Empty);
        }
        if raw.len() > AUTHORITY_BYTES_MAX {
            return Err(AuthorityRefused::TooLong);
        }
        if raw.contains('@') {
            return Err(AuthorityRefused::UserInformation);
        }
        let (host, port) = match raw.strip_prefix('[') {
            Some(rest) => {
                let (address, port) = rest.split_once(']').ok_or(AuthorityRefused::Address)?;
                (ipv6(&raw[..address.len() + 2], address)?, port)
            }
            None => {
                let (name, port) = raw.split_at(raw.find(':').unwrap_or(raw.len()));
                (host_name(name)?, port)
            }
        };
        let port = match port.strip_prefix(':') {
            Some(port) => Some(port_number(port)?),
            None if port.is_empty() => None,
            None => return Err(AuthorityRefused::Address),
        };
        Ok(Self { host, port })
    }

    /// The host: a name in lower case, an IPv4 address, or an IPv6 address in brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, when it was given.
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// The service of the mesh that it names: `catalog.mesh`.
    pub fn service(&self) -> Option<ServiceName> {
        self.host.strip_suffix(".mesh").and_then(|name| ServiceName::parse(name).ok())
    }
}

fn host_name(name: &str) -> Result<Cow<'_, str>, AuthorityRefused> {
    let name = name.strip_suffix('.').unwrap_or(name); // the root of DNS
    if name.is_empty() {
        return Err(AuthorityRefused::Empty);
    }
    let label =
        |label: &str| !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    if !name.split('.').all(label) {
        return Err(AuthorityRefused::Name);
    }
    // `127.1` and `0x7f.1` are addresses to some resolvers and names to others: WHATWG URL, 3.5, "ends in a number".
    let last = name.rsplit('.').next().unwrap_or(name);
    let numeric =
        last.bytes().all(|b| b.is_ascii_digit()) || last.get(..2).is_some_and(|x| x.eq_ignore_ascii_case("0x"));
    if numeric && name.parse::<Ipv4Addr>().is_err() {
        return Err(AuthorityRefused::Name);
    }
    Ok(match name.bytes().any(|b| b.is_ascii_uppercase()) {
        true => Cow::Owned(name.to_ascii_lowercase()),
        false => Cow::Borrowed(name),
    })
}

fn ipv6<'a>(came: &'a str, address: &str) -> Result<Cow<'a, str>, AuthorityRefused> {
    let address: Ipv6Addr = address.parse().map_err(|_| AuthorityRefused::Address)?;
    let normal = format!("[{address}]");
    Ok(if normal == came { Cow::Borrowed(came) } else { Cow::Owned(normal) })
}

fn port_number(given: &str) -> Result<u16, AuthorityRefused> {
    // `u16::from_str` takes a `+` and leading zeros.
    let plain = given.bytes().all(|b| b.is_ascii_digit()) && !given.starts_with('0');
    given.parse().ok().filter(|_| plain).ok_or(AuthorityRefused::Port)
}

impl fmt::Display for Authority<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}:{port}", self.host),
            None => f.write_str(&self.host),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_spelling_of_a_path_comes_to_one_form_or_is_refused() {
        for (given, expected) in [
            // Refused.
            ("", Err(PathRefused::NotRooted)),
            ("*", Err(PathRefused::NotRooted)),
            ("a/b", Err(PathRefused::NotRooted)),
            ("?x", Err(PathRefused::NotRooted)),
            ("http://web.mesh/", Err(PathRefused::NotRooted)),
            ("/%", Err(PathRefused::Percent)),
            ("/%4", Err(PathRefused::Percent)),
            ("/%zz", Err(PathRefused::Percent)),
            ("/%+1", Err(PathRefused::Percent)),
            ("/%é", Err(PathRefused::Percent)),
            ("/%u002e", Err(PathRefused::Percent)),
            ("/a%2fb", Err(PathRefused::EncodedSeparator)),
            ("/a%2Fb", Err(PathRefused::EncodedSeparator)),
            ("/a%5cb", Err(PathRefused::EncodedSeparator)),
            ("/a\\b", Err(PathRefused::Backslash)),
            ("/a%00", Err(PathRefused::Control)),
            ("/a%0d%0aset-cookie:x", Err(PathRefused::Control)),
            ("/a%7F", Err(PathRefused::Control)),
            ("/a\tb", Err(PathRefused::Control)),
            ("/a\0b", Err(PathRefused::Control)),
            ("/é", Err(PathRefused::NotUtf8)),
            ("/%e9", Err(PathRefused::NotUtf8)),
            ("/%c0%ae%c0%ae/x", Err(PathRefused::NotUtf8)),
            ("/%c0%af", Err(PathRefused::NotUtf8)),
            ("/a b", Err(PathRefused::Raw)),
            ("/a#b", Err(PathRefused::Raw)),
            ("/.", Err(PathRefused::DotSegment)),
            ("/..", Err(PathRefused::DotSegment)),
            ("/a/../b", Err(PathRefused::DotSegment)),
            ("/a/./b", Err(PathRefused::DotSegment)),
            ("/a/%2e%2E/b", Err(PathRefused::DotSegment)),
            ("/a/.%2e", Err(PathRefused::DotSegment)),
            ("/a/%2e", Err(PathRefused::DotSegment)),
            ("/a/..%3bx/b", Err(PathRefused::DotSegment)),
            ("/a/..;x/b", Err(PathRefused::Parameter)),
            ("/a;x=1", Err(PathRefused::Parameter)),
            ("//", Err(PathRefused::EmptySegment)),
            ("//a", Err(PathRefused::EmptySegment)),
            ("/a//b", Err(PathRefused::EmptySegment)),
            ("/a//", Err(PathRefused::EmptySegment)),
            ("/%252e%252e/", Err(PathRefused::EncodedTwice)),
            ("/%252f", Err(PathRefused::EncodedTwice)),
            ("/%25%32%65", Err(PathRefused::EncodedTwice)),
            ("/%25252e", Err(PathRefused::EncodedTwice)),
            ("/a?b c", Err(PathRefused::Raw)),
            ("/a?b\r", Err(PathRefused::Control)),
            ("/a?é", Err(PathRefused::NotUtf8)),
            // Rewritten.
            ("/%41%7eb", Ok("/A~b")),
            ("/caf%c3%a9", Ok("/caf%C3%A9")),
            ("/%C3%a9/%2d", Ok("/%C3%A9/-")),
            ("/a|b[1]{x}^`\"<>", Ok("/a%7Cb%5B1%5D%7Bx%7D%5E%60%22%3C%3E")),
            ("/a%3bb", Ok("/a%3Bb")),
            // Kept.
            ("/", Ok("/")),
            ("/a/b/", Ok("/a/b/")),
            ("/a.b/..c/d../...", Ok("/a.b/..c/d../...")),
            ("/a%20b", Ok("/a%20b")),
            ("/100%25", Ok("/100%25")),
            ("/100%25/2%25x", Ok("/100%25/2%25x")),
            ("/a+b&c=d,e:f@g!$'()*", Ok("/a+b&c=d,e:f@g!$'()*")),
            ("/a?b=/../%2f;//\\&c=%zz%00", Ok("/a?b=/../%2f;//\\&c=%zz%00")),
            ("/a?", Ok("/a?")),
            ("/a??b", Ok("/a??b")),
        ] {
            let parsed = NormalPath::parse(given);
            let forwarded = parsed.as_ref().map(|path| path.path_and_query().into_owned());
            assert_eq!(forwarded, expected.as_ref().map(|path| path.to_string()), "{given:?}");
            if let Ok(path) = parsed {
                assert_eq!(path.is_as_it_came(), path.path_and_query() == given, "{given:?}");
            }
        }
        let long = format!("/{}", "a".repeat(PATH_BYTES_MAX));
        assert_eq!(NormalPath::parse(&long), Err(PathRefused::TooLong));
        assert!(NormalPath::parse(&long[..PATH_BYTES_MAX]).is_ok());
    }

    #[test]
    fn a_host_comes_to_one_form_or_is_refused() {
        for (given, expected) in [
            ("", Err(AuthorityRefused::Empty)),
            (".", Err(AuthorityRefused::Empty)),
            (":80", Err(AuthorityRefused::Empty)),
            ("me@catalog.mesh", Err(AuthorityRefused::UserInformation)),
            ("catalog.mesh:80@evil.example", Err(AuthorityRefused::UserInformation)),
            ("catalog mesh", Err(AuthorityRefused::Name)),
            ("catalog..mesh", Err(AuthorityRefused::Name)),
            (".mesh", Err(AuthorityRefused::Name)),
            ("catalog.mesh..", Err(AuthorityRefused::Name)),
            ("catalog.mesh/x", Err(AuthorityRefused::Name)),
            ("catalog%2emesh", Err(AuthorityRefused::Name)),
            ("catálog.mesh", Err(AuthorityRefused::Name)),
            ("a,b", Err(AuthorityRefused::Name)),
            ("127.1", Err(AuthorityRefused::Name)),
            ("2130706433", Err(AuthorityRefused::Name)),
            ("0x7f.0.0.0x1", Err(AuthorityRefused::Name)),
            ("127.0.0.01", Err(AuthorityRefused::Name)),
            ("[::1", Err(AuthorityRefused::Address)),
            ("[127.0.0.1]", Err(AuthorityRefused::Address)),
            ("[fe80::1%eth0]", Err(AuthorityRefused::Address)),
            ("[::1]80", Err(AuthorityRefused::Address)),
            ("::1", Err(AuthorityRefused::Empty)),
            ("fe80::1", Err(AuthorityRefused::Port)),
            ("catalog.mesh:", Err(AuthorityRefused::Port)),
            ("catalog.mesh:0", Err(AuthorityRefused::Port)),
            ("catalog.mesh:080", Err(AuthorityRefused::Port)),
            ("catalog.mesh:+80", Err(AuthorityRefused::Port)),
            ("catalog.mesh:65536", Err(AuthorityRefused::Port)),
            ("catalog.mesh:80:80", Err(AuthorityRefused::Port)),
            ("Catalog.MESH.:8080", Ok(("catalog.mesh", Some(8080)))),
            ("catalog.mesh", Ok(("catalog.mesh", None))),
            ("orders_db-1.example", Ok(("orders_db-1.example", None))),
            ("127.0.0.1:80", Ok(("127.0.0.1", Some(80)))),
            ("[0:0::0:1]:443", Ok(("[::1]", Some(443)))),
            ("[::1]", Ok(("[::1]", None))),
        ] {
            let parsed = Authority::parse(given);
            assert_eq!(parsed.as_ref().map(|a| (a.host(), a.port())).map_err(|e| *e), expected, "{given}");
        }
        let long = "a".repeat(AUTHORITY_BYTES_MAX + 1);
        assert_eq!(Authority::parse(&long), Err(AuthorityRefused::TooLong));
        let service = |host| Authority::parse(host).unwrap().service().map(|name| name.to_string());
        assert_eq!(service("Catalog.mesh:80"), Some("catalog".into()));
        assert_eq!(service("a.catalog.mesh"), None);
        assert_eq!(service("catalog.mesh.example"), None);
        assert_eq!(service("countersign.mesh"), None);
    }

    /// Text with far more tricks in it than chance would give.
    fn tricky() -> impl Strategy<Value = String> {
        let piece = prop_oneof![
            Just("/"),
            Just("."),
            Just(".."),
            Just("%2e"),
            Just("%2E"),
            Just("%25"),
            Just("25"),
            Just("2e"),
            Just("%32"),
            Just("%65"),
            Just("2f"),
            Just("%3b"),
            Just("5c"),
            Just("%c3%a9"),
            Just("%"),
            Just("a"),
            Just("|"),
            Just("%c0"),
            Just("?"),
        ];
        prop::collection::vec(piece, 0..12).prop_map(|pieces| format!("/{}", pieces.concat()))
    }

    fn lenient_decode(path: &str) -> String {
        percent_encoding::percent_decode_str(path).decode_utf8_lossy().into_owned()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        // PROVES (one-path)
        #[test]
        fn a_normal_path_stays_the_same_and_no_decoding_finds_more_in_it(given in prop_oneof![tricky(), "/.*", "/[ -~]{0,40}"]) {
            if let Ok(path) = NormalPath::parse(&given) {
                let normal = path.as_str().to_owned();
                let again = NormalPath::parse(&normal).unwrap();
                prop_assert_eq!(again.as_str(), &normal);
                prop_assert!(again.is_as_it_came());
                let (mut decoded, segments) = (normal.clone(), normal.split('/').count());
                for _ in 0..4 {
                    decoded = lenient_decode(&decoded);
                    prop_assert_eq!(decoded.split(['/', '\\']).count(), segments, "{}", &decoded);
                    prop_assert!(!decoded.split('/').any(|segment| segment == "." || segment == ".."), "{}", &decoded);
                    prop_assert!(!decoded.contains(char::is_control) || normal.contains("%C2"), "{}", &decoded);
                }
            }
        }

        #[test]
        fn a_normal_host_stays_the_same(given in prop_oneof!["[a-zA-Z0-9.:\\[\\]-]{0,20}", ".*", "\\[[0-9a-f:]{2,20}\\](:[0-9]{1,5})?"]) {
            if let Ok(authority) = Authority::parse(&given) {
                let normal = authority.to_string();
                prop_assert_eq!(Authority::parse(&normal).unwrap(), authority);
            }
        }
    }
}
