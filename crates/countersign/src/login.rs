//! `login`, `whoami` and `logout`: an operator signs this machine's commands in to a mesh that runs elsewhere. The command asks the
//! dashboard, the operator says yes there, and the session that comes of it is bound to a key that stays here.
//!
//! | furniture | does |
//! |---|---|
//! | [`kept`] | keeps the session and its key in a file |

use std::{fmt, path::PathBuf, time::Duration};

use clap::Args;
use http::{Request, Uri, header};
use hyper::body::Bytes;
use serde::de::DeserializeOwned;
use serde_json::json;
use time::OffsetDateTime;
use tokio::time::Instant;

use countersign_api::{
    device::{AUTHORIZE_PATH, Authorization, CLIENT_ID, GRANT_TYPE, Granted, OAuthError, TOKEN_PATH},
    dpop::{DPOP_HEADER, ProofKey},
    https::{Bounds, Https, is_loopback},
    local::{SessionView, SessionsEnded},
};

use crate::{
    cli::{self, Global},
    client::{self, Client, query},
    error::{Done, Failure},
    render::{self, Output, Paint},
    sign,
};

pub mod kept;

use kept::{Login, Logins};

/// The environment's name for the dashboard that commands ask.
pub const VARIABLE: &str = "COUNTERSIGN_DASHBOARD";
/// What a dashboard that is asked too fast adds to the time between two questions (RFC 8628, 3.5).
const SLOWER: Duration = Duration::from_secs(5);
/// The longest time between two questions that a dashboard can ask for.
const INTERVAL_MAX: Duration = Duration::from_secs(60);
const BOUNDS: Bounds = Bounds { within: Duration::from_secs(15), body_bytes_max: 64 * 1024 };

/// The dashboard of a mesh on another machine: its origin, as browsers write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dashboard(pub String);

impl fmt::Display for Dashboard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Dashboard {
    /// Reads `https://mesh.example:8443`, with or without a slash behind it.
    pub fn parse(given: &str) -> Result<Self, Failure> {
        let no = || {
            Failure::usage(format!("`{given}` is no dashboard"))
                .help("give its origin, as `https://mesh.example` or `https://mesh.example:8443`")
        };
        let uri: Uri = given.trim_end_matches('/').parse().map_err(|_| no())?;
        let (scheme, host) = (uri.scheme_str().ok_or_else(no)?, uri.host().ok_or_else(no)?);
        let authority = uri.authority().ok_or_else(no)?.as_str();
        let is_plain = uri.path() == "/" && uri.query().is_none() && !authority.contains('@');
        if !is_plain || !(scheme == "https" || scheme == "http" && is_loopback(host)) {
            return Err(no());
        }
        let authority = authority.to_ascii_lowercase();
        let port = if scheme == "https" { ":443" } else { ":80" };
        Ok(Self(format!("{scheme}://{}", authority.strip_suffix(port).unwrap_or(&authority))))
    }
}

/// How to sign in.
#[derive(Debug, Args)]
pub struct LoginArguments {
    /// A PEM file of certificates that the dashboard is verified with, beside those that the system trusts
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// Only print where to go
    #[arg(long)]
    pub no_browser: bool,
}

/// Signs this machine's commands in.
pub async fn login(arguments: LoginArguments, global: &Global) -> Done {
    let dashboard = meant(global)?;
    let ca_file = arguments.ca_file.map(|path| std::path::absolute(&path).unwrap_or(path));
    let asking = Asking { https: trusting(ca_file.as_deref())?, key: ProofKey::generate(), dashboard };
    let authorization = asking.authorize().await?;
    tell(&authorization, &asking.key, global.output);
    if !arguments.no_browser {
        sign::open_browser(&authorization.verification_uri_complete);
    }
    let Granted { access_token, who, .. } = asking.answered(&authorization).await?;
    let Asking { dashboard, key, .. } = asking;
    let logins = Logins::here()?;
    // One session of this user on this machine is enough: the one before ends. Whether it could be told, it is forgotten.
    if let Ok(Some(_)) = logins.find(&dashboard) {
        let _ = Client::dashboard(&dashboard).post::<SessionsEnded>("/v1/session/end", &json!({})).await;
    }
    logins.keep(&Login { dashboard: dashboard.clone(), who, token: access_token, key, ca_file })?;
    let session: SessionView = Client::dashboard(&dashboard).get("/v1/session").await?;
    render::answer(global.output, &session, |session, paint| {
        format!("{} {}\n", paint.good("signed in:"), described(session, &dashboard))
    })
}

