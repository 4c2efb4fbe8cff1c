//! The workloads of this host: which instances should run, and the difference to those that do. Each instance runs in
//! a task of its own ([`instance`]); nothing here talks to a process.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use countersign_api::{local::WorkloadView, run_file::RunService};
use countersign_core::identity::{InstanceId, ServiceName};
use tokio::{
    sync::{Mutex, watch},
    task::JoinHandle,
};

use self::instance::{Instance, Status};
use crate::{WorkloadSpec, host::Host};

mod event;
pub(crate) mod instance;
mod output;
mod sidecar;

/// How long open exchanges may take when a workload is replaced because its definition changed.
const REPLACE_WITHIN: Duration = Duration::from_secs(5);

/// Everything that runs here.
pub(crate) struct Workloads {
    host: Arc<Host>,
    once: bool,
    running: parking_lot::Mutex<BTreeMap<ServiceName, Vec<Running>>>,
    changing: Mutex<()>, // held by whoever brings `running` in line with a wish: one at a time
}

struct Running {
    instance: Arc<Instance>,
    stop: watch::Sender<Option<Duration>>,
    task: JoinHandle<()>,
}

impl Workloads {
    /// Nothing runs yet. With `once` a workload that ended is not started again.
    pub(crate) fn new(host: Arc<Host>, once: bool) -> Self {
        Self { host, once, running: parking_lot::Mutex::default(), changing: Mutex::default() }
    }

    /// Brings what runs in line with `specs`: what is not in it is stopped, what is new started, and an instance whose
    /// definition changed is replaced, one after the other, so that a service with several is never without one.
    pub(crate) async fn set(&self, specs: Vec<WorkloadSpec>) {
        let _one_at_a_time = self.changing.lock().await;
        let wanted: BTreeMap<ServiceName, WorkloadSpec> =
            specs.into_iter().map(|spec| (spec.service.clone(), spec)).collect();
        let gone: Vec<(ServiceName, Vec<Running>)> = {
            let mut running = self.running.lock();
            let names: Vec<_> = running.keys().filter(|name| !wanted.contains_key(*name)).cloned().collect();
            names.into_iter().filter_map(|name| running.remove_entry(&name)).collect()
        };
        for (service, instances) in gone {
            stop_all(instances, REPLACE_WITHIN).await;
            self.host.views.forget(&service);
        }
        for (service, spec) in wanted {
            self.set_one(service, spec).await;
        }
    }

    async fn set_one(&self, service: ServiceName, spec: WorkloadSpec) {
        let slots = if spec.run.is_some() { spec.instances.max(1) } else { 1 } as usize;
        let surplus: Vec<Running> = {
            let mut running = self.running.lock();
            let instances = running.entry(service.clone()).or_default();
            instances.split_off(slots.min(instances.len()))
        };
        stop_all(surplus, REPLACE_WITHIN).await;
        for slot in 0..slots {
            let old = {
                let mut running = self.running.lock();
                let instances = running.entry(service.clone()).or_default();
                match instances.get(slot) {
                    Some(running) if running.instance.spec.starts_like(&spec) => continue,
                    Some(_) => Some(instances.remove(slot)),
                    None => None,
                }
            };
            let replaced = old.is_some();
            stop_all(Vec::from_iter(old), REPLACE_WITHIN).await;
            let new = self.start(spec.clone(), slot as u32 + 1);
            let mut settled = new.instance.watch();
            self.running.lock().entry(service.clone()).or_default().insert(slot, new);
            if replaced && slot + 1 < slots {
                let _ = tokio::time::timeout(REPLACE_WITHIN, settled.wait_for(|status| status.settled)).await;
            }
        }
    }

    fn start(&self, spec: WorkloadSpec, slot: u32) -> Running {
        let instance = Arc::new(Instance::new(&self.host, spec, slot));
        let (stop, stopped) = watch::channel(None);
        let task = tokio::spawn(instance.clone().run(self.host.clone(), stopped, self.once));
        Running { instance, stop, task }
    }

