//! Telemetry that others report, beside what the data plane sees itself: events in, evidence for the gates out.
//!
//! Whoever brings events (the API, and what will read topics) shares one [`Intake`]. It counts each event for the version it
//! names, once, and hands the counts to the node ten times a second, like the data plane.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use metrics::{Counter, Gauge, counter, gauge};
use tokio_util::sync::CancellationToken;
use xxhash_rust::xxh3::xxh3_64;

use crate::domain::ids::ServiceId;
use crate::domain::window::{Evidence, Tally};
use crate::node::handle::NodeHandle;
use crate::protocol::{Observation, View};

pub mod event;
pub mod prometheus;
pub mod source;

use event::{Event, FUTURE_MS_MAX, LATE_MS_MAX, Rejection};

/// How often counts are handed over.
const DRAIN: Duration = Duration::from_millis(100);
/// Ids that are remembered, to know an event that comes again: lines of as many as share a cache line.
const ID_LINES: usize = 1 << 17;
const IDS_IN_LINE: usize = 8;
/// What an event without an id has, and an empty place.
const NO_ID: u64 = 0;
/// Events that are looked at before they are counted.
const AHEAD: usize = 64;
/// Rejected events that an answer names one by one.
const NAMED_MAX: usize = 10;

/// What became of a batch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Receipt {
    /// Events that count.
    pub accepted: u64,
    /// Events that don't, by kind.
    pub rejected: BTreeMap<&'static str, u64>,
    /// The first of them: place in the batch, from 0, and why.
    pub first: Vec<(usize, String)>,
}

/// The door for reported events.
#[derive(Clone)]
pub struct Intake {
    node: NodeHandle,
    counted: Arc<Mutex<Counted>>,
    accepted: Counter,
    rejected: Arc<[Counter; Rejection::KINDS.len()]>,
    lag: Gauge,
}

/// What was counted since the last drain.
struct Counted {
    /// Of the view that `services` was made of.
    number: Option<u64>,
    services: BTreeMap<Box<str>, Entry>,
    ids: Ids,
}

struct Entry {
    service: ServiceId,
    stable: Box<str>,
    canary: Option<Box<str>>,
    routing_version: u64,
    /// When that version came into force, in milliseconds since 1970.
    since_ms: u64,
    /// Events of the present version, and those from before it.
    present: Tally,
    earlier: Tally,
    touched: bool,
}

impl Intake {
    /// Returns the intake of a node; events are counted in its metrics by this `source`.
    pub fn new(node: NodeHandle, source: &'static str) -> Self {
        let rejected = Rejection::KINDS
            .map(|kind| counter!("aviary_telemetry_rejected_total", "source" => source, "kind" => kind));
        Self {
            node,
            counted: Arc::new(Mutex::new(Counted { number: None, services: BTreeMap::new(), ids: Ids::default() })),
            accepted: counter!("aviary_telemetry_events_total", "source" => source),
            rejected: Arc::new(rejected),
            lag: gauge!("aviary_telemetry_lag_seconds", "source" => source),
        }
    }

    /// Counts a batch of events, or says why not.
    pub fn take<'b>(&self, events: impl IntoIterator<Item = Result<Event<'b>, Rejection>>) -> Receipt {
        let now_ms = self.node.published.clock().now().wall.0;
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.refresh(&self.node);
        let (mut receipt, mut kinds, mut newest_ms) = (Receipt::default(), [0; Rejection::KINDS.len()], 0);
        let mut events = events.into_iter().enumerate();
        let mut some = Vec::with_capacity(AHEAD);
        loop {
            some.extend(events.by_ref().take(AHEAD).map(|(place, event)| {
                let id = event.as_ref().ok().map_or(0, |event| Ids::hash(&event.id));
                (place, id, event)
            }));
            if some.is_empty() {
                break;
            }
            counted.ids.fetch(some.iter().map(|(_, id, _)| *id));
            for (place, id, event) in some.drain(..) {
                match event.and_then(|event| counted.count(&event, id, now_ms).map(|()| event.at_ms)) {
                    Ok(at_ms) => {
                        receipt.accepted += 1;
                        newest_ms = newest_ms.max(at_ms);
                    }
                    Err(rejection) => {
                        kinds[rejection.kind()] += 1;
                        if receipt.first.len() < NAMED_MAX {
                            receipt.first.push((place, rejection.to_string()));
                        }
                    }
                }
            }
        }
        drop(counted);
        self.accepted.increment(receipt.accepted);
        for (at, count) in kinds.into_iter().enumerate().filter(|(_, count)| *count > 0) {
            self.rejected[at].increment(count);
            receipt.rejected.insert(Rejection::KINDS[at], count);
        }
        if newest_ms > 0 {
            self.lag.set(now_ms.saturating_sub(newest_ms) as f64 / 1000.0);
        }
        receipt
    }

    /// Hands over what was counted, until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut tick = tokio::time::interval(DRAIN);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = tick.tick() => {}
            }
            let observations = self.drain();
            if !observations.is_empty() {
                self.node.observed(observations);
            }
        }
    }

    fn drain(&self) -> Vec<Observation> {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.drain()
    }
}

