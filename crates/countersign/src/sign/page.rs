//! One page on this machine, for one ceremony: it shows the text that the command shows, and hands back what the authenticator
//! signed. It ends with the first good answer. No other origin, and nobody who does not know its address, is answered.
//!
//! The port is constant: it is part of the origin, and authenticators sign for an origin.

use std::{convert::Infallible, io, net::Ipv4Addr, sync::Arc, time::Duration};

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    body::{Bytes, Incoming},
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::{net::TcpListener, sync::mpsc};

use countersign_core::{assurance::webauthn::LOCAL_ORIGIN, countersignature, identity::FactorId};

use crate::error::Failure;

/// Longest answer of an authenticator that is read, in bytes.
const ANSWER_BYTES_MAX: usize = 16 * 1024;
/// Another ceremony on this machine may have the port for so long.
const PORT_WITHIN: Duration = Duration::from_secs(20);
const PAGE: &str = include_str!("page.html");
const SCRIPT: &str = include_str!("page.js");
const STYLE: &str = include_str!("page.css");
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'";

/// What the page shows, and what it has signed.
#[derive(Debug, Clone)]
pub struct Shown {
    /// The mesh.
    pub mesh: String,
    /// Who signs.
    pub operator: String,
    /// What for.
    pub purpose: &'static str,
    /// Who asked for the change.
    pub author: String,
    /// The revision it was planned on.
    pub base: u64,
    /// The digest of the change-set, in hexadecimal.
    pub digest: String,
    /// The difference, as the command shows it.
    pub text: String,
    /// What `navigator.credentials.get` is asked for, in WebAuthn's JSON.
    pub options: serde_json::Value,
}

/// What an authenticator answered.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    /// With which credential.
    pub credential: FactorId,
    /// What it said.
    pub authenticator_data: countersignature::Bytes,
    /// What the browser said.
    pub client_data_json: countersignature::Bytes,
    /// Over both.
    pub signature: countersignature::Bytes,
}

/// A page that waits for its answer.
pub struct Page {
    listener: TcpListener,
    site: Arc<Site>,
    answers: mpsc::Receiver<(Answer, mpsc::Sender<Result<(), String>>)>,
}

struct Site {
    /// Nobody guesses it.
    path: String,
    html: String,
    options: String,
    answered: mpsc::Sender<(Answer, mpsc::Sender<Result<(), String>>)>,
}

impl Page {
    /// Takes the port.
    pub async fn open(shown: &Shown) -> Result<Self, Failure> {
        let port = LOCAL_ORIGIN.rsplit(':').next().and_then(|port| port.parse().ok()).unwrap_or_default();
        let began = tokio::time::Instant::now();
        let listener = loop {
            match TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await {
                Ok(listener) => break listener,
                Err(error) if error.kind() == io::ErrorKind::AddrInUse && began.elapsed() < PORT_WITHIN => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Err(error) => {
                    return Err(Failure::new(format!("could not listen on port {port} for the page to sign on"))
                        .because(&error)
                        .help("end what listens there; the port is part of what keys were enrolled for"));
                }
            }
        };
        let mut secret = [0; 16];
        rustix::rand::getrandom(&mut secret, rustix::rand::GetRandomFlags::empty())
            .map_err(|error| Failure::new("could not make an address for the page").because(&error))?;
        let path = format!("/{}/", secret.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
        let (answered, answers) = mpsc::channel(1);
        let site = Site { path, html: html(shown), options: shown.options.to_string(), answered };
        Ok(Self { listener, site: Arc::new(site), answers })
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("{LOCAL_ORIGIN}{}", self.site.path)
    }

    /// Serves until `accept` takes an answer; what it says of one that it does not take is shown on the page.
    pub async fn signed<T>(mut self, accept: impl Fn(Answer) -> Result<T, String>) -> T {
        let (listener, site) = (self.listener, self.site.clone());
        let serving = tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let site = site.clone();
                tokio::spawn(async move {
                    let serve = service_fn(move |request| {
                        let site = site.clone();
                        async move { Ok::<_, Infallible>(respond(&site, request).await) }
                    });
                    // A browser that hangs up has had its answer, or asks again.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .keep_alive(false)
                        .serve_connection(TokioIo::new(stream), serve)
                        .await;
                });
            }
        });
        loop {
            // The sender lies in `self.site`.
            let Some((answer, said)) = self.answers.recv().await else { std::future::pending().await };
            match accept(answer) {
                Ok(taken) => {
                    let _ = said.send(Ok(())).await;
                    said.closed().await;
                    // What was answered leaves before the page is gone.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    serving.abort();
                    return taken;
                }
                Err(why) => drop(said.send(Err(why)).await),
            }
        }
    }
}

