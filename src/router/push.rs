//! Push mode: each record is posted to the data plane, and done once that answers 2xx.
//!
//! Records of a key are posted one after the other, others beside each other. A record that is posted again goes to the version
//! that it was assigned; the data plane may still give it to stable instead, as it may any request. At least once: after a crash the
//! last batch is posted again, under the same idempotency keys.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tracing::warn;

use crate::backoff::Backoff;
use crate::domain::assignment::TicketHash;
use crate::domain::side::Side;
use crate::domain::split::Ticket;
use crate::domain::weights::Weight;
use crate::ports::{NotDone, OutsideError, Post, PostSource, Posted};

/// First pause before a record is posted again.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest pause between two tries of a record.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Settings of push mode, from the router's file.
#[derive(Debug, Clone)]
pub struct PushPlan {
    /// Whether a key decides who gets a record.
    pub keyed: bool,
    /// How often a record is posted before it is given up.
    pub attempts: u32,
    /// Records under way at a time.
    pub in_flight: usize,
    /// Most records read before they are committed.
    pub batch_max: usize,
    /// How long records are waited for.
    pub interval: Duration,
}

/// Result of a batch of records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pushed {
    /// Records done, by who answered.
    pub done: BTreeMap<String, u64>,
    /// Number of records sent to the dead-letter topic.
    pub given_up: u64,
}

/// Why a record is given up.
#[derive(Debug, thiserror::Error)]
enum GivenUp {
    /// The data plane refused it.
    #[error("{}", .last.why)]
    Refused { last: NotDone },
    /// It was not done in as many attempts as are allowed.
    #[error("{} ({attempts} times)", .last.why)]
    OutOfAttempts { last: NotDone, attempts: u32 },
}

/// A record, whom it goes to, and what became of it.
struct Sent {
    record: Posted,
    side: Side,
    done: Result<String, GivenUp>,
}

/// Posts records over HTTP, those of one key one after another.
pub struct Pusher {
    source: Box<dyn PostSource>,
    post: Arc<dyn Post>,
    plan: PushPlan,
    runtime: tokio::runtime::Runtime,
}

impl Pusher {
    /// Returns a pusher; errors are those of the system.
    pub fn new(source: Box<dyn PostSource>, post: Arc<dyn Post>, plan: PushPlan) -> Result<Self, OutsideError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|why| OutsideError::new("push", why))?;
        Ok(Self { source, post, plan, runtime })
    }

    /// Posts a batch of records under this weight, until each is done or given up, and commits it. `hash` makes tickets of keys, as
    /// the data plane does for the service's rollout.
    pub fn turn(&mut self, weight: Weight, hash: TicketHash) -> Result<Pushed, OutsideError> {
        let records = self.source.read(self.plan.interval, self.plan.batch_max)?;
        if records.is_empty() {
            return Ok(Pushed::default());
        }
        // The whole batch is one weight's.
        let mut shards: Vec<Vec<(Posted, Side)>> = vec![Vec::new(); self.plan.in_flight];
        for record in records.iter().cloned() {
            let key = record.key.as_deref().filter(|_| self.plan.keyed);
            let side = Ticket::of(hash, key, record.partition, record.offset).side(weight);
            shards[shard(&record, self.plan.in_flight)].push((record, side));
        }
        let (post, attempts) = (self.post.clone(), self.plan.attempts);
        let sent = self.runtime.block_on(async move {
            let mut tasks = JoinSet::new();
            for shard in shards.into_iter().filter(|shard| !shard.is_empty()) {
                let post = post.clone();
                tasks.spawn(async move {
                    let mut sent = Vec::new();
                    for (record, side) in shard {
                        let done = until_done(post.as_ref(), &record, side, attempts).await;
                        sent.push(Sent { record, side, done });
                    }
                    sent
                });
            }
            tasks.join_all().await
        });
        let mut pushed = Pushed::default();
        for Sent { record, side, done } in sent.into_iter().flatten() {
            match done {
                Ok(who) => *pushed.done.entry(who).or_default() += 1,
                Err(why) => {
                    warn!(
                        partition = record.partition,
                        offset = record.offset,
                        side = side.word(),
                        "record given up: {why}"
                    );
                    self.source.give_up(&record, &why.to_string())?;
                    pushed.given_up += 1;
                }
            }
        }
        self.source.commit(&records)?;
        Ok(pushed)
    }
}

