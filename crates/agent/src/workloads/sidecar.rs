//! One sidecar process and the conversation with it: the agent's news become orders, its messages become
//! acknowledgements and reports. The two directions never wait for each other, so neither side can stall the other by
//! being busy. A sidecar sees the end of the conversation when its agent dies, and exits.

use std::{collections::BTreeSet, io, os::fd::OwnedFd, path::Path, process::Stdio, sync::Arc, time::Duration};

use bytes::Bytes;
use countersign_api::{
    sidecar::{
        AGENT_FD, AgentFrames, BROKER_FD, Configure, Drain, Fresh, Identity, MetricsQuery, SidecarMessage,
        SidecarOrder, sidecar_message::Message, sidecar_order::Order,
    },
    signals,
};
use countersign_core::{change::Revision, view::View};
use futures_util::{FutureExt, SinkExt, StreamExt, future::BoxFuture};
use tokio::{
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    process::{Child, Command},
    sync::{mpsc, watch},
    time::Instant,
};
use tokio_util::codec::{FramedRead, FramedWrite};

use super::instance::{Addresses, Instance, said};
use crate::{
    AgentEvent, TOLD, discovery,
    host::{Contact, Host},
    launch, probe,
    telemetry::{self, Source, Telemetry},
    tokens::{self, Identified},
    views::Published,
    workloads::output::Output,
};

/// The hidden subcommand that is the proxy.
const SUBCOMMAND: &str = "sidecar";
/// How the proxy's allocator behaves: a thread of its own gives back what a burst took after a second, where otherwise an idle
/// proxy would keep it. By the environment, because the launcher is the same binary and must not have a second thread.
const ALLOCATOR_VARIABLE: &str = "_RJEM_MALLOC_CONF";
const ALLOCATOR: &str = "background_thread:true,max_background_threads:1,dirty_decay_ms:1000,muzzy_decay_ms:0";
/// How often a proxy hears how fresh its agent is.
const FRESH_EVERY: Duration = Duration::from_secs(1);
/// How long a proxy that said it is drained may take to exit.
const EXIT_WITHIN: Duration = Duration::from_secs(2);

/// A running sidecar. Dropped, it is killed.
pub(super) struct Sidecar {
    child: Child,
    socket: UnixStream,
}

/// How a sidecar ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ended {
    /// It was asked to.
    Drained,
    /// It died.
    Died(String),
}

/// Starts a sidecar; `broker` is its end of the broker of the workload's namespace.
pub(super) fn spawn(executable: &Path, broker: Option<OwnedFd>, output: &Output) -> io::Result<Sidecar> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let mut command = std::process::Command::new(executable);
    command
        .arg(SUBCOMMAND)
        .env(ALLOCATOR_VARIABLE, ALLOCATOR)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let descriptors = [(theirs.into(), AGENT_FD)].into_iter().chain(broker.map(|broker| (broker, BROKER_FD)));
    launch::inherit(&mut command, descriptors.collect())?;
    let mut command = Command::from(command);
    // A terminal's signals are for the agent, which ends its sidecars in order.
    let mut child = command.process_group(0).kill_on_drop(true).spawn()?;
    drop(command); // and with it our copies of the sidecar's descriptors: its death must be seen as a closed socket
    if let Some(stdout) = child.stdout.take() {
        output.read(stdout);
    }
    if let Some(stderr) = child.stderr.take() {
        output.read(stderr);
    }
    Ok(Sidecar { child, socket: UnixStream::from_std(ours)? })
}

/// What the conversation with one sidecar needs.
pub(super) struct Talk<'a> {
    pub(super) host: &'a Arc<Host>,
    pub(super) instance: &'a Instance,
    pub(super) views: watch::Receiver<Option<Published>>,
    pub(super) identity: watch::Receiver<Option<Arc<Identified>>>,
    /// When set: how long open exchanges may take to end.
    pub(super) drain: watch::Receiver<Option<Duration>>,
}

