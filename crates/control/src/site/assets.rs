//! The files that pages load: our style and scripts, and the released files of htmx with its licence. They are part of the binary.

use axum::{
    extract::Path,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};

const CSS: &str = "text/css; charset=utf-8";
const JS: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// Name, kind and bytes of each.
const ASSETS: &[(&str, &str, &[u8])] = &[
    ("countersign.css", CSS, include_bytes!("../../assets/countersign.css")),
    ("countersign.js", JS, include_bytes!("../../assets/countersign.js")),
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
