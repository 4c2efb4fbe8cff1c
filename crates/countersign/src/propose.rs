//! `propose`: what a pipeline does. It plans the mesh directory on the mesh in force, asks for exactly that, and waits until an
//! operator has countersigned it. Its token comes from the CI system and never stands on a command line.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use clap::Args;
use http::{Request, Uri, header};
use hyper::body::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use time::OffsetDateTime;
use tokio::time::Instant;

use countersign_api::{
    https::{Bounds, Https},
    local::{Apply, GateOutcome, GateRefusal, Mesh, Proposal, ProposalState},
};
use countersign_core::{
    canonical::Digest,
    change::Revision,
    directory::{self, Directory},
    identity::TrustDomain,
};

use crate::{
    apply, change, cli,
    cli::Global,
    client::{self, query},
    deploy::{self, Deployment},
    difference::difference,
    error::{Done, Failure, Kind},
    mesh_directory, mesh_finder,
    render::{self, Output, Paint},
    workload::Svid,
};

/// Where GitLab, and whoever likes, puts the token.
const TOKEN_VARIABLE: &str = "COUNTERSIGN_ID_TOKEN";
/// Where GitHub says that tokens are to be had, and with what.
const GITHUB_URL_VARIABLE: &str = "ACTIONS_ID_TOKEN_REQUEST_URL";
const GITHUB_TOKEN_VARIABLE: &str = "ACTIONS_ID_TOKEN_REQUEST_TOKEN";
/// Longest token that is read, in bytes.
const TOKEN_BYTES_MAX: usize = 16 * 1024;
/// A token that ends sooner than this is not used any more when another can be had.
const TOKEN_LEFT_SECONDS: i64 = 60;
/// How often a change-set is planned anew because someone else's came first.
const ATTEMPTS_MAX: usize = 5;
/// How long one question waits for a decision.
const ASK_FOR: Duration = Duration::from_secs(20);
/// How long a wait goes on to ask while the control plane is away.
const AGAIN_AFTER: Duration = Duration::from_secs(3);
const TOKEN_BOUNDS: Bounds = Bounds { within: Duration::from_secs(15), body_bytes_max: 64 * 1024 };
const BOUNDS: Bounds = Bounds { within: Duration::from_secs(60), body_bytes_max: 256 * 1024 * 1024 };

/// What to propose, to whom, and as whom.
#[derive(Debug, Args)]
pub struct ProposeArguments {
    /// The mesh directory [default: the one found from here]
    #[arg(value_name = "DIR")]
    pub mesh: Option<PathBuf>,
    /// Sign in with the CI system's OpenID Connect token: GitHub's, or what `COUNTERSIGN_ID_TOKEN` holds
    #[arg(long, required_unless_present = "svid")]
    pub ci: bool,
    /// Sign in as the workload that this runs as, with a JWT-SVID of the agent at `SPIFFE_ENDPOINT_SOCKET`
    #[arg(long, conflicts_with_all = ["ci", "audience", "token_file"])]
    pub svid: bool,
    /// Where the control plane serves pipelines: what it was given as `--api`, from here
    #[arg(long, value_name = "URL", env = "COUNTERSIGN_CONTROL", hide_env_values = true)]
    pub control: String,
    /// For whom GitHub is asked to issue the token: the `audience` of [issuers.*] in mesh.toml
    #[arg(long, value_name = "TEXT", env = "COUNTERSIGN_AUDIENCE", hide_env_values = true)]
    pub audience: Option<String>,
    /// A file that holds the token, in place of the environment
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Which pipeline, for a token that several of mesh.toml fit
    #[arg(long, value_name = "NAME")]
    pub pipeline: Option<String>,
    /// A PEM file of certificates that the control plane is verified with, beside those that the system trusts
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// Admit a program as an instance of a service, in the same change
    #[arg(long, value_name = "SERVICE=FILE|SHA256", value_parser = deploy::deployment)]
    pub deploy: Vec<Deployment>,
    /// Wait until it is applied; fail when it is rejected, or after this long
    #[arg(long, value_name = "SPAN", value_parser = cli::span)]
    pub wait: Option<Duration>,
}

/// What proposing came to, when it came to an end.
#[derive(Debug, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
enum Outcome {
    /// The mesh is what the directory says.
    Unchanged { revision: Revision },
    /// An operator countersigned, and it is in the ledger.
    Applied { revision: Revision, digest: Digest, change: String, changes: Vec<String> },
}

