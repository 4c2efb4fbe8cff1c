//! `control`: the control plane alone, for meshes of several hosts.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;

use countersign_api::run_file::{CONTROL_SOCKET, RunFile};
use countersign_control::{
    AUDIT_FILE, Control, ControlConfig,
    advertise::Advertise,
    oauth::OauthConfig,
    pipelines,
    site::{SiteConfig, place::TlsFiles},
    store::postgres::PostgresUrl,
};
use countersign_core::identity::TrustDomain;

use crate::{
    cli::{self, Global},
    error::{Done, Failure},
    ledger::WitnessArguments,
    mesh_finder::{self, Place},
    render,
    sealing_key::SealingKeyArguments,
    serve,
    telemetry::Telemetry,
};

/// Where pipelines find the control plane.
#[derive(Debug, Args)]
pub struct PipelineArguments {
    /// Where pipelines propose changes, over HTTPS; on 127.0.0.1 also without a certificate
    #[arg(long, value_name = "IP:PORT")]
    pub api: Option<SocketAddr>,
    /// A PEM file of the certificate chain for --api; it is read again when it was renewed
    #[arg(long, value_name = "FILE", requires = "api_key")]
    pub api_cert: Option<PathBuf>,
    /// A PEM file of the key of --api-cert
    #[arg(long, value_name = "FILE", requires = "api_cert")]
    pub api_key: Option<PathBuf>,
    /// A PEM file of certificates that issuers are verified with, beside those that the system trusts
    #[arg(long, value_name = "FILE")]
    pub issuer_ca: Option<PathBuf>,
}

impl PipelineArguments {
    /// The same, for the control plane.
    pub fn settings(self) -> pipelines::Settings {
        let Self { api, api_cert, api_key, issuer_ca } = self;
        pipelines::Settings { listen: api, certificate: api_cert.zip(api_key), issuer_ca }
    }
}

/// Where the token service is.
#[derive(Debug, Args)]
pub struct TokenServiceArguments {
    /// The URL that the token service issues as, to the letter [default: https://IP:PORT of --oauth]
    #[arg(long, value_name = "URL")]
    pub oauth_url: Option<String>,
}

/// Where the audit trail is.
#[derive(Debug, Args)]
pub struct AuditArguments {
    /// The file that says what operators did and were refused, in lines of JSON [default: audit.jsonl in the data directory]
    #[arg(long, value_name = "FILE")]
    pub audit_log: Option<PathBuf>,
}

impl AuditArguments {
    /// The file.
    pub fn file(self, place: &Place) -> PathBuf {
        self.audit_log.unwrap_or_else(|| place.data_dir.join(AUDIT_FILE))
    }
}

/// What the dashboard shows the providers of `[sign_in.*]`.
#[derive(Debug, Args)]
pub struct SignInArguments {
    /// A directory with the client secret of each sign-in whose provider gave the mesh one, in a file of its name
    #[arg(long, value_name = "DIR")]
    pub sign_in_secrets: Option<PathBuf>,
}

/// Where it keeps its state and where it listens.
#[derive(Debug, Args)]
pub struct ControlArguments {
    /// The mesh directory whose data directory it uses; not needed with --data-dir
    #[arg(value_name = "DIR")]
    pub mesh: Option<PathBuf>,
    /// Where agents connect
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:7443")]
    pub listen: SocketAddr,
    /// Where other hosts find it, as `host invite` names it [default: the address it listens on, or this machine's]
    #[arg(long, value_name = "HOST[:PORT]")]
    pub advertise: Option<Advertise>,
    /// Where `/metrics` is served
    #[arg(long, value_name = "IP:PORT")]
    pub metrics: Option<SocketAddr>,
    /// What seals all other keys
    #[command(flatten)]
    pub key: SealingKeyArguments,
    /// The trust domain of a new mesh [default: that of DIR/mesh.toml]
    #[arg(long, value_name = "NAME")]
    pub trust_domain: Option<TrustDomain>,
    /// Start on a store that was restored from an older copy; agents that know the later one have to join again
    #[arg(long)]
    pub accept_rollback: bool,
    /// Where the dashboard is: on loopback, or anywhere with a certificate [default: nowhere]
    #[arg(long, value_name = "IP:PORT")]
    pub dashboard: Option<SocketAddr>,
    /// The origin under which browsers find it [default: http(s)://localhost:PORT]
    #[arg(long, value_name = "URL", requires = "dashboard")]
    pub dashboard_origin: Option<String>,
    /// A PEM file with the dashboard's certificate chain, leaf first
    #[arg(long, value_name = "FILE", requires = "dashboard_key")]
    pub dashboard_cert: Option<PathBuf>,
    /// A PEM file with its private key
    #[arg(long, value_name = "FILE", requires = "dashboard_cert")]
    pub dashboard_key: Option<PathBuf>,
    /// Whom the dashboard signs in beside operators
    #[command(flatten)]
    pub sign_in: SignInArguments,
    /// Who cosigns the ledger's checkpoints
    #[command(flatten)]
    pub witnesses: WitnessArguments,
    /// Where pipelines propose
    #[command(flatten)]
    pub pipelines: PipelineArguments,
    /// Where clients ask for access tokens, over HTTPS [default: nowhere]
    #[arg(long, value_name = "IP:PORT")]
    pub oauth: Option<SocketAddr>,
    /// What they know it as
    #[command(flatten)]
    pub token_service: TokenServiceArguments,
    /// Where what operators do is written down
    #[command(flatten)]
    pub audit: AuditArguments,
    /// The PostgreSQL database that several control planes share [default: a file]
    #[arg(long, value_name = "URL", env = "COUNTERSIGN_STORE", hide_env_values = true)]
    pub store: Option<String>,
}

