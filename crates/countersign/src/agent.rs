//! `agent`: the agent of one host, its workloads and their sidecars; and what every command that starts an agent shares.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;

use countersign_agent::{
    AgentConfig, Isolate, SOCKET_PATH_BYTES_MAX, StartError, WorkloadSpec, isolate::WORKLOAD_SOCKET,
};
use countersign_core::{
    directory::{self, Directory},
    identity::ServiceName,
};

use crate::{
    cli::{self, Global},
    error::{Done, Failure},
    mesh_directory,
    mesh_finder::{self, Place},
    serve, status,
    telemetry::Telemetry,
    tell::Teller,
};

/// How long open exchanges may take to finish when workloads are stopped.
pub const DRAIN: Duration = Duration::from_secs(3);

/// Which mesh to join and what to run.
#[derive(Debug, Args)]
pub struct AgentArguments {
    /// The mesh directory, for how to run its services
    #[arg(value_name = "DIR")]
    pub mesh: Option<PathBuf>,
    /// Where the control plane listens; each of them, where there are several
    #[arg(long, value_name = "https://IP:PORT", value_delimiter = ',', required = true)]
    pub control: Vec<String>,
    /// A join token of `countersign host invite`; not needed by a host that has joined before
    #[arg(long, value_name = "TOKEN", env = "COUNTERSIGN_JOIN", hide_env_values = true)]
    pub join: Option<String>,
    /// The services to run here [default: all of the directory]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub service: Vec<ServiceName>,
    /// Where other hosts reach the sidecars of this one [default: the address on the way to the control plane]
    #[arg(long, value_name = "IP")]
    pub address: Option<IpAddr>,
    /// The name of this host [default: its host name]
    #[arg(long, value_name = "NAME")]
    pub host: Option<ServiceName>,
    /// Where processes that it did not start ask
    #[command(flatten)]
    pub socket: WorkloadSocketArguments,
}

/// Where processes that an agent did not start ask for identities.
#[derive(Debug, Args)]
pub struct WorkloadSocketArguments {
    /// Where processes that the agent did not start ask for identities: its directory says which users reach it
    /// [default: workload.sock in the data directory, which only this user reaches]
    #[arg(long, value_name = "PATH")]
    workload_socket: Option<PathBuf>,
}

impl WorkloadSocketArguments {
    /// Where it is; nowhere, when nothing was said and the data directory lies too deep for a socket.
    pub fn place(self, place: &Place) -> Result<Option<PathBuf>, Failure> {
        let usual = self.workload_socket.is_none();
        let path = self.workload_socket.unwrap_or_else(|| place.data_dir.join(WORKLOAD_SOCKET));
        let path = std::path::absolute(&path)
            .map_err(|e| Failure::new(format!("could not find `{}`", path.display())).because(&e))?;
        if usual && path.as_os_str().len() > SOCKET_PATH_BYTES_MAX {
            tracing::warn!(path = %path.display(), "processes that the agent did not start cannot ask: the path of the socket is too long");
            return Ok(None);
        }
        Ok(Some(path))
    }
}

/// Runs until it is told to stop.
pub async fn agent(arguments: AgentArguments, global: &Global, telemetry: &Telemetry) -> Done {
    let place = match &arguments.mesh {
        Some(dir) => mesh_finder::at(dir, global.data_dir.as_deref())?,
        None => cli::here(global)?,
    };
    let dir = place.dir()?;
    let directory = mesh_directory::load(dir)?;
    let wanted: BTreeSet<_> = arguments.service.into_iter().collect();
    if let Some(unknown) = wanted.iter().find(|name| !directory.services.contains_key(*name)) {
        let names: Vec<_> = directory.services.keys().collect();
        return Err(Failure::usage(format!("`{}` describes no service `{unknown}`", dir.display()))
            .help(format!("its services are: {}", status::join(&names))));
    }
    place.create_data_dir()?;
    let told = serve::until_told()?;
    let mut workloads = workloads(&directory, dir);
    let workload_socket = arguments.socket.place(&place)?;
    workloads.retain(|workload| wanted.is_empty() || wanted.contains(&workload.service));
    let teller =
        Teller::new(global.output, workloads.iter().map(|workload| (workload.service.clone(), workload.instances)));
    let agent = start(AgentConfig {
        data_dir: place.data_dir.clone(),
        host: arguments.host.unwrap_or_else(serve::host_name),
        control: arguments.control.join(","),
        join: arguments.join,
        address: arguments.address,
        workloads,
        isolate: isolate(&directory),
        workers: directory.defaults.workers,
        executable: executable(),
        exit_with_workload: false,
        telemetry: telemetry.of_agent(Some(&directory.trust_domain)),
        workload_socket,
    })
    .await?;
    let mut events = agent.events();
    tokio::select! {
        () = told.cancelled() => {}
        () = teller.follow(&mut events) => {}
    }
    agent.stop(DRAIN).await;
    Ok(())
}

/// Starts it, or says why not and what to do.
pub async fn start(config: AgentConfig) -> Result<countersign_agent::Agent, Failure> {
    serve::shut_to_debuggers()?;
    countersign_agent::start(config).await.map_err(|e| {
        let help = match &e {
            StartError::Control(_) => "a control plane is named like `https://192.0.2.1:7443`",
            StartError::Token(_)
            | StartError::NotJoined(_)
            | StartError::Expired(_)
            | StartError::Revoked(_)
            | StartError::Join(_) => {
                "make a new join token with `countersign host invite` where the control plane runs, and give it with `--join`"
            }
            StartError::Dir { .. } | StartError::Socket { .. } => {
                "the data directory, and that of `--workload-socket`, must be yours and writable for you alone; see `countersign doctor`"
            }
            StartError::Isolation(_) => "see `countersign doctor`, or accept workloads that are not separated: `isolate = \"auto\"`",
            StartError::Kept { .. } | StartError::Anchor(_) => "remove that directory and join again with a new token",
            StartError::NoWay { .. } => "check the address and the network; `countersign status` at the control plane says where it listens",
        };
        Failure::new("could not start the agent").because(&e).help(help)
    })
}

/// How this host runs the services of `directory`, which lies at `dir`. What is only attested needs no sidecar.
pub fn workloads(directory: &Directory, dir: &Path) -> Vec<WorkloadSpec> {
    let services = directory.services.iter();
    services
        .filter(|(_, service)| service.run.is_some() || service.port.is_some())
        .map(|(name, service)| WorkloadSpec {
            service: name.clone(),
            spec: service.spec.clone(),
            run: service.run.clone(),
            dir: dir.to_path_buf(),
            env: service.env.clone(),
            instances: service.instances,
            port: service.port,
        })
        .collect()
}

/// As the directory wants it.
pub fn isolate(directory: &Directory) -> Isolate {
    match directory.defaults.isolate {
        directory::Isolate::Auto => Isolate::Auto,
        directory::Isolate::Required => Isolate::Required,
        directory::Isolate::Off => Isolate::Off,
    }
}

/// This very binary, even after it was replaced on disk.
pub fn executable() -> PathBuf {
    PathBuf::from("/proc/self/exe")
}

/// Where an agent beside another one of the same data directory keeps what is its own.
pub fn beside(place: &Place, name: &str) -> PathBuf {
    place.data_dir.join("runs").join(name)
}