    /// Stops everything: proxies drain for at most `drain`, then workloads are asked to end, then made to.
    pub(crate) async fn stop(&self, drain: Duration) {
        let _one_at_a_time = self.changing.lock().await;
        let all = std::mem::take(&mut *self.running.lock());
        stop_all(all.into_values().flatten().collect(), drain).await;
    }

    /// Waits until every instance enforces a view and its workload accepts connections, or will not: it only calls
    /// others, or it ended. Returns those that ended, and why.
    pub(crate) async fn ready(&self) -> Vec<(InstanceId, String)> {
        let watched: Vec<(InstanceId, watch::Receiver<Status>)> = {
            let running = self.running.lock();
            running.values().flatten().map(|running| (running.instance.id.clone(), running.instance.watch())).collect()
        };
        let mut ended = Vec::new();
        for (id, mut status) in watched {
            let proxy_ready = |status: &Status| status.revision.is_some() && status.has_identity;
            let ready = status
                .wait_for(|status| status.settled && (proxy_ready(status) || status.last_exit.is_some()))
                .await
                .map(|status| status.clone());
            match ready {
                Ok(Status { app_ready: false, last_exit: Some(why), .. }) => ended.push((id, why)),
                Ok(_) => {}
                Err(_) => ended.push((id, "it was stopped".into())),
            }
        }
        ended
    }

    /// Waits until a workload ended for good; how it ended, as a shell would put it.
    pub(crate) async fn exited(&self) -> u8 {
        let watched: Vec<_> = self.running.lock().values().flatten().map(|running| running.instance.watch()).collect();
        let each = watched.into_iter().map(|mut status| {
            Box::pin(async move {
                status.wait_for(|status| status.exit.is_some()).await.ok().and_then(|status| status.exit)
            })
        });
        match futures_util::future::select_all(each.collect::<Vec<_>>()).await.0 {
            Some(crate::isolate::Exit::Code(code)) => code.clamp(0, 255) as u8,
            Some(crate::isolate::Exit::Signal(signal)) => (128 + signal).clamp(0, 255) as u8,
            Some(crate::isolate::Exit::Lost) | None => 1,
        }
    }

    /// Where the first instance of each service listens, as `run.json` has it.
    pub(crate) fn run_services(&self) -> BTreeMap<ServiceName, RunService> {
        let running = self.running.lock();
        let of_service = |instances: &Vec<Running>| {
            let statuses: Vec<Status> = instances.iter().map(|one| one.instance.watch().borrow().clone()).collect();
            let addresses = statuses.first()?.addresses.clone()?;
            Some(RunService {
                inbound: addresses.inbound,
                outbound_http: addresses.outbound_http,
                admin: addresses.admin,
                upstreams: addresses.upstreams,
                isolated: instances.first()?.instance.isolated,
                pids: statuses.iter().filter_map(|status| status.pid).collect(),
            })
        };
        running.iter().filter_map(|(service, instances)| Some((service.clone(), of_service(instances)?))).collect()
    }

    /// Every instance, as `GET /v1/workloads` shows it.
    pub(crate) fn views(&self) -> Vec<WorkloadView> {
        self.running.lock().values().flatten().map(|running| running.instance.view()).collect()
    }
}

/// Stops instances side by side and waits for the last.
async fn stop_all(instances: Vec<Running>, drain: Duration) {
    for running in &instances {
        running.stop.send_replace(Some(drain));
    }
    for mut running in instances {
        if let Err(error) = (&mut running.task).await
            && error.is_panic()
        {
            tracing::error!(instance = %running.instance.id, %error, "the task of an instance panicked");
        }
    }
}

impl Drop for Running {
    /// Its processes end with the task that holds them.
    fn drop(&mut self) {
        self.task.abort();
    }
}
