//! What proxies report, on its way to control: decision records as they are made, and the answers to control's
//! questions for kept ones. Never blocks a proxy: what finds no room is counted, and the count is sent.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use countersign_api::{
    local::RecordFilter,
    mesh::{FollowRequest, RecordsAnswer, RecordsQuery, Report, follow_request::Message},
};
use countersign_core::identity::InstanceId;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::mpsc;

/// Messages that wait for control at most; each holds what one proxy gathered in a moment.
const WAITING_MAX: usize = 256;
/// Records in one message to control.
const RECORDS_PER_MESSAGE: usize = 500;
/// Records in one answer at most, whatever is asked.
const RECORDS_MAX: usize = 10_000;
/// Records in an answer when the question does not say.
const RECORDS_DEFAULT: usize = 100;
/// How long the proxies of this host may take to answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
/// Questions of control that are open at once.
const QUERIES_MAX: usize = 32;

/// Relays between the proxies of this host and control.
pub(crate) struct Reports {
    to_control: mpsc::Sender<FollowRequest>,
    shed: AtomicU64,
    proxies: Mutex<BTreeMap<InstanceId, mpsc::Sender<RecordsQuery>>>,
    open: Mutex<BTreeMap<u64, Open>>,
}

/// A question that is being answered.
struct Open {
    waits_for: BTreeSet<InstanceId>,
    limit: usize,
    records: Vec<(u64, Bytes)>, // by time in milliseconds
    errors: Vec<String>,
}

/// The one member of a record that relaying needs.
#[derive(Deserialize)]
struct At {
    at_ms: u64,
}

impl Reports {
    /// The relay and what it has for control.
    pub(crate) fn new() -> (Arc<Self>, mpsc::Receiver<FollowRequest>) {
        let (to_control, for_control) = mpsc::channel(WAITING_MAX);
        let reports = Self { to_control, shed: AtomicU64::new(0), proxies: Mutex::default(), open: Mutex::default() };
        (Arc::new(reports), for_control)
    }

    /// A proxy's report, with what was shed before it.
    pub(crate) fn relay(&self, mut report: Report) {
        report.shed += self.shed.swap(0, Ordering::Relaxed);
        let lost = report.shed + report.records_json.len() as u64;
        if self.send(Message::Report(report)).is_err() {
            self.shed.fetch_add(lost, Ordering::Relaxed);
        }
    }

    /// What came of a probe. One that finds no room is as one that came to nothing: there is a next.
    pub(crate) fn send_probed(&self, probed: FollowRequest) {
        let _ = self.to_control.try_send(probed);
    }

    /// A proxy that can be asked for kept records.
    pub(crate) fn proxy_started(&self, instance: &InstanceId) -> mpsc::Receiver<RecordsQuery> {
        let (ask, asked) = mpsc::channel(QUERIES_MAX);
        self.proxies.lock().insert(instance.clone(), ask);
        asked
    }

    /// A proxy that will not answer any more.
    pub(crate) fn proxy_ended(&self, instance: &InstanceId) {
        self.proxies.lock().remove(instance);
        let queries: Vec<u64> = self.open.lock().keys().copied().collect();
        for query in queries {
            self.answered(instance, query, Vec::new(), true, "");
        }
    }

    /// Asks every proxy of this host, and answers control when the last one has, or when time is up.
    pub(crate) fn ask(self: &Arc<Self>, query: RecordsQuery) {
        let filter: RecordFilter = match serde_json::from_str(&query.filter_json) {
            Ok(filter) => filter,
            Err(e) => return self.refuse(query.query, format!("the filter cannot be read: {e}")),
        };
        let limit = filter.limit.map_or(RECORDS_DEFAULT, |limit| limit as usize).min(RECORDS_MAX);
        {
            let mut open = self.open.lock();
            if open.len() >= QUERIES_MAX {
                drop(open);
                return self.refuse(query.query, format!("{QUERIES_MAX} questions for records are open already"));
            }
            let proxies = self.proxies.lock();
            let asked = proxies.iter().filter(|(_, ask)| ask.try_send(query.clone()).is_ok());
            let waits_for = asked.map(|(instance, _)| instance.clone()).collect();
            open.insert(query.query, Open { waits_for, limit, records: Vec::new(), errors: Vec::new() });
        }
        self.finish(query.query, false);
        let (reports, number) = (self.clone(), query.query);
        tokio::spawn(async move {
            tokio::time::sleep(ANSWER_WITHIN).await;
            reports.finish(number, true);
        });
    }

    /// A part of a proxy's answer.
    pub(crate) fn answer(&self, instance: &InstanceId, answer: RecordsAnswer) {
        self.answered(instance, answer.query, answer.records_json, answer.last, &answer.error);
    }

    fn answered(&self, instance: &InstanceId, query: u64, records: Vec<Bytes>, last: bool, error: &str) {
        {
            let mut all = self.open.lock();
            let Some(open) = all.get_mut(&query) else { return };
            if !open.waits_for.contains(instance) {
                return;
            }
            for json in records {
                if let Ok(At { at_ms }) = serde_json::from_slice(&json) {
                    open.records.push((at_ms, json));
                }
            }
            if open.records.len() > 2 * open.limit {
                open.keep_newest();
            }
            if !error.is_empty() {
                open.errors.push(format!("{instance}: {error}"));
            }
            if last || !error.is_empty() {
                open.waits_for.remove(instance);
            }
        }
        self.finish(query, false);
    }

