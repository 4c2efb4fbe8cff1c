//! News for pages that are open: a server-sent event says that something has changed, and the page asks for itself again. An event
//! carries nothing, so that nothing is told to whom a page would not be shown; it ends with the session.

use std::{collections::BTreeMap, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    extract::{Query, State},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
};
use futures_util::{Stream, stream};
use http::StatusCode;
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::{
    broadcast::{self, error::RecvError},
    watch,
};

use super::session::{self, Session};
use crate::{Changed, Plane, proposals};

/// Pages of one session that listen at the same time: browsers open six connections to a host at most.
const PER_SESSION_MAX: usize = 4;
/// Pages that listen at the same time.
const LISTENERS_MAX: usize = 256;
/// How often it is asked whether the session has ended.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// What follows at once is one event.
const GATHER: Duration = Duration::from_millis(300);

/// Pages that listen, by their session.
#[derive(Default)]
pub struct Listeners(Arc<Mutex<BTreeMap<String, usize>>>);

/// The place of one of them.
struct Place {
    listeners: Arc<Mutex<BTreeMap<String, usize>>>,
    session: String,
}

impl Listeners {
    fn take(&self, session: &str) -> Option<Place> {
        let mut held = self.0.lock();
        let own = held.get(session).copied().unwrap_or(0);
        if own >= PER_SESSION_MAX || held.values().sum::<usize>() >= LISTENERS_MAX {
            return None;
        }
        held.insert(session.to_owned(), own + 1);
        Some(Place { listeners: self.0.clone(), session: session.to_owned() })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.listeners.lock();
        match held.get_mut(&self.session) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(held.remove(&self.session)),
        }
    }
}

/// What a page listens for: everything, or what becomes of one change.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    change: Option<String>,
}

struct Listener {
    plane: Arc<Plane>,
    place: Place,
    changed: broadcast::Receiver<Changed>,
    decided: watch::Receiver<()>,
    change: Option<String>,
    seen: String,
}

/// Tells a page when to ask for itself again.
pub async fn events(State(plane): State<Arc<Plane>>, session: Session, Query(about): Query<About>) -> Response {
    // The browser is told not to come back; the page asks from time to time by itself.
    let Some(place) = plane.listeners.take(&session.id) else { return StatusCode::NO_CONTENT.into_response() };
    let (changed, decided) = (plane.changes.subscribe(), plane.decided.subscribe());
    let mut listener = Listener { plane, place, changed, decided, change: about.change, seen: String::new() };
    listener.seen = listener.sees().await;
    Sse::new(stream_of(listener)).keep_alive(KeepAlive::default()).into_response()
}

fn stream_of(listener: Listener) -> impl Stream<Item = Result<Event, Infallible>> {
    stream::unfold(listener, |mut listener| async move {
        listener.next().await.then(|| (Ok(Event::default().event("changed").data("look")), listener))
    })
}

impl Listener {
    /// Waits for the next event; false when there will be none.
    async fn next(&mut self) -> bool {
        loop {
            let is_news = tokio::select! {
                changed = self.changed.recv() => match changed {
                    Ok(_) | Err(RecvError::Lagged(_)) => true,
                    Err(RecvError::Closed) => return false,
                },
                decided = self.decided.changed() => match decided {
                    Ok(()) => true,
                    Err(_) => return false,
                },
                () = tokio::time::sleep(LOOK_EVERY) => false,
            };
            if session::has_ended(&self.plane, &self.place.session).await.unwrap_or(true) {
                return false;
            }
            if is_news {
                tokio::time::sleep(GATHER).await;
                self.changed = self.changed.resubscribe();
                self.decided.borrow_and_update();
            }
            if self.change.is_none() && is_news {
                return true;
            }
            let sees = self.sees().await;
            if sees != self.seen {
                self.seen = sees;
                return true;
            }
        }
    }

    /// How the one change stands.
    async fn sees(&self) -> String {
        let Some(id) = &self.change else { return String::new() };
        match proposals::show(&self.plane, id).await {
            Ok(detail) => serde_json::to_string(&detail.proposal).unwrap_or_default(),
            Err(problem) => problem.title,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_listen_are_bounded_and_leave_their_place() {
        let listeners = Listeners::default();
        let held: Vec<_> = (0..PER_SESSION_MAX).map(|_| listeners.take("a").unwrap()).collect();
        assert!(listeners.take("a").is_none(), "one session");
        assert!(listeners.take("b").is_some(), "another");
        drop(held);
        assert!(listeners.0.lock().is_empty());
        let held: Vec<_> = (0..LISTENERS_MAX).map(|n| listeners.take(&n.to_string()).unwrap()).collect();
        assert!(listeners.take("one more").is_none());
        drop(held);
        assert!(listeners.take("one more").is_some());
    }
}
