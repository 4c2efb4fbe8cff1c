//! Asks the control plane or the agent on this machine, over their unix sockets, or the control plane of another machine, at its
//! dashboard, with a login and a proof of its key. HTTP and JSON, one connection for each question; a refusal arrives as a
//! [`Problem`] and leaves as a [`Failure`].

use std::{
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use http::header;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use time::OffsetDateTime;
use tokio::net::UnixStream;

use countersign_api::{
    dpop::DPOP_HEADER,
    local::{OPERATOR_HEADER, Problem, RECOVERED_HEADER},
    run_file::{AGENT_SOCKET, CONTROL_SOCKET},
};
use countersign_core::identity::OperatorName;

use crate::{
    error::Failure,
    login::{self, Dashboard, kept::Logins},
    mesh_finder::Place,
    render::{self, Paint},
};

/// Whether this command has spoken of a recovery already.
static WARNED: AtomicBool = AtomicBool::new(false);

/// Longest answer that is read whole, in bytes.
const ANSWER_BYTES_MAX: usize = 256 * 1024 * 1024;
/// Longest line of a tail, in bytes.
const LINE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// How long a dashboard has until its answer begins: longer than the longest wait that it takes.
const AFAR_WITHIN: Duration = Duration::from_secs(11 * 60);
/// What this command calls itself.
pub const USER_AGENT: &str = concat!("countersign/", env!("CARGO_PKG_VERSION"));

/// One of the two local APIs.
#[derive(Debug, Clone)]
pub struct Client {
    at: At,
    whose: &'static str,
    start: String,
    operator: Option<OperatorName>,
}

/// Where it is asked.
#[derive(Debug, Clone)]
enum At {
    /// On this machine, at its socket.
    Socket(PathBuf),
    /// On another one, by an operator who has signed in.
    Dashboard(Dashboard),
}

impl Client {
    /// The control plane of the mesh at `place`.
    pub fn control(place: &Place) -> Self {
        match &place.dashboard {
            Some(dashboard) => Self::dashboard(dashboard),
            None => Self::new(place, CONTROL_SOCKET, "control plane"),
        }
    }

    /// The control plane of the mesh on another machine that this dashboard is of.
    pub fn dashboard(dashboard: &Dashboard) -> Self {
        Self { at: At::Dashboard(dashboard.clone()), whose: "control plane", start: String::new(), operator: None }
    }

    /// The agent of the mesh at `place`.
    pub fn agent(place: &Place) -> Self {
        Self::new(place, AGENT_SOCKET, "agent")
    }

    fn new(place: &Place, socket: &str, whose: &'static str) -> Self {
        let start = match &place.dir {
            Some(dir) => format!("start the mesh with `countersign up {}`", shown(dir)),
            None => "start the mesh, or name its directory with `-C DIR`".to_owned(),
        };
        Self { at: At::Socket(place.data_dir.join(socket)), whose, start, operator: None }
    }

    /// The same, which reads what was opened for `operator`.
    pub fn reading_as(self, operator: Option<OperatorName>) -> Self {
        Self { operator, ..self }
    }

    /// Reads one document.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        self.document(Method::GET, path, Bytes::new()).await
    }

    /// Sends one document and reads the answer.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Failure> {
        let body = serde_json::to_vec(body).map_err(|e| Failure::new("could not encode the request").because(&e))?;
        self.document(Method::POST, path, body.into()).await
    }

    /// Reads newline-delimited documents until the other end, or the caller, has enough.
    pub async fn lines(&self, path: &str) -> Result<Lines, Failure> {
        Ok(Lines { body: self.ask(Method::GET, path, Bytes::new()).await?, pending: Vec::new(), whose: self.whose })
    }

    async fn document<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T, Failure> {
        let answer = self.ask(method, path, body).await?;
        let bytes = self.whole(answer).await?;
        serde_json::from_slice(&bytes).map_err(|e| {
            Failure::new(format!("did not understand the answer of the {} to `{path}`", self.whose))
                .because(&e)
                .help("use the same version of countersign for the mesh and for this command")
        })
    }

    async fn ask(&self, method: Method, path: &str, body: Bytes) -> Result<Incoming, Failure> {
        let response = match &self.at {
            At::Socket(socket) => self.ask_here(socket, method, path, body).await?,
            At::Dashboard(dashboard) => ask_afar(dashboard, method, path, body).await?,
        };
        let status = response.status();
        if let Some(operator) = response.headers().get(RECOVERED_HEADER).and_then(|name| name.to_str().ok())
            && !WARNED.swap(true, Ordering::Relaxed)
        {
            render::print_error(&format!(
                "{} this mesh was recovered past its gate, `{operator}` was made owner; `countersign status` says more\n",
                Paint::stderr().warn("warning:")
            ));
        }
        if status.is_success() {
            return Ok(response.into_body());
        }
        let bytes = self.whole(response.into_body()).await?;
        Err(problem(status, &bytes).into())
    }

    async fn ask_here(
        &self,
        socket: &Path,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, Failure> {
        let stream = UnixStream::connect(socket).await.map_err(|e| self.unreachable(socket, &e))?;
        let lost = |e: &hyper::Error| Failure::new(format!("lost the connection to the {}", self.whose)).because(e);
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| lost(&e))?;
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .header("content-type", "application/json");
        if let Some(operator) = &self.operator {
            request = request.header(OPERATOR_HEADER, operator.as_str());
        }
        let request = request
            .body(Full::new(body))
            .map_err(|e| Failure::new(format!("could not ask for `{path}`")).because(&e))?;
        sender.send_request(request).await.map_err(|e| lost(&e))
    }

    async fn whole(&self, body: Incoming) -> Result<Bytes, Failure> {
        let limited = Limited::new(body, ANSWER_BYTES_MAX).collect().await;
        limited.map(|whole| whole.to_bytes()).map_err(|e| {
            Failure::new(format!("lost the connection to the {} in the middle of its answer", self.whose)).because(&*e)
        })
    }

    fn unreachable(&self, socket: &Path, e: &io::Error) -> Failure {
        let socket = socket.display();
        match e.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                Failure::new(format!("the {} of this mesh is not running: nothing listens at `{socket}`", self.whose))
                    .help(&self.start)
            }
            io::ErrorKind::PermissionDenied => Failure::new(format!("may not open `{socket}`"))
                .because(e)
                .help("run this as the user who runs the mesh"),
            _ => Failure::new(format!("could not reach the {} at `{socket}`", self.whose)).because(e),
        }
    }
}

