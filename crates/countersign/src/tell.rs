//! What `up`, `agent` and `run` tell while they run: a line per service until each is ready, then what happens, as it
//! happens. One document per line with `-o json`.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{self, IsTerminal},
    sync::Mutex,
    time::{Duration, Instant},
};

use countersign_agent::AgentEvent;
use countersign_core::identity::{InstanceId, ServiceName};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use tokio::sync::broadcast::{Receiver, error::RecvError};

use crate::render::{self, Output, Paint, tame};

/// How often a spinner turns.
const TICK: Duration = Duration::from_millis(120);

/// Tells what happens.
pub struct Teller {
    output: Output,
    paint: Paint,
    started: Instant,
    /// Only what the workload writes, and what went wrong.
    quiet: bool,
    bars: MultiProgress,
    services: Mutex<BTreeMap<ServiceName, Progress>>,
}

/// How far a service is.
struct Progress {
    instances: u32,
    ready: BTreeSet<InstanceId>,
    bar: Option<ProgressBar>,
}

impl Teller {
    /// Tells of `services`, each with its number of instances.
    pub fn new(output: Output, services: impl IntoIterator<Item = (ServiceName, u32)>) -> Self {
        let bars = MultiProgress::new();
        let terminal = output == Output::Text && io::stdout().is_terminal() && io::stderr().is_terminal();
        let style = ProgressStyle::with_template("{spinner} {prefix:16} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        let progress = |name: &ServiceName, instances| {
            let bar = terminal.then(|| {
                let bar = bars.add(ProgressBar::new_spinner()).with_style(style.clone());
                bar.set_prefix(name.to_string());
                bar.set_message("starting");
                bar.enable_steady_tick(TICK);
                bar
            });
            Progress { instances, ready: BTreeSet::new(), bar }
        };
        let services =
            services.into_iter().map(|(name, instances)| (name.clone(), progress(&name, instances))).collect();
        Self {
            output,
            paint: Paint::stdout(),
            started: Instant::now(),
            quiet: false,
            bars,
            services: Mutex::new(services),
        }
    }

    /// Tells only what one workload writes, and what goes wrong.
    pub fn quiet(output: Output) -> Self {
        Self { quiet: true, ..Self::new(output, []) }
    }

    /// Whether lines are for people.
    pub fn is_text(&self) -> bool {
        self.output == Output::Text
    }

    /// How lines are painted.
    pub fn paint(&self) -> Paint {
        self.paint
    }

