//! `run --service S -- CMD`: one workload with its sidecar, as long as the command lives.

use std::{ffi::OsString, fs, net::IpAddr, process::ExitCode, time::Duration};

use clap::Args;

use countersign_agent::{Agent, AgentConfig, Isolate, WorkloadSpec};
use countersign_api::local::{Invitation, Invite, InviteAs, Mesh};
use countersign_core::{identity::ServiceName, service::ServiceSpec};

use crate::{
    agent, cli, cli::Global, client::Client, error::Failure, mesh_directory, mesh_finder::Place, operator::Asker,
    serve, status, telemetry::Telemetry, tell::Teller,
};

/// How long the token is good that this command gets for itself.
const INVITATION: Duration = Duration::from_secs(60);
/// How long the control plane may take to send the mesh to a host that joined it.
const DECLARED_WITHIN: Duration = Duration::from_secs(10);

/// Which service, and the command that is it.
#[derive(Debug, Args)]
pub struct Run {
    /// The service that the command is an instance of
    #[arg(long, value_name = "NAME")]
    pub service: ServiceName,
    /// Where the command listens on 127.0.0.1 [default: picked, and told as PORT]
    #[arg(long)]
    pub port: Option<u16>,
    /// A join token for a mesh that runs elsewhere
    #[arg(long, value_name = "TOKEN", requires = "control", env = "COUNTERSIGN_JOIN", hide_env_values = true)]
    pub join: Option<String>,
    /// Where the control plane of that mesh listens
    #[arg(long, value_name = "https://IP:PORT", requires = "join")]
    pub control: Option<String>,
    /// Where other hosts reach its sidecar [default: the address on the way to the control plane]
    #[arg(long, value_name = "IP")]
    pub address: Option<IpAddr>,
    /// The services that the command calls, each on a loopback address of its own [default: as declared]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub upstreams: Vec<ServiceName>,
    /// Who lets it in, in the mesh that runs here.
    #[command(flatten)]
    pub asker: Asker,
    /// The command
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// Runs the command and ends as it ends.
pub async fn run(arguments: Run, global: &Global, telemetry: &Telemetry) -> Result<ExitCode, Failure> {
    let told = serve::until_told()?;
    let mut command = Vec::new();
    for part in arguments.command {
        command.push(part.into_string().map_err(|part| Failure::usage(format!("`{}` is not UTF-8", part.display())))?);
    }
    let name = format!("{}-{}", arguments.service, std::process::id());
    let host =
        ServiceName::parse(&name.chars().rev().take(63).collect::<Vec<_>>().into_iter().rev().collect::<String>())
            .unwrap_or_else(|_| serve::host_name());
    let (place, control, join, isolate) = match (arguments.control, arguments.join) {
        (Some(control), Some(join)) => (elsewhere(global, &name)?, control, join, Isolate::Auto),
        _ => here(global, &arguments.service, host.clone(), &arguments.asker).await?,
    };
    let data_dir = agent::beside(&place, &name);
    let own = Place { dir: None, data_dir: data_dir.clone(), dashboard: None };
    own.create_data_dir()?;
    let dir = std::env::current_dir().map_err(|e| Failure::new("could not find the current directory").because(&e))?;
    let teller = Teller::quiet(global.output);
    let agent = agent::start(AgentConfig {
        data_dir: data_dir.clone(),
        host,
        control,
        join: Some(join),
        address: arguments.address,
        workloads: Vec::new(),
        isolate,
        workers: 1,
        executable: agent::executable(),
        exit_with_workload: true,
        telemetry: telemetry.of_agent(None),
        workload_socket: None,
    })
    .await;
    let code = match agent {
        Ok(agent) => {
            let mut events = agent.events();
            let exited = async {
                let mut spec = declared(&agent, &arguments.service).await?;
                if !arguments.upstreams.is_empty() {
                    spec.upstreams = arguments.upstreams.into_iter().collect();
                }
                let (service, env, port) = (arguments.service, Default::default(), arguments.port);
                let workload = WorkloadSpec { service, spec, run: Some(command), dir, env, instances: 1, port };
                agent.set_workloads(vec![workload]).await;
                Ok(agent.exited().await)
            };
            let code = tokio::select! {
                code = exited => code,
                () = told.cancelled() => Ok(130),
                () = teller.follow(&mut events) => Ok(1),
            };
            agent.stop(agent::DRAIN).await;
            code.map(ExitCode::from)
        }
        Err(failure) => Err(failure),
    };
    let _ = fs::remove_dir_all(&data_dir);
    code
}

/// What the mesh declares of `service`, which this host has just joined for.
async fn declared(agent: &Agent, service: &ServiceName) -> Result<ServiceSpec, Failure> {
    let mut declared = tokio::time::timeout(DECLARED_WITHIN, agent.declared()).await.map_err(|_| {
        Failure::new(format!("the control plane did not say within {DECLARED_WITHIN:?} what it declares"))
            .help("look at it with `countersign status` where it runs; a mesh that nobody applied declares nothing")
    })?;
    let spec = declared.remove(service);
    spec.ok_or_else(|| undeclared(service, &declared.keys().collect::<Vec<_>>()))
}

fn undeclared(service: &ServiceName, names: &[&ServiceName]) -> Failure {
    Failure::new(format!("this mesh has no service `{service}`"))
        .help(format!("declare it in mesh.toml and apply; its services are: {}", status::join(names)))
}

type Joined = (Place, String, String, Isolate);

/// In the mesh that runs on this machine: it lets this command in when it has the service.
async fn here(global: &Global, service: &ServiceName, host: ServiceName, asker: &Asker) -> Result<Joined, Failure> {
    let place = cli::here(global)?;
    let client = Client::control(&place);
    let mesh: Mesh = client.get("/v1/mesh").await?;
    if !mesh.state.services.contains_key(service) {
        return Err(undeclared(service, &mesh.state.services.keys().collect::<Vec<_>>()));
    }
    let services = Some([service.clone()].into());
    let invite = Invite { ttl_seconds: INVITATION.as_secs(), host: Some(host), services };
    let asked = InviteAs { invite, shown: asker.shown() };
    let invitation: Invitation = client.post("/v1/hosts/invitations", &asked).await?;
    let isolate = match &place.dir {
        Some(dir) => agent::isolate(&mesh_directory::load(dir)?),
        None => Isolate::Auto,
    };
    Ok((place, invitation.control.clone(), invitation.token.clone(), isolate))
}

/// For a mesh elsewhere nothing has to be here: what the agent keeps goes below the data directory, or a temporary one.
fn elsewhere(global: &Global, name: &str) -> Result<Place, Failure> {
    match cli::here(global) {
        Ok(place) => Ok(place),
        Err(_) => {
            Ok(Place { dir: None, data_dir: std::env::temp_dir().join(format!("countersign-{name}")), dashboard: None })
        }
    }
}