/// Runs until it is told to stop.
pub async fn control(arguments: ControlArguments, global: &Global, telemetry: &Telemetry) -> Done {
    let place = match &arguments.mesh {
        Some(dir) => mesh_finder::at(dir, global.data_dir.as_deref())?,
        None => cli::here(global)?,
    };
    place.create_data_dir()?;
    let _held = serve::hold(&place)?;
    let trust_domain = match (arguments.trust_domain, &place.dir) {
        (Some(given), _) => Some(given),
        (None, Some(dir)) => Some(crate::mesh_directory::load(dir)?.trust_domain),
        (None, None) => None,
    };
    let told = serve::until_told()?;
    let files = arguments.dashboard_cert.zip(arguments.dashboard_key);
    let tls = files.map(|(certificate, key)| TlsFiles { certificate, key });
    let site = arguments.dashboard.map(|listen| SiteConfig {
        listen,
        origin: arguments.dashboard_origin,
        tls,
        sign_in_secrets: arguments.sign_in.sign_in_secrets,
    });
    let config = ControlConfig {
        data_dir: place.data_dir.clone(),
        store: store(arguments.store.as_deref())?,
        listen: arguments.listen,
        advertise: arguments.advertise,
        accept_rollback: arguments.accept_rollback,
        metrics_listen: arguments.metrics,
        key: arguments.key.place()?,
        trust_domain: trust_domain.clone(),
        witnesses: arguments.witnesses.witnesses()?,
        site,
        pipelines: arguments.pipelines.settings(),
        oauth: arguments.oauth.map(|listen| OauthConfig { listen, issuer: arguments.token_service.oauth_url }),
        audit: Some(arguments.audit.file(&place)),
    };
    let control = start(config).await?;
    telemetry.follow(&control, trust_domain.as_ref());
    let _running = serve::tell(&place, &run_file(&place, &control))?;
    render::print_error(&format!(
        "the control plane listens on {} for agents; `countersign host invite` lets one in\n",
        control.listen
    ));
    if let Some(link) = control.enrolment_link().await? {
        render::print_error(&format!("the first operator enrols within 15 minutes at {link}\n"));
    }
    tokio::select! {
        () = told.cancelled() => {}
        failed = control.wait_failed() => return Err(Failure::new("the control plane failed").cause(failed)),
    }
    control.stop().await;
    Ok(())
}

/// The shared database, if one is named.
pub fn store(given: Option<&str>) -> Result<Option<PostgresUrl>, Failure> {
    let help = "write `postgres://USER@HOST/DATABASE`; another machine also needs `?sslrootcert=FILE`";
    given
        .map(|given| {
            PostgresUrl::parse(given).map_err(|e| Failure::usage("could not use --store").because(&e).help(help))
        })
        .transpose()
}

/// Starts it, or says why not.
pub async fn start(config: ControlConfig) -> Result<Control, Failure> {
    let data_dir = config.data_dir.display().to_string();
    countersign_control::start(config).await.map_err(|e| {
        Failure::new(format!("could not start the control plane with `{data_dir}`")).because(&e).help(
            e.help().unwrap_or_else(|| "`countersign doctor` checks the data directory and says what to do".to_owned()),
        )
    })
}

/// What tools can know of a control plane alone.
pub fn run_file(place: &Place, control: &Control) -> RunFile {
    RunFile {
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        api: Some(format!("unix://{}", place.data_dir.join(CONTROL_SOCKET).display())),
        control: Some(format!("https://{}", control.listen)),
        metrics: control.metrics.map(|address| format!("http://{address}/metrics")),
        dashboard: control.dashboard().map(str::to_owned),
        pipelines: control.pipelines.clone(),
        token: control.token.clone(),
        ledger_origin: control.ledger_origin(),
        workload_api: None,
        sds: None,
        services: Default::default(),
    }
}
