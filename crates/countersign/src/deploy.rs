//! `service deploy` and `service artifact`: which executables may be instances of a service, and what a command is.

use std::{
    collections::BTreeSet,
    env,
    path::{Path, PathBuf},
};

use clap::Args;
use serde_json::json;

use countersign_agent::artifact::{self, Measured};
use countersign_api::local::{Mesh, ServiceView, Status};
use countersign_core::{canonical::Digest, change::Change, identity::ServiceName};

use crate::{
    client::Client,
    error::{Done, Failure},
    mesh_finder::Place,
    operator::{self, Who},
    render::{self, Output, cell},
    service,
};

/// What may be an instance of which service.
#[derive(Debug, Args)]
pub struct DeployArguments {
    /// The service
    pub service: ServiceName,
    /// Admit what has this SHA-256, as `service artifact` or `sha256sum` print it
    #[arg(long, value_name = "SHA256", value_parser = sha256)]
    pub artifact: Vec<Digest>,
    /// Admit this program, when it is run without arguments
    #[arg(long, value_name = "FILE")]
    pub file: Vec<PathBuf>,
    /// Admit what runs now and what waits to be admitted, on every host: look at it first
    #[arg(long)]
    pub seen: bool,
    /// Take back everything that was admitted before; what runs of it is ended at once
    #[arg(long)]
    pub only: bool,
    /// Who asks.
    #[command(flatten)]
    pub who: Who,
    /// Admit this command, read here as an agent would read it
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// One deployment of a proposal.
#[derive(Debug, Clone)]
pub struct Deployment {
    service: ServiceName,
    artifact: Digest,
}

/// A SHA-256, as `sha256sum` prints it or with its name before it.
pub fn sha256(given: &str) -> Result<Digest, String> {
    let digits = given.strip_prefix("sha256:").unwrap_or(given);
    digits.parse().map_err(|_| "give 64 hexadecimal digits, as `sha256sum` prints them".to_owned())
}

/// `SERVICE=SHA256` or `SERVICE=FILE`.
pub fn deployment(given: &str) -> Result<Deployment, String> {
    let (service, what) =
        given.split_once('=').ok_or("give SERVICE=FILE or SERVICE=SHA256, like payments=./payments")?;
    let service = ServiceName::parse(service).map_err(|e| e.to_string())?;
    let artifact = match sha256(what) {
        Ok(artifact) => artifact,
        Err(_) => program(Path::new(what)).map_err(|e| e.to_string())?.artifact,
    };
    Ok(Deployment { service, artifact })
}

/// The changes that admit `deployments`, beside what is admitted; none for those that are.
pub fn changes(deployments: &[Deployment], on: &Mesh) -> Vec<Change> {
    let services: BTreeSet<&ServiceName> = deployments.iter().map(|deployment| &deployment.service).collect();
    let change = |service: &ServiceName| {
        let admitted = on.state.deployments.get(service).cloned().unwrap_or_default();
        let of_service = deployments.iter().filter(|deployment| deployment.service == *service);
        let artifacts: BTreeSet<Digest> = admitted.iter().copied().chain(of_service.map(|d| d.artifact)).collect();
        (artifacts != admitted).then(|| Change::Deploy { service: service.clone(), artifacts })
    };
    services.into_iter().filter_map(change).collect()
}

/// Says which executables may be instances of a service.
pub async fn deploy(arguments: DeployArguments, place: &Place, output: Output) -> Done {
    let DeployArguments { service, artifact, file, seen, only, who, command } = arguments;
    let control = Client::control(place);
    let mut named: BTreeSet<Digest> = artifact.into_iter().collect();
    for file in &file {
        named.insert(program(file)?.artifact);
    }
    if !command.is_empty() {
        named.insert(measured(&command)?.artifact);
    }
    if seen {
        let status: Status = control.get("/v1/status").await?;
        named.extend(seen_of(service::find(&status.services, &service)?)?);
    }
    if named.is_empty() {
        return Err(Failure::usage("nothing says what may be an instance")
            .help("give --artifact SHA256, --file FILE, --seen, or `-- COMMAND` as mesh.toml has it"));
    }
    let wanted = |mesh: &Mesh| match mesh.state.deployments.get(&service) {
        Some(admitted) if !only => admitted.union(&named).copied().collect(),
        _ => named.clone(),
    };
    let mesh: Mesh = control.get("/v1/mesh").await?;
    if mesh.state.deployments.get(&service) == Some(&wanted(&mesh)) {
        let answer = json!({ "outcome": "unchanged", "revision": mesh.revision });
        return render::answer(output, &answer, |_, paint| {
            let unchanged = paint.good("nothing to change:");
            format!("{unchanged} revision {} admits that already\n", mesh.revision)
        });
    }
    let change = |mesh: &Mesh| Ok(Change::Deploy { service: service.clone(), artifacts: wanted(mesh) });
    operator::change(&control, &who, output, change).await
}

/// What the instances of a service name, wherever they run or wait.
fn seen_of(service: &ServiceView) -> Result<BTreeSet<Digest>, Failure> {
    let running = service.instances.iter().map(|instance| (&instance.instance, &instance.host, instance.artifact));
    let waiting = service.waiting.iter().map(|waiting| (&waiting.instance, &waiting.host, waiting.artifact));
    let mut seen = BTreeSet::new();
    for (instance, host, artifact) in running.chain(waiting) {
        match artifact {
            Some(artifact) => drop(seen.insert(artifact)),
            None => {
                return Err(Failure::refused(format!("what {instance} on host {host} runs was not measured"))
                    .help("an agent measures what it starts itself; name the others with --artifact or --file"));
            }
        }
    }
    if seen.is_empty() {
        return Err(Failure::refused(format!("no instance of `{}` runs or waits", service.name))
            .help("start one, or name what may run with --artifact or --file"));
    }
    Ok(seen)
}

/// Prints what a command is, and what of it was read.
pub fn show(command: &[String], output: Output) -> Done {
    let measured = measured(command)?;
    let parts: Vec<_> = measured
        .parts
        .iter()
        .map(|part| json!({ "kind": part.kind(), "sha256": part.digest, "name": part.name.to_string_lossy() }))
        .collect();
    render::answer(output, &json!({ "artifact": measured.artifact, "parts": parts }), |_, paint| {
        let rows = measured
            .parts
            .iter()
            .map(|part| vec![cell(part.kind()), cell(part.digest), cell(render::tame(&part.name.to_string_lossy()))]);
        format!("{}\n\n{}", measured.artifact, render::table(&["KIND", "SHA-256", "NAME"], rows, paint))
    })
}

fn program(file: &Path) -> Result<Measured, Failure> {
    let path = std::path::absolute(file)
        .map_err(|e| Failure::new(format!("could not find `{}`", file.display())).because(&e))?;
    measured(&[path.display().to_string()])
}

fn measured(command: &[String]) -> Result<Measured, Failure> {
    let here = env::current_dir().map_err(|e| Failure::new("could not tell the current directory").because(&e))?;
    artifact::measure(command, &here, env::var_os("PATH").as_deref()).map_err(|e| {
        Failure::new("could not measure what is to be deployed")
            .because(&e)
            .help("name the files as the agent will find them, from the directory in which the workload runs")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_deployed_is_a_digest_or_a_file() {
        let digits = "a".repeat(64);
        assert_eq!(sha256(&digits).unwrap(), sha256(&format!("sha256:{digits}")).unwrap());
        assert!(sha256("a").is_err());
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("payments");
        std::fs::write(&file, "1").unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let given = deployment(&format!("payments={}", file.display())).unwrap();
        assert_eq!((given.service.as_str(), given.artifact), ("payments", Digest::of(b"1")));
        assert!(deployment("payments").is_err());
        assert!(deployment("payments=./no-such-file").unwrap_err().contains("could not measure"));
        let on: Mesh = Mesh { revision: Default::default(), state: Default::default(), bodies: Default::default() };
        assert_eq!(changes(&[given.clone(), given.clone()], &on).len(), 1);
        let mut held = on.clone();
        held.state.deployments.insert(given.service.clone(), [given.artifact].into());
        assert_eq!(changes(std::slice::from_ref(&given), &held), []);
    }
}
