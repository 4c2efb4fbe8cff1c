//! The sidecar's pages for operators and their tools, on a loopback address of the host. They show; they change nothing,
//! and no key, token, header or body appears in them.
//!
//! | page | answers |
//! |---|---|
//! | `/metrics` | everything counted, in OpenMetrics' text form; `docs/metrics.txt` lists it |
//! | `/healthz` | 200 while the process runs |
//! | `/readyz` | 200 when a request could be admitted, otherwise 503 and every reason why not |
//! | `/live` | the exchanges that are open, the oldest first, at most [`LIVE_MAX`] |
//! | `/view` | the view in force: revision, policies, services, routes |

use std::{
    convert::Infallible,
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header, uri::Authority};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::json;
use tokio::{net::TcpListener, sync::Semaphore};
use tracing::debug;

use crate::{record::Reader, shared::Shared};

pub(crate) mod metrics;

/// Connections served at the same time.
const CONNECTIONS_MAX: usize = 16;
/// Longest time to send a request's head.
const HEAD_WITHIN: Duration = Duration::from_secs(5);
/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Exchanges on the page of what is open.
const LIVE_MAX: usize = 1000;
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What the pages are made from.
pub struct Admin {
    shared: Arc<Shared>,
    records: Reader,
}

type Page = Response<Full<Bytes>>;

impl Admin {
    /// Pages about `shared` and its records.
    pub fn new(shared: Arc<Shared>, records: Reader) -> Self {
        Self { shared, records }
    }

    /// Serves until the listener fails for good; each connection has a time and a size.
    pub async fn serve(self, listener: TcpListener) {
        let admin = Arc::new(self);
        let turns = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let Ok(turn) = turns.clone().acquire_owned().await else { return };
            let connection = match listener.accept().await {
                Ok((connection, _)) => connection,
                Err(error) => {
                    debug!(%error, "could not accept a connection for the admin pages");
                    tokio::time::sleep(Duration::from_millis(100)).await; // out of descriptors: some will be closed
                    continue;
                }
            };
            let admin = admin.clone();
            tokio::spawn(async move {
                let _turn = turn;
                let service = service_fn(|request| {
                    let admin = admin.clone();
                    async move { Ok::<_, Infallible>(admin.answer(&request).await) }
                });
                let served = http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_WITHIN)
                    .max_buf_size(HEAD_BYTES_MAX)
                    .keep_alive(false) // a turn must not be kept by a silent scraper
                    .serve_connection(TokioIo::new(connection), service)
                    .await;
                if let Err(error) = served {
                    debug!(%error, "a connection for the admin pages broke");
                }
            });
        }
    }

    async fn answer(&self, request: &Request<Incoming>) -> Page {
        if !is_local(request) {
            return text(StatusCode::MISDIRECTED_REQUEST, "ask for these pages by address or as localhost\n");
        }
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return text(StatusCode::METHOD_NOT_ALLOWED, "these pages only show\n");
        }
        match request.uri().path() {
            "/metrics" => self.metrics(),
            "/healthz" => text(StatusCode::OK, "ok\n"),
            "/readyz" => self.readyz(),
            "/live" => json_page(StatusCode::OK, &json!({ "exchanges": self.shared.live(LIVE_MAX).await })),
            "/view" => self.view(),
            _ => text(StatusCode::NOT_FOUND, "/metrics /healthz /readyz /live /view\n"),
        }
    }

    fn metrics(&self) -> Page {
        let mut page = String::with_capacity(16 * 1024);
        match metrics::encode(&mut page, &self.shared, &self.records.counts()) {
            Ok(()) => respond(StatusCode::OK, OPEN_METRICS, page),
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, &format!("could not write the metrics: {error}\n")),
        }
    }

    fn readyz(&self) -> Page {
        let shared = &self.shared;
        let stale = || {
            let max = Duration::from_secs(shared.view()?.view.spec.as_ref()?.max_staleness_seconds.into());
            Some(shared.age().is_none_or(|age| age > max))
        };
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64);
        let expired = shared.identity().is_none_or(|identity| identity.svid().not_after() <= now_s);
        let reasons: Vec<&str> = [
            (shared.view().is_none(), "no view yet"),
            (shared.view().is_some_and(|view| view.view.spec.is_none()), "the service is not declared"),
            (expired, "no valid SVID"),
            (stale() == Some(true), "no control plane was heard for `max_staleness`"),
            (shared.setup.app.is_some() && !shared.app_is_ready(), "the workload does not accept connections"),
            (shared.is_draining(), "draining"),
        ]
        .into_iter()
        .filter_map(|(holds, reason)| holds.then_some(reason))
        .collect();
        let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        json_page(status, &json!({ "ready": reasons.is_empty(), "reasons": reasons }))
    }

    fn view(&self) -> Page {
        let Some(compiled) = self.shared.view() else {
            return json_page(StatusCode::OK, &json!({ "instance": self.shared.setup.instance, "revision": null }));
        };
        let view = &compiled.view;
        let routes: Vec<_> = view.routes.values().flatten().map(|route| &route.name).collect();
        let policies: Vec<_> =
            view.policies.iter().map(|policy| json!({"id": policy.id, "file": policy.file})).collect();
        let page = json!({
            "instance": self.shared.setup.instance,
            "revision": compiled.revision(),
            "trust_domain": view.trust_domain,
            "service": view.service,
            "declared": view.spec.is_some(),
            "policies": policies,
            "roles": view.roles.keys().collect::<Vec<_>>(),
            "services": view.services.keys().collect::<Vec<_>>(),
            "routes": routes,
        });
        json_page(StatusCode::OK, &page)
    }
}

/// A page of a stranger's in the operator's browser can make a name of its own mean 127.0.0.1; it cannot make the browser
/// send an address or `localhost` for it.
fn is_local<B>(request: &Request<B>) -> bool {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()?.parse::<Authority>().ok());
    host.is_some_and(|host| {
        let name = host.host().trim_start_matches('[').trim_end_matches(']');
        name == "localhost" || name.parse::<IpAddr>().is_ok()
    })
}

fn text(status: StatusCode, page: &str) -> Page {
    respond(status, "text/plain; charset=utf-8", page.to_owned())
}

fn json_page(status: StatusCode, page: &serde_json::Value) -> Page {
    respond(status, "application/json", format!("{page:#}\n"))
}

fn respond(status: StatusCode, content_type: &'static str, page: String) -> Page {
    let mut response = Response::new(Full::new(Bytes::from(page)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_a_stranger_in_a_browser_gets_nothing() {
        for (host, expected) in [
            (Some("127.0.0.1:9901"), true),
            (Some("localhost:9901"), true),
            (Some("[::1]:9901"), true),
            (Some("stranger.example:9901"), false),
            (Some("localhost.stranger.example"), false),
            (Some("127.0.0.1.stranger.example"), false),
            (Some("127.0.0.1@stranger.example"), false),
            (Some(""), false),
            (None, false),
        ] {
            let request = Request::builder();
            let request = match host {
                Some(host) => request.header(header::HOST, host),
                None => request,
            };
            assert_eq!(is_local(&request.body(()).unwrap()), expected, "{host:?}");
        }
    }
}