/// Proposes what would make the mesh what its directory says.
pub async fn propose(arguments: ProposeArguments, global: &Global) -> Done {
    let place = match &arguments.mesh {
        Some(dir) => mesh_finder::at(dir, global.data_dir.as_deref())?,
        None => cli::here(global)?,
    };
    let directory = mesh_directory::load(place.dir()?)?;
    for failed in apply::failing(&directory)? {
        let paint = Paint::stderr();
        render::print_error(&format!("{} {}\n", paint.warn("warning:"), apply::failing_test(&failed)));
    }
    let https = Https::new(arguments.ca_file.as_deref()).map_err(|e| {
        Failure::new("could not read the certificates that are trusted")
            .because(&e)
            .help("give a PEM file with --ca-file")
    })?;
    let deadline = arguments.wait.map(|wait| Instant::now() + wait);
    let mut control = Control {
        url: arguments.control.trim_end_matches('/').to_owned(),
        pipeline: arguments.pipeline.clone(),
        token: Token::of(&arguments, &directory.trust_domain)?,
        https,
    };
    let wanted = Wanted { directory: &directory, deployments: &arguments.deploy };
    let outcome = until_applied(&mut control, wanted, deadline, global.output).await?;
    render::answer(global.output, &outcome, |outcome, paint| match outcome {
        Outcome::Unchanged { revision } => {
            format!("{} revision {revision} holds what the directory says\n", paint.good("nothing to change:"))
        }
        Outcome::Applied { revision, change, .. } => {
            format!("{} revision {revision}, change {change}\n", paint.good("applied:"))
        }
    })
}

/// What is proposed.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    directory: &'a Directory,
    deployments: &'a [Deployment],
}

/// Plans and proposes, again when what was proposed is void because another change came first.
async fn until_applied(
    control: &mut Control,
    wanted: Wanted<'_>,
    deadline: Option<Instant>,
    output: Output,
) -> Result<Outcome, Failure> {
    let mut attempts = 0;
    loop {
        let on: Mesh = control.get("/v1/pipeline/mesh", &[]).await?;
        let mut plan = directory::plan(wanted.directory, &on.state, on.revision).map_err(|e| {
            Failure::new("this directory is about another mesh").because(&e).help("correct `trust_domain` in mesh.toml")
        })?;
        plan.change_set.changes.extend(deploy::changes(wanted.deployments, &on));
        if plan.is_empty() {
            return Ok(Outcome::Unchanged { revision: on.revision });
        }
        let shown = difference(&plan.change_set.changes, &plan.bodies, Some(&on), Paint::stdout());
        let asked = Apply { change_set: plan.change_set, bodies: plan.bodies };
        let failure = match control.post::<serde_json::Value>("/v1/pipeline/proposals", &asked).await {
            // Nothing is applied before an operator has countersigned it, so the answer is a refusal that says what waits.
            Ok(_) => return Err(Failure::new("did not understand the answer of the control plane")),
            Err(failure) if failure.kind() == Kind::Moved && attempts < ATTEMPTS_MAX => {
                attempts += 1;
                continue;
            }
            Err(failure) => failure,
        };
        let (id, url) = match failure.refusal() {
            Some(GateRefusal { outcome: GateOutcome::NeedsCountersign, change: Some(id), url, .. }) => {
                (id.clone(), url.as_ref().map(|url| format!(", or at {url}")).unwrap_or_default())
            }
            _ => return Err(failure),
        };
        if output == Output::Text {
            render::print(&format!("{shown}\n"));
        }
        let Some(deadline) = deadline else { return Err(failure) };
        let paint = Paint::stderr();
        let note = format!("{} an operator runs `countersign change countersign {id}`{url}\n", paint.note("waiting:"));
        render::print_error(&note);
        let proposal = control.decided(&id, deadline).await?;
        match &proposal.state {
            ProposalState::Applied { revision } => {
                let Proposal { digest, changes, .. } = proposal;
                return Ok(Outcome::Applied { revision: *revision, digest, change: id, changes });
            }
            ProposalState::NeedsCountersign | ProposalState::StepUp => return Err(failure),
            ProposalState::Void { revision } if Instant::now() < deadline => {
                render::print_error(&format!(
                    "{} revision {revision} came first and made of change {id} something else; planning again, and a new \
                     countersignature is needed\n",
                    paint.warn("void:")
                ));
            }
            _ => {
                let what = format!("change {id} was not applied: {}", change::state(&proposal));
                return Err(Failure::refused(what).help("correct what was said, and propose again"));
            }
        }
    }
}