/// Records of one key share a shard; those without one are spread.
fn shard(record: &Posted, shards: usize) -> usize {
    let ticket = match &record.key {
        Some(key) => xxhash_rust::xxh3::xxh3_64(key),
        None => xxhash_rust::xxh3::xxh3_64(&record.offset.to_le_bytes()),
    };
    (ticket % shards as u64) as usize
}

async fn until_done(post: &dyn Post, record: &Posted, side: Side, attempts: u32) -> Result<String, GivenUp> {
    let mut retry = Backoff::new(RETRY_MIN, RETRY_MAX);
    for attempt in 1..=attempts {
        match post.post(record, side).await {
            Ok(who) => return Ok(who),
            Err(last) if last.refused => return Err(GivenUp::Refused { last }),
            Err(last) if attempt == attempts => return Err(GivenUp::OutOfAttempts { last, attempts }),
            Err(_) => tokio::time::sleep(retry.wait()).await,
        }
    }
    unreachable!("the last attempt returns")
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::ports::Later;

    #[derive(Clone, Default)]
    struct Told(Arc<Mutex<Vec<String>>>);

    impl Told {
        fn tell(&self, what: String) {
            self.0.lock().unwrap().push(what);
        }
    }

    struct Topic(Vec<Posted>, Told);

    impl PostSource for Topic {
        fn read(&mut self, _: Duration, most: usize) -> Result<Vec<Posted>, OutsideError> {
            Ok(self.0.drain(..most.min(self.0.len())).collect())
        }

        fn give_up(&mut self, record: &Posted, why: &str) -> Result<(), OutsideError> {
            self.1.tell(format!("gave up {}: {why}", record.offset));
            Ok(())
        }

        fn commit(&mut self, records: &[Posted]) -> Result<(), OutsideError> {
            self.1.tell(format!("committed {}", records.len()));
            Ok(())
        }
    }

    /// Refuses offsets of 7 and a multiple of 10, fails others of 3 and a multiple of 10 twice.
    struct Plane(Told, Mutex<BTreeMap<i64, (u32, Side)>>);

    impl Post for Plane {
        fn post<'a>(&'a self, record: &'a Posted, side: Side) -> Later<'a, Result<String, NotDone>> {
            Box::pin(async move {
                tokio::task::yield_now().await;
                let tries = {
                    let mut tries = self.1.lock().unwrap();
                    let (tries, before) = tries.entry(record.offset).or_insert((0, side));
                    assert_eq!(*before, side, "posted again, to the same version");
                    *tries += 1;
                    *tries
                };
                match record.offset % 10 {
                    7 => Err(NotDone { why: "400".into(), refused: true }),
                    3 if tries <= 2 => Err(NotDone { why: "503".into(), refused: false }),
                    _ => {
                        let key = String::from_utf8(record.key.clone().unwrap()).unwrap();
                        self.0.tell(format!("{key} {}", record.offset));
                        Ok(side.word().into())
                    }
                }
            })
        }
    }

    #[test]
    fn records_are_committed_when_each_is_done_or_given_up_and_keys_keep_their_order() {
        let told = Told::default();
        let record = |offset: i64| Posted {
            partition: 0,
            offset,
            key: Some(format!("k{}", offset % 5).into_bytes()),
            value: None,
            headers: Vec::new(),
        };
        let source = Box::new(Topic((0..40).map(record).collect(), told.clone()));
        let post = Arc::new(Plane(told.clone(), Mutex::default()));
        let interval = Duration::ZERO;
        let plan = PushPlan { keyed: true, attempts: 3, in_flight: 3, batch_max: 40, interval };
        let mut pusher = Pusher::new(source, post, plan).unwrap();
        let pushed = pusher.turn(Weight::from_bp(5000).unwrap(), TicketHash::Salted(1)).unwrap();
        assert_eq!((pushed.given_up, pushed.done.values().sum::<u64>()), (4, 36));
        let told = told.0.lock().unwrap();
        assert_eq!(told.last().unwrap(), "committed 40");
        assert!(told.contains(&"gave up 17: 400".to_string()));
        for key in 0..5 {
            let of_key = told.iter().filter_map(|line| line.strip_prefix(&format!("k{key} "))?.parse::<i64>().ok());
            let order: Vec<i64> = of_key.collect();
            assert!(order.is_sorted(), "{order:?}");
        }
    }
}