/// Asks as the operator of the login, with a proof made for this very request.
async fn ask_afar(
    dashboard: &Dashboard,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<Response<Incoming>, Failure> {
    let login = Logins::here()?.find(dashboard)?.ok_or_else(|| not_signed_in(dashboard))?;
    let url = format!("{dashboard}{path}");
    let proof = login.key.prove(method.as_str(), &url, Some(&login.token), OffsetDateTime::now_utc().unix_timestamp());
    let request = Request::builder()
        .method(method)
        .uri(&url)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::USER_AGENT, USER_AGENT)
        .header(header::AUTHORIZATION, format!("DPoP {}", login.token))
        .header(DPOP_HEADER, proof)
        .body(body)
        .map_err(|e| unreachable(dashboard).because(&e))?;
    let https = login::trusting(login.ca_file.as_deref())?;
    https.open(request, AFAR_WITHIN).await.map_err(|e| unreachable(dashboard).because(&e))
}

/// What is said where nobody is signed in.
pub fn not_signed_in(dashboard: &Dashboard) -> Failure {
    Failure::new(format!("nobody is signed in to `{dashboard}` here"))
        .help(format!("sign in with `countersign login --at {dashboard}`"))
}

/// What is said of a dashboard that does not answer.
pub fn unreachable(dashboard: &Dashboard) -> Failure {
    Failure::new(format!("could not reach the dashboard at `{dashboard}`"))
        .help("it is where `control --dashboard` listens, under its `--dashboard-origin`; `login --ca-file` trusts its certificate")
}