/// Where to go, and what to compare there.
fn tell(authorization: &Authorization, key: &ProofKey, output: Output) {
    let Authorization { user_code, verification_uri, verification_uri_complete, expires_in, .. } = authorization;
    if output == Output::Json {
        let told = json!({
            "verification_uri": verification_uri,
            "verification_uri_complete": verification_uri_complete,
            "user_code": user_code,
            "key": key.thumbprint(),
            "expires_in": expires_in,
        });
        return render::print(&render::json_line(&told));
    }
    let paint = Paint::stderr();
    render::print_error(&format!(
        "open {verification_uri_complete}\nand compare there, within {} minutes:\n\n  {}  {}\n  {}   {}\n\n",
        expires_in / 60,
        paint.dim("code"),
        paint.strong(&render::tame(user_code)),
        paint.dim("key"),
        key.thumbprint(),
    ));
}

/// Says who is signed in.
pub async fn whoami(global: &Global) -> Done {
    let dashboard = meant(global)?;
    let session: SessionView = Client::dashboard(&dashboard).get("/v1/session").await?;
    render::answer(global.output, &session, |session, _| format!("{}\n", described(session, &dashboard)))
}

fn described(session: &SessionView, dashboard: &Dashboard) -> String {
    format!(
        "{} at {dashboard}, until {} at the latest when unused",
        render::tame(&session.who),
        render::moment_full(session.expires_at_ms)
    )
}

/// Ends the session, and forgets it here whatever the dashboard says.
pub async fn logout(global: &Global) -> Done {
    let dashboard = meant(global)?;
    let logins = Logins::here()?;
    if logins.find(&dashboard).is_ok_and(|login| login.is_none()) {
        return Err(client::not_signed_in(&dashboard));
    }
    let told = Client::dashboard(&dashboard).post::<SessionsEnded>("/v1/session/end", &json!({})).await;
    logins.forget(&dashboard)?;
    told.map_err(|failure| {
        let help = "it is forgotten here, and ends by itself within the hour; `countersign session revoke` ends it now";
        Failure::new("the dashboard did not end the session").because(&failure).help(help)
    })?;
    render::answer(global.output, &json!({ "signed_out": dashboard.0 }), |_, paint| {
        format!("{} {dashboard}\n", paint.good("signed out:"))
    })
}

/// The dashboard that is named, or else the one of the mesh that runs here, or else the only one that somebody is signed in to.
fn meant(global: &Global) -> Result<Dashboard, Failure> {
    if let Some(named) = cli::dashboard(global)? {
        return Ok(named);
    }
    let here = cli::here(global).ok().and_then(|place| place.run_file()).and_then(|run| run.dashboard);
    if let Some(url) = here {
        return Dashboard::parse(&url);
    }
    match &Logins::here()?.all()[..] {
        [only] => Ok(only.clone()),
        _ => Err(Failure::usage("no dashboard is named").help(format!("name it: `--at URL`, or {VARIABLE}"))),
    }
}

/// Whoever verifies the dashboard.
pub fn trusting(ca_file: Option<&std::path::Path>) -> Result<Https, Failure> {
    Https::new(ca_file).map_err(|error| {
        Failure::new("could not read the certificates that are trusted")
            .because(&error)
            .help("give a PEM file with `countersign login --ca-file`")
    })
}

/// A command that is not signed in yet.
struct Asking {
    https: Https,
    key: ProofKey,
    dashboard: Dashboard,
}

impl Asking {
    async fn authorize(&self) -> Result<Authorization, Failure> {
        let form = [("client_id", CLIENT_ID), ("dpop_jkt", &self.key.thumbprint()), ("device_name", &machine())];
        match self.ask(AUTHORIZE_PATH, &form).await? {
            Ok(authorization) => Ok(authorization),
            Err(error) => Err(self.refused(&error)),
        }
    }