impl Talk<'_> {
    /// Talks with `sidecar` until it ends.
    pub(super) async fn run(mut self, sidecar: Sidecar, configure: Configure) -> Ended {
        let Sidecar { mut child, socket } = sidecar;
        let (read, write) = socket.into_split();
        let queries = self.host.reports.proxy_started(&self.instance.id);
        let mut deadline = self.drain.clone();
        let overdue = async move {
            said(&mut deadline, Option::is_some).await;
            let within = deadline.borrow().unwrap_or_default();
            tokio::time::sleep(within + EXIT_WITHIN).await;
        };
        let (host, instance) = (self.host, self.instance);
        let (order, probing) = mpsc::channel(1);
        let listening = listen(host, instance, self.identity.clone(), read);
        let speaking = self.speak(write, configure, queries, probing);
        let probes = probe::run(host, instance, order);
        let ended = tokio::select! {
            biased;
            drained = listening => match drained {
                Ok(()) => {
                    let _ = tokio::time::timeout(EXIT_WITHIN, child.wait()).await;
                    Ended::Drained
                }
                Err(why) => Ended::Died(exit_status(&mut child).await.unwrap_or(why)),
            },
            never = probes => match never {},
            why = speaking => Ended::Died(exit_status(&mut child).await.unwrap_or(why)),
            () = overdue => Ended::Drained,
        };
        host.reports.proxy_ended(&instance.id);
        let _ = child.kill().await;
        ended
    }

    /// Says everything there is to say and then what is new. Returns why it cannot any more.
    async fn speak(
        &mut self,
        write: OwnedWriteHalf,
        configure: Configure,
        mut queries: mpsc::Receiver<countersign_api::mesh::RecordsQuery>,
        mut probing: mpsc::Receiver<Order>,
    ) -> String {
        let mut orders = Orders { frames: FramedWrite::new(write, AgentFrames::default()) };
        let said: io::Result<std::convert::Infallible> = async {
            orders.say(Order::Configure(configure)).await?;
            let mut signals = self.host.signals.subscribe();
            let mut bundle = self.host.bundle.subscribe();
            let mut discovery = self.host.discovery.subscribe();
            let mut tick = tokio::time::interval(FRESH_EVERY);
            let mut metrics_due = metrics_due(self.host.telemetry.as_ref());
            let mut sent = Sent::default();
            let mut settled = Box::pin(identity_is_settled(self.host, self.instance, self.identity.clone()));
            let mut is_settled = false;
            signals.mark_changed();
            bundle.mark_changed();
            discovery.mark_changed();
            self.identity.mark_changed();
            self.views.mark_changed();
            loop {
                tokio::select! {
                    biased;
                    () = said(&mut self.drain, Option::is_some) => break,
                    // Before any identity: nothing is ever accepted that was revoked.
                    Ok(()) = signals.changed() => {
                        let all = signals::all(&signals.borrow_and_update());
                        orders.say(Order::Signals(all)).await?;
                    }
                    Ok(()) = bundle.changed() => {
                        let bundle = bundle.borrow_and_update().clone();
                        orders.say(Order::Bundle(bundle)).await?;
                    }
                    Ok(()) = self.identity.changed() => {
                        let identified = self.identity.borrow_and_update().clone();
                        if let Some(identified) = identified {
                            match sent.identity.replace(identified.clone()) {
                                Some(before) if identified.is_same_identity(&before) => {
                                    orders.say(Order::Tokens(identified.tokens())).await?;
                                }
                                _ => {
                                    orders.say(Order::Identity(identity(&identified))).await?;
                                    self.instance.has_identity(self.host);
                                }
                            }
                        }
                    }
                    () = &mut settled, if !is_settled => is_settled = true,
                    // A view comes after all that it needs to be served: the answer to it says that the rest was taken in.
                    Ok(()) = self.views.changed(), if is_settled => {
                        let published = self.views.borrow_and_update().clone();
                        if let Some(published) = published {
                            sent.visible = published.view.services.keys().cloned().collect();
                            let news = sent.endpoints.news(&discovery.borrow(), &sent.visible);
                            orders.say_all(news.map(Order::Endpoints)).await?;
                            orders.say_all(self.fresh()).await?;
                            self.say_view(&mut orders, &mut sent, &published).await?;
                        }
                    }
                    Ok(()) = discovery.changed() => {
                        let news = sent.content.and_then(|_| sent.endpoints.news(&discovery.borrow_and_update(), &sent.visible));
                        orders.say_all(news.map(Order::Endpoints)).await?;
                    }
                    Some(query) = queries.recv() => orders.say(Order::RecordsQuery(query)).await?,
                    Some(order) = probing.recv() => orders.say(order).await?,
                    _ = tick.tick() => orders.say_all(self.fresh()).await?,
                    () = metrics_due.next() => orders.say(Order::MetricsQuery(MetricsQuery {})).await?,
                }
            }
            let within = self.drain.borrow().unwrap_or_default();
            // Callers hear of it before the first one is turned away.
            self.instance.departs(self.host, "it stops");
            orders.say(Order::Drain(Drain { within_ms: within.as_millis() as u64 })).await?;
            // While it drains it still needs to know that its agent is there.
            loop {
                tick.tick().await;
                orders.say_all(self.fresh()).await?;
            }
        }
        .await;
        match said {
            Ok(never) => match never {},
            Err(error) => format!("could not write to it: {error}"),
        }
    }

    async fn say_view(&self, orders: &mut Orders, sent: &mut Sent, published: &Published) -> io::Result<()> {
        let enforced = self.instance.watch().borrow().revision;
        // A bare number is for a proxy that said it enforces this very content. One that refused it, or has not answered
        // yet, gets it in full: else it would count an older view as the newer revision.
        if sent.content != Some(published.content)
            || (enforced < sent.content_at && sent.revision != Some(published.revision))
        {
            let json = if published.view.revision == published.revision {
                published.json.clone()
            } else {
                let view = View { revision: published.revision, ..(*published.view).clone() };
                serde_json::to_vec(&view)?.into()
            };
            orders.say(Order::ViewJson(json)).await?;
            sent.content = Some(published.content);
            (sent.content_at, sent.revision) = (Some(published.revision), Some(published.revision));
        } else if sent.revision != Some(published.revision) {
            orders.say(Order::Revision(published.revision.0)).await?;
            sent.revision = Some(published.revision);
        }
        if let Some(refused) = &published.refused {
            let why = format!("revision {}: {}", refused.revision, refused.why);
            self.host.acknowledgements.enforces(&self.instance.id, published.revision, &why);
        }
        Ok(())
    }

    fn fresh(&self) -> Option<Order> {
        let age = self.host.fresh.age()?;
        Some(Order::Fresh(Fresh { age_ms: age.as_millis().min(u64::MAX.into()) as u64 }))
    }
}