/// What an answer that is no success says.
pub fn problem(status: StatusCode, bytes: &[u8]) -> Problem {
    serde_json::from_slice(bytes).unwrap_or_else(|_| Problem {
        title: format!("the answer was {status}"),
        status: status.as_u16(),
        detail: Some(String::from_utf8_lossy(&bytes[..bytes.len().min(1000)]).into_owned())
            .filter(|text| !text.is_empty()),
        help: None,
        refusal: None,
    })
}

/// The way a user would type a path: `.` for the current directory.
pub fn shown(dir: &Path) -> String {
    match std::env::current_dir() {
        Ok(here) if here == dir => ".".to_owned(),
        Ok(here) => dir.strip_prefix(here).unwrap_or(dir).display().to_string(),
        Err(_) => dir.display().to_string(),
    }
}

/// Newline-delimited documents.
pub struct Lines {
    body: Incoming,
    pending: Vec<u8>,
    whose: &'static str,
}

impl Lines {
    /// The next document; `None` after the last.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Failure> {
        loop {
            if let Some(end) = self.pending.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=end).collect();
                if line.len() > 1 {
                    return self.parse(&line).map(Some);
                }
                continue;
            }
            if self.pending.len() > LINE_BYTES_MAX {
                return Err(Failure::new(format!(
                    "the {} sent a line of more than {LINE_BYTES_MAX} bytes",
                    self.whose
                )));
            }
            match self.body.frame().await {
                Some(Ok(frame)) => self.pending.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new())),
                Some(Err(e)) => {
                    return Err(Failure::new(format!("lost the connection to the {}", self.whose)).because(&e));
                }
                None if self.pending.is_empty() => return Ok(None),
                None => {
                    let rest = std::mem::take(&mut self.pending);
                    return self.parse(&rest).map(Some);
                }
            }
        }
    }

    fn parse<T: DeserializeOwned>(&self, line: &[u8]) -> Result<T, Failure> {
        serde_json::from_slice(line).map_err(|e| {
            Failure::new(format!("did not understand a line of the {}", self.whose))
                .because(&e)
                .help("use the same version of countersign for the mesh and for this command")
        })
    }
}

/// A query string of the members that are there.
pub fn query<'a>(members: impl IntoIterator<Item = (&'a str, Option<String>)>) -> String {
    use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
    let members: Vec<String> = members
        .into_iter()
        .filter_map(|(name, value)| Some(format!("{name}={}", utf8_percent_encode(&value?, NON_ALPHANUMERIC))))
        .collect();
    if members.is_empty() { String::new() } else { format!("?{}", members.join("&")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_mesh_that_does_not_run_is_said_so_with_the_command_that_starts_it() {
        let root = tempfile::tempdir().unwrap();
        let place =
            Place { dir: Some(root.path().into()), data_dir: root.path().join(".countersign"), dashboard: None };
        let failure = Client::control(&place).get::<serde_json::Value>("/v1/status").await.unwrap_err();
        let text = failure.render(crate::render::Output::Text, crate::render::Paint::plain());
        assert!(text.contains("the control plane of this mesh is not running"), "{text}");
        assert!(text.contains("help: start the mesh with `countersign up "), "{text}");
    }

    #[test]
    fn a_query_escapes_what_it_carries() {
        assert_eq!(
            query([("id", None), ("principal", Some("spiffe://a/b&c".into()))]),
            "?principal=spiffe%3A%2F%2Fa%2Fb%26c"
        );
        assert_eq!(query([("id", None)]), "");
    }

    #[test]
    fn an_answer_that_is_no_problem_document_is_still_told() {
        let problem = problem(StatusCode::BAD_GATEWAY, b"<html>");
        assert_eq!((problem.status, problem.detail.as_deref()), (502, Some("<html>")));
    }
}