    /// Tells every event until there are no more.
    pub async fn follow(&self, events: &mut Receiver<AgentEvent>) {
        loop {
            match events.recv().await {
                Ok(event) => self.tell(&event),
                Err(RecvError::Lagged(missed)) => self.warn(&format!("{missed} events came too fast to be shown")),
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// Everything is ready, or will not be: no more lines of progress.
    pub fn settled(&self) {
        let mut services = self.services.lock().expect("no one panics while telling");
        // All at once: bars that end one after the other leave stale lines behind.
        let _ = self.bars.clear();
        self.bars.set_draw_target(ProgressDrawTarget::hidden());
        for progress in services.values_mut() {
            if let Some(bar) = progress.bar.take() {
                bar.finish_and_clear();
            }
        }
    }

    /// Prints a line above whatever moves.
    pub fn line(&self, line: &str) {
        self.bars.suspend(|| render::print(&format!("{}\n", line.trim_end_matches('\n'))));
    }

    /// Prints lines that there may be.
    pub fn lines(&self, lines: Option<String>) {
        if let Some(lines) = lines {
            self.line(&lines);
        }
    }

    /// One document, for programs.
    pub fn document(&self, value: &Value) {
        render::print(&render::json_line(value));
    }

    /// Something that is not as it should be.
    pub fn warn(&self, what: &str) {
        match self.output {
            Output::Json => self.document(&json!({ "event": "warning", "what": what })),
            Output::Text => self.line(&format!("{} {}", self.paint.warn("warning:"), tame(what))),
        }
    }

    fn tell(&self, event: &AgentEvent) {
        match self.output {
            Output::Json => self.document(&document(event)),
            Output::Text => self.text(event),
        }
    }

    fn text(&self, event: &AgentEvent) {
        let paint = self.paint;
        match event {
            AgentEvent::Output { instance, line } if self.quiet => {
                let _ = instance;
                self.line(line);
            }
            AgentEvent::Output { instance, line } => {
                self.line(&format!("{} {}", paint.dim(&format!("{}:", instance.service())), tame(line)));
            }
            AgentEvent::WorkloadEnded { instance, why, last_lines, restart_in } => {
                if self.quiet {
                    return;
                }
                let again = restart_in.map_or_else(
                    || "it is not started again".to_owned(),
                    |span| format!("starting it again in {span:.0?}"),
                );
                self.line(&format!("{} {instance} ended: {}; {again}", paint.bad("error:"), tame(why)));
                for line in last_lines {
                    self.line(&format!("  {} {}", paint.dim("|"), tame(line)));
                }
                self.progress(instance, |progress| {
                    progress.ready.remove(instance);
                    format!("ended: {}", tame(why))
                });
            }
            AgentEvent::InstanceWaits { instance, artifact, why } => {
                let service = instance.service();
                let which = artifact.map_or_else(String::new, |artifact| format!(" ({artifact})"));
                self.line(&format!(
                    "{} {instance} does not run: {}{which}; `countersign service deploy {service} --seen` admits it",
                    paint.warn("waiting:"),
                    tame(why)
                ));
                self.progress(instance, |_| "waits to be admitted".to_owned());
            }
            AgentEvent::ProxyEnded { instance, why, restart_in } => {
                self.line(&format!(
                    "{} the sidecar of {instance} ended: {}; starting it again in {restart_in:.0?}",
                    paint.bad("error:"),
                    tame(why)
                ));
            }
            AgentEvent::ViewRefused { service, revision, why } => {
                self.line(&format!(
                    "{} {service} keeps its last good view: revision {revision} cannot be enforced: {}",
                    paint.bad("error:"),
                    tame(why)
                ));
            }
            AgentEvent::HistoryRefused { why } => {
                self.line(&format!("{} refused what the control plane sent: {}", paint.bad("error:"), tame(why)));
            }
            AgentEvent::ControlLost { why } => {
                self.warn(&format!("lost the control plane: {why}; going on from what is held"));
            }
            AgentEvent::ControlFollowed { .. } | AgentEvent::Joined { .. } | AgentEvent::InstanceStopped { .. } => {}
            AgentEvent::InstanceStarting { instance } => self.progress(instance, |_| "starting".to_owned()),
            AgentEvent::IdentityIssued { instance } => {
                self.progress(instance, |progress| match progress.ready.is_empty() {
                    true => "has its identity".to_owned(),
                    false => String::new(),
                })
            }
            AgentEvent::Enforced { instance, revision } => {
                self.progress(instance, |progress| match progress.ready.is_empty() {
                    true => format!("enforces revision {revision}"),
                    false => String::new(),
                })
            }
            AgentEvent::InstanceReady { instance } => self.ready(instance),
        }
    }

    fn ready(&self, instance: &InstanceId) {
        let mut all = None;
        self.progress(instance, |progress| {
            progress.ready.insert(instance.clone());
            let ready = u32::try_from(progress.ready.len()).unwrap_or(u32::MAX);
            if ready >= progress.instances {
                all = Some(progress.bar.is_none());
            }
            match progress.instances {
                1 => "ready".to_owned(),
                instances => format!("{ready} of {instances} ready"),
            }
        });
        if all == Some(true) && !self.quiet {
            let after = self.started.elapsed().as_secs_f64();
            self.line(&format!("{} {} after {after:.1} s", self.paint.good("ready:"), instance.service()));
        }
    }

    fn progress(&self, instance: &InstanceId, change: impl FnOnce(&mut Progress) -> String) {
        let mut services = self.services.lock().expect("no one panics while telling");
        let Some(progress) = services.get_mut(&instance.service()) else { return };
        let message = change(progress);
        if let Some(bar) = progress.bar.as_ref().filter(|_| !message.is_empty()) {
            bar.set_message(message);
        }
    }
}

fn document(event: &AgentEvent) -> Value {
    match event {
        AgentEvent::Joined { trust_domain } => json!({ "event": "joined", "trust_domain": trust_domain }),
        AgentEvent::ControlFollowed { revision } => json!({ "event": "control_followed", "revision": revision }),
        AgentEvent::ControlLost { why } => json!({ "event": "control_lost", "why": why }),
        AgentEvent::HistoryRefused { why } => json!({ "event": "history_refused", "why": why }),
        AgentEvent::ViewRefused { service, revision, why } => {
            json!({ "event": "view_refused", "service": service, "revision": revision, "why": why })
        }
        AgentEvent::InstanceStarting { instance } => json!({ "event": "instance_starting", "instance": instance }),
        AgentEvent::IdentityIssued { instance } => json!({ "event": "identity_issued", "instance": instance }),
        AgentEvent::Enforced { instance, revision } => {
            json!({ "event": "enforced", "instance": instance, "revision": revision })
        }
        AgentEvent::InstanceReady { instance } => json!({ "event": "instance_ready", "instance": instance }),
        AgentEvent::Output { instance, line } => json!({ "event": "output", "instance": instance, "line": line }),
        AgentEvent::WorkloadEnded { instance, why, last_lines, restart_in } => json!({
            "event": "workload_ended", "instance": instance, "why": why, "last_lines": last_lines,
            "restart_in_ms": restart_in.map(|span| u64::try_from(span.as_millis()).unwrap_or(u64::MAX)),
        }),
        AgentEvent::InstanceWaits { instance, artifact, why } => {
            json!({ "event": "instance_waits", "instance": instance, "artifact": artifact, "why": why })
        }
        AgentEvent::ProxyEnded { instance, why, restart_in } => json!({
            "event": "proxy_ended", "instance": instance, "why": why,
            "restart_in_ms": u64::try_from(restart_in.as_millis()).unwrap_or(u64::MAX),
        }),
        AgentEvent::InstanceStopped { instance } => json!({ "event": "instance_stopped", "instance": instance }),
    }
}