/// Waits until an identity was issued, or control cannot be reached to issue one.
async fn identity_is_settled(host: &Host, instance: &Instance, mut identity: watch::Receiver<Option<Arc<Identified>>>) {
    let (mut status, mut contact) = (instance.watch(), host.contact.subscribe());
    tokio::select! {
        () = said(&mut identity, Option::is_some) => {}
        () = said(&mut status, |status| status.identity_refused) => {}
        () = said(&mut contact, |contact| *contact == Contact::Lost) => {}
    }
}

/// What one sidecar has been told.
#[derive(Default)]
struct Sent {
    content: Option<u64>,
    /// The revision it was sent as.
    content_at: Option<Revision>,
    revision: Option<Revision>,
    visible: BTreeSet<countersign_core::identity::ServiceName>,
    identity: Option<Arc<Identified>>,
    endpoints: discovery::Told,
}

struct Orders {
    frames: FramedWrite<OwnedWriteHalf, AgentFrames>,
}

impl Orders {
    async fn say(&mut self, order: Order) -> io::Result<()> {
        self.frames.send(SidecarOrder { order: Some(order) }).await
    }

    async fn say_all(&mut self, order: Option<Order>) -> io::Result<()> {
        match order {
            Some(order) => self.say(order).await,
            None => Ok(()),
        }
    }
}

fn identity(identified: &Identified) -> Identity {
    let issued = &identified.issued;
    Identity {
        chain_der: issued.svid.chain().iter().map(|der| Bytes::copy_from_slice(der)).collect(),
        key_pkcs8_der: Bytes::copy_from_slice(&issued.key_pkcs8_der),
        tokens: identified.tokens().tokens,
    }
}