impl Counted {
    /// Follows the node's view. What was counted by the former one is kept: it belongs to its routing version.
    fn refresh(&mut self, node: &NodeHandle) {
        let number = node.published.number();
        if self.number == Some(number) {
            return;
        }
        self.number = Some(number);
        let view = node.published.view();
        self.services.retain(|name, _| view.services.contains_key(&**name));
        for id in view.services.keys() {
            let entry = self.services.entry(id.as_str().into()).or_insert_with(|| Entry::new(id));
            entry.follow(&view, id);
        }
    }

    fn count(&mut self, event: &Event, id: u64, now_ms: u64) -> Result<(), Rejection> {
        let Some(entry) = self.services.get_mut(&*event.service) else {
            return Err(Rejection::Service(event.service.to_string()));
        };
        if event.at_ms > now_ms + FUTURE_MS_MAX {
            return Err(Rejection::Future(event.at_ms - now_ms));
        }
        if event.at_ms + LATE_MS_MAX < now_ms {
            return Err(Rejection::Late(now_ms - event.at_ms));
        }
        let tally = if event.at_ms >= entry.since_ms { &mut entry.present } else { &mut entry.earlier };
        let counts = if *event.version == *entry.stable {
            &mut tally.stable
        } else if entry.canary.as_deref() == Some(&*event.version) {
            &mut tally.canary
        } else {
            let canary = entry.canary.as_ref().map(|canary| format!(" or {canary}")).unwrap_or_default();
            let expected = format!("{}{canary}", entry.stable);
            return Err(Rejection::Version { found: event.version.to_string(), expected });
        };
        if id != NO_ID && !self.ids.is_new(id) {
            return Err(Rejection::Duplicate);
        }
        counts.record(event.latency_us, event.error);
        entry.touched = true;
        Ok(())
    }

    fn drain(&mut self) -> Vec<Observation> {
        let mut observations = Vec::new();
        for entry in self.services.values_mut() {
            if !std::mem::take(&mut entry.touched) {
                continue;
            }
            let tallies = [
                (entry.routing_version, &mut entry.present),
                (entry.routing_version.saturating_sub(1), &mut entry.earlier),
            ];
            for (routing_version, tally) in tallies {
                let evidence = tally.take();
                if evidence != Evidence::default() {
                    observations.push(Observation { service: entry.service.clone(), routing_version, evidence });
                }
            }
        }
        observations
    }
}

/// The last million ids, by their hashes: each may be in one line only, where it takes the oldest one's place.
struct Ids(Box<[[u64; IDS_IN_LINE]]>);

impl Default for Ids {
    fn default() -> Self {
        Self(vec![[0; IDS_IN_LINE]; ID_LINES].into())
    }
}

impl Ids {
    /// Returns what an id is remembered by.
    fn hash(id: &str) -> u64 {
        if id.is_empty() { NO_ID } else { xxh3_64(id.as_bytes()).max(NO_ID + 1) }
    }

    /// Brings the lines of these ids near: each is somewhere else in memory, and all are waited for at once.
    fn fetch(&self, ids: impl Iterator<Item = u64>) {
        let near = ids.filter(|id| *id != NO_ID).fold(0, |sum, id| sum ^ self.0[id as usize % ID_LINES][0]);
        std::hint::black_box(near);
    }

    /// Returns true the first time that this id comes.
    fn is_new(&mut self, id: u64) -> bool {
        let line = &mut self.0[id as usize % ID_LINES];
        if line.contains(&id) {
            return false;
        }
        line.copy_within(..IDS_IN_LINE - 1, 1);
        line[0] = id;
        true
    }
}

impl Entry {
    fn new(id: &ServiceId) -> Self {
        Self {
            service: id.clone(),
            stable: Box::default(),
            canary: None,
            routing_version: 1,
            since_ms: 0,
            present: Tally::default(),
            earlier: Tally::default(),
            touched: false,
        }
    }

    fn follow(&mut self, view: &View, id: &ServiceId) {
        let routing = &view.services[id].service.routing;
        if routing.version == self.routing_version && *self.stable == *routing.stable_model_id.as_str() {
            return;
        }
        // What was counted at the former version, and not handed over yet, is of the time before this one.
        std::mem::swap(&mut self.present, &mut self.earlier);
        self.present = Tally::default();
        self.stable = routing.stable_model_id.as_str().into();
        self.canary = routing.canary_model_id.as_ref().map(|canary| canary.as_str().into());
        self.routing_version = routing.version;
        self.since_ms = routing.timestamp.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_new_once_and_again_when_it_is_long_forgotten() {
        let mut ids = Ids::default();
        assert!(ids.is_new(7) && !ids.is_new(7));
        assert_eq!((Ids::hash(""), Ids::hash("a") == Ids::hash("b")), (NO_ID, false));
        let found = (1..=IDS_IN_LINE as u64).filter(|i| ids.is_new(7 + i * ID_LINES as u64)).count();
        assert_eq!((found, ids.is_new(7)), (IDS_IN_LINE, true));
        let many = (0..500_000u64).filter(|i| ids.is_new(xxh3_64(&i.to_le_bytes()))).count();
        let again = (400_000..500_000u64).filter(|i| !ids.is_new(xxh3_64(&i.to_le_bytes()))).count();
        assert!(many == 500_000 && again == 100_000, "{many} {again}");
    }
}
