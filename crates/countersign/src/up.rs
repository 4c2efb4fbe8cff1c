//! `up`: the whole mesh of a directory on this machine, as one process: control plane and agent, which starts the
//! workloads and their sidecars. It tells what happens, applies the directory when it is saved, and takes everything
//! down again.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::json;
use tokio::sync::broadcast::error::RecvError;

use countersign_agent::{Agent, AgentConfig};
use countersign_api::{
    local::{self, Status, TailEvent},
    run_file::RunFile,
};
use countersign_control::{Control, ControlConfig, advertise::Advertise, oauth::OauthConfig, site::SiteConfig};
use countersign_core::{
    change::Revision,
    directory::{Directory, Files, plan},
    identity::OperatorName,
};

use crate::{
    agent,
    apply::{self, Outcome},
    change, cli,
    cli::Global,
    client::{Client, shown},
    control::{self, AuditArguments, PipelineArguments, SignInArguments, TokenServiceArguments},
    error::{Done, Failure},
    glance::{self, Glance},
    ledger::WitnessArguments,
    mesh_directory,
    mesh_finder::{self, Place},
    operator::Who,
    render::Paint,
    sealing_key::SealingKeyArguments,
    serve::{self, Running},
    status,
    telemetry::Telemetry,
    tell::Teller,
    watch::Watch,
};

/// How long the proxies may take to enforce what was saved before that is said.
const ENFORCE_WITHIN: Duration = Duration::from_secs(10);
/// How long the token is good with which the agent of this very process joins.
const INVITATION: Duration = Duration::from_secs(60);

/// Which mesh, and how.
#[derive(Debug, Args)]
pub struct Up {
    /// The mesh directory [default: the one found from here]
    #[arg(value_name = "DIR")]
    pub mesh: Option<PathBuf>,
    /// Where agents of other hosts connect; port 0 picks one
    #[arg(long, value_name = "IP:PORT", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))]
    pub listen: SocketAddr,
    /// Where other hosts find the control plane, as `host invite` names it [default: the address of --listen]
    #[arg(long, value_name = "HOST[:PORT]")]
    pub advertise: Option<Advertise>,
    /// Start on a store that was restored from an older copy; agents that know the later one have to join again
    #[arg(long)]
    pub accept_rollback: bool,
    /// Who cosigns the ledger's checkpoints
    #[command(flatten)]
    pub witnesses: WitnessArguments,
    /// What seals all other keys
    #[command(flatten)]
    pub key: SealingKeyArguments,
    /// Where pipelines propose
    #[command(flatten)]
    pub pipelines: PipelineArguments,
    /// Where clients ask for access tokens, over HTTPS; port 0 takes the one that it had before
    #[arg(long, value_name = "IP:PORT", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))]
    pub oauth: SocketAddr,
    /// What they know it as
    #[command(flatten)]
    pub token_service: TokenServiceArguments,
    /// Where what operators do is written down
    #[command(flatten)]
    pub audit: AuditArguments,
    /// Where other hosts reach the sidecars of this one [default: the address of --listen]
    #[arg(long, value_name = "IP")]
    pub address: Option<IpAddr>,
    /// Where the control plane serves `/metrics`; port 0 picks one
    #[arg(long, value_name = "IP:PORT", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))]
    pub metrics: SocketAddr,
    /// Where the dashboard is; port 0 takes the one that it had before
    #[arg(long, value_name = "IP:PORT", default_value_t = SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))]
    pub dashboard: SocketAddr,
    /// Whom it signs in beside operators
    #[command(flatten)]
    pub sign_in: SignInArguments,
    /// Where processes that it did not start ask
    #[command(flatten)]
    pub socket: agent::WorkloadSocketArguments,
    /// Leave the mesh as it is when its directory is saved
    #[arg(long)]
    pub no_watch: bool,
    /// The operator who is said to ask for what is saved, in a protected mesh [default: the only one that has enrolled]
    #[arg(long, value_name = "NAME", env = "COUNTERSIGN_OPERATOR", hide_env_values = true)]
    pub operator: Option<OperatorName>,
}

