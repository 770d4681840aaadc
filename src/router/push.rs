//! Push mode: each record is posted to the data plane, and done once that answers 2xx.
//!
//! Records of a key are posted one after the other, others beside each other. A record that is posted again goes to the version
//! that it was assigned; the data plane may still give it to stable instead, as it may any request. At least once: after a crash the
//! last batch is posted again, under the same idempotency keys.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tracing::warn;

use crate::backoff::Backoff;
use crate::domain::assignment::TicketHash;
use crate::domain::side::Side;
use crate::domain::split::Ticket;
use crate::domain::weights::Weight;
use crate::ports::{NotDone, OutsideError, Post, PostAnswer, PostSource, Posted};

/// First pause before a record is posted again.
const RETRY_MIN: Duration = Duration::from_millis(100);
/// Longest pause between two tries of a record.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Longest pause that an answer can ask for by `Retry-After`.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);

/// Settings of push mode, from the router's file.
#[derive(Debug, Clone)]
pub struct PushPlan {
    /// Whether a key decides who gets a record.
    pub keyed: bool,
    /// How many answers that fail a record may get before it is given up. A post without an answer says nothing of it.
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
    /// Why a dead letter could not be written: the next turn tries again, and posts nothing before that.
    pub blocked: Option<OutsideError>,
}

/// A batch of which everything was posted, and some dead letters are left to be written.
struct Batch {
    records: Vec<Posted>,
    /// Records that are given up, in their order, with the reasons.
    letters: VecDeque<(Posted, String)>,
    /// What lies before the first of them was committed.
    begun: bool,
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
    batch: Option<Batch>,
    runtime: tokio::runtime::Runtime,
}

impl Pusher {
    /// Returns a pusher; errors are those of the system.
    pub fn new(source: Box<dyn PostSource>, post: Arc<dyn Post>, plan: PushPlan) -> Result<Self, OutsideError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|why| OutsideError::new("push", why))?;
        Ok(Self { source, post, plan, batch: None, runtime })
    }

    /// Posts a batch of records under this weight, until each is done or given up, and commits it. `hash` makes tickets of keys, as
    /// the data plane does for the service's rollout.
    ///
    /// # Errors
    /// When records can't be read or committed. A dead letter that can't be written is told in the result.
    pub fn turn(&mut self, weight: Weight, hash: TicketHash) -> Result<Pushed, OutsideError> {
        let mut pushed = Pushed::default();
        if self.batch.is_none() {
            let records = self.source.read(self.plan.interval, self.plan.batch_max)?;
            if records.is_empty() {
                return Ok(pushed);
            }
            self.batch = Some(self.post_all(records, weight, hash, &mut pushed));
        }
        self.finish(&mut pushed)?;
        Ok(pushed)
    }

    /// Posts records until each is done or given up.
    fn post_all(&mut self, records: Vec<Posted>, weight: Weight, hash: TicketHash, pushed: &mut Pushed) -> Batch {
        // The whole batch is one weight's.
        let mut shards: Vec<Vec<(Posted, Side)>> = vec![Vec::new(); self.plan.in_flight];
        for record in records.iter().cloned() {
            let key = record.key.as_deref().filter(|_| self.plan.keyed);
            let side = Ticket::of(hash, key, record.partition, record.offset).side(weight);
            shards[shard(&record, self.plan.in_flight)].push((record, side));
        }
        let (post, attempts, silence) = (self.post.clone(), self.plan.attempts, Arc::new(AtomicBool::new(false)));
        let sent = self.runtime.block_on(async move {
            let mut tasks = JoinSet::new();
            for shard in shards.into_iter().filter(|shard| !shard.is_empty()) {
                let (post, silence) = (post.clone(), silence.clone());
                tasks.spawn(async move {
                    let mut sent = Vec::new();
                    for (record, side) in shard {
                        let done = until_done(post.as_ref(), &record, side, attempts, &silence).await;
                        sent.push(Sent { record, side, done });
                    }
                    sent
                });
            }
            tasks.join_all().await
        });
        let mut letters = Vec::new();
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
                    letters.push((record, why.to_string()));
                }
            }
        }
        letters.sort_by_key(|(record, _)| (record.partition, record.offset));
        Batch { records, letters: letters.into(), begun: false }
    }

    /// Writes the batch's dead letters and commits it. Where a letter can't be written, what lies before it is committed.
    fn finish(&mut self, pushed: &mut Pushed) -> Result<(), OutsideError> {
        let Some(mut batch) = self.batch.take() else { return Ok(()) };
        while let Some((record, why)) = batch.letters.front() {
            if let Err(why) = self.source.give_up(record, why) {
                if !std::mem::replace(&mut batch.begun, true) {
                    self.source.commit(&before(&batch))?;
                }
                pushed.blocked = Some(why);
                self.batch = Some(batch);
                return Ok(());
            }
            pushed.given_up += 1;
            (batch.letters, batch.begun) = (batch.letters.split_off(1), false);
        }
        self.source.commit(&batch.records)
    }
}

/// Returns the records of a batch that lie before its dead letters, in each partition.
fn before(batch: &Batch) -> Vec<Posted> {
    let is_before = |record: &&Posted| {
        let mut letters = batch.letters.iter().filter(|(letter, _)| letter.partition == record.partition);
        letters.all(|(letter, _)| record.offset < letter.offset)
    };
    batch.records.iter().filter(is_before).cloned().collect()
}