/// The control plane, as a pipeline reaches it.
struct Control {
    url: String,
    pipeline: Option<String>,
    token: Token,
    https: Https,
}

impl Control {
    async fn get<T: DeserializeOwned>(&mut self, path: &str, more: &[(&str, String)]) -> Result<T, Failure> {
        self.ask(Request::get(self.at(path, more)), Bytes::new()).await
    }

    async fn post<T: DeserializeOwned>(&mut self, path: &str, body: &impl Serialize) -> Result<T, Failure> {
        let body = serde_json::to_vec(body).map_err(|e| Failure::new("could not encode the request").because(&e))?;
        self.ask(Request::post(self.at(path, &[])).header(header::CONTENT_TYPE, "application/json"), body.into()).await
    }

    fn at(&self, path: &str, more: &[(&str, String)]) -> String {
        let more = more.iter().map(|(name, value)| (*name, Some(value.clone())));
        format!("{}{path}{}", self.url, query(more.chain([("pipeline", self.pipeline.clone())])))
    }

    async fn ask<T: DeserializeOwned>(&mut self, request: http::request::Builder, body: Bytes) -> Result<T, Failure> {
        let unreachable = || {
            Failure::new(format!("could not reach the control plane at `{}`", self.url))
                .help("`--control` names what it was given as `--api`, as https://HOST:PORT")
        };
        let token = self.token.get(&self.https).await?;
        let request = request.header(header::AUTHORIZATION, format!("Bearer {token}")).body(body);
        let request = request.map_err(|e| unreachable().because(&e))?;
        let (status, body) = self.https.ask(request, BOUNDS).await.map_err(|e| unreachable().because(&e))?;
        if !status.is_success() {
            return Err(client::problem(status, &body).into());
        }
        serde_json::from_slice(&body).map_err(|e| {
            Failure::new("did not understand the answer of the control plane")
                .because(&e)
                .help("use the same version of countersign for the control plane and for this command")
        })
    }

    /// The proposal once it is decided, or as it is at the deadline. A control plane that is away for a while is asked again.
    async fn decided(&mut self, id: &str, deadline: Instant) -> Result<Proposal, Failure> {
        let path = format!("/v1/pipeline/proposals/{id}/wait");
        let mut known: Option<Proposal> = None;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = left.min(ASK_FOR).as_millis().to_string();
            match self.get::<Proposal>(&path, &[("timeout_ms", timeout)]).await {
                Ok(proposal) => {
                    let is_open = matches!(proposal.state, ProposalState::NeedsCountersign | ProposalState::StepUp);
                    if !is_open || Instant::now() >= deadline {
                        return Ok(proposal);
                    }
                    known = Some(proposal);
                }
                Err(failure) if failure.kind() != Kind::Failed || Instant::now() >= deadline => {
                    return known.ok_or(failure);
                }
                Err(failure) => {
                    tracing::debug!(%failure, "asked for a decision in vain");
                    tokio::time::sleep(AGAIN_AFTER.min(left)).await;
                }
            }
        }
    }
}

/// Where the token comes from.
enum Token {
    /// A file; read each time, so that whoever renews it is followed.
    File(PathBuf),
    /// The environment.
    Given(String),
    /// GitHub, which issues another whenever it is asked.
    GitHub { url: String, secret: String, issued: Option<(String, i64)> },
    /// The agent of this host, for the workload that this runs as.
    Svid(Svid),
}

