//! What a terminal shows of a stream of decisions: each edge once when it is first permitted, each denial once, and from
//! time to time how often both came again. Bounded, whatever the traffic. Nothing is lost by it: `decision` shows all.

use std::{collections::BTreeMap, time::Duration};

use countersign_api::local::TailEvent;
use countersign_core::{
    identity::TrustDomain,
    record::{DecisionRecord, EdgeCount, Outcome},
};

use crate::{
    decision,
    render::{self, Paint, tame},
};

/// How often the repetitions are summed up.
pub const SUM_EVERY: Duration = Duration::from_secs(10);
/// Edges that are remembered as told; beyond that all of them are new again.
const EDGES_MAX: usize = 4096;
/// Denials whose repetitions are counted apart; those beyond are told each time.
const DENIALS_MAX: usize = 256;
/// Edges that a sum names.
const NAMED_MAX: usize = 4;

/// What has been shown, and what has come again since.
pub struct Glance {
    own: Option<TrustDomain>,
    paint: Paint,
    /// Permits of an edge (who, how, to what) that were not shown yet.
    permits: BTreeMap<(String, String, String), u64>,
    /// Repetitions of a denial (outcome, about what).
    denials: BTreeMap<(Outcome, String), u64>,
}

impl Glance {
    /// Nothing shown yet; workloads of `own` go by the names of their services.
    pub fn new(own: Option<TrustDomain>, paint: Paint) -> Self {
        Self { own, paint, permits: BTreeMap::new(), denials: BTreeMap::new() }
    }

    /// What to show of `event` now.
    pub fn see(&mut self, event: &TailEvent) -> Option<String> {
        let first = match event {
            TailEvent::Edge(edge) => self.first_permit(edge),
            // The count of its edge says so, and how often.
            TailEvent::Record(record) if record.outcome == Outcome::Permit => false,
            TailEvent::Record(record) => self.first_denial(record),
            TailEvent::Shed(_) => true,
        };
        first.then(|| decision::line(event, self.own.as_ref(), self.paint))
    }

    fn first_permit(&mut self, edge: &EdgeCount) -> bool {
        let EdgeCount { principal, service, action, permits, revision: _ } = edge;
        let key = (decision::short(principal, self.own.as_ref()), action.to_string(), service.to_string());
        if let Some(more) = self.permits.get_mut(&key) {
            *more += permits;
            return false;
        }
        if self.permits.len() == EDGES_MAX {
            self.permits.clear();
        }
        self.permits.insert(key, 0);
        true
    }

    fn first_denial(&mut self, record: &DecisionRecord) -> bool {
        let inputs = &record.inputs;
        let (who, how, to) = (decision::short(&inputs.principal, self.own.as_ref()), &inputs.action, &inputs.service);
        let key = (record.outcome, format!("{who} {how} {to}{}", tame(&inputs.path)));
        if let Some(more) = self.denials.get_mut(&key) {
            *more += 1;
            return false;
        }
        if self.denials.len() < DENIALS_MAX {
            self.denials.insert(key, 0);
        }
        true
    }

    /// What came again since the last sum, `elapsed` ago.
    pub fn sum(&mut self, elapsed: Duration) -> Option<String> {
        let mut lines = String::new();
        let time = self.paint.dim(&render::moment(render::now_ms()));
        let span = format!("in {} s", elapsed.as_secs());
        let mut of_pair: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        for ((who, _, to), more) in self.permits.iter_mut().filter(|(_, more)| **more > 0) {
            *of_pair.entry((who, to)).or_default() += std::mem::take(more);
        }
        let all: u64 = of_pair.values().sum();
        if all > 0 {
            let mut pairs: Vec<_> = of_pair.into_iter().collect();
            pairs.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
            let mut named: Vec<String> =
                pairs.iter().take(NAMED_MAX).map(|((who, to), count)| format!("{who} → {to} {count}")).collect();
            if pairs.len() > NAMED_MAX {
                named.push(format!("{} more", pairs.len() - NAMED_MAX));
            }
            let permit = decision::outcome(Outcome::Permit, self.paint);
            let named = self.paint.dim(&format!("{span}: {}", named.join(", ")));
            lines.push_str(&format!("{time} {permit} {all} more {named}\n"));
        }
        // A denial that did not come again is told in full when it comes next.
        for ((outcome, about), more) in std::mem::take(&mut self.denials).into_iter().filter(|(_, more)| *more > 0) {
            let told = decision::outcome(outcome, self.paint);
            lines.push_str(&format!("{time} {told} {about} {}\n", self.paint.dim(&format!("{more} more {span}"))));
            self.denials.insert((outcome, about), 0);
        }
        (!lines.is_empty()).then_some(lines)
    }
}

#[cfg(test)]
mod tests {
    use countersign_core::{
        change::Revision,
        identity::{ServiceName, SpiffeId},
    };

    use super::*;

    fn edge(who: &str, action: &str, to: &str, permits: u64) -> TailEvent {
        TailEvent::Edge(EdgeCount {
            principal: SpiffeId::parse(&format!("spiffe://{who}")).unwrap(),
            service: ServiceName::parse(to).unwrap(),
            action: action.into(),
            permits,
            revision: Revision(3),
        })
    }

    /// A line without the time in front.
    fn told(line: Option<String>) -> Vec<String> {
        line.unwrap_or_default().lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }

    #[test]
    fn an_edge_is_shown_when_it_is_new_and_then_summed_up() {
        let mut glance = Glance::new(Some(TrustDomain::parse("a.example").unwrap()), Paint::plain());
        let web = |permits| edge("a.example/web", "http:GET", "catalog", permits);
        assert_eq!(told(glance.see(&web(1))), ["permit  web http:GET catalog once, revision 3"]);
        assert_eq!(told(glance.sum(SUM_EVERY)), [""; 0], "nothing came again");
        assert_eq!(glance.see(&web(2)), None);
        assert_eq!(glance.see(&web(3)), None);
        let foreign = edge("b.example/web", "http:GET", "catalog", 7);
        let line = "permit  spiffe://b.example/web http:GET catalog 7 times, revision 3";
        assert_eq!(told(glance.see(&foreign)), [line], "a stranger does not look familiar");
        assert_eq!(told(glance.sum(SUM_EVERY)), ["permit  5 more in 10 s: web → catalog 5"]);
        assert_eq!(told(glance.sum(SUM_EVERY)), [""; 0]);
    }

    #[test]
    fn a_sum_names_the_busiest_and_counts_the_rest() {
        let mut glance = Glance::new(None, Paint::plain());
        for _ in 0..2 {
            for n in 1..=6 {
                glance.see(&edge("a.example/web", "http:GET", &format!("s{n}"), n));
            }
        }
        let sums = told(glance.sum(SUM_EVERY));
        let who = "spiffe://a.example/web";
        let named = [6, 5, 4, 3].map(|n| format!("{who} → s{n} {n}")).join(", ");
        assert_eq!(sums, [format!("permit  21 more in 10 s: {named}, 2 more")]);
    }
}
