//! What every request of a browser passes first: it names this site as its host, comes from a page of this site when it
//! changes something, and its answer tells the browser to load, run and frame nothing that is not ours.
//!
//! INVARIANT (own-pages-only): a request that changes something is looked at only when a page of this origin sent it.

use std::{
    net::{IpAddr, Ipv6Addr},
    num::NonZeroU32,
    sync::Arc,
};

use axum::{
    extract::{Extension, Request, State},
    middleware::Next,
    response::{IntoResponse, Redirect, Response},
};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};

use super::serve::From;
use crate::{
    Plane,
    local_api::{Refusal, problem},
};

/// Attempts of strangers from one address at once; later ones come back at [`ATTEMPTS_PER_SECOND`].
const ATTEMPTS_AT_ONCE: u32 = 120;
const ATTEMPTS_PER_SECOND: u32 = 2;
/// Addresses that are counted before those that were quiet are forgotten.
const ADDRESSES_MAX: usize = 10_000;

/// What a page may load: files of this site. No script or style stands in a page itself.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
                      font-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";

/// What all answers say.
const HEADERS: [(HeaderName, &str); 7] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (
        HeaderName::from_static("permissions-policy"),
        "publickey-credentials-get=(self), publickey-credentials-create=(self), camera=(), microphone=(), geolocation=()",
    ),
];

/// How often strangers from one address tried something.
pub struct Attempts(DefaultKeyedRateLimiter<IpAddr>);

impl Default for Attempts {
    fn default() -> Self {
        let number = |n| NonZeroU32::new(n).expect("INVARIANT: it is a constant that is not 0");
        let quota = Quota::per_second(number(ATTEMPTS_PER_SECOND)).allow_burst(number(ATTEMPTS_AT_ONCE));
        Self(RateLimiter::keyed(quota))
    }
}

impl Attempts {
    /// Counts one more; false when there were too many.
    pub fn count(&self, from: IpAddr) -> bool {
        if self.0.len() > ADDRESSES_MAX {
            self.0.retain_recent();
        }
        self.0.check_key(&network_of(from)).is_ok()
    }
}

/// An IPv6 host has as many addresses as it likes within its network.
pub fn network_of(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_none() => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        other => other.to_canonical(),
    }
}

/// The first look at a request.
pub async fn guard(State(plane): State<Arc<Plane>>, request: Request, next: Next) -> Response {
    let Some(site) = &plane.site else { return StatusCode::NOT_FOUND.into_response() };
    let authority = request.uri().authority().map(ToString::to_string);
    let authority = authority.or_else(|| text(request.headers(), header::HOST).map(str::to_owned)).unwrap_or_default();
    let is_safe = matches!(*request.method(), Method::GET | Method::HEAD);
    let mut response = if authority != site.authority {
        let port = site.listen.port();
        let by_address = [format!("127.0.0.1:{port}"), format!("[::1]:{port}")].contains(&authority);
        match (by_address && is_safe, request.uri().path_and_query()) {
            // A passkey works under the name only.
            (true, Some(path)) => Redirect::permanent(&format!("{}{path}", site.origin)).into_response(),
            _ => {
                let help = format!("open {}", site.origin);
                Refusal::from(problem(421, "this is not the host that was asked for", None, Some(&help)))
                    .into_response()
            }
        }
    } else if !is_safe && !is_own(request.headers(), &site.origin) {
        plane.metrics.refused("another-origin");
        Refusal::from(problem(403, "a page of another origin sent this", None, Some("open the dashboard itself")))
            .into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if site.is_https {
        let value = HeaderValue::from_static("max-age=31536000");
        headers.insert(header::STRICT_TRANSPORT_SECURITY, value);
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// Browsers say which page sends; a command says nothing of the kind and has no cookie that somebody else could use.
fn is_own(headers: &HeaderMap, origin: &str) -> bool {
    const SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
    if headers.contains_key(header::ORIGIN) {
        return text(headers, header::ORIGIN) == Some(origin);
    }
    if headers.contains_key(SITE) {
        return text(headers, SITE) == Some("same-origin");
    }
    !headers.contains_key(header::COOKIE)
}

/// What needs no session is slowed down when one address tries too much of it.
pub async fn slow_down_strangers(
    State(plane): State<Arc<Plane>>,
    Extension(From(address)): Extension<From>,
    request: Request,
    next: Next,
) -> Response {
    if plane.attempts.count(address) {
        return next.run(request).await;
    }
    plane.metrics.refused("too-many-attempts");
    let refused = problem(429, "too much was tried from this address", None, Some("wait a minute"));
    Refusal::from(refused).into_response()
}

/// A header that is there once, and text.
pub fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    let mut values = headers.get_all(name).iter();
    let (value, more) = (values.next()?, values.next());
    more.is_none().then(|| value.to_str().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_changes_something_comes_from_a_page_of_this_origin() {
        let origin = "https://mesh.example";
        for (headers, expected) in [
            (&[("origin", origin)][..], true),
            (&[("origin", "https://mesh.example:444")], false),
            (&[("origin", "http://mesh.example")], false),
            (&[("origin", "null")], false),
            (&[("origin", origin), ("origin", "https://other.example")], false),
            (&[("sec-fetch-site", "same-origin")], true),
            (&[("sec-fetch-site", "same-site")], false),
            (&[("sec-fetch-site", "cross-site"), ("cookie", "a=b")], false),
            (&[("sec-fetch-site", "none")], false),
            (&[], true),
            (&[("cookie", "a=b")], false),
        ] {
            let mut map = HeaderMap::new();
            for (name, value) in headers {
                map.append(*name, HeaderValue::from_static(value));
            }
            assert_eq!(is_own(&map, origin), expected, "{headers:?}");
        }
    }

    #[test]
    fn what_one_address_tries_is_bounded_and_an_ipv6_network_is_one() {
        let attempts = Attempts::default();
        let tried = |address: &str| attempts.count(address.parse().unwrap());
        for _ in 0..ATTEMPTS_AT_ONCE {
            assert!(tried("2001:db8::1"));
        }
        assert!(!tried("2001:db8::2"), "the same network");
        assert!(tried("2001:db8:0:1::1"), "another");
        assert!(tried("192.0.2.1"));
    }
}