/// Records of one key share a shard; those without one are spread.
fn shard(record: &Posted, shards: usize) -> usize {
    let ticket = match &record.key {
        Some(key) => xxhash_rust::xxh3::xxh3_64(key),
        None => xxhash_rust::xxh3::xxh3_64(&record.offset.to_le_bytes()),
    };
    (ticket % shards as u64) as usize
}

/// Posts a record until it is done, refused, or has failed as often as it may. `silence` is set once it was said that nobody answers.
async fn until_done(
    post: &dyn Post,
    record: &Posted,
    side: Side,
    attempts: u32,
    silence: &AtomicBool,
) -> Result<String, GivenUp> {
    let mut retry = Backoff::new(RETRY_MIN, RETRY_MAX);
    let (mut failed, mut silent) = (0, 0);
    loop {
        let last = match post.post(record, side).await {
            Ok(who) => return Ok(who),
            Err(last) => last,
        };
        let mut wait = retry.wait();
        match last.answer {
            PostAnswer::Refused => return Err(GivenUp::Refused { last }),
            PostAnswer::Missing => {
                silent += 1;
                if silent == attempts && !silence.swap(true, Ordering::Relaxed) {
                    warn!("nobody answers, and records wait for that: {}", last.why);
                }
            }
            PostAnswer::Failed { retry_after } => {
                failed += 1;
                if failed == attempts {
                    return Err(GivenUp::OutOfAttempts { last, attempts });
                }
                wait = wait.max(retry_after.unwrap_or_default().min(RETRY_AFTER_MAX));
            }
        }
        tokio::time::sleep(wait).await;
    }
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

    /// Records, what became of them, and how many dead letters are not written before one is.
    struct Topic(Vec<Posted>, Told, u32);

    impl PostSource for Topic {
        fn read(&mut self, _: Duration, most: usize) -> Result<Vec<Posted>, OutsideError> {
            Ok(self.0.drain(..most.min(self.0.len())).collect())
        }

        fn give_up(&mut self, record: &Posted, why: &str) -> Result<(), OutsideError> {
            if self.2 > 0 {
                self.2 -= 1;
                return Err(OutsideError::new("topic dead", "too large"));
            }
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
                    7 => Err(NotDone { why: "400".into(), answer: PostAnswer::Refused }),
                    3 if tries <= 2 => Err(failed("503")),
                    5 if tries <= 4 => Err(NotDone { why: "refused".into(), answer: PostAnswer::Missing }),
                    8 if record.offset == 38 => Err(failed("500")),
                    _ => {
                        let key = String::from_utf8(record.key.clone().unwrap()).unwrap();
                        self.0.tell(format!("{key} {}", record.offset));
                        Ok(side.word().into())
                    }
                }
            })
        }
    }

    fn failed(why: &str) -> NotDone {
        NotDone { why: why.into(), answer: PostAnswer::Failed { retry_after: None } }
    }

    fn pusher(letters_lost: u32) -> (Pusher, Told) {
        let told = Told::default();
        let record = |offset: i64| Posted {
            partition: 0,
            offset,
            key: Some(format!("k{}", offset % 5).into_bytes()),
            value: None,
            headers: Vec::new(),
            time_ms: None,
        };
        let source = Box::new(Topic((0..40).map(record).collect(), told.clone(), letters_lost));
        let post = Arc::new(Plane(told.clone(), Mutex::default()));
        let interval = Duration::ZERO;
        let plan = PushPlan { keyed: true, attempts: 3, in_flight: 3, batch_max: 40, interval };
        (Pusher::new(source, post, plan).unwrap(), told)
    }

    #[test]
    fn records_are_committed_when_each_is_done_or_given_up_and_keys_keep_their_order() {
        let (mut pusher, told) = pusher(0);
        let pushed = pusher.turn(Weight::from_bp(5000).unwrap(), TicketHash::Salted(1)).unwrap();
        assert_eq!((pushed.given_up, pushed.done.values().sum::<u64>()), (5, 35), "no answer uses up no attempt");
        let told = told.0.lock().unwrap();
        assert_eq!(told.last().unwrap(), "committed 40");
        assert!(told.contains(&"gave up 17: 400".to_string()));
        assert!(told.contains(&"gave up 38: 500 (3 times)".to_string()));
        for key in 0..5 {
            let of_key = told.iter().filter_map(|line| line.strip_prefix(&format!("k{key} "))?.parse::<i64>().ok());
            let order: Vec<i64> = of_key.collect();
            assert!(order.is_sorted(), "{order:?}");
        }
    }

    #[test]
    fn a_dead_letter_that_is_not_written_is_tried_again_and_nothing_is_posted_twice() {
        let (mut pusher, told) = pusher(2);
        let weight = Weight::from_bp(5000).unwrap();
        for _ in 0..2 {
            let blocked =
                pusher.turn(weight, TicketHash::Salted(1)).unwrap().blocked.expect("the letter was not written");
            assert_eq!(blocked.to_string(), "topic dead: too large");
        }
        assert_eq!(pusher.turn(weight, TicketHash::Salted(1)).unwrap().given_up, 5);
        let told = told.0.lock().unwrap();
        let commits: Vec<&String> = told.iter().filter(|line| line.starts_with("committed")).collect();
        assert_eq!(commits, ["committed 7", "committed 40"], "what lies before the letter, once; then all");
        let posted = told.iter().filter(|line| line.starts_with('k'));
        assert_eq!(posted.count(), 35, "each once");
    }
}
