//! What control must know of this host's instances: that they are up, where, and which revision their proxies enforce.
//! Kept as a state and said as differences, a few milliseconds' worth at a time, so that a burst of revisions becomes
//! one message, and a new stream begins by saying everything again. Nothing here is ever lost to a full queue.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use countersign_api::mesh::{
    Acknowledgement, FollowRequest, InstanceDown, InstanceRevision, InstanceUp, InstanceWaits, follow_request::Message,
};
use countersign_core::{change::Revision, identity::InstanceId};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// How long news gathers before it is said.
const GATHER: Duration = Duration::from_millis(3);
/// A host without news says so this often, so that control knows when it last heard of it.
const QUIET_MAX: Duration = Duration::from_secs(5);

/// One instance, as control should see it.
#[derive(Debug, Clone, Default)]
struct Instance {
    up: Option<InstanceUp>,
    waits: Option<InstanceWaits>,
    acknowledged: Option<InstanceRevision>,
}

/// Why an instance takes no more calls, and whether it runs no more.
#[derive(Debug)]
struct Gone {
    reason: String,
    ended: bool,
}

#[derive(Debug, Default)]
struct State {
    instances: BTreeMap<InstanceId, Instance>,
    up_unsaid: BTreeSet<InstanceId>,
    waits_unsaid: BTreeSet<InstanceId>,
    acknowledged_unsaid: BTreeSet<InstanceId>,
    down_unsaid: BTreeMap<InstanceId, Gone>,
}

/// The instances of this host and what control has not been told of them.
#[derive(Debug, Default)]
pub(crate) struct Acknowledgements {
    state: Mutex<State>,
    news: Notify,
}

impl Acknowledgements {
    /// An instance's proxy listens and has a view, or what was said of it changed.
    pub(crate) fn up(&self, instance: &InstanceId, up: InstanceUp) {
        let mut state = self.state.lock();
        let known = state.instances.entry(instance.clone()).or_default();
        if known.up.as_ref() != Some(&up) {
            (known.up, known.waits) = (Some(up), None);
            state.waits_unsaid.remove(instance);
            state.down_unsaid.remove(instance);
            state.up_unsaid.insert(instance.clone());
            self.news.notify_one();
        }
    }

    /// An instance does not run before it is admitted; control takes it out of discovery.
    pub(crate) fn waits(&self, instance: &InstanceId, waits: InstanceWaits) {
        let mut state = self.state.lock();
        let known = state.instances.entry(instance.clone()).or_default();
        if known.waits.as_ref() != Some(&waits) {
            (known.up, known.waits) = (None, Some(waits));
            state.up_unsaid.remove(instance);
            state.down_unsaid.remove(instance);
            state.waits_unsaid.insert(instance.clone());
            self.news.notify_one();
        }
    }

    /// An instance takes no more calls; what it has begun it may end. What is still unsaid of it is dropped.
    pub(crate) fn down(&self, instance: &InstanceId, reason: &str) {
        let mut state = self.state.lock();
        if state.forget(instance).is_some_and(|known| known.up.is_some() || known.waits.is_some()) {
            state.down_unsaid.insert(instance.clone(), Gone { reason: reason.into(), ended: false });
            self.news.notify_one();
        }
    }

    /// An instance runs no more, or is not what it was: what it was issued is to be revoked.
    pub(crate) fn ended(&self, instance: &InstanceId, reason: &str) {
        let mut state = self.state.lock();
        state.forget(instance);
        state.down_unsaid.insert(instance.clone(), Gone { reason: reason.into(), ended: true });
        self.news.notify_one();
    }

    /// An instance's proxy enforces `revision`; or still does, because of `error`.
    pub(crate) fn enforces(&self, instance: &InstanceId, revision: Revision, error: &str) {
        let mut state = self.state.lock();
        let known = state.instances.entry(instance.clone()).or_default();
        let before = known.acknowledged.clone().unwrap_or_default();
        let (instance_name, revision, error) = (instance.to_string(), revision.0, error.to_owned());
        let said = InstanceRevision { instance: instance_name, revision, error, ..before };
        state.acknowledge(instance, said, &self.news);
    }