/// Hears everything the sidecar says, until it says that it is drained; otherwise why it cannot be heard.
///
/// That it enforces a revision is passed on once it has the tokens that follow from it: whoever hears that a change is in force
/// everywhere may ask for what it permits.
async fn listen(
    host: &Arc<Host>,
    instance: &Instance,
    identity: watch::Receiver<Option<Arc<Identified>>>,
    read: OwnedReadHalf,
) -> Result<(), String> {
    let mut messages = FramedRead::new(read, AgentFrames::default());
    let wanted = host.held.look(|follower| host.views.wanted(&instance.id.service(), follower));
    let mut unsaid: Option<Unsaid> = None;
    loop {
        let message = tokio::select! {
            biased;
            revision = Unsaid::followed(&mut unsaid) => {
                host.acknowledgements.enforces(&instance.id, revision, "");
                continue;
            }
            message = messages.next() => message,
        };
        let Some(message) = message else { break };
        let SidecarMessage { message } = message.map_err(|error| format!("could not read from it: {error}"))?;
        match message {
            Some(Message::Listening(listening)) => {
                let addresses =
                    Addresses::parse(&listening).map_err(|why| format!("it said where it listens: {why}"))?;
                instance.listens(host, addresses);
            }
            Some(Message::Applied(applied)) => {
                let revision = Revision(applied.revision);
                if applied.error.is_empty() {
                    instance.enforces(host, revision);
                    let until =
                        unsaid.take().map_or_else(|| Instant::now() + tokens::FOLLOW_WITHIN, |before| before.until);
                    let followed = tokens::follow(revision, until, wanted.clone(), identity.clone()).boxed();
                    unsaid = Some(Unsaid { revision, until, followed });
                } else {
                    unsaid = None;
                    host.acknowledgements.enforces(&instance.id, revision, &applied.error);
                    instance.refuses();
                    let service = instance.id.service();
                    tracing::error!(target: TOLD, instance = %instance.id, why = applied.error, "a proxy keeps its last good view");
                    host.tell(AgentEvent::ViewRefused { service, revision, why: applied.error });
                }
            }
            Some(Message::Heeded(sequence)) => host.acknowledgements.heeds(&instance.id, sequence),
            Some(Message::Report(report)) => host.reports.relay(report),
            Some(Message::Records(answer)) => host.reports.answer(&instance.id, answer),
            Some(Message::Metrics(metrics)) => {
                host.probes.hear_metrics(&instance.id, &metrics.page);
                heard(host, instance, telemetry::Told::Metrics(metrics));
            }
            Some(Message::Spans(spans)) => {
                let spans = host.probes.hear_spans(&instance.id, spans.spans);
                if !spans.is_empty() {
                    heard(host, instance, telemetry::Told::Spans(spans));
                }
            }
            Some(Message::Probed(probed)) => host.probes.hear_end(&instance.id, probed),
            Some(Message::AppReady(ready)) => instance.app_ready(host, ready),
            Some(Message::Drained(_)) => return Ok(()),
            // A message of a newer proxy: the binary was replaced under a running agent.
            None => {}
        }
    }
    Err("it closed its connection to the agent".into())
}

/// A revision that a sidecar enforces, while its tokens do not follow from it yet.
struct Unsaid {
    revision: Revision,
    until: Instant,
    followed: BoxFuture<'static, ()>,
}

impl Unsaid {
    /// Waits until the tokens follow, and takes it.
    async fn followed(unsaid: &mut Option<Self>) -> Revision {
        let Some(waiting) = unsaid else { return std::future::pending().await };
        (&mut waiting.followed).await;
        let revision = waiting.revision;
        *unsaid = None;
        revision
    }
}

fn heard(host: &Host, instance: &Instance, told: telemetry::Told) {
    if let Some(telemetry) = &host.telemetry {
        let source = Source { trust_domain: &host.trust_domain, host: &host.name, instance: &instance.id };
        (telemetry.hear)(source, told);
    }
}

/// When a sidecar is asked next what it counted.
struct MetricsDue(Option<tokio::time::Interval>);

fn metrics_due(telemetry: Option<&Telemetry>) -> MetricsDue {
    let every = telemetry.and_then(|telemetry| telemetry.metrics_every);
    MetricsDue(every.map(|every| tokio::time::interval_at(Instant::now() + every, every)))
}

impl MetricsDue {
    async fn next(&mut self) {
        match &mut self.0 {
            Some(due) => _ = due.tick().await,
            None => std::future::pending().await,
        }
    }
}

/// How the process ended, when it did.
async fn exit_status(child: &mut Child) -> Option<String> {
    let status = tokio::time::timeout(EXIT_WITHIN, child.wait()).await.ok()?.ok()?;
    Some(status.to_string())
}
