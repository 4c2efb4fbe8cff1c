//! A whole agent against a control plane that can be stopped and told to lie, with sidecars that write down what they are
//! told. This program is its own launcher (`launch`), sidecar (`sidecar`), for the tests that kill one agent (`agent`), and a workload that
//! asks for its identities (`asks`, `asks-as-envoy`, `asks-by-crate`).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use countersign_agent::{
    Agent, AgentConfig, AgentEvent, Isolate, Source, StartError, Telemetry, Told, WorkloadSpec, artifact,
    launch::{SUBCOMMAND, launch_main},
    start,
};
use countersign_api::{
    mesh::{RecordsQuery, follow_event::Event, follow_request::Message},
    sidecar::Sampling,
};
use countersign_core::{
    canonical::Digest,
    change::Change,
    identity::{InstanceId, ServiceName},
    service::{Protocol, ServiceSpec, Tokens},
};
use libtest_mimic::{Arguments, Failed, Trial};
use nix::{sys::signal::Signal, unistd::Pid};
use tempfile::TempDir;
use tokio::sync::broadcast;

use crate::{
    compromised::{
        a_cold_host_is_given_no_operators_but_the_pinned_ones,
        a_compromised_control_plane_changes_nothing_that_the_operators_did_not_sign,
        a_host_that_joined_before_the_anchor_pins_it_and_keeps_it,
        two_hosts_that_are_shown_two_histories_part_at_the_next_signature,
    },
    control::{Control, Served, declare, name},
    identities::{
        a_process_that_the_agent_did_not_launch_has_no_identity,
        a_process_that_the_agent_did_not_start_is_the_service_that_registers_it_and_nobody_without,
        a_workload_asks_for_its_identities_until_its_service_is_taken_out_of_the_mesh,
        an_envoy_has_its_secrets_until_its_service_is_suspended_and_again_when_it_is_resumed,
        one_user_does_not_keep_others_from_the_socket_of_the_host,
        the_crate_of_spiffe_follows_three_rotations_and_a_revocation,
        what_the_agent_started_is_nobody_else_on_the_socket_of_the_host,
    },
};

mod compromised;
mod control;
mod identities;
mod sidecar;

const WITHIN: Duration = Duration::from_secs(20);
const ANYWHERE: &str = "127.0.0.1:0";

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    match args.get(1).and_then(|first| first.to_str()) {
        Some(SUBCOMMAND) => launch_main(args.into_iter().skip(2)),
        Some("sidecar") => sidecar::main(),
        Some("agent") => agent(),
        Some("asks") => identities::main(),
        Some("asks-as-envoy") => identities::envoy_main(),
        Some("asks-by-crate") => identities::crate_main(),
        _ => tests(&Arguments::from_args()),
    }
}

macro_rules! trials {
    ($($name:ident)*) => { vec![$(Trial::test(stringify!($name), || run($name()))),*] };
}

fn tests(arguments: &Arguments) -> ExitCode {
    let trials = trials! {
        a_control_plane_of_another_root_is_never_shown_the_token
        a_used_token_is_refused_in_words
        a_host_that_has_not_joined_needs_a_token
        a_host_that_joined_starts_without_control_and_without_a_token
        the_stream_survives_a_restart_of_control_and_nothing_is_lost
        a_forged_entry_is_refused_and_the_last_good_state_stays
        a_ledger_that_was_cut_is_refused_and_the_last_good_state_stays
        another_root_for_the_same_entries_is_refused
        a_view_that_cannot_be_built_is_reported_and_not_applied
        a_view_that_a_proxy_refuses_is_reported
        a_revision_that_changes_nothing_for_a_proxy_is_only_a_number
        an_identity_is_renewed_while_the_old_one_is_good_and_without_a_restart
        what_rests_on_a_tainted_root_is_replaced_at_once_and_the_token_of_a_root_that_is_gone_is_still_known
        what_is_revoked_is_told_before_any_identity_replaced_at_once_and_remembered
        access_tokens_come_with_an_identity_and_are_renewed_by_themselves
        a_revision_is_enforced_once_the_tokens_that_follow_from_it_are_there_or_none_can_be_had
        a_host_whose_own_identity_is_revoked_says_so_and_what_to_do
        a_crashing_workload_is_started_again_ever_later_and_keeps_its_sidecar
        a_program_that_does_not_exist_is_named
        a_workload_finds_the_mesh_in_its_environment
        a_crashed_sidecar_comes_back_where_it_was_and_its_workload_does_not_notice
        stopping_ends_everything_and_says_so
        everything_ends_when_the_agent_is_killed
        what_did_not_change_keeps_running_when_workloads_are_set_anew
        endpoints_reach_the_proxies_that_see_them
        control_hears_the_records_of_every_proxy
        proxies_are_asked_what_they_count_only_when_somebody_wants_it
        what_comes_of_a_probe_goes_to_control_and_its_span_to_nobody_else
        a_workload_that_ends_ends_the_run_with_its_code
        the_local_socket_shows_what_runs_to_its_owner
        a_workload_is_started_after_its_sidecar_serves_it
        a_host_that_knows_nothing_of_its_mesh_starts_nothing
        nothing_runs_that_no_deployment_admits_and_what_ceases_to_be_one_is_ended
        a_program_that_was_replaced_waits_when_it_is_started_again
        what_the_agent_does_not_start_waits_where_deployments_are_asked_for
        a_workload_of_its_own_namespace_crashes_alone
        a_killed_launcher_lets_both_begin_anew
        an_answer_that_is_long_on_its_way_makes_nothing_younger_than_its_question
        a_stream_that_trickles_lets_what_is_held_age
        a_compromised_control_plane_changes_nothing_that_the_operators_did_not_sign
        two_hosts_that_are_shown_two_histories_part_at_the_next_signature
        a_cold_host_is_given_no_operators_but_the_pinned_ones
        a_host_that_joined_before_the_anchor_pins_it_and_keeps_it
        a_workload_asks_for_its_identities_until_its_service_is_taken_out_of_the_mesh
        an_envoy_has_its_secrets_until_its_service_is_suspended_and_again_when_it_is_resumed
        a_process_that_the_agent_did_not_launch_has_no_identity
        a_process_that_the_agent_did_not_start_is_the_service_that_registers_it_and_nobody_without
        what_the_agent_started_is_nobody_else_on_the_socket_of_the_host
        one_user_does_not_keep_others_from_the_socket_of_the_host
        the_crate_of_spiffe_follows_three_rotations_and_a_revocation
    };
    libtest_mimic::run(arguments, trials).exit_code()
}

fn run(test: impl Future<Output = ()>) -> Result<(), Failed> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(async { tokio::time::timeout(3 * WITHIN, test).await });
    runtime.shutdown_timeout(Duration::from_secs(2));
    ended.map_err(|_| Failed::from("it did not end in time"))
}

// ---- the ground

struct Ground {
    dir: TempDir,
    control: Arc<Control>,
    served: Option<Served>,
}

async fn ground() -> Ground {
    let control = Control::new();
    let served = control.serve(ANYWHERE.parse().unwrap()).await;
    Ground { dir: tempfile::tempdir().unwrap(), control, served: Some(served) }
}