    /// An instance's proxy enforces all signals up to `sequence`.
    pub(crate) fn heeds(&self, instance: &InstanceId, sequence: u64) {
        let mut state = self.state.lock();
        let known = state.instances.entry(instance.clone()).or_default();
        let before = known.acknowledged.clone().unwrap_or_default();
        let said = InstanceRevision { instance: instance.to_string(), signal_sequence: sequence, ..before };
        state.acknowledge(instance, said, &self.news);
    }

    /// A new stream begins: everything is unsaid again. Instances that went down in between are not: the control plane
    /// forgets what a host does not repeat.
    pub(crate) fn say_all_again(&self) {
        let mut state = self.state.lock();
        state.down_unsaid.clear();
        state.up_unsaid = state.instances.iter().filter(|(_, i)| i.up.is_some()).map(|(id, _)| id.clone()).collect();
        state.waits_unsaid =
            state.instances.iter().filter(|(_, i)| i.waits.is_some()).map(|(id, _)| id.clone()).collect();
        state.acknowledged_unsaid =
            state.instances.iter().filter(|(_, i)| i.acknowledged.is_some()).map(|(id, _)| id.clone()).collect();
        self.news.notify_one();
    }

    /// Returns when nothing is unsaid.
    pub(crate) async fn said(&self) {
        while !self.state.lock().is_said() {
            tokio::time::sleep(GATHER).await;
        }
    }

    /// Waits for news, lets it gather, and returns it: instances up first, then what they enforce, then those gone. When
    /// there is none for long, an acknowledgement of nothing is the sign of life.
    pub(crate) async fn news(&self) -> Vec<FollowRequest> {
        loop {
            if tokio::time::timeout(QUIET_MAX, self.news.notified()).await.is_err() {
                return vec![FollowRequest { message: Some(Message::Acknowledgement(Acknowledgement::default())) }];
            }
            tokio::time::sleep(GATHER).await;
            let news = self.state.lock().take();
            if !news.is_empty() {
                return news;
            }
        }
    }
}

impl State {
    fn is_said(&self) -> bool {
        self.up_unsaid.is_empty()
            && self.waits_unsaid.is_empty()
            && self.acknowledged_unsaid.is_empty()
            && self.down_unsaid.is_empty()
    }

    fn forget(&mut self, instance: &InstanceId) -> Option<Instance> {
        self.up_unsaid.remove(instance);
        self.waits_unsaid.remove(instance);
        self.acknowledged_unsaid.remove(instance);
        self.instances.remove(instance)
    }

    fn acknowledge(&mut self, instance: &InstanceId, said: InstanceRevision, news: &Notify) {
        let known = self.instances.entry(instance.clone()).or_default();
        if known.acknowledged.as_ref() != Some(&said) {
            known.acknowledged = Some(said);
            self.acknowledged_unsaid.insert(instance.clone());
            news.notify_one();
        }
    }

