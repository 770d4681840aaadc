//! Telemetry that others report, beside what the data plane sees itself: events in, evidence for the gates out.
//!
//! All that bring events (the API, and the readers of topics) share one [`Intake`]. It counts each event for the version it
//! names, once, and hands the counts to the node ten times a second, like the data plane.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hashbrown::HashTable;
use metrics::{Counter, Gauge, counter, gauge};
use tokio_util::sync::CancellationToken;
use xxhash_rust::xxh3::xxh3_64;

use crate::domain::classes::ErrorClasses;
use crate::domain::ids::ServiceId;
use crate::domain::side::Side;
use crate::domain::window::{Evidence, Tally};
use crate::node::handle::NodeHandle;
use crate::protocol::{Observation, ServiceView, View};

pub mod event;
mod ids;
pub mod prometheus;
pub mod source;

use event::{FUTURE_MS_MAX, LATE_MS_MAX, Rejection, ReportedEvent};
use ids::{Ids, NO_ID};

/// How often counts are handed over.
const DRAIN: Duration = Duration::from_millis(100);
/// Events that are looked at before they are counted.
const AHEAD: usize = 64;
/// Rejected events that an answer names one by one.
const NAMED_MAX: usize = 10;

/// Result of a batch: accepted events, and rejected ones by kind.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Receipt {
    /// Number of events that were counted.
    pub accepted: u64,
    /// Events that don't, by kind.
    pub rejected: BTreeMap<&'static str, u64>,
    /// The first of them: place in the batch, from 0, and why.
    pub first: Vec<(usize, String)>,
}

/// Result of a batch while it is being counted.
#[derive(Default)]
struct Taken {
    /// Events that are not counted yet, and their places in the batch.
    hits: Vec<(usize, Hit)>,
    accepted: u64,
    /// Of them, those that came after a newer one of their service.
    out_of_order: u64,
    newest_ms: u64,
    kinds: [u64; Rejection::KINDS.len()],
    first: Vec<(usize, String)>,
}

impl Taken {
    #[cold]
    fn reject(&mut self, place: usize, why: &Rejection) {
        self.kinds[why.kind()] += 1;
        let named = self.first.partition_point(|(before, _)| *before < place);
        if named < NAMED_MAX {
            self.first.insert(named, (place, why.to_string()));
            self.first.truncate(NAMED_MAX);
        }
    }
}

/// Events that are being counted.
pub struct IntakeBatch<'i> {
    intake: &'i Intake,
    counted: MutexGuard<'i, ServiceTable>,
    taken: Taken,
    now_ms: u64,
    /// Position of the next event, from 0.
    place: usize,
}

impl IntakeBatch<'_> {
    /// Takes in the next event: counts it, or says why it is rejected.
    #[inline]
    pub fn put(&mut self, event: &Result<ReportedEvent<'_>, Rejection>) {
        match event {
            Ok(event) => match self.counted.find(event, self.now_ms) {
                Ok(hit) => self.taken.hits.push((self.place, hit)),
                Err(why) => self.taken.reject(self.place, &why),
            },
            Err(why) => self.taken.reject(self.place, why),
        }
        self.place += 1;
        if self.taken.hits.len() == AHEAD {
            self.counted.count(&mut self.taken);
        }
    }

    /// Returns what became of them.
    pub fn receipt(mut self) -> Receipt {
        self.counted.count(&mut self.taken);
        let Self { intake, counted, taken, now_ms, .. } = self;
        drop(counted);
        if taken.newest_ms > 0 {
            intake.lag.set(now_ms.saturating_sub(taken.newest_ms) as f64 / 1000.0);
        }
        intake.accepted.increment(taken.accepted);
        intake.out_of_order.increment(taken.out_of_order);
        let kinds = taken.kinds.into_iter().enumerate().filter(|(_, count)| *count > 0);
        let rejected = kinds.map(|(at, count)| {
            intake.rejected[at].increment(count);
            (Rejection::KINDS[at], count)
        });
        Receipt { accepted: taken.accepted, rejected: rejected.collect(), first: taken.first }
    }
}

/// Takes in reported events: checks them, ignores repeated ones, and counts the rest.
#[derive(Clone)]
pub struct Intake {
    node: NodeHandle,
    counted: Arc<Mutex<ServiceTable>>,
    accepted: Counter,
    out_of_order: Counter,
    rejected: Arc<[Counter; Rejection::KINDS.len()]>,
    lag: Gauge,
}

/// Counts since the last drain.
struct ServiceTable {
    /// Of the view that `services` was made of.
    number: Option<u64>,
    /// The services of that view: the next one may have the same.
    seen: Arc<BTreeMap<ServiceId, Arc<ServiceView>>>,
    services: HashTable<CountedService>,
    ids: Ids,
}

/// What an event counts as: its service, side, time, result and latency.
struct Hit {
    /// The place of its service in the table.
    bucket: usize,
    side: Side,
    /// True if it is of the time before the present routing version.
    earlier: bool,
    status: u16,
    error: bool,
    latency_us: u64,
    at_ms: u64,
    id: u64,
}

struct CountedService {
    service: ServiceId,
    stable: Box<str>,
    canary: Option<Box<str>>,
    routing_version: u64,
    /// Statuses that count as errors of the present rollout.
    error_classes: ErrorClasses,
    /// When that version came into force, in milliseconds since 1970.
    since_ms: u64,
    /// Events of the present version, and those from before it.
    present: Tally,
    earlier: Tally,
    touched: bool,
    /// The time of the newest event, in milliseconds since 1970.
    newest_ms: u64,
}

