//! The files that pages load: our style and scripts, and the released files of htmx with its licence. They are part of the binary.

use axum::{
    extract::Path,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};

const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";
const TEXT: &str = "text/plain; charset=utf-8";

/// Name, kind and bytes of each.
const ASSETS: &[(&str, &str, &[u8])] = &[
    ("countersign.css", CSS, include_bytes!("../../assets/countersign.css")),
    ("countersign.js", JS, include_bytes!("../../assets/countersign.js")),
    ("htmx-2.0.10.min.js", JS, include_bytes!("../../assets/vendor/htmx-2.0.10.min.js")),
    ("htmx-LICENSE", TEXT, include_bytes!("../../assets/vendor/htmx-LICENSE")),
    ("htmx-ext-sse-2.2.4.min.js", JS, include_bytes!("../../assets/vendor/htmx-ext-sse-2.2.4.min.js")),
    ("htmx-ext-sse-LICENSE", TEXT, include_bytes!("../../assets/vendor/htmx-ext-sse-LICENSE")),
    ("key.svg", SVG, include_bytes!("../../assets/key.svg")),
];

/// One of them.
pub async fn asset(Path(name): Path<String>) -> Response {
    let Some((_, kind, bytes)) = ASSETS.iter().find(|(known, ..)| *known == name) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static(kind)),
        // Another version of the binary may have another file of the same name.
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    (headers, *bytes).into_response()
}

#[cfg(test)]
mod tests {
    use countersign_core::canonical::Digest;

    use super::*;

    #[test]
    fn what_others_released_is_served_as_they_released_it() {
        for (name, expected) in [
            ("htmx-2.0.10.min.js", "71ea67185bfa8c98c39d31717c6fce5d852370fcdfd129db4543774d3145c0de"),
            ("htmx-ext-sse-2.2.4.min.js", "98a46496de0c3605fbffdce9167ba427bdd9553184f83f149c261891a92c0136"),
        ] {
            let (_, _, bytes) = ASSETS.iter().find(|(known, ..)| *known == name).unwrap();
            assert_eq!(hex::encode(Digest::of(bytes).0), expected, "{name}");
        }
    }
}