    fn take(&mut self) -> Vec<FollowRequest> {
        let mut messages = Vec::new();
        for id in std::mem::take(&mut self.up_unsaid) {
            messages.extend(self.instances.get(&id).and_then(|i| i.up.clone()).map(Message::Up));
        }
        for id in std::mem::take(&mut self.waits_unsaid) {
            messages.extend(self.instances.get(&id).and_then(|i| i.waits.clone()).map(Message::Waits));
        }
        let instances: Vec<InstanceRevision> = std::mem::take(&mut self.acknowledged_unsaid)
            .iter()
            .filter_map(|id| self.instances.get(id)?.acknowledged.clone())
            .collect();
        if !instances.is_empty() {
            messages.push(Message::Acknowledgement(Acknowledgement { instances }));
        }
        for (id, Gone { reason, ended }) in std::mem::take(&mut self.down_unsaid) {
            messages.push(Message::Down(InstanceDown { instance: id.to_string(), reason, ended }));
        }
        messages.into_iter().map(|message| FollowRequest { message: Some(message) }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(given: &str) -> InstanceId {
        InstanceId::parse(given).unwrap()
    }

    fn up(instance: &str) -> InstanceUp {
        InstanceUp { instance: instance.into(), address: "127.0.0.1:1".into(), ..InstanceUp::default() }
    }

    async fn said(acknowledgements: &Acknowledgements) -> String {
        let spell = |request: FollowRequest| match request.message.unwrap() {
            Message::Up(up) => format!("up {}", up.instance),
            Message::Down(down) if down.ended => format!("ended {} ({})", down.instance, down.reason),
            Message::Down(down) => format!("down {} ({})", down.instance, down.reason),
            Message::Waits(waits) => format!("waits {}", waits.instance),
            Message::Acknowledgement(ack) => ack
                .instances
                .iter()
                .map(|i| format!("{}@{}{}", i.instance, i.revision, i.error))
                .collect::<Vec<_>>()
                .join(" "),
            other => panic!("{other:?}"),
        };
        acknowledgements.news().await.into_iter().map(spell).collect::<Vec<_>>().join(", ")
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_of_revisions_is_one_message_with_the_last_of_each() {
        let acknowledgements = Acknowledgements::default();
        acknowledgements.up(&id("a/1"), up("a/1"));
        for revision in 1..=100 {
            acknowledgements.enforces(&id("a/1"), Revision(revision), "");
            acknowledgements.enforces(&id("b/1"), Revision(revision), "");
        }
        assert_eq!(said(&acknowledgements).await, "up a/1, a/1@100 b/1@100");
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_stream_repeats_what_is_and_forgets_what_was() {
        let acknowledgements = Acknowledgements::default();
        acknowledgements.up(&id("a/1"), up("a/1"));
        acknowledgements.up(&id("b/1"), up("b/1"));
        acknowledgements.enforces(&id("a/1"), Revision(3), "");
        said(&acknowledgements).await;
        acknowledgements.down(&id("b/1"), "stopped");
        acknowledgements.say_all_again();
        assert_eq!(said(&acknowledgements).await, "up a/1, a/1@3");
        acknowledgements.down(&id("a/1"), "it drains");
        assert_eq!(said(&acknowledgements).await, "down a/1 (it drains)");
        acknowledgements.ended(&id("a/1"), "stopped");
        assert_eq!(said(&acknowledgements).await, "ended a/1 (stopped)");
    }

    #[tokio::test(start_paused = true)]
    async fn of_an_instance_that_came_and_went_only_the_last_is_said() {
        let acknowledgements = Acknowledgements::default();
        let waits = InstanceWaits { instance: "a/1".into(), ..InstanceWaits::default() };
        acknowledgements.up(&id("a/1"), up("a/1"));
        acknowledgements.down(&id("a/1"), "it waits");
        acknowledgements.waits(&id("a/1"), waits.clone());
        assert_eq!(said(&acknowledgements).await, "waits a/1");
        acknowledgements.down(&id("a/1"), "it was admitted");
        acknowledgements.up(&id("a/1"), up("a/1"));
        assert_eq!(said(&acknowledgements).await, "up a/1");
        acknowledgements.waits(&id("a/1"), waits);
        acknowledgements.say_all_again();
        assert_eq!(said(&acknowledgements).await, "waits a/1");
        acknowledgements.down(&id("a/1"), "stopped");
        assert_eq!(said(&acknowledgements).await, "down a/1 (stopped)");
    }

    #[tokio::test(start_paused = true)]
    async fn saying_the_same_twice_says_it_once() {
        let acknowledgements = Acknowledgements::default();
        acknowledgements.enforces(&id("a/1"), Revision(3), "");
        assert_eq!(said(&acknowledgements).await, "a/1@3");
        acknowledgements.enforces(&id("a/1"), Revision(3), "");
        let more = tokio::time::timeout(Duration::from_secs(1), acknowledgements.news()).await;
        assert!(more.is_err(), "{more:?}");
    }
}