impl Intake {
    /// Returns the intake of a node; events are counted in its metrics by this `source`.
    pub fn new(node: NodeHandle, source: &'static str) -> Self {
        let rejected = Rejection::KINDS
            .map(|kind| counter!("aviary_telemetry_rejected_total", "source" => source, "kind" => kind));
        Self {
            node,
            counted: Arc::new(Mutex::new(ServiceTable {
                number: None,
                seen: Arc::default(),
                services: HashTable::new(),
                ids: Ids::default(),
            })),
            accepted: counter!("aviary_telemetry_events_total", "source" => source),
            out_of_order: counter!("aviary_telemetry_out_of_order_total", "source" => source),
            rejected: Arc::new(rejected),
            lag: gauge!("aviary_telemetry_lag_seconds", "source" => source),
        }
    }

    /// Counts events, or says why not.
    pub fn take<'b>(&self, events: impl IntoIterator<Item = Result<ReportedEvent<'b>, Rejection>>) -> Receipt {
        let mut batch = self.batch();
        events.into_iter().for_each(|event| batch.put(&event));
        batch.receipt()
    }

    /// Begins a batch whose events come one by one; nobody else's are counted meanwhile.
    pub fn batch(&self) -> IntakeBatch<'_> {
        let now_ms = self.node.published.clock().now().wall.0;
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.refresh(&self.node);
        IntakeBatch { intake: self, counted, taken: Taken::default(), now_ms, place: 0 }
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

impl ServiceTable {
    /// Follows the node's view. What was counted by the former one is kept: it belongs to its routing version.
    fn refresh(&mut self, node: &NodeHandle) {
        let number = node.published.number();
        if self.number == Some(number) {
            return;
        }
        self.number = Some(number);
        let view = node.published.view();
        if Arc::ptr_eq(&self.seen, &view.services) {
            return;
        }
        self.seen = view.services.clone();
        self.services.retain(|entry| view.services.contains_key(&entry.service));
        for id in view.services.keys() {
            let found = self.services.entry(
                xxh3_64(id.as_str().as_bytes()),
                |entry| entry.service == *id,
                CountedService::hash,
            );
            found.or_insert_with(|| CountedService::new(id)).into_mut().follow(&view, id);
        }
    }

    /// Returns where an event counts, if it isn't counted yet.
    #[inline]
    fn find(&self, event: &ReportedEvent, now_ms: u64) -> Result<Hit, Rejection> {
        let name = event.service.as_bytes();
        let bucket = self.services.find_bucket_index(xxh3_64(name), |entry| entry.service.as_str().as_bytes() == name);
        let bucket = bucket.ok_or_else(|| Rejection::Service(event.service.to_string()))?;
        if event.at_ms > now_ms + FUTURE_MS_MAX {
            return Err(Rejection::Future(event.at_ms - now_ms));
        }
        if event.at_ms + LATE_MS_MAX < now_ms {
            return Err(Rejection::Late(now_ms - event.at_ms));
        }
        let entry = self.services.get_bucket(bucket).expect("it was just found");
        let version = event.version.as_bytes();
        let side = if *version == *entry.stable.as_bytes() {
            Side::Stable
        } else if entry.canary.as_ref().is_some_and(|canary| *version == *canary.as_bytes()) {
            Side::Canary
        } else {
            let canary = entry.canary.as_ref().map(|canary| format!(" or {canary}")).unwrap_or_default();
            let expected = format!("{}{canary}", entry.stable);
            return Err(Rejection::Version { found: event.version.to_string(), expected });
        };
        Ok(Hit {
            bucket,
            side,
            earlier: event.at_ms < entry.since_ms,
            status: event.status.try_into().unwrap_or_default(),
            error: event.status.try_into().is_ok_and(|status| entry.error_classes.has(status)),
            latency_us: event.latency_us,
            at_ms: event.at_ms,
            id: Ids::hash(event.id.as_bytes()),
        })
    }

    /// Counts what was found, and knows the ids from then on.
    fn count(&mut self, taken: &mut Taken) {
        self.ids.fetch(taken.hits.iter().map(|(_, hit)| hit.id));
        let mut hits = std::mem::take(&mut taken.hits);
        for (place, hit) in hits.drain(..) {
            if hit.id != NO_ID && !self.ids.is_new(hit.id) {
                taken.reject(place, &Rejection::Duplicate);
                continue;
            }
            let entry = self.services.get_bucket_mut(hit.bucket).expect("it was just found");
            entry.touched = true;
            let tally = if hit.earlier { &mut entry.earlier } else { &mut entry.present };
            let counts = match hit.side {
                Side::Stable => &mut tally.stable,
                Side::Canary => &mut tally.canary,
            };
            counts.record(hit.latency_us, hit.error);
            counts.classes.add(hit.status);
            taken.out_of_order += u64::from(hit.at_ms < entry.newest_ms);
            entry.newest_ms = entry.newest_ms.max(hit.at_ms);
            taken.accepted += 1;
            taken.newest_ms = taken.newest_ms.max(hit.at_ms);
        }
        taken.hits = hits;
    }

    fn drain(&mut self) -> Vec<Observation> {
        let mut observations = Vec::new();
        for entry in self.services.iter_mut() {
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

impl CountedService {
    fn hash(&self) -> u64 {
        xxh3_64(self.service.as_str().as_bytes())
    }

    fn new(id: &ServiceId) -> Self {
        Self {
            service: id.clone(),
            stable: Box::default(),
            canary: None,
            routing_version: 1,
            error_classes: ErrorClasses::default(),
            since_ms: 0,
            present: Tally::default(),
            earlier: Tally::default(),
            touched: false,
            newest_ms: 0,
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
        self.error_classes = view.services[id].service.rollout.spec.error_classes;
        self.since_ms = routing.timestamp.0;
    }
}