    /// Asks until somebody has answered (RFC 8628, 3.5).
    async fn answered(&self, authorization: &Authorization) -> Result<Granted, Failure> {
        let form = [("grant_type", GRANT_TYPE), ("client_id", CLIENT_ID), ("device_code", &authorization.device_code)];
        let deadline = Instant::now() + Duration::from_secs(authorization.expires_in);
        let mut interval = Duration::from_secs(authorization.interval);
        loop {
            tokio::time::sleep(interval.min(INTERVAL_MAX)).await;
            match self.ask(TOKEN_PATH, &form).await {
                Ok(Ok(granted)) => return Ok(granted),
                Ok(Err(error)) => match &*error.error {
                    "authorization_pending" => {}
                    "slow_down" => interval += SLOWER,
                    _ => return Err(self.refused(&error)),
                },
                // Away for a moment: "the client MUST unilaterally reduce its polling frequency".
                Err(failure) if Instant::now() >= deadline => return Err(failure),
                Err(failure) => {
                    tracing::debug!(%failure, "asked the dashboard in vain");
                    interval *= 2;
                }
            }
            if Instant::now() >= deadline {
                return Err(Failure::refused("nobody has answered in time").help("run `countersign login` again"));
            }
        }
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        path: &str,
        form: &[(&str, &str)],
    ) -> Result<Result<T, OAuthError>, Failure> {
        let url = format!("{}{path}", self.dashboard);
        let unreachable = || client::unreachable(&self.dashboard);
        let now_seconds = OffsetDateTime::now_utc().unix_timestamp();
        let body = query(form.iter().map(|(name, value)| (*name, Some((*value).to_owned()))));
        let request = Request::post(&url)
            .header(header::CONTENT_TYPE, "application/x-www-form-urlencoded")
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, client::USER_AGENT)
            .header(DPOP_HEADER, self.key.prove("POST", &url, None, now_seconds))
            .body(Bytes::from(body.trim_start_matches('?').to_owned()));
        let request = request.map_err(|error| unreachable().because(&error))?;
        let (status, body) = self.https.ask(request, BOUNDS).await.map_err(|error| unreachable().because(&error))?;
        let strange = |error: serde_json::Error| {
            Failure::new(format!("did not understand the answer of `{}`", self.dashboard))
                .because(&error)
                .help("is it the dashboard of a mesh, of the same version as this command?")
        };
        if status.is_success() {
            return serde_json::from_slice(&body).map(Ok).map_err(strange);
        }
        match serde_json::from_slice(&body) {
            Ok(error) => Ok(Err(error)),
            Err(_) => Err(client::problem(status, &body).into()),
        }
    }

    fn refused(&self, error: &OAuthError) -> Failure {
        let why = error.error_description.as_deref().unwrap_or(&error.error);
        Failure::refused(format!("`{}` does not sign this command in", self.dashboard))
            .cause(render::tame(why))
            .help("run `countersign login` again, and answer on the page that it names")
    }
}

/// What this machine is called, and who uses it: for whoever answers.
fn machine() -> String {
    let name = rustix::system::uname();
    let host = name.nodename().to_string_lossy();
    match std::env::var("USER").or_else(|_| std::env::var("LOGNAME")) {
        Ok(user) => format!("{user}@{host}"),
        Err(_) => host.into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dashboard_is_an_origin_and_nothing_goes_over_the_network_in_the_clear() {
        for (given, expected) in [
            ("https://mesh.example", Some("https://mesh.example")),
            ("https://Mesh.Example:8443/", Some("https://mesh.example:8443")),
            ("https://mesh.example:443", Some("https://mesh.example")),
            ("http://localhost:7440", Some("http://localhost:7440")),
            ("http://mesh.example", None),
            ("https://mesh.example/a", None),
            ("https://mesh.example?a", None),
            ("https://you@mesh.example", None),
            ("mesh.example", None),
            ("", None),
        ] {
            assert_eq!(Dashboard::parse(given).ok().map(|dashboard| dashboard.0).as_deref(), expected, "{given}");
        }
    }
}
