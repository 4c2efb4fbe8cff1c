//! What may cross from one connection to the next: hop-by-hop headers end here, and nobody outside the mesh may speak of
//! identity.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{self, Entry},
};

/// Who the caller is, as the workload learns it.
pub(crate) const CALLER: HeaderName = HeaderName::from_static("countersign-caller");

/// The nonce of an exchange of this sidecar with itself. Never crosses, as nothing of ours does.
pub(crate) const PROBE: HeaderName = HeaderName::from_static("countersign-probe");

/// The access token of the caller's sidecar, on the mesh hop alone: nobody else sets it, and no workload sees it.
pub(crate) const TOKEN: HeaderName = HeaderName::from_static("countersign-token");

// RFC 9110, section 7.6.1: these concern one connection only, whether `Connection` names them or not. `TE` goes on for
// gRPC, reduced to `trailers`; `Expect` was answered by whoever asks for the body.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::EXPECT,
];

// Headers by which other proxies tell an application who is calling. From outside they are claims, and an application
// that believes them would believe anyone. Compared with `_` read as `-`: CGI and WSGI make both the same variable.
const IDENTITY: [&str; 15] = [
    "x-forwarded-client-cert",
    "x-client-cert",
    "x-client-verify",
    "x-client-dn",
    "x-client-subject-dn",
    "x-ssl-cert",
    "x-ssl-client-cert",
    "ssl-client-cert",
    "ssl-client-verify",
    "client-cert",
    "client-cert-chain",
    "x-spiffe-id",
    "x-remote-user",
    "remote-user",
    "x-authenticated-user",
];

/// Removes from a request what must not cross to the next connection.
pub(crate) fn request(headers: &mut HeaderMap) {
    hop_by_hop(headers);
    claims(headers);
}

/// Removes from an application's response what must not cross.
pub(crate) fn response_of_app(headers: &mut HeaderMap) {
    hop_by_hop(headers);
    claims(headers);
}

/// Removes from the response of another sidecar what concerns that connection; what the mesh says of itself stays.
pub(crate) fn response_of_mesh(headers: &mut HeaderMap) {
    hop_by_hop(headers);
}

/// Removes from trailers what may only stand in a head.
pub(crate) fn trailers(headers: &mut HeaderMap) {
    hop_by_hop(headers);
    claims(headers);
    headers.remove(header::CONTENT_LENGTH);
    headers.remove(header::HOST);
}

fn hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| name.trim().parse().ok())
            // RFC 9110, section 7.6.1: end-to-end fields cannot be taken away by naming them here.
            .filter(|name| ![header::HOST, header::CONTENT_LENGTH, header::TE, header::CONTENT_TYPE].contains(name))
            .collect();
        for name in named {
            headers.remove(name);
        }
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
    if let Entry::Occupied(mut te) = headers.entry(header::TE) {
        let trailers = te.iter().any(|value| value.as_bytes().eq_ignore_ascii_case(b"trailers"));
        if trailers {
            te.insert(HeaderValue::from_static("trailers"));
        } else {
            te.remove();
        }
    }
}

fn claims(headers: &mut HeaderMap) {
    let is_claim = |name: &HeaderName| {
        let name = name.as_str();
        let (b, n) = (name.as_bytes(), name.len());
        // Cheap first: all of them begin with one of these letters.
        n >= 10 && matches!(b[0], b'c' | b'x' | b's' | b'r') && {
            let like = |known: &str| {
                n >= known.len() && known.bytes().zip(b).all(|(k, g)| k == if *g == b'_' { b'-' } else { *g })
            };
            like("countersign-") || IDENTITY.iter().any(|known| known.len() == n && like(known))
        }
    };
    if headers.keys().any(is_claim) {
        let found: Vec<HeaderName> = headers.keys().filter(|name| is_claim(name)).cloned().collect();
        for name in found {
            headers.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(given: &[(&str, &str)]) -> HeaderMap {
        given.iter().map(|(n, v)| (n.parse::<HeaderName>().unwrap(), v.parse::<HeaderValue>().unwrap())).collect()
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn what_connection_names_ends_here_and_end_to_end_headers_do_not() {
        let mut given = headers(&[
            ("connection", "x-private, close, content-length"),
            ("keep-alive", "timeout=5"),
            ("x-private", "1"),
            ("content-length", "3"),
            ("te", "trailers"),
            ("upgrade", "h2c"),
            ("x-kept", "1"),
        ]);
        request(&mut given);
        assert_eq!(names(&given), ["content-length", "te", "x-kept"]);
    }

    #[test]
    fn nobody_outside_the_mesh_speaks_of_identity() {
        let mut given = headers(&[
            ("countersign-caller", "spiffe://shop.example/admin"),
            ("countersign_caller", "spiffe://shop.example/admin"),
            ("countersign-reason", "denied"),
            ("x-forwarded-client-cert", "URI=spiffe://shop.example/admin"),
            ("x_forwarded_client_cert", "URI=spiffe://shop.example/admin"),
            ("x-request-id", "1"),
            ("content-type", "text/plain"),
        ]);
        request(&mut given);
        assert_eq!(names(&given), ["content-type", "x-request-id"]);
    }
}
