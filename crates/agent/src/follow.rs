//! Follows control: one stream at a time, opened again with back-off for as long as the agent lives. What arrives is
//! verified before it is held, and held before anyone hears of it. Losing control changes nothing but the age of what
//! is held; a history that does not follow from ours is refused loudly, and nothing of it is used.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use countersign_api::mesh::{
    self, FollowEvent, FollowHello, FollowRequest, ReadHeadRequest, follow_event::Event, follow_request::Message,
    mesh_client::MeshClient,
};
use countersign_core::{canonical::Digest, change::Revision};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming, transport::Channel};

use crate::{
    AgentEvent, TOLD,
    backoff::Backoff,
    fresh,
    held::Refused,
    host::{Contact, Host},
    link::{ALPN, MESSAGE_BYTES_MAX, chain},
};

/// Control says something every second; a stream that is silent for so long is dead.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// How long control may take to welcome us: a cold agent's snapshot is made on the spot.
const WELCOME_WITHIN: Duration = Duration::from_secs(15);
/// How often control is asked what it holds.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Messages to control that are handed over and not sent.
const SAYING_MAX: usize = 16;
/// A revision waits so long for the next before both are written to disk as one.
const WRITE_APART: Duration = Duration::from_millis(200);

/// What is said when the agent's own identity was revoked.
const REVOKED: &str = "this host's identity was revoked; invite it again (`countersign host invite`) and start its agent with the new token";

/// How a stream ended.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ended {
    /// We have a new identity, or the agent ends.
    OnPurpose,
    /// Control went away. It will be back.
    Lost(String),
    /// Control and this host do not agree on what happened, or on who we are. An operator has to look.
    Refused(String),
}

/// Follows control until dropped. `for_control` is what proxies report.
pub(crate) async fn follow(host: Arc<Host>, mut for_control: mpsc::Receiver<FollowRequest>) {
    let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(10));
    loop {
        let ended = match stream(&host, &mut for_control, &mut backoff).await {
            Ok(never) => match never {},
            Err(ended) => ended,
        };
        host.channel.send_replace(None);
        let ended = match ended {
            Ended::Lost(_) | Ended::Refused(_) if host.is_revoked() => Ended::Refused(REVOKED.into()),
            other => other,
        };
        let retry_in = match ended {
            Ended::OnPurpose => continue,
            Ended::Lost(why) => {
                host.contact.send_replace(Contact::Lost);
                let retry_in = backoff.next_delay();
                tracing::warn!(target: TOLD, control = %host.control, why, ?retry_in, "lost the control plane; proxies go on from what they hold");
                host.control.move_on();
                host.tell(AgentEvent::ControlLost { why });
                retry_in
            }
            Ended::Refused(why) => {
                host.contact.send_replace(Contact::Lost);
                let retry_in = backoff.next_delay();
                let revision = host.held.head().0;
                tracing::error!(target: TOLD, control = %host.control, why, revision, ?retry_in, "refused the control plane's history; the last good state stays");
                // Another one may be right; whether it is, its history says.
                host.control.move_on();
                *host.refused.lock() = Some(why.clone());
                host.tell(AgentEvent::HistoryRefused { why });
                retry_in
            }
        };
        tokio::time::sleep(retry_in).await;
    }
}

/// Writes what was revoked to disk, until dropped.
pub(crate) async fn keep_signals(host: Arc<Host>) {
    let mut news = host.signals.subscribe();
    while news.changed().await.is_ok() {
        let writing = host.clone();
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || writing.signals.write()).await {
            tracing::error!(%error, dir = %host.dir.display(), "what was revoked could not be kept for the next start");
        }
    }
}

/// Writes what is held to disk, and how fresh it is, until dropped.
pub(crate) async fn keep_held(host: Arc<Host>) {
    let mut revisions = host.held.revisions();
    let mut tick = tokio::time::interval(fresh::WRITE_EVERY);
    loop {
        let new_revision = tokio::select! {
            changed = revisions.changed() => changed.is_ok(),
            _ = tick.tick() => false,
        };
        if new_revision {
            tokio::time::sleep(WRITE_APART).await;
            revisions.mark_unchanged();
        }
        let writing = host.clone();
        let written = tokio::task::spawn_blocking(move || {
            if new_revision {
                writing.held.write()?;
            }
            writing.fresh.write()
        });
        if let Ok(Err(error)) = written.await {
            tracing::warn!(%error, dir = %host.dir.display(), "could not keep the mesh's state for the next start");
        }
    }
}