    /// Answers control when every proxy has answered, or when `time_is_up`.
    fn finish(&self, query: u64, time_is_up: bool) {
        let mut open = {
            let mut all = self.open.lock();
            let done = all.get(&query).is_some_and(|open| time_is_up || open.waits_for.is_empty());
            let Some(open) = done.then(|| all.remove(&query)).flatten() else { return };
            open
        };
        open.keep_newest();
        open.errors.extend(open.waits_for.iter().map(|instance| format!("{instance}: did not answer in time")));
        let records: Vec<Bytes> = open.records.into_iter().map(|(_, json)| json).collect();
        let count = records.len().div_ceil(RECORDS_PER_MESSAGE).max(1);
        for n in 0..count {
            let part = records.iter().skip(n * RECORDS_PER_MESSAGE).take(RECORDS_PER_MESSAGE);
            let last = n + 1 == count;
            let error = if last { open.errors.join("; ") } else { String::new() };
            let answer = RecordsAnswer { query, records_json: part.cloned().collect(), last, error };
            // Control gives up by itself when an answer does not end.
            let _ = self.send(Message::Records(answer));
        }
    }

    fn refuse(&self, query: u64, error: String) {
        let _ = self.send(Message::Records(RecordsAnswer { query, records_json: Vec::new(), last: true, error }));
    }

    fn send(&self, message: Message) -> Result<(), ()> {
        self.to_control.try_send(FollowRequest { message: Some(message) }).map_err(drop)
    }
}

impl Open {
    fn keep_newest(&mut self) {
        self.records.sort_by_key(|(at_ms, _)| Reverse(*at_ms));
        self.records.truncate(self.limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(given: &str) -> InstanceId {
        InstanceId::parse(given).unwrap()
    }

    fn record(at_ms: u64) -> Bytes {
        format!("{{\"at_ms\":{at_ms}}}").into()
    }

    fn part(query: u64, at: &[u64], last: bool) -> RecordsAnswer {
        RecordsAnswer { query, records_json: at.iter().copied().map(record).collect(), last, error: String::new() }
    }

    fn query(limit: usize) -> RecordsQuery {
        RecordsQuery { query: 1, filter_json: format!("{{\"limit\":{limit}}}") }
    }

    fn next(for_control: &mut mpsc::Receiver<FollowRequest>) -> Option<String> {
        match for_control.try_recv().ok()?.message.unwrap() {
            Message::Records(answer) => {
                let records: Vec<_> =
                    answer.records_json.iter().map(|r| String::from_utf8_lossy(r).into_owned()).collect();
                Some(format!("{} last={} {}", records.join(" "), answer.last, answer.error))
            }
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_records_of_all_proxies_make_one_answer() {
        let (reports, mut for_control) = Reports::new();
        let (mut a, mut b) = (reports.proxy_started(&id("a/1")), reports.proxy_started(&id("b/1")));
        reports.ask(query(3));
        assert_eq!((a.recv().await.unwrap().query, b.recv().await.unwrap().query), (1, 1));
        reports.answer(&id("a/1"), part(1, &[9, 7], false));
        reports.answer(&id("a/1"), part(1, &[1], true));
        assert_eq!(next(&mut for_control), None, "b has not answered");
        reports.answer(&id("b/1"), part(1, &[8, 2], true));
        assert_eq!(next(&mut for_control).unwrap(), r#"{"at_ms":9} {"at_ms":8} {"at_ms":7} last=true "#);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_or_dead_proxy_does_not_keep_the_others_from_answering() {
        let (reports, mut for_control) = Reports::new();
        let _a =
            (reports.proxy_started(&id("a/1")), reports.proxy_started(&id("b/1")), reports.proxy_started(&id("c/1")));
        reports.ask(query(3));
        reports.answer(&id("a/1"), part(1, &[9], true));
        reports.proxy_ended(&id("b/1"));
        tokio::time::sleep(ANSWER_WITHIN * 2).await;
        assert_eq!(next(&mut for_control).unwrap(), r#"{"at_ms":9} last=true c/1: did not answer in time"#);
        reports.answer(&id("c/1"), part(1, &[9], true));
        assert_eq!(next(&mut for_control), None, "a late answer is no second answer");
    }

    #[tokio::test]
    async fn what_finds_no_room_is_counted_and_the_count_is_sent() {
        let (reports, mut for_control) = Reports::new();
        let report = |n| Report { records_json: vec![record(1); n], edges_json: Vec::new(), shed: 0 };
        for _ in 0..WAITING_MAX + 3 {
            reports.relay(report(2));
        }
        for _ in 0..WAITING_MAX {
            for_control.try_recv().unwrap();
        }
        reports.relay(report(1));
        let Some(Message::Report(last)) = for_control.try_recv().unwrap().message else { panic!("no report") };
        assert_eq!(last.shed, 6);
    }
}
