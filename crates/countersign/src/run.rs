//! `run --service S -- CMD`: one workload with its sidecar, as long as the command lives.

use std::{ffi::OsString, fs, process::ExitCode, time::Duration};

use clap::Args;

use countersign_agent::{AgentConfig, Isolate, WorkloadSpec};
use countersign_api::local::{Invitation, Invite, Mesh};
use countersign_core::{identity::ServiceName, service::ServiceSpec};

use crate::{
    agent, cli, cli::Global, client::Client, error::Failure, mesh_directory, mesh_finder::Place, serve, status,
    tell::Teller,
};

/// How long the token is good that this command gets for itself.
const INVITATION: Duration = Duration::from_secs(60);

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
    /// The services that the command calls, each on a loopback address of its own [default: as declared]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub upstreams: Vec<ServiceName>,
    /// The command
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// Runs the command and ends as it ends.
pub async fn run(arguments: Run, global: &Global) -> Result<ExitCode, Failure> {
    let told = serve::until_told()?;
    let mut command = Vec::new();
    for part in arguments.command {
        command.push(part.into_string().map_err(|part| Failure::usage(format!("`{}` is not UTF-8", part.display())))?);
    }
    let name = format!("{}-{}", arguments.service, std::process::id());
    let host =
        ServiceName::parse(&name.chars().rev().take(63).collect::<Vec<_>>().into_iter().rev().collect::<String>())
            .unwrap_or_else(|_| serve::host_name());
    let (place, control, join, spec, isolate) = match (arguments.control, arguments.join) {
        (Some(control), Some(join)) => {
            let spec = ServiceSpec::new(Default::default());
            (elsewhere(global, &name)?, control, join, spec, Isolate::Auto)
        }
        _ => here(global, &arguments.service, host.clone()).await?,
    };
    let data_dir = agent::beside(&place, &name);
    let own = Place { dir: None, data_dir: data_dir.clone() };
    own.create_data_dir()?;
    let spec = match arguments.upstreams.is_empty() {
        true => spec,
        false => ServiceSpec { upstreams: arguments.upstreams.into_iter().collect(), ..spec },
    };
    let workload = WorkloadSpec {
        service: arguments.service.clone(),
        spec,
        run: Some(command),
        dir: std::env::current_dir().map_err(|e| Failure::new("could not find the current directory").because(&e))?,
        env: Default::default(),
        instances: 1,
        port: arguments.port,
    };
    let teller = Teller::quiet(global.output);
    let agent = agent::start(AgentConfig {
        data_dir: data_dir.clone(),
        host,
        control,
        join: Some(join),
        workloads: vec![workload],
        isolate,
        workers: 1,
        executable: agent::executable(),
        exit_with_workload: true,
    })
    .await;
    let code = match agent {
        Ok(agent) => {
            let mut events = agent.events();
            let code = tokio::select! {
                code = agent.exited() => code,
                () = told.cancelled() => 130,
                () = teller.follow(&mut events) => 1,
            };
            agent.stop(agent::DRAIN).await;
            Ok(ExitCode::from(code))
        }
        Err(failure) => Err(failure),
    };
    let _ = fs::remove_dir_all(&data_dir);
    code
}

type Joined = (Place, String, String, ServiceSpec, Isolate);

/// In the mesh that runs on this machine: it lets this command in and says what the service declares.
async fn here(global: &Global, service: &ServiceName, host: ServiceName) -> Result<Joined, Failure> {
    let place = cli::place(global)?;
    let client = Client::control(&place);
    let mesh: Mesh = client.get("/v1/mesh").await?;
    let Some(declared) = mesh.state.services.get(service) else {
        let names: Vec<_> = mesh.state.services.keys().collect();
        return Err(Failure::new(format!("this mesh has no service `{service}`"))
            .help(format!("declare it in mesh.toml and apply; its services are: {}", status::join(&names))));
    };
    let invite = Invite { ttl_seconds: INVITATION.as_secs(), host: Some(host) };
    let invitation: Invitation = client.post("/v1/hosts/invitations", &invite).await?;
    let isolate = match &place.dir {
        Some(dir) => agent::isolate(&mesh_directory::load(dir)?),
        None => Isolate::Auto,
    };
    Ok((place, invitation.control.clone(), invitation.token.clone(), declared.spec.clone(), isolate))
}

/// For a mesh elsewhere nothing has to be here: what the agent keeps goes below the data directory, or a temporary one.
fn elsewhere(global: &Global, name: &str) -> Result<Place, Failure> {
    match cli::place(global) {
        Ok(place) => Ok(place),
        Err(_) => Ok(Place { dir: None, data_dir: std::env::temp_dir().join(format!("countersign-{name}")) }),
    }
}