impl Ground {
    fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn address(&self) -> SocketAddr {
        self.served.as_ref().unwrap().address
    }

    fn config(&self, join: Option<String>, workloads: Vec<WorkloadSpec>) -> AgentConfig {
        config(self.data_dir(), self.address(), join, workloads)
    }

    async fn start(&self, workloads: Vec<WorkloadSpec>) -> Agent {
        start(self.config(Some(self.control.token()), workloads)).await.unwrap()
    }

    /// Everything the sidecar of instance 1 of `service` was told.
    fn orders(&self, service: &str) -> Vec<String> {
        let file = self.data_dir().join(format!("agent/records/{service}-1/orders"));
        fs::read_to_string(file).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    async fn told(&self, service: &str, order: &str) {
        until(&format!("`{order}` in the orders of {service}"), || {
            self.orders(service).iter().any(|line| line.starts_with(order))
        })
        .await;
    }

    fn words_of(&self, service: &str, word: &str) -> Vec<String> {
        let word = format!("{word} ");
        self.orders(service).iter().filter_map(|line| line.strip_prefix(&word).map(str::to_owned)).collect()
    }

    /// The revision (and error) that control last heard from `service`.
    fn acknowledged(&self, service: &str) -> Option<(u64, String)> {
        let said = self.control.said.lock();
        let acks = said.iter().filter_map(|message| match message {
            Message::Acknowledgement(ack) => Some(&ack.instances),
            _ => None,
        });
        let of_service = acks.flatten().filter(|one| one.instance.starts_with(&format!("{service}/")));
        of_service.last().map(|one| (one.revision, one.error.clone()))
    }

    /// What the instances of `service` name that control knows to wait.
    fn waiting(&self, service: &str) -> Vec<Digest> {
        let said = self.control.said.lock();
        let waits = said.iter().filter_map(|message| match message {
            Message::Waits(waits) if waits.instance.starts_with(&format!("{service}/")) => Some(&waits.artifact),
            _ => None,
        });
        waits.filter_map(|artifact| Some(Digest(artifact[..].try_into().ok()?))).collect()
    }

    /// The workloads of the instances that control knows to be up.
    fn up_with_pid(&self) -> Vec<i32> {
        let said = self.control.said.lock();
        let mut pids: Vec<i32> = said
            .iter()
            .filter_map(|message| match message {
                Message::Up(up) if up.pid != 0 => Some(up.pid as i32),
                _ => None,
            })
            .collect();
        pids.sort_unstable();
        pids.dedup();
        pids
    }

    async fn enforced(&self, service: &str, revision: u64) {
        until(&format!("{service} enforces {revision}"), || {
            self.acknowledged(service) == Some((revision, String::new()))
        })
        .await;
    }
}

fn config(data_dir: PathBuf, control: SocketAddr, join: Option<String>, workloads: Vec<WorkloadSpec>) -> AgentConfig {
    AgentConfig {
        data_dir,
        host: name("h1"),
        control: format!("https://{control}"),
        join,
        address: None,
        workloads,
        isolate: Isolate::Off,
        workers: 1,
        executable: std::env::current_exe().unwrap(),
        exit_with_workload: false,
        telemetry: None,
        workload_socket: None,
    }
}

fn workload(service: &str, script: &str) -> WorkloadSpec {
    WorkloadSpec {
        service: name(service),
        spec: ServiceSpec::new(Protocol::Http),
        run: Some(vec!["sh".into(), "-c".into(), script.into()]),
        dir: "/".into(),
        env: BTreeMap::new(),
        instances: 1,
        port: None,
    }
}

fn idle(service: &str) -> WorkloadSpec {
    workload(service, "exec sleep 1000")
}

async fn until(what: &str, so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !so() {
        assert!(begun.elapsed() < WITHIN, "in vain: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn event<T>(events: &mut broadcast::Receiver<AgentEvent>, wanted: impl Fn(&AgentEvent) -> Option<T>) -> T {
    loop {
        let event = tokio::time::timeout(WITHIN, events.recv()).await.expect("in vain: an event");
        if let Some(found) = event.ok().as_ref().and_then(&wanted) {
            return found;
        }
    }
}

fn history_refused(event: &AgentEvent) -> Option<String> {
    match event {
        AgentEvent::HistoryRefused { why } => Some(why.clone()),
        _ => None,
    }
}

fn lives(pid: i32) -> bool {
    let state = fs::read_to_string(format!("/proc/{pid}/stat")).ok();
    state.is_some_and(|stat| !stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
}

fn pid(given: &str) -> i32 {
    given.parse().unwrap()
}

// ---- joining

async fn a_control_plane_of_another_root_is_never_shown_the_token() {
    let (ours, theirs) = (ground().await, ground().await);
    let refused = start(theirs.config(Some(ours.control.token()), vec![])).await.err().unwrap();
    let mut said = refused.to_string();
    let mut cause = std::error::Error::source(&refused);
    while let Some(error) = cause {
        said.push_str(&format!(": {error}"));
        cause = error.source();
    }
    assert!(said.contains("does not show the root certificate that the join token names"), "{said}");
    assert_eq!(*theirs.control.shown.lock(), Vec::<String>::new());
}

async fn a_used_token_is_refused_in_words() {
    let ground = ground().await;
    let token = ground.control.token();
    start(ground.config(Some(token.clone()), vec![])).await.unwrap().stop(Duration::ZERO).await;
    let elsewhere = tempfile::tempdir().unwrap();
    let refused = start(config(elsewhere.path().join("d"), ground.address(), Some(token), vec![])).await.err().unwrap();
    let expected = format!(
        "the control plane at `https://{}` refused the join token: the join token was used before; a token is good for one join",
        ground.address()
    );
    assert_eq!(refused.to_string(), expected);
}

async fn a_host_that_has_not_joined_needs_a_token() {
    let ground = ground().await;
    assert!(matches!(start(ground.config(None, vec![])).await.err(), Some(StartError::NotJoined(_))));
    let refused = start(ground.config(Some("csj1.short".into()), vec![])).await.err().unwrap();
    assert_eq!(refused.to_string(), "this is not a join token: it must be `csj1.<secret>.<root>`");
}

// ---- following

async fn a_host_that_joined_starts_without_control_and_without_a_token() {
    let mut ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    ground.enforced("web", revision).await;
    agent.stop(Duration::ZERO).await;
    let config = ground.config(None, vec![idle("web")]);
    ground.served = None;
    let pids = ground.words_of("web", "pid").len();
    let agent = start(config).await.unwrap();
    until("a second sidecar", || ground.words_of("web", "pid").len() > pids).await;
    until("a second view", || ground.words_of("web", "view") == [format!("{revision} web"), format!("{revision} web")])
        .await;
    let begun = ground.orders("web").iter().rposition(|line| line.starts_with("pid ")).unwrap();
    let after: Vec<_> = ground.orders("web")[begun..].to_vec();
    assert!(after.iter().any(|line| line.starts_with("fresh ")), "it must know how old the view is: {after:?}");
    agent.stop(Duration::ZERO).await;
}

async fn the_stream_survives_a_restart_of_control_and_nothing_is_lost() {
    let mut ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    let mut events = agent.events();
    ground.enforced("web", revision).await;
    let address = ground.address();
    ground.served = None;
    event(&mut events, |event| matches!(event, AgentEvent::ControlLost { .. }).then_some(())).await;
    let mut last = 0;
    for service in ["a", "b", "c"] {
        last = ground.control.append(vec![declare(service)], &[]);
    }
    ground.control.said.lock().clear();
    ground.served = Some(ground.control.serve(address).await);
    ground.enforced("web", last).await;
    assert_eq!(ground.words_of("web", "view").last().unwrap(), &format!("{last} a,b,c,web"));
    let said_up = || ground.control.said.lock().iter().any(|message| matches!(message, Message::Up(_)));
    until("a new stream hears of the instance again", said_up).await;
    assert_eq!(ground.words_of("web", "pid").len(), 1, "its sidecar was not disturbed");
    agent.stop(Duration::ZERO).await;
}

async fn a_forged_entry_is_refused_and_the_last_good_state_stays() {
    let ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    let mut events = agent.events();
    ground.enforced("web", revision).await;
    ground.control.send_forged(vec![declare("evil")]);
    let why = event(&mut events, history_refused).await;
    assert!(why.contains("entry 2 of the ledger is damaged"), "{why}");
    let next = ground.control.append(vec![declare("good")], &[]);
    ground.enforced("web", next).await;
    assert!(!ground.orders("web").iter().any(|line| line.contains("evil")), "{:?}", ground.orders("web"));
    agent.stop(Duration::ZERO).await;
}

async fn a_ledger_that_was_cut_is_refused_and_the_last_good_state_stays() {
    let ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let last = ground.control.append(vec![declare("a")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    let mut events = agent.events();
    ground.enforced("web", last).await;
    ground.control.forget(1);
    let why = event(&mut events, history_refused).await;
    assert!(why.contains(&format!("control holds {revision} entries, this host has verified {last}")), "{why}");
    // Another entry in the place of the one that was cut is a second history.
    ground.control.append(vec![declare("b")], &[]);
    let why = event(&mut events, |event| history_refused(event).filter(|why| why.contains("two histories"))).await;
    assert!(why.contains(&format!("the ledger of {last} entries")), "{why}");
    assert_eq!(ground.words_of("web", "view").last().unwrap(), &format!("{last} a,web"));
    agent.stop(Duration::ZERO).await;
}

async fn another_root_for_the_same_entries_is_refused() {
    let ground = ground().await;
    ground.control.lies_about_root.store(true, Ordering::Relaxed);
    let agent = ground.start(vec![idle("web")]).await;
    let why = event(&mut agent.events(), history_refused).await;
    assert!(why.contains("there are two histories"), "{why}");
    assert_eq!(ground.words_of("web", "view"), Vec::<String>::new(), "a host that holds nothing shows nothing");
    agent.stop(Duration::ZERO).await;
}

// ---- views

async fn a_view_that_cannot_be_built_is_reported_and_not_applied() {
    let ground = ground().await;
    let good = ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    let mut events = agent.events();
    ground.enforced("web", good).await;
    let text = "permit(";
    let body = countersign_core::canonical::Digest::of(text.as_bytes());
    let policy = Change::SetPolicy { id: "broken".into(), file: "policies/broken.cedar".into(), body };
    let bad = ground.control.append(vec![policy], &[text]);
    let refused = event(&mut events, |event| match event {
        AgentEvent::ViewRefused { revision, .. } => Some(revision.0),
        _ => None,
    });
    assert_eq!(refused.await, bad);
    until("control hears why", || {
        ground.acknowledged("web").is_some_and(|(at, why)| at == good && why.contains(&format!("revision {bad}")))
    })
    .await;
    let healed = ground.control.append(vec![Change::RemovePolicy { id: "broken".into() }], &[]);
    ground.enforced("web", healed).await;
    assert_eq!(ground.words_of("web", "view"), [format!("{good} web")], "only good views reach a proxy");
    agent.stop(Duration::ZERO).await;
}

async fn a_view_that_a_proxy_refuses_is_reported() {
    let ground = ground().await;
    let good = ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    ground.enforced("web", good).await;
    ground.control.append(vec![declare("refused")], &[]);
    until("control hears why", || ground.acknowledged("web") == Some((good, "it shows `refused`".into()))).await;
    // The next revision says the same: its number alone would have the proxy count its old view as the new revision.
    let again = ground.control.append(vec![declare("refused")], &[]);
    ground.told("web", &format!("view {again} refused,web")).await;
    assert_eq!(ground.words_of("web", "revision"), Vec::<String>::new());
    assert_eq!(ground.acknowledged("web"), Some((good, "it shows `refused`".into())));
    agent.stop(Duration::ZERO).await;
}

async fn a_revision_that_changes_nothing_for_a_proxy_is_only_a_number() {
    let ground = ground().await;
    let first = ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    ground.enforced("web", first).await;
    let second = ground.control.append(vec![declare("web")], &[]);
    ground.enforced("web", second).await;
    assert_eq!(ground.words_of("web", "view"), [format!("{first} web")]);
    assert_eq!(ground.words_of("web", "revision"), [second.to_string()]);
    agent.stop(Duration::ZERO).await;
}

async fn endpoints_reach_the_proxies_that_see_them() {
    let ground = ground().await;
    ground.control.append(vec![declare("web"), declare("a")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    ground.told("web", "view").await;
    until("a stream", || ground.control.stream_count() == 1).await;
    ground.control.discover("a/1", "127.0.0.1:81");
    ground.control.discover("hidden/1", "127.0.0.1:82");
    ground.control.discover("a/2", "127.0.0.1:83");
    ground.told("web", "endpoints a 127.0.0.1:81,127.0.0.1:83").await;
    assert!(!ground.orders("web").iter().any(|line| line.contains("hidden")));
    agent.stop(Duration::ZERO).await;
}

// ---- identities

async fn an_identity_is_renewed_while_the_old_one_is_good_and_without_a_restart() {
    let ground = ground().await;
    ground.control.append(vec![declare("web")], &[]);
    ground.control.svid_seconds.store(4, Ordering::Relaxed);
    let begun = Instant::now();
    let agent = ground.start(vec![idle("web")]).await;
    until("a third identity", || ground.words_of("web", "identity").len() >= 3).await;
    assert!(begun.elapsed() < Duration::from_secs(8), "each must come before its predecessor expires");
    let identities = ground.words_of("web", "identity");
    assert_ne!(identities[0], identities[1]);
    assert_eq!(ground.words_of("web", "pid").len(), 1);
    agent.stop(Duration::ZERO).await;
}

async fn what_rests_on_a_tainted_root_is_replaced_at_once_and_the_token_of_a_root_that_is_gone_is_still_known() {
    let ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let token = ground.control.token();
    let agent = start(ground.config(Some(token.clone()), vec![idle("web")])).await.unwrap();
    ground.enforced("web", revision).await;
    ground.control.rotate(false);
    until("the proxy verifies by both roots", || ground.words_of("web", "bundle").len() >= 2).await;
    assert_eq!(ground.control.issued.lock().len(), 1, "what an old root signed is good");
    ground.control.rotate(true);
    until("each has another identity", || ground.control.issued.lock().len() >= 3).await;
    until("its own proxy shows it", || ground.words_of("web", "identity").len() == 2).await;
    let issued = ground.control.issued.lock().clone();
    let of_agent = issued.iter().filter(|one| *one == "agent").count();
    assert_eq!((of_agent, issued.len()), (1, 3), "once each: {issued:?}");
    until("it is kept", || {
        let kept = fs::read_to_string(ground.data_dir().join("agent/identity.json")).unwrap();
        kept.contains("\"tainted\":[\"")
    })
    .await;
    agent.stop(Duration::ZERO).await;
    // As it is once the root is revoked: nothing but the way by which this host joined names it.
    let path = ground.data_dir().join("agent/identity.json");
    let mut kept: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    kept["bundle"].as_array_mut().unwrap().remove(0);
    fs::write(&path, kept.to_string()).unwrap();
    until("its stream is gone", || ground.control.stream_count() == 0).await;
    let agent = start(ground.config(Some(token), Vec::new())).await.unwrap();
    until("it follows", || ground.control.stream_count() == 1).await;
    assert_eq!(ground.control.shown.lock().len(), 1, "it joined once");
    agent.stop(Duration::ZERO).await;
}

// ---- workloads

async fn what_is_revoked_is_told_before_any_identity_replaced_at_once_and_remembered() {
    let mut ground = ground().await;
    ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    ground.told("web", "identity").await;
    let first = ground.words_of("web", "identity").remove(0);
    ground.control.revoke(&hex::decode(&first).unwrap());
    until("another identity", || ground.words_of("web", "identity").len() == 2).await;
    assert_ne!(ground.words_of("web", "identity")[1], first);
    let heeded = || {
        let said = ground.control.said.lock();
        said.iter().any(|message| match message {
            Message::Acknowledgement(ack) => {
                ack.instances.iter().any(|one| one.signal_sequence == 1 && one.revision > 0)
            }
            _ => false,
        })
    };
    until("control knows that the proxy heeds it", heeded).await;
    until("it is kept", || ground.data_dir().join("agent/signals").exists()).await;
    agent.stop(Duration::ZERO).await;
    ground.served = None;
    let before = ground.orders("web").len();
    let agent =
        start(config(ground.data_dir(), "127.0.0.1:1".parse().unwrap(), None, vec![idle("web")])).await.unwrap();
    until("the next proxy is told without control", || ground.words_of("web", "signals").len() >= 3).await;
    let orders = ground.orders("web").split_off(before);
    let told = orders.iter().position(|order| order.starts_with("signals 1 ")).unwrap();
    assert!(!orders[..told].iter().any(|order| order.starts_with("bundle") || order.starts_with("identity")));
    agent.stop(Duration::ZERO).await;
}

/// The access tokens that the proxy of a service was given, in order: the certificate, the audience, the scope and the id.
fn tokens(ground: &Ground, service: &str) -> Vec<[String; 4]> {
    let read = |line: String| {
        let mut words = line.split(' ').map(str::to_owned);
        let (certificate, audience, token) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
        let claims = token.split('.').nth(1).unwrap();
        let claims = base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, claims).unwrap();
        let claims: serde_json::Value = serde_json::from_slice(&claims).unwrap();
        let text = |name: &str| claims[name].as_str().unwrap().to_owned();
        [certificate, audience, text("scope"), text("jti")]
    };
    ground.words_of(service, "token").into_iter().map(read).collect()
}

const READS: &str = "http:GET http:HEAD";
const WRITES: &str =
    "http:COPY http:DELETE http:LOCK http:MKCOL http:MOVE http:PATCH http:POST http:PROPPATCH http:PUT http:UNLOCK";

/// Permits `web` these actions of `orders`; control issues tokens of this scope.
fn permit(ground: &Ground, actions: &str, scope: &str) -> u64 {
    let text = format!(
        "@id(\"web\")\npermit (principal == Workload::\"web\", action in {actions}, resource in Service::\"orders\");"
    );
    ground.control.scopes.lock().insert("orders".into(), scope.into());
    let body = Digest::of(text.as_bytes());
    ground
        .control
        .append(vec![Change::SetPolicy { id: "web".into(), file: "policies/web.cedar".into(), body }], &[&text])
}

/// `web` runs and holds a token to read at `orders`.
async fn ground_with_tokens() -> (Ground, Agent) {
    let ground = ground().await;
    let declared = |service: &str, upstreams: &[&str], tokens| {
        let upstreams = upstreams.iter().map(|upstream| name(upstream)).collect();
        Change::DeclareService {
            name: name(service),
            spec: ServiceSpec { upstreams, tokens, ..ServiceSpec::new(Protocol::Http) },
        }
    };
    let services = vec![
        declared("orders", &[], Tokens::Required),
        declared("free", &[], Tokens::Optional),
        declared("web", &["orders", "free"], Tokens::Optional),
    ];
    ground.control.append(services, &[]);
    permit(&ground, "[Action::\"http:GET\", Action::\"http:HEAD\"]", READS);
    let agent = ground.start(vec![idle("web")]).await;
    ground.told("web", "tokens 1").await;
    (ground, agent)
}

async fn access_tokens_come_with_an_identity_and_are_renewed_by_themselves() {
    let (ground, agent) = ground_with_tokens().await;
    let certificate =
        |at: usize| hex::encode(Digest::of(&hex::decode(&ground.words_of("web", "identity")[at]).unwrap()).0);
    let first = tokens(&ground, "web");
    assert_eq!(first.len(), 1, "of what demands one");
    assert_eq!(first[0][..3], [certificate(0), "orders".into(), READS.into()]);

    // What a policy permits now is what the token is for now, without a word from anybody.
    permit(&ground, "Action::\"write\"", WRITES);
    until("a token for what is permitted now", || tokens(&ground, "web").len() == 2).await;
    assert!(tokens(&ground, "web")[1][2].contains("http:POST"));

    ground.control.revoke_tokens("subject:web");
    until("another after it was revoked", || tokens(&ground, "web").len() == 3).await;
    let ids: BTreeSet<String> = tokens(&ground, "web").iter().map(|token| token[3].clone()).collect();
    assert_eq!(ids.len(), 3);

    // Control signs nothing for a while: what there is stays until it expires.
    ground.control.token_seconds.store(2, Ordering::Relaxed);
    ground.control.revoke_tokens("subject:web");
    until("a short one", || tokens(&ground, "web").len() >= 4).await;
    until("its renewal", || tokens(&ground, "web").len() >= 5).await;
    ground.control.token_seconds.store(0, Ordering::Relaxed);
    ground.told("web", "tokens 0").await;
    ground.control.token_seconds.store(300, Ordering::Relaxed);
    let had = tokens(&ground, "web").len();
    until("one as soon as control signs again", || tokens(&ground, "web").len() > had).await;

    ground.control.revoke(&hex::decode(&ground.words_of("web", "identity")[0]).unwrap());
    until("another identity", || ground.words_of("web", "identity").len() == 2).await;
    until("tokens that are bound to it", || tokens(&ground, "web").last().unwrap()[0] == certificate(1)).await;
    let orders = ground.orders("web");
    let identity = orders.iter().rposition(|order| order.starts_with("identity")).unwrap();
    assert!(orders[identity + 1].starts_with("token "), "they come with it: {}", orders[identity + 1]);
    agent.stop(Duration::ZERO).await;
}

async fn a_revision_is_enforced_once_the_tokens_that_follow_from_it_are_there_or_none_can_be_had() {
    let (ground, agent) = ground_with_tokens().await;
    // Control is not there yet: it signs what it signed before.
    let revision = permit(&ground, "Action::\"write\"", READS);
    ground.told("web", &format!("revision {revision}")).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_ne!(ground.acknowledged("web").unwrap().0, revision, "a caller would be refused what is permitted now");
    ground.control.scopes.lock().insert("orders".into(), WRITES.into());
    ground.enforced("web", revision).await;
    assert_eq!(tokens(&ground, "web").last().unwrap()[2], WRITES);

    ground.control.token_seconds.store(0, Ordering::Relaxed);
    let revision = permit(&ground, "[Action::\"http:GET\", Action::\"http:HEAD\"]", READS);
    ground.enforced("web", revision).await;
    assert_eq!(
        tokens(&ground, "web").last().unwrap()[2],
        WRITES,
        "no change waits for ever for tokens that nobody signs"
    );
    agent.stop(Duration::ZERO).await;
}

async fn a_host_whose_own_identity_is_revoked_says_so_and_what_to_do() {
    let ground = ground().await;
    let agent = ground.start(Vec::new()).await;
    let mut events = agent.events();
    until("it follows", || ground.control.stream_count() == 1).await;
    let kept: serde_json::Value =
        serde_json::from_slice(&fs::read(ground.data_dir().join("agent/identity.json")).unwrap()).unwrap();
    let own = kept["chain"][0].as_str().unwrap();
    ground.control.revoke(&base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, own).unwrap());
    ground.control.hang_up();
    let why = event(&mut events, |event| match event {
        AgentEvent::HistoryRefused { why } => Some(why.clone()),
        _ => None,
    });
    assert!(why.await.contains("this host's identity was revoked; invite it again"));
    until("it is kept", || ground.data_dir().join("agent/signals").exists()).await;
    agent.stop(Duration::ZERO).await;
    let refused = start(ground.config(None, Vec::new())).await;
    assert!(matches!(refused, Err(StartError::Revoked(_))), "{:?}", refused.err());
    let agent = ground.start(Vec::new()).await;
    until("it follows again, by what the new token brought", || ground.control.stream_count() == 1).await;
    agent.stop(Duration::ZERO).await;
}

async fn a_crashing_workload_is_started_again_ever_later_and_keeps_its_sidecar() {
    let ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![workload("web", "echo these are my last words; exit 3")]).await;
    let mut events = agent.events();
    let mut delays = Vec::new();
    for _ in 0..4 {
        let ended = event(&mut events, |event| match event {
            AgentEvent::WorkloadEnded { why, last_lines, restart_in, .. } => {
                Some((why.clone(), last_lines.clone(), restart_in.unwrap()))
            }
            _ => None,
        });
        let (why, last_lines, restart_in) = ended.await;
        assert_eq!((why.as_str(), last_lines), ("exited with 3", vec!["these are my last words".to_owned()]));
        delays.push(restart_in);
    }
    assert!(delays[3] > 2 * delays[0], "{delays:?}");
    ground.enforced("web", revision).await;
    assert_eq!(ground.words_of("web", "pid").len(), 1);
    let ended = agent.ready().await;
    assert_eq!(ended.len(), 1, "{ended:?}");
    agent.stop(Duration::ZERO).await;
}

async fn a_program_that_does_not_exist_is_named() {
    let ground = ground().await;
    let mut spec = idle("web");
    spec.run = Some(vec!["no-such-program".into()]);
    spec.env.insert("PATH".into(), "/nowhere".into());
    let agent = ground.start(vec![spec]).await;
    let mut events = agent.events();
    let why = event(&mut events, |event| match event {
        AgentEvent::WorkloadEnded { why, .. } => Some(why.clone()),
        _ => None,
    });
    assert_eq!(why.await, "could not find the program `no-such-program`: looked in `/nowhere`");
    agent.stop(Duration::ZERO).await;
}

async fn a_workload_finds_the_mesh_in_its_environment() {
    let ground = ground().await;
    let mut spec = workload("web", "env; exec sleep 1000");
    spec.spec.upstreams = [name("orders-db")].into();
    spec.env.insert("LOG".into(), "debug".into());
    let agent = ground.start(vec![spec]).await;
    let mut events = agent.events();
    let mut env = BTreeMap::new();
    let wanted = ["PORT", "LOG", "HTTP_PROXY", "NO_PROXY", "COUNTERSIGN_INSTANCE", "COUNTERSIGN_UPSTREAM_ORDERS_DB"];
    while !wanted.iter().all(|name| env.contains_key(*name)) {
        let line = event(&mut events, |event| match event {
            AgentEvent::Output { line, .. } => Some(line.clone()),
            _ => None,
        });
        if let Some((name, value)) = line.await.split_once('=') {
            env.insert(name.to_owned(), value.to_owned());
        }
    }
    let service = agent.run_services().remove(&name("web")).unwrap();
    assert_eq!(env["HTTP_PROXY"], format!("http://{}", service.outbound_http));
    assert_eq!(env["COUNTERSIGN_UPSTREAM_ORDERS_DB"], service.upstreams[&name("orders-db")].to_string());
    assert_eq!(env["LOG"], "debug");
    agent.stop(Duration::ZERO).await;
}

async fn a_crashed_sidecar_comes_back_where_it_was_and_its_workload_does_not_notice() {
    let ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    ground.enforced("web", revision).await;
    until("it is up with its workload", || ground.up_with_pid().len() == 1).await;
    let workload = agent.run_services()[&name("web")].pids.clone();
    ground.control.said.lock().clear();
    nix::sys::signal::kill(Pid::from_raw(pid(&ground.words_of("web", "pid")[0])), Signal::SIGKILL).unwrap();
    ground.enforced("web", revision).await;
    let listening = ground.words_of("web", "listening");
    assert_eq!((listening.len(), &listening[0]), (2, &listening[1]));
    assert_eq!(agent.run_services()[&name("web")].pids, workload);
    let spell = |message: &Message| match message {
        Message::Up(_) => Some("up"),
        Message::Down(_) => Some("down"),
        _ => None,
    };
    until("it is down and up again", || ground.control.said.lock().iter().filter_map(spell).eq(["down", "up"])).await;
    agent.stop(Duration::ZERO).await;
}

async fn stopping_ends_everything_and_says_so() {
    let ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let stubborn = "trap '' TERM; sleep 1000 & wait; sleep 1000";
    let agent = ground.start(vec![idle("web"), workload("stubborn", stubborn)]).await;
    ground.enforced("web", revision).await;
    ground.enforced("stubborn", revision).await;
    until("both are up with their workloads", || ground.up_with_pid().len() == 2).await;
    let mut pids: Vec<i32> = agent.run_services().values().map(|service| service.pids[0] as i32).collect();
    pids.extend(["web", "stubborn"].map(|service| pid(&ground.words_of(service, "pid")[0])));
    assert!(pids.iter().all(|pid| lives(*pid)));
    agent.stop(Duration::from_millis(500)).await;
    assert_eq!(pids.iter().filter(|pid| lives(**pid)).count(), 0);
    assert_eq!(ground.words_of("web", "drain"), ["500"]);
    let end = |message: &Message| match message {
        Message::Down(down) if down.ended => Some(down.reason.clone()),
        _ => None,
    };
    let ended = || ground.control.said.lock().iter().filter_map(end).collect::<Vec<_>>();
    until("control knows", || ended().len() >= 2).await;
    assert_eq!(ended(), ["it was stopped"; 2], "of each, once");
    assert!(!ground.data_dir().join("agent.sock").exists());
}

/// An agent that runs until it is killed.
fn agent() -> ExitCode {
    let given = |name: &str| std::env::var(name).unwrap();
    let config =
        config(given("DATA_DIR").into(), given("CONTROL").parse().unwrap(), Some(given("TOKEN")), vec![idle("web")]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let _agent = start(config).await.unwrap();
        tokio::time::sleep(3 * WITHIN).await;
    });
    ExitCode::SUCCESS
}

async fn everything_ends_when_the_agent_is_killed() {
    let ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let mut agent = tokio::process::Command::new(std::env::current_exe().unwrap())
        .arg("agent")
        .env("DATA_DIR", ground.data_dir())
        .env("CONTROL", ground.address().to_string())
        .env("TOKEN", ground.control.token())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    ground.enforced("web", revision).await;
    until("it is up with its workload", || ground.up_with_pid().len() == 1).await;
    let pids = [ground.up_with_pid()[0], pid(&ground.words_of("web", "pid")[0])];
    agent.kill().await.unwrap();
    until("both ended", || !pids.iter().any(|pid| lives(*pid))).await;
}

async fn what_did_not_change_keeps_running_when_workloads_are_set_anew() {
    let ground = ground().await;
    let agent = ground.start(vec![idle("stays"), idle("changes"), idle("goes")]).await;
    let pids = |service: &str| {
        agent.run_services().get(&name(service)).map(|service| service.pids.clone()).unwrap_or_default()
    };
    until("all run", || ["stays", "changes", "goes"].iter().all(|service| pids(service).len() == 1)).await;
    let before: Vec<_> = ["stays", "changes", "goes"].iter().map(|service| pids(service)[0]).collect();
    let mut more = idle("stays");
    more.instances = 2;
    agent.set_workloads(vec![more, workload("changes", "exec sleep 2000"), idle("comes")]).await;
    until("all run again", || pids("stays").len() == 2 && pids("changes").len() == 1 && pids("comes").len() == 1).await;
    assert_eq!(pids("stays")[0], before[0]);
    assert_ne!(pids("changes")[0], before[1]);
    assert!(lives(before[0] as i32) && !lives(before[1] as i32) && !lives(before[2] as i32));
    assert_eq!(pids("goes"), Vec::<u32>::new());
    agent.stop(Duration::ZERO).await;
}

async fn control_hears_the_records_of_every_proxy() {
    let ground = ground().await;
    let revision = ground.control.append(vec![declare("web"), declare("a")], &[]);
    let agent = ground.start(vec![idle("web"), idle("a")]).await;
    ground.enforced("web", revision).await;
    ground.enforced("a", revision).await;
    ground.control.tell(Event::RecordsQuery(RecordsQuery { query: 9, filter_json: "{}".into() }));
    let answer = || {
        ground.control.said.lock().iter().find_map(|message| match message {
            Message::Records(answer) => {
                Some((answer.query, answer.records_json.len(), answer.last, answer.error.clone()))
            }
            _ => None,
        })
    };
    until("an answer", || answer().is_some()).await;
    assert_eq!(answer().unwrap(), (9, 2, true, String::new()));
    agent.stop(Duration::ZERO).await;
}

async fn proxies_are_asked_what_they_count_only_when_somebody_wants_it() {
    let ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    ground.enforced("web", revision).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let asked = |line: &String| line.starts_with("metrics_query") || line.starts_with("sampling");
    assert!(!ground.orders("web").iter().any(asked));
    agent.stop(Duration::ZERO).await;

    let heard: Arc<parking_lot::Mutex<Vec<String>>> = Arc::default();
    let hears = heard.clone();
    let hear = move |source: Source<'_>, told: Told| {
        let told = match told {
            Told::Metrics(metrics) => metrics.page,
            Told::Spans(spans) => format!("span {}", spans[0].span_id),
        };
        hears.lock().push(format!("{} {} {} {told}", source.trust_domain, source.host, source.instance.service()));
    };
    let telemetry = Telemetry {
        sampling: Some(Sampling { follow_parent: true, ratio: 0.25 }),
        metrics_every: Some(Duration::from_millis(50)),
        hear: Arc::new(hear),
    };
    let mut config = ground.config(None, vec![idle("web")]);
    config.telemetry = Some(telemetry);
    let agent = start(config).await.unwrap();
    until("two rounds", || heard.lock().len() >= 4).await;
    assert_eq!(heard.lock()[..2], ["shop.example h1 web page", "shop.example h1 web span 7"]);
    assert_eq!(ground.words_of("web", "sampling"), ["true 0.25"]);
    agent.stop(Duration::ZERO).await;
}

async fn what_comes_of_a_probe_goes_to_control_and_its_span_to_nobody_else() {
    let ground = ground().await;
    ground.control.probes_telemetry.store(true, Ordering::Relaxed);
    ground.control.append(vec![declare("web")], &[]);
    let heard: Arc<parking_lot::Mutex<Vec<u64>>> = Arc::default();
    let hears = heard.clone();
    let hear = move |_: Source<'_>, told: Told| {
        if let Told::Spans(spans) = told {
            hears.lock().extend(spans.iter().map(|span| span.span_id));
        }
    };
    let mut config = ground.config(Some(ground.control.token()), vec![idle("web")]);
    config.telemetry = Some(Telemetry { sampling: None, metrics_every: None, hear: Arc::new(hear) });
    let agent = start(config).await.unwrap();
    let probed = || {
        ground.control.said.lock().iter().find_map(|message| match message {
            Message::Probed(probed) => Some(probed.clone()),
            _ => None,
        })
    };
    until("a probe", || probed().is_some()).await;
    let (probed, given) = (probed().unwrap(), ground.control.probes.lock()[0].clone());
    assert_eq!((&probed.instance, &probed.nonce[..]), (&given.0, &given.1[..]));
    assert!(probed.metric.contains(&hex::encode(given.1)), "{probed:?}");
    assert_eq!(probed.span.unwrap().span_id, 8);
    until("the other span", || heard.lock().contains(&7)).await;
    assert!(!heard.lock().contains(&8), "it is no traffic");
    assert_eq!(ground.words_of("web", "probe"), [hex::encode(given.1)]);
    agent.stop(Duration::ZERO).await;
}

async fn a_workload_that_ends_ends_the_run_with_its_code() {
    let ground = ground().await;
    for (script, code) in [("exit 7", 7), ("kill -9 $$", 137)] {
        let mut config = ground.config(Some(ground.control.token()), vec![workload("web", script)]);
        config.exit_with_workload = true;
        let agent = start(config).await.unwrap();
        assert_eq!(tokio::time::timeout(WITHIN, agent.exited()).await.unwrap(), code);
        agent.stop(Duration::ZERO).await;
    }
}

async fn the_local_socket_shows_what_runs_to_its_owner() {
    use std::os::unix::fs::PermissionsExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let ground = ground().await;
    let agent = ground.start(vec![idle("web")]).await;
    until("it runs", || agent.run_services().values().any(|service| service.pids.len() == 1)).await;
    let path = ground.data_dir().join("agent.sock");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut socket = tokio::net::UnixStream::connect(path).await.unwrap();
    socket.write_all(b"GET /v1/workloads HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let views: Vec<countersign_api::local::WorkloadView> = serde_json::from_str(body).unwrap();
    assert_eq!((views.len(), views[0].state.as_str()), (1, "running"));
    assert_eq!(InstanceId::parse(views[0].instance.as_str()).unwrap().service(), ServiceName::parse("web").unwrap());
    another_user_is_refused(ground.data_dir()).await;
    let second = start(ground.config(None, vec![])).await.err().unwrap();
    assert!(matches!(second, StartError::Socket { .. }), "{second:?}");
    agent.stop(Duration::ZERO).await;
}

/// The mode of the socket keeps others away already; here it does not.
async fn another_user_is_refused(data_dir: PathBuf) {
    use std::{
        io::{Read, Write},
        os::unix::fs::PermissionsExt,
    };
    if !rustix::process::geteuid().is_root() {
        eprintln!("NOT TESTED: only root can be another user; run the tests as root to see this one");
        return;
    }
    let socket = data_dir.join("agent.sock");
    fs::set_permissions(&data_dir, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(data_dir.parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
    let asks = move || {
        // This thread alone becomes `nobody`, for good.
        let nobody = rustix::process::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        stream.write_all(b"GET /v1/workloads HTTP/1.1\r\nhost: agent\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = tokio::task::spawn_blocking(|| std::thread::spawn(asks).join().unwrap()).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 ") && !answer.contains("instance"), "{answer}");
}

/// PROVES (sidecar-first): whatever a sidecar needs to serve a call was taken in before its workload runs.
async fn a_workload_is_started_after_its_sidecar_serves_it() {
    for isolate in [Isolate::Off, Isolate::Auto] {
        let ground = ground().await;
        let revision = ground.control.append(vec![declare("web"), declare("a")], &[]);
        ground.control.discover("a/1", "127.0.0.1:81");
        ground.control.withholds_svids.store(true, Ordering::Relaxed);
        let mut config = ground.config(Some(ground.control.token()), vec![idle("web")]);
        config.isolate = isolate;
        let agent = start(config).await.unwrap();
        ground.told("web", "bundle").await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let pids = || agent.run_services().get(&name("web")).map_or(Vec::new(), |service| service.pids.clone());
        assert_eq!(pids(), Vec::<u32>::new(), "its sidecar cannot prove who it is yet");
        ground.control.withholds_svids.store(false, Ordering::Relaxed);
        until("it runs", || pids().len() == 1).await;
        let told: Vec<String> =
            ground.orders("web").iter().filter_map(|line| Some(line.split_once(' ')?.0.to_owned())).collect();
        let view = told.iter().position(|order| order == "view").expect("a workload runs and its sidecar has no view");
        for before in ["listening", "bundle", "identity", "endpoints", "fresh"] {
            assert!(told[..view].iter().any(|order| order == before), "`{before}` came after the view: {told:?}");
        }
        ground.enforced("web", revision).await;
        agent.stop(Duration::ZERO).await;
    }
}

async fn a_host_that_knows_nothing_of_its_mesh_starts_nothing() {
    let mut ground = ground().await;
    ground.control.append(vec![declare("web")], &[]);
    ground.start(vec![]).await.stop(Duration::ZERO).await;
    let _ = fs::remove_file(ground.data_dir().join("agent/mesh.snapshot")); // kept if it lived long enough
    let (config, address) = (ground.config(None, vec![idle("web")]), ground.address());
    ground.served = None;
    let agent = start(config).await.unwrap();
    ground.told("web", "listening").await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(workload_of(&agent), None, "what its service may run is not known");
    ground.served = Some(ground.control.serve(address).await);
    until("it runs", || workload_of(&agent).is_some()).await;
    agent.stop(Duration::ZERO).await;
}

// ---- deployments

fn artifact_of(workload: &WorkloadSpec) -> Digest {
    artifact::measure(workload.run.as_ref().unwrap(), &workload.dir, std::env::var_os("PATH").as_deref())
        .unwrap()
        .artifact
}

fn deploy(service: &str, artifacts: impl IntoIterator<Item = Digest>) -> Change {
    Change::Deploy { service: name(service), artifacts: artifacts.into_iter().collect() }
}

/// A workload whose program is a file of its own.
fn program(ground: &Ground, content: &str) -> WorkloadSpec {
    let file = ground.dir.path().join("serve");
    fs::write(ground.dir.path().join("next"), format!("#!/bin/sh\nexec sleep 1000\n# {content}\n")).unwrap();
    fs::set_permissions(ground.dir.path().join("next"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    fs::rename(ground.dir.path().join("next"), &file).unwrap();
    WorkloadSpec { run: Some(vec![file.display().to_string()]), ..idle("web") }
}

fn waits(event: &AgentEvent) -> Option<Option<Digest>> {
    match event {
        AgentEvent::InstanceWaits { artifact, .. } => Some(*artifact),
        _ => None,
    }
}

/// PROVES (only-admitted-runs)
async fn nothing_runs_that_no_deployment_admits_and_what_ceases_to_be_one_is_ended() {
    for isolate in [Isolate::Off, Isolate::Auto] {
        let ground = ground().await;
        let first = program(&ground, "1");
        let (one, other) = (artifact_of(&first), Digest::of(b"another"));
        ground.control.append(vec![declare("web"), deploy("web", [other])], &[]);
        let mut config = ground.config(Some(ground.control.token()), vec![]);
        config.isolate = isolate;
        let agent = start(config).await.unwrap();
        agent.declared().await;
        let mut events = agent.events();
        agent.set_workloads(vec![first]).await;
        assert_eq!(event(&mut events, waits).await, Some(one));
        until("control hears of it", || ground.waiting("web") == [one]).await;
        assert_eq!(agent.ready().await.len(), 1, "nobody waits for it in vain");
        assert_eq!(workload_of(&agent), None);
        assert_eq!(ground.words_of("web", "pid"), Vec::<String>::new(), "nor is there a sidecar");
        assert_eq!(*ground.control.issued.lock(), Vec::<String>::new(), "nor an identity");

        let revision = ground.control.append(vec![deploy("web", [one, other])], &[]);
        until("it runs", || workload_of(&agent).is_some()).await;
        ground.enforced("web", revision).await;
        let runs = workload_of(&agent).unwrap();
        let up = ground.control.said.lock().iter().rev().find_map(|message| match message {
            Message::Up(up) => Some(up.artifact.clone()),
            _ => None,
        });
        assert_eq!(up.as_deref(), Some(&one.0[..]), "control is told what runs");

        ground.control.append(vec![deploy("web", [other])], &[]);
        assert_eq!(event(&mut events, waits).await, Some(one));
        assert!(!lives(runs), "what was taken back runs no more");
        assert_eq!(workload_of(&agent), None);
        until("control hears of it again", || ground.waiting("web") == [one, one]).await;
        agent.stop(Duration::ZERO).await;
    }
}

async fn a_program_that_was_replaced_waits_when_it_is_started_again() {
    let ground = ground().await;
    let first = program(&ground, "1");
    let revision = ground.control.append(vec![declare("web"), deploy("web", [artifact_of(&first)])], &[]);
    let agent = ground.start(vec![first.clone()]).await;
    ground.enforced("web", revision).await;
    until("it runs", || workload_of(&agent).is_some()).await;
    let mut events = agent.events();
    let second = artifact_of(&program(&ground, "2"));
    let runs = workload_of(&agent).unwrap();
    assert!(lives(runs), "a file that was replaced stops nothing");
    nix::sys::signal::kill(Pid::from_raw(runs), Signal::SIGKILL).unwrap();
    assert_eq!(event(&mut events, waits).await, Some(second));
    assert_eq!(workload_of(&agent), None);
    program(&ground, "1");
    until("the right one, in its place again, runs", || workload_of(&agent).is_some()).await;
    fs::set_permissions(ground.dir.path().join("serve"), std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    nix::sys::signal::kill(Pid::from_raw(workload_of(&agent).unwrap()), Signal::SIGKILL).unwrap();
    assert_eq!(event(&mut events, waits).await, None, "what cannot be measured is nothing that was admitted");
    agent.stop(Duration::ZERO).await;
}

async fn what_the_agent_does_not_start_waits_where_deployments_are_asked_for() {
    let ground = ground().await;
    ground.control.append(vec![declare("web"), deploy("web", [Digest::of(b"1")])], &[]);
    let agent = ground.start(vec![]).await;
    agent.declared().await;
    let mut events = agent.events();
    agent.set_workloads(vec![WorkloadSpec { run: None, ..idle("web") }]).await;
    assert_eq!(event(&mut events, waits).await, None);
    assert_eq!(ground.words_of("web", "pid"), Vec::<String>::new());
    agent.stop(Duration::ZERO).await;
}

/// An isolated `web` that enforces and runs; `None`, and the reason printed, where there are no namespaces.
async fn isolated(ground: &Ground) -> Option<(Agent, i32)> {
    let revision = ground.control.append(vec![declare("web")], &[]);
    let mut config = ground.config(Some(ground.control.token()), vec![idle("web")]);
    config.isolate = Isolate::Auto;
    let agent = start(config).await.unwrap();
    if !agent.isolation().available {
        eprintln!("not tested, no namespaces here: {}", agent.isolation().note);
        agent.stop(Duration::ZERO).await;
        return None;
    }
    ground.enforced("web", revision).await;
    until("it runs", || workload_of(&agent).is_some()).await;
    let first = workload_of(&agent).unwrap();
    Some((agent, first))
}

fn workload_of(agent: &Agent) -> Option<i32> {
    agent.run_services().get(&name("web")).and_then(|service| service.pids.first().map(|pid| *pid as i32))
}

async fn a_workload_of_its_own_namespace_crashes_alone() {
    let ground = ground().await;
    let Some((agent, first)) = isolated(&ground).await else { return };
    let network = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let before = network(first).unwrap();
    let orders = ground.orders("web").len();
    nix::sys::signal::kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    until("it began anew", || workload_of(&agent).is_some_and(|pid| pid != first)).await;
    assert_eq!(network(workload_of(&agent).unwrap()), Some(before));
    assert_eq!(ground.words_of("web", "pid").len(), 1, "its sidecar is the same");
    assert!(ground.orders("web")[orders..].iter().all(|line| line.starts_with("fresh ")), "and was told nothing of it");
    let downs = ground.control.said.lock().iter().filter(|message| matches!(message, Message::Down(_))).count();
    assert_eq!(downs, 0, "callers keep their connections");
    agent.stop(Duration::ZERO).await;
}

async fn a_killed_launcher_lets_both_begin_anew() {
    let ground = ground().await;
    let Some((agent, first)) = isolated(&ground).await else { return };
    let stat = fs::read_to_string(format!("/proc/{first}/stat")).unwrap();
    let launcher: i32 = stat.rsplit_once(") ").unwrap().1.split(' ').nth(1).unwrap().parse().unwrap();
    nix::sys::signal::kill(Pid::from_raw(launcher), Signal::SIGKILL).unwrap();
    until("both began anew", || {
        workload_of(&agent).is_some_and(|pid| pid != first) && ground.words_of("web", "pid").len() == 2
    })
    .await;
    assert_eq!(ground.words_of("web", "isolated"), ["broker=true", "broker=true"]);
    let listening = ground.words_of("web", "listening");
    assert_eq!(listening[0], listening[1]);
    assert!(listening[0].ends_with(" 127.0.0.1:15001"), "{listening:?}");
    agent.stop(Duration::ZERO).await;
}

// ---- freshness

impl Ground {
    /// The age that the sidecar of `web` heard last, in milliseconds.
    fn age_ms(&self) -> Option<u64> {
        self.words_of("web", "fresh").last().map(|age| age.parse().unwrap())
    }
}

/// PROVES (fresh-by-asking): heartbeats go on as ever.
async fn an_answer_that_is_long_on_its_way_makes_nothing_younger_than_its_question() {
    let ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    ground.enforced("web", revision).await;
    until("it is fresh", || ground.age_ms().is_some_and(|age| age < 1500)).await;
    ground.control.head_takes_ms.store(2500, Ordering::Relaxed);
    until("an answer that was asked for before", || ground.age_ms().is_some_and(|age| age >= 2500)).await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let ages: Vec<u64> = ground.words_of("web", "fresh").iter().rev().take(3).map(|age| age.parse().unwrap()).collect();
    assert!(ages.iter().all(|age| *age >= 2000), "{ages:?}");
    ground.control.head_takes_ms.store(0, Ordering::Relaxed);
    until("it is fresh again", || ground.age_ms().is_some_and(|age| age < 1500)).await;
    agent.stop(Duration::ZERO).await;
}

/// PROVES (fresh-by-asking): each event comes, late, and later each time.
async fn a_stream_that_trickles_lets_what_is_held_age() {
    let ground = ground().await;
    let revision = ground.control.append(vec![declare("web")], &[]);
    let agent = ground.start(vec![idle("web")]).await;
    ground.enforced("web", revision).await;
    ground.control.event_takes_ms.store(1000, Ordering::Relaxed); // heartbeats are made three times as fast
    tokio::time::sleep(Duration::from_secs(2)).await;
    let next = ground.control.append(vec![declare("a")], &[]);
    until("what is held is old", || ground.age_ms().is_some_and(|age| age >= 2500)).await;
    assert_ne!(ground.acknowledged("web"), Some((next, String::new())), "the change is still on its way");
    ground.control.event_takes_ms.store(0, Ordering::Relaxed);
    ground.enforced("web", next).await;
    until("it is fresh again", || ground.age_ms().is_some_and(|age| age < 1500)).await;
    agent.stop(Duration::ZERO).await;
}