/// One stream, from its opening to its end.
async fn stream(
    host: &Arc<Host>,
    for_control: &mut mpsc::Receiver<FollowRequest>,
    backoff: &mut Backoff,
) -> Result<std::convert::Infallible, Ended> {
    let tls = host.tls.client_config(host.trust_domain.control(), ALPN);
    let channel = host.control.connect(tls).await.map_err(|error| Ended::Lost(chain(&error)))?;
    let asked_at = Instant::now();
    let (say, said) = mpsc::channel(SAYING_MAX);
    let _ = say.try_send(hello(host));
    let mut events = open(channel.clone(), said).await?;
    let welcome = match tokio::time::timeout(WELCOME_WITHIN, next(&mut events)).await {
        Ok(event) => event?,
        Err(_) => return Err(Ended::Lost("control did not welcome this host".into())),
    };
    let Event::Welcome(welcome) = welcome else {
        return Err(Ended::Lost("control spoke before it welcomed this host".into()));
    };
    if let Some(bundle) = &welcome.bundle {
        host.trust(bundle).map_err(|error| Ended::Refused(chain(&error)))?;
    }
    host.held.welcome(&welcome).map_err(refused)?;
    if let Some(signals) = &welcome.signals {
        host.heed(signals).map_err(|refused| Ended::Lost(refused.to_string()))?;
    }
    // A welcome without it means that nothing runs anywhere; whatever was known before is not.
    let discovery = mesh::Discovery { full: true, ..welcome.discovery.unwrap_or_default() };
    host.discovery.take_in(discovery).map_err(|gap| Ended::Lost(gap.to_string()))?;
    // Before the views: a proxy must not get a view that looks stale.
    let in_step = welcome.head.is_some_and(|head| holds(host, &head));
    if in_step {
        host.fresh.in_step(asked_at);
    }
    // What is held follows from what control holds: a refusal is over, and control is told so.
    if in_step && host.refused.lock().take().is_some() {
        let _ = say.try_send(hello(host));
    }
    take_up_views(host);

    backoff.reset();
    host.acknowledgements.say_all_again();
    host.channel.send_replace(Some(channel.clone()));
    host.contact.send_replace(Contact::Followed);
    let revision = host.held.head().0;
    tracing::info!(control = %host.control, revision, "following the control plane");
    host.tell(AgentEvent::ControlFollowed { revision: Revision(revision) });

    // Each side runs to its end by itself: a message half taken is never dropped for another's sake.
    tokio::select! {
        ended = listen(host, events) => Err(ended),
        never = keep_in_step(host, channel) => match never {},
        () = acknowledge(host, &say) => Err(Ended::Lost("control stopped listening".into())),
        () = relay(for_control, &say) => Err(Ended::Lost("control stopped listening".into())),
        () = host.renewed.notified() => Err(Ended::OnPurpose),
    }
}

fn hello(host: &Host) -> FollowRequest {
    let (revision, root) = host.held.head();
    let isolation = if host.isolation.available { "namespace" } else { "none" };
    let hello = FollowHello {
        host: host.name.to_string(),
        version: env!("CARGO_PKG_VERSION").into(),
        revision,
        root: root.0.to_vec().into(),
        isolation: isolation.into(),
        isolation_note: host.isolation.note.clone(),
        refused: host.refused.lock().clone().unwrap_or_default(),
    };
    FollowRequest { message: Some(Message::Hello(hello)) }
}

async fn open(channel: Channel, said: mpsc::Receiver<FollowRequest>) -> Result<Streaming<FollowEvent>, Ended> {
    let mut client = MeshClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    match tokio::time::timeout(WELCOME_WITHIN, client.follow(ReceiverStream::new(said))).await {
        Ok(Ok(events)) => Ok(events.into_inner()),
        Ok(Err(status)) => Err(by_status(&status)),
        Err(_) => Err(Ended::Lost("control did not answer".into())),
    }
}

async fn next(events: &mut Streaming<FollowEvent>) -> Result<Event, Ended> {
    loop {
        match events.message().await {
            Ok(Some(FollowEvent { event: Some(event) })) => return Ok(event),
            // An event of a newer control plane that we do not know.
            Ok(Some(FollowEvent { event: None })) => {}
            Ok(None) => return Err(Ended::Lost("control closed the stream".into())),
            Err(status) => return Err(by_status(&status)),
        }
    }
}

fn by_status(status: &tonic::Status) -> Ended {
    let why = match status.message() {
        "" => status.code().to_string(),
        message => message.to_owned(),
    };
    match status.code() {
        Code::FailedPrecondition | Code::PermissionDenied | Code::Unauthenticated => Ended::Refused(why),
        _ => Ended::Lost(chain(status)),
    }
}