async fn respond(site: &Site, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let host = LOCAL_ORIGIN.trim_start_matches("http://");
    // A page of another name that resolves to this machine is not this page.
    if request.headers().get(header::HOST).is_none_or(|given| given != host) {
        return plain(StatusCode::MISDIRECTED_REQUEST, "not here");
    }
    let Some(name) = request.uri().path().strip_prefix(&site.path) else {
        return plain(StatusCode::NOT_FOUND, "there is no such page");
    };
    match (request.method(), name) {
        (&Method::GET, "") => document("text/html; charset=utf-8", site.html.clone()),
        (&Method::GET, "page.js") => document("text/javascript; charset=utf-8", SCRIPT.to_owned()),
        (&Method::GET, "page.css") => document("text/css; charset=utf-8", STYLE.to_owned()),
        (&Method::GET, "options.json") => document("application/json", site.options.clone()),
        (&Method::POST, "answer") => answer(site, request).await,
        _ => plain(StatusCode::NOT_FOUND, "there is no such page"),
    }
}

async fn answer(site: &Site, request: Request<Incoming>) -> Response<Full<Bytes>> {
    if request.headers().get(header::ORIGIN).is_none_or(|origin| origin != LOCAL_ORIGIN) {
        return plain(StatusCode::FORBIDDEN, "another page sent this");
    }
    let Ok(body) = Limited::new(request.into_body(), ANSWER_BYTES_MAX).collect().await else {
        return plain(StatusCode::BAD_REQUEST, "the answer could not be read");
    };
    let Ok(answer) = serde_json::from_slice(&body.to_bytes()) else {
        return plain(StatusCode::BAD_REQUEST, "that is no answer of an authenticator");
    };
    let (say, mut said) = mpsc::channel(1);
    if site.answered.send((answer, say)).await.is_err() {
        return plain(StatusCode::GONE, "this change is signed already");
    }
    match said.recv().await {
        Some(Ok(())) => plain(StatusCode::OK, "Signed. The command goes on; this page can be closed."),
        Some(Err(why)) => plain(StatusCode::UNPROCESSABLE_ENTITY, &format!("Not taken: {why}")),
        None => plain(StatusCode::GONE, "this change is signed already"),
    }
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = document("text/plain; charset=utf-8", text.to_owned());
    *response.status_mut() = status;
    response
}

fn document(kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text)));
    for (name, value) in [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ] {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}

fn html(shown: &Shown) -> String {
    let values = [
        ("{mesh}", escaped(&shown.mesh)),
        ("{operator}", escaped(&shown.operator)),
        ("{purpose}", escaped(shown.purpose)),
        ("{author}", escaped(&shown.author)),
        ("{base}", shown.base.to_string()),
        ("{digest}", escaped(&shown.digest)),
        ("{text}", escaped(&shown.text)),
    ];
    // One pass: what a value says is never taken for a place.
    let mut html = String::with_capacity(PAGE.len() + shown.text.len());
    let mut rest = PAGE;
    while let Some(at) = rest.find('{') {
        html.push_str(&rest[..at]);
        rest = &rest[at..];
        let found = values.iter().find(|(place, _)| rest.starts_with(place));
        let (place, value) = found.map_or(("{", "{"), |(place, value)| (*place, value.as_str()));
        html.push_str(value);
        rest = &rest[place.len()..];
    }
    html + rest
}

fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}