/// Runs the mesh until it is told to stop.
pub async fn up(arguments: Up, global: &Global, telemetry: &Telemetry) -> Done {
    let started = Instant::now();
    let place = match &arguments.mesh {
        Some(dir) => mesh_finder::at(dir, global.data_dir.as_deref())?,
        None => cli::here(global)?,
    };
    place.create_data_dir()?;
    let _held = serve::hold(&place)?;
    let dir = place.dir()?;
    let (files, _) = mesh_directory::read(dir)?;
    let directory = mesh_directory::load(dir)?;
    let told = serve::until_told()?;
    let control = control::start(ControlConfig {
        store: None,
        data_dir: place.data_dir.clone(),
        listen: arguments.listen,
        advertise: arguments.advertise,
        accept_rollback: arguments.accept_rollback,
        metrics_listen: Some(arguments.metrics),
        key: arguments.key.place()?,
        trust_domain: Some(directory.trust_domain.clone()),
        witnesses: arguments.witnesses.witnesses()?,
        site: Some(SiteConfig {
            listen: arguments.dashboard,
            origin: None,
            tls: None,
            sign_in_secrets: arguments.sign_in.sign_in_secrets,
        }),
        pipelines: arguments.pipelines.settings(),
        oauth: Some(OauthConfig { listen: arguments.oauth, issuer: arguments.token_service.oauth_url }),
        audit: Some(arguments.audit.file(&place)),
    })
    .await?;
    telemetry.follow(&control, Some(&directory.trust_domain));
    let mesh = Mesh {
        telemetry,
        place: &place,
        dir,
        control: &control,
        client: Client::control(&place),
        address: arguments.address,
        // Whoever saves a file has shown nothing by it: what needs a factor waits for one.
        who: Who { operator: arguments.operator, ..Who::default() },
        started,
        workload_socket: arguments.socket.place(&place)?,
    };
    let result = tokio::select! {
        result = mesh.begin(directory, global) => match result {
            Ok((agent, teller)) => {
                let result = tokio::select! {
                    result = mesh.serve(&agent, &teller, files, !arguments.no_watch) => result,
                    () = told.cancelled() => Ok(()),
                };
                teller.settled();
                agent.stop(agent::DRAIN).await;
                result
            }
            Err(failure) => Err(failure),
        },
        () = told.cancelled() => Ok(()),
    };
    control.stop().await;
    result
}

/// A mesh whose control plane runs.
struct Mesh<'a> {
    telemetry: &'a Telemetry,
    place: &'a Place,
    dir: &'a Path,
    control: &'a Control,
    client: Client,
    address: Option<IpAddr>,
    who: Who,
    started: Instant,
    workload_socket: Option<PathBuf>,
}

