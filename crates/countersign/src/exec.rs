//! `exec SERVICE -- CMD`: runs a command as a running workload would run it: its environment and directory, and its
//! namespaces when it has its own. For the mesh's own uid only: the agent's socket and the kernel both see to that.

use std::{ffi::OsString, io, os::unix::process::ExitStatusExt, path::Path, process::ExitCode};

use clap::Args;
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
};

use countersign_agent::isolate;
use countersign_api::local::WorkloadView;
use countersign_core::identity::ServiceName;

use crate::{cli, client::Client, error::Failure, mesh_finder::Place, status};

/// Which workload, and what to run.
#[derive(Debug, Args)]
pub struct Exec {
    /// The service, or one of its instances
    #[arg(value_name = "SERVICE")]
    pub workload: String,
    /// The command
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// Runs the command and ends as it ends.
pub fn exec(arguments: Exec, place: &Place) -> Result<ExitCode, Failure> {
    // The runtime of this one question has no other thread and is gone before the namespaces are entered.
    let workloads: Vec<WorkloadView> = cli::ask(async { Client::agent(place).get("/v1/workloads").await })?;
    let workload = choose(&workloads, &arguments.workload)?;
    let (program, rest) = arguments.command.split_first().expect("clap requires a command");
    let mut command = Command::new(program);
    command.args(rest).envs(&workload.env);
    match workload.namespace_pid {
        Some(pid) => isolate::enter(pid, Path::new(&workload.dir)).map_err(|e| {
            Failure::new(format!("could not enter the namespaces of {}", workload.instance))
                .because(&e)
                .help("run this as the user who runs the mesh; `countersign service list` shows what is running")
        })?,
        None => {
            command.current_dir(&workload.dir);
        }
    }
    cli::ask(async {
        let mut child = command.spawn().map_err(|e| {
            Failure::new(format!("could not run `{}` in `{}`", program.display(), workload.dir))
                .because(&e)
                .help("the command is looked up in PATH, from the workload's directory")
        })?;
        until_it_ends(&mut child).await.map_err(|e| Failure::new("lost the command").because(&e))
    })
}

/// The terminal sends Ctrl-C to the command as well, which may mean something else by it: this process stays until the
/// command ends.
async fn until_it_ends(child: &mut Child) -> io::Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    loop {
        tokio::select! {
            status = child.wait() => {
                let status = status?;
                let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
                return Ok(ExitCode::from(code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)));
            }
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {
                let Some(pid) = child.id().and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) else { continue };
                rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
            }
        }
    }
}

fn choose<'a>(workloads: &'a [WorkloadView], wanted: &str) -> Result<&'a WorkloadView, Failure> {
    let known = || {
        let names: std::collections::BTreeSet<_> =
            workloads.iter().map(|workload| workload.instance.service()).collect();
        format!("this host runs: {}", status::join(&names.into_iter().collect::<Vec<ServiceName>>()))
    };
    let mut of_it = workloads
        .iter()
        .filter(|w| w.instance.as_str() == wanted || w.instance.service().as_str() == wanted)
        .peekable();
    let Some(any) = of_it.peek().copied() else {
        return Err(Failure::new(format!("no workload of `{wanted}` runs on this host")).help(known()));
    };
    // A stopped process has left its namespaces behind only when its launcher is still there.
    of_it
        .find(|workload| workload.state == "running")
        .or(Some(any).filter(|any| any.namespace_pid.is_some()))
        .ok_or_else(|| {
            let why = any.last_exit.clone().unwrap_or_else(|| format!("it is {}", any.state));
            Failure::new(format!("`{wanted}` is not running"))
                .cause(why)
                .help("its output, above in the terminal of `up`, may say why")
        })
}

#[cfg(test)]
mod tests {
    use countersign_core::identity::InstanceId;

    use super::*;

    fn workload(instance: &str, state: &str, namespace_pid: Option<u32>) -> WorkloadView {
        WorkloadView {
            instance: InstanceId::parse(instance).unwrap(),
            state: state.into(),
            namespace_pid,
            env: Default::default(),
            dir: "/".into(),
            restarts: 0,
            last_exit: None,
        }
    }

    #[test]
    fn a_running_instance_is_chosen_before_one_that_is_not() {
        let all = [
            workload("web/1", "restarting", Some(1)),
            workload("web/2", "running", Some(2)),
            workload("jobs/1", "stopped", None),
        ];
        for (wanted, expected) in [
            ("web", Ok("web/2")),
            ("web/1", Ok("web/1")),
            ("jobs", Err("is not running")),
            ("nobody", Err("no workload")),
        ] {
            match (choose(&all, wanted), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found.instance.as_str(), expected),
                (Err(e), Err(expected)) => assert!(e.to_string().contains(expected), "{e}"),
                (found, _) => panic!("{wanted}: {found:?}"),
            }
        }
    }
}