impl Token {
    fn of(arguments: &ProposeArguments, trust_domain: &TrustDomain) -> Result<Self, Failure> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        if arguments.svid {
            return Svid::for_control(trust_domain).map(Self::Svid);
        }
        if let Some(path) = &arguments.token_file {
            return Ok(Self::File(path.clone()));
        }
        if let Some(token) = variable(TOKEN_VARIABLE) {
            return Ok(Self::Given(token));
        }
        let (Some(url), Some(secret)) = (variable(GITHUB_URL_VARIABLE), variable(GITHUB_TOKEN_VARIABLE)) else {
            return Err(Failure::usage("found no token of a CI system").help(format!(
                "GitHub: `permissions: {{ id-token: write }}`; GitLab: `id_tokens: {{ {TOKEN_VARIABLE}: {{ aud: … }} }}`; or \
                 --token-file"
            )));
        };
        let audience = arguments.audience.as_ref().ok_or_else(|| {
            Failure::usage("GitHub has to be told for whom the token is")
                .help("give the `audience` of [issuers.*] in mesh.toml with --audience, or COUNTERSIGN_AUDIENCE")
        })?;
        let and = if url.contains('?') { '&' } else { '?' };
        let audience = query([("audience", Some(audience.clone()))]);
        Ok(Self::GitHub { url: format!("{url}{and}{}", audience.trim_start_matches('?')), secret, issued: None })
    }

    async fn get(&mut self, https: &Https) -> Result<String, Failure> {
        match self {
            Self::Given(token) => plain(token, TOKEN_VARIABLE),
            Self::File(path) => {
                let shown = path.display().to_string();
                let read = read(path).map_err(|e| Failure::new(format!("could not read `{shown}`")).because(&e))?;
                plain(&read, &shown)
            }
            Self::GitHub { url, secret, issued } => {
                let now = OffsetDateTime::now_utc().unix_timestamp();
                if let Some((token, expires)) = issued
                    && *expires > now + TOKEN_LEFT_SECONDS
                {
                    return Ok(token.clone());
                }
                let token = issue(https, url, secret).await?;
                let token = plain(&token, "GitHub's answer")?;
                *issued = Some((token.clone(), expires(&token).unwrap_or(now)));
                Ok(token)
            }
            Self::Svid(svid) => svid.fetch().await,
        }
    }
}

async fn issue(https: &Https, url: &str, secret: &str) -> Result<String, Failure> {
    let could_not = || {
        Failure::new("GitHub issued no token")
            .help("the job needs `permissions: { id-token: write }`; a pull request from a fork gets none")
    };
    let url: Uri = url.parse().map_err(|e| could_not().because(&e))?;
    let request = Request::get(url)
        .header(header::AUTHORIZATION, format!("Bearer {secret}"))
        .header(header::ACCEPT, "application/json")
        .header(header::USER_AGENT, concat!("countersign/", env!("CARGO_PKG_VERSION")))
        .body(Bytes::new());
    let request = request.map_err(|e| could_not().because(&e))?;
    let (status, body) = https.ask(request, TOKEN_BOUNDS).await.map_err(|e| could_not().because(&e))?;
    if !status.is_success() {
        return Err(could_not().cause(format!("it answered {status}")));
    }
    #[derive(serde::Deserialize)]
    struct Issued {
        value: String,
    }
    let issued: Issued = serde_json::from_slice(&body).map_err(|e| could_not().because(&e))?;
    Ok(issued.value)
}

fn read(path: &Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    fs::File::open(path)?.take(TOKEN_BYTES_MAX as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}

/// A token as it goes into a header: base64url and dots, and nothing that could be anything else.
fn plain(given: &str, of: &str) -> Result<String, Failure> {
    let token = given.trim();
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if (1..=TOKEN_BYTES_MAX).contains(&token.len()) && token.bytes().all(allowed) {
        return Ok(token.to_owned());
    }
    Err(Failure::new(format!("what `{of}` holds is no token")).help("it must hold the token alone, as it was issued"))
}

/// When a token says that it ends. Nothing is verified: it is only asked for another in time.
fn expires(token: &str) -> Option<i64> {
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    serde_json::from_slice::<serde_json::Value>(&payload).ok()?.get("exp")?.as_i64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_base64url_and_its_end_is_read_from_it() {
        for (given, expected) in [
            ("a.b-_.c", Some("a.b-_.c")),
            (" a.b.c\n", Some("a.b.c")),
            ("a.b.c\r\nx-evil: 1", None),
            ("Bearer a.b.c", None),
            ("", None),
        ] {
            assert_eq!(plain(given, "it").ok().as_deref(), expected, "{given:?}");
        }
        assert!(plain(&"a".repeat(TOKEN_BYTES_MAX + 1), "it").is_err());
        let payload = URL_SAFE_NO_PAD.encode(r#"{"exp":7}"#);
        assert_eq!(expires(&format!("e30.{payload}.x")), Some(7));
        assert_eq!((expires("e30.e30.x"), expires("x")), (None, None));
    }
}