impl Mesh<'_> {
    /// Makes the mesh what the directory says and lets this host in.
    async fn begin(&self, directory: Directory, global: &Global) -> Result<(Agent, Teller), Failure> {
        let refused = match apply::apply_directory(&self.client, &directory, &self.who, Paint::plain()).await {
            // A protected mesh runs on as its ledger says; what differs waits.
            Err(failure) if failure.refusal().is_some() => Some(failure),
            applied => applied.map(|_| None)?,
        };
        let host = serve::host_name();
        let invitation = self.control.invite(INVITATION, Some(host.clone())).await?;
        let workloads = agent::workloads(&directory, self.dir);
        let services = workloads.iter().map(|workload| (workload.service.clone(), workload.instances));
        let teller = Teller::new(global.output, services);
        for failed in apply::failing(&directory)? {
            teller.warn(&apply::failing_test(&failed));
        }
        if let Some(failure) = &refused {
            self.refuse(&teller, failure);
        }
        let agent = agent::start(AgentConfig {
            data_dir: self.place.data_dir.clone(),
            host,
            control: invitation.control.clone(),
            join: Some(invitation.token.clone()),
            address: self.address,
            workloads,
            isolate: agent::isolate(&directory),
            workers: directory.defaults.workers,
            executable: agent::executable(),
            exit_with_workload: false,
            telemetry: self.telemetry.of_agent(Some(&directory.trust_domain)),
            workload_socket: self.workload_socket.clone(),
        })
        .await?;
        Ok((agent, teller))
    }

    /// Tells, watches and applies until something that cannot be gone on from.
    async fn serve(&self, agent: &Agent, teller: &Teller, files: Files, watched: bool) -> Done {
        let mut events = agent.events();
        tokio::select! {
            () = teller.follow(&mut events) => Err(Failure::new("the agent ended")),
            failed = self.control.wait_failed() => Err(Failure::new("the control plane failed").cause(failed)),
            failure = self.tell_and_apply(agent, teller, files, watched) => Err(failure),
        }
    }

    async fn tell_and_apply(&self, agent: &Agent, teller: &Teller, files: Files, watched: bool) -> Failure {
        let ended = agent.ready().await;
        teller.settled();
        let running = match serve::tell(self.place, &self.run_file(agent)) {
            Ok(running) => running,
            Err(failure) => return failure,
        };
        if let Err(failure) = self.announce(agent, teller, ended.len()).await {
            return failure;
        }
        tokio::select! {
            never = self.tail(teller) => never,
            failure = self.apply_saves(agent, teller, &running, files, watched) => failure,
        }
    }

    fn run_file(&self, agent: &Agent) -> RunFile {
        let asked = agent.workload_socket().map(|path| format!("unix://{}", path.display()));
        RunFile {
            services: agent.run_services(),
            workload_api: asked.clone(),
            sds: asked,
            ..control::run_file(self.place, self.control)
        }
    }

    async fn announce(&self, agent: &Agent, teller: &Teller, ended: usize) -> Done {
        let status: Status = self.client.get("/v1/status").await?;
        let after = self.started.elapsed();
        let enroll = self.control.enrolment_link().await?;
        if !teller.is_text() {
            teller.document(&json!({
                "event": "up",
                "after_ms": u64::try_from(after.as_millis()).unwrap_or(u64::MAX),
                "dashboard": self.control.dashboard(),
                "enroll": enroll,
                "status": status,
            }));
            return Ok(());
        }
        let paint = teller.paint();
        let instances: usize = agent.run_services().values().map(|service| service.pids.len()).sum();
        let name = status.trust_domain.as_ref().map_or("the mesh", |name| name.as_str());
        teller.line(&format!(
            "{} {} at revision {}: {} services, {instances} instances, {:.1} s",
            paint.good("up:"),
            paint.strong(name),
            status.revision,
            status.services.len(),
            after.as_secs_f64(),
        ));
        for warning in status::warnings(&status) {
            teller.warn(&warning);
        }
        if let Some(link) = enroll {
            teller.line(&format!("become its owner, within 15 minutes: {link}"));
        } else if let Some(dashboard) = self.control.dashboard() {
            teller.line(&format!("dashboard: {dashboard}"));
        }
        if ended > 0 {
            teller.warn(&format!("{ended} instances are not running; they are started again, and again more rarely"));
        }
        let at = shown(self.dir);
        let at = if at == "." { String::new() } else { format!(" -C {at}") };
        teller
            .line(&paint.dim(&format!("`countersign{at} status` shows it; saving a file applies it; Ctrl-C stops it")));
        Ok(())
    }

    /// Shows decisions as they are made, and sums up what repeats itself. They are this process's own: no socket is asked for them.
    async fn tail(&self, teller: &Teller) -> Failure {
        let own = self.client.get::<Status>("/v1/status").await.ok().and_then(|status| status.trust_domain);
        let glance = Mutex::new(Glance::new(own, teller.paint()));
        let seen = async {
            let mut decided = self.control.decided();
            loop {
                let event = match decided.recv().await {
                    Ok(event) => event,
                    Err(RecvError::Lagged(missed)) => TailEvent::Shed(missed),
                    Err(RecvError::Closed) => {
                        return Failure::new("the control plane stopped telling what was decided");
                    }
                };
                match teller.is_text() {
                    true => teller.lines(glance.lock().expect("no one panics while telling").see(&event)),
                    false => teller.document(&json!({ "event": "decision", "decision": event })),
                }
            }
        };
        let summed = async {
            loop {
                tokio::time::sleep(glance::SUM_EVERY).await;
                teller.lines(glance.lock().expect("no one panics while telling").sum(glance::SUM_EVERY));
            }
        };
        tokio::select! {
            never = seen => never,
            never = summed => never,
        }
    }

    /// Applies the directory whenever it is saved, and runs what it says once that is applied, by whomever. A mistake is told and
    /// changes nothing.
    async fn apply_saves(
        &self,
        agent: &Agent,
        teller: &Teller,
        running: &Running,
        mut files: Files,
        watched: bool,
    ) -> Failure {
        let mut watch = None;
        if watched {
            match Watch::begin(self.dir) {
                Ok(begun) => watch = Some(begun),
                Err(failure) => self.refuse(teller, &failure),
            }
        }
        let mut changes = self.control.changes();
        loop {
            let saved = async {
                match &mut watch {
                    Some(watch) => watch.saved().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = saved => {}
                // What a save asked for may be applied later, by who shows a factor for it.
                Ok(_) = changes.recv() => {
                    if let Err(failure) = self.take_up(agent, running).await {
                        self.refuse(teller, &failure);
                    }
                    continue;
                }
            }
            let Ok((now, _)) = mesh_directory::read(self.dir) else { continue };
            if now == files {
                continue;
            }
            files = now;
            if let Err(failure) = self.apply_save(agent, teller, running).await {
                self.refuse(teller, &failure);
            }
        }
    }

    /// Runs what the directory says, once the mesh is what it says. What is wrong with the directory was said when it was saved.
    async fn take_up(&self, agent: &Agent, running: &Running) -> Done {
        let Ok(directory) = mesh_directory::load(self.dir) else { return Ok(()) };
        let mesh: local::Mesh = self.client.get("/v1/mesh").await?;
        if plan(&directory, &mesh.state, mesh.revision).is_ok_and(|plan| plan.is_empty()) {
            agent.set_workloads(agent::workloads(&directory, self.dir)).await;
            running.tell(&self.run_file(agent))?;
        }
        Ok(())
    }

    async fn apply_save(&self, agent: &Agent, teller: &Teller, running: &Running) -> Done {
        let saved = Instant::now();
        let directory = mesh_directory::load(self.dir)?;
        let failing = apply::failing(&directory)?;
        let (outcome, difference) = apply::apply_directory(&self.client, &directory, &self.who, teller.paint()).await?;
        agent.set_workloads(agent::workloads(&directory, self.dir)).await;
        for failed in &failing {
            teller.warn(&apply::failing_test(failed));
        }
        if let Outcome::Applied { revision, .. } = &outcome {
            self.tell_applied(teller, &outcome, *revision, &difference, saved).await?;
        }
        // Services may have come or gone, and with them addresses.
        running.tell(&self.run_file(agent))
    }

    async fn tell_applied(
        &self,
        teller: &Teller,
        outcome: &Outcome,
        revision: Revision,
        difference: &str,
        saved: Instant,
    ) -> Done {
        let paint = teller.paint();
        match teller.is_text() {
            true => teller.line(&format!("{difference}{} revision {revision}", paint.good("applied:"))),
            false => teller.document(&json!({ "event": "applied", "applied": outcome })),
        }
        let waited = change::enforced(&self.client, revision, ENFORCE_WITHIN).await?;
        let after = saved.elapsed();
        match teller.is_text() {
            true => teller.line(&format!(
                "{} by all {} proxies, {after:.0?} after the save",
                paint.good("enforced:"),
                waited.connected
            )),
            false => teller.document(&json!({ "event": "enforced_everywhere", "waited": waited })),
        }
        Ok(())
    }

    fn refuse(&self, teller: &Teller, failure: &Failure) {
        match teller.is_text() {
            true => teller.line(&failure.render(crate::render::Output::Text, teller.paint())),
            false => {
                let refusal = failure.refusal();
                teller.document(&json!({ "event": "refused", "failure": failure.json(), "refusal": refusal }));
            }
        }
        if let Some(id) = failure.refusal().and_then(|refusal| refusal.change.as_deref())
            && teller.is_text()
        {
            teller.line(&format!("change {id} waits: `countersign apply --change {id} --otp CODE` applies it"));
        }
    }
}