fn refused(refused: Refused) -> Ended {
    let why = chain(&refused);
    if refused.is_for_the_operator() { Ended::Refused(why) } else { Ended::Lost(why) }
}

async fn listen(host: &Arc<Host>, mut events: Streaming<FollowEvent>) -> Ended {
    loop {
        let taken = match tokio::time::timeout(SILENCE_MAX, next(&mut events)).await {
            Ok(Ok(event)) => take_in(host, event),
            Ok(Err(ended)) => Err(ended),
            Err(_) => Err(Ended::Lost(format!("control was silent for {SILENCE_MAX:?}"))),
        };
        if let Err(ended) = taken {
            return ended;
        }
    }
}

fn take_in(host: &Arc<Host>, event: Event) -> Result<(), Ended> {
    match event {
        Event::Welcome(_) => return Err(Ended::Lost("control welcomed this host twice".into())),
        Event::Entries(entries) => {
            host.held.entries(&entries).map_err(refused)?;
            take_up_views(host);
        }
        Event::Discovery(discovery) => {
            host.discovery.take_in(discovery).map_err(|gap| Ended::Lost(gap.to_string()))?;
        }
        Event::Bundle(bundle) => host.trust(&bundle).map_err(|error| Ended::Refused(chain(&error)))?,
        Event::Heartbeat(heartbeat) => {
            host.held.compare(heartbeat.size, &heartbeat.root).map_err(refused)?;
            let held = host.discovery.sequence();
            if heartbeat.discovery_sequence != held {
                let given = heartbeat.discovery_sequence;
                return Err(Ended::Lost(format!("control is at discovery event {given}, this host at {held}")));
            }
            let (given, held) = (heartbeat.signal_sequence, host.signals.now().sequence().0);
            if given != held {
                return Err(Ended::Lost(format!("control is at signal {given}, this host at {held}")));
            }
        }
        Event::Signals(signals) => host.heed(&signals).map_err(|refused| Ended::Lost(refused.to_string()))?,
        Event::RecordsQuery(query) => host.reports.ask(query),
    }
    Ok(())
}

/// Asks control again and again what it holds. What it held is fresh as of the question, and only once it is held here:
/// an answer, or a stream, that is long on its way lets what is held age.
async fn keep_in_step(host: &Host, channel: Channel) -> std::convert::Infallible {
    let mut client = MeshClient::new(channel);
    let mut tick = tokio::time::interval(ASK_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (mut revisions, mut discovery) = (host.held.revisions(), host.discovery.subscribe());
    let mut signals = host.signals.subscribe();
    loop {
        tick.tick().await;
        let asked_at = Instant::now();
        let bundle = host.tls.bundle();
        let roots = bundle.authorities().iter().map(|root| Digest::of(root).0.to_vec().into());
        let ask = ReadHeadRequest { x509_authorities_sha256: roots.collect() };
        match client.read_head(ask).await {
            Ok(head) => {
                let head = head.into_inner();
                while !holds(host, &head) {
                    // Neither can fail: the senders lie in `host`.
                    tokio::select! {
                        _ = revisions.changed() => {}
                        _ = discovery.changed() => {}
                        _ = signals.changed() => {}
                    }
                }
                host.fresh.in_step(asked_at);
            }
            Err(status) => tracing::warn!(error = chain(&status), "control did not say what it holds"),
        }
    }
}

/// Whether this host holds all that `head` counts. What it holds beyond has come since.
fn holds(host: &Host, head: &mesh::Head) -> bool {
    host.held.head().0 >= head.size
        && host.discovery.sequence() >= head.discovery_sequence
        && host.signals.now().sequence().0 >= head.signal_sequence
}

fn take_up_views(host: &Host) {
    for (service, refused) in host.held.look(|follower| host.views.take_up(follower)) {
        let (revision, why) = (refused.revision, refused.why);
        tracing::error!(target: TOLD, %service, %revision, why, "a view cannot be built; the last good one stays");
        host.tell(AgentEvent::ViewRefused { service, revision, why });
    }
}

async fn acknowledge(host: &Host, say: &mpsc::Sender<FollowRequest>) {
    loop {
        for news in host.acknowledgements.news().await {
            if say.send(news).await.is_err() {
                return;
            }
        }
    }
}

async fn relay(for_control: &mut mpsc::Receiver<FollowRequest>, say: &mpsc::Sender<FollowRequest>) {
    // First the room, then the message: one that is taken out is also sent.
    while let Ok(room) = say.reserve().await {
        match for_control.recv().await {
            Some(message) => room.send(message),
            None => return,
        }
    }
}
