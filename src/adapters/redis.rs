//! Redis: the decisions of a cluster for other readers. A copy, never the truth: the log is that.
//!
//! Keys of a cluster, all in one hash slot:
//!
//! | key | type | what |
//! |---|---|---|
//! | `aviary:{CLUSTER}:rollout:SERVICE` | hash | the routing as decided last: `sequence`, `kind`, `routing_version`, `stable`, `canary`, `canary_weight_bp`, `transaction_id`, `reasons`, `decided_ms` |
//! | `aviary:{CLUSTER}:window:SERVICE:ROLLOUT:TO_MS` | string | what the window that ended then says: `sequence verdict`; kept for a week |
//! | `aviary:{CLUSTER}:published` | hash | `publisher`: who publishes; `through`: the place in the log |
//!
//! One script writes a decision, and nothing of it unless its publisher is still the only one and the decision is newer; a rollout's
//! state is never replaced by an older one, whatever became of the other keys. `sequence` is the version that orders all of it: the
//! slot that the nodes decided, whose content no ballot can change any more.

use std::time::Duration;

use redis::{Client, Connection, RedisError, Script};

use crate::domain::ids::ClusterId;
use crate::ports::{DecisionSink, GuardProbe, OutsideError};
use crate::protocol::record::{Sequence, Slot};
use crate::schema::v1::Decision;

/// Longest wait for a connection, and for an answer.
const ANSWER_MAX: Duration = Duration::from_millis(500);
/// How long a window's verdict is kept, in seconds.
const WINDOW_KEPT_S: u64 = 7 * 24 * 3600;
/// How long what a probe wrote is kept, in seconds.
const PROBE_KEPT_S: u64 = 60;

/// Takes over: ARGV is who publishes from now on, a name that nobody had before, nor will when the key is gone. Returns the place.
const TAKE_OVER: &str = "
redis.call('HSET', KEYS[1], 'publisher', ARGV[1])
return redis.call('HGET', KEYS[1], 'through')
";

/// Publishes one decision. KEYS: published, rollout, window. ARGV: publisher, sequence, verdict or '', seconds, field, value, …
/// Returns 1 when it was written, 0 when it was before, -1 when another one publishes, -2 when the window was decided otherwise.
const PUBLISH: &str = "
if redis.call('HGET', KEYS[1], 'publisher') ~= ARGV[1] then return -1 end
local through = tonumber(redis.call('HGET', KEYS[1], 'through') or '0')
if tonumber(ARGV[2]) <= through then return 0 end
if ARGV[3] ~= '' then
  local decided = redis.call('GET', KEYS[3])
  local verdict = ARGV[2] .. ' ' .. ARGV[3]
  if decided and decided ~= verdict then return -2 end
  redis.call('SET', KEYS[3], verdict, 'EX', ARGV[4])
end
local newest = tonumber(redis.call('HGET', KEYS[2], 'sequence') or '0')
if tonumber(ARGV[2]) > newest then
  for i = 5, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
end
redis.call('HSET', KEYS[1], 'through', ARGV[2])
return 1
";

/// Moves the place on where nothing was to be published.
const MOVE_ON: &str = "
if redis.call('HGET', KEYS[1], 'publisher') ~= ARGV[1] then return -1 end
if tonumber(ARGV[2]) > tonumber(redis.call('HGET', KEYS[1], 'through') or '0') then
  redis.call('HSET', KEYS[1], 'through', ARGV[2])
end
return 1
";

/// Returns what Redis answered, as an error.
fn outside(error: &RedisError) -> OutsideError {
    OutsideError::new("redis", error)
}

fn connect(client: &Client) -> Result<Connection, RedisError> {
    let connection = client.get_connection_with_timeout(ANSWER_MAX)?;
    connection.set_read_timeout(Some(ANSWER_MAX))?;
    connection.set_write_timeout(Some(ANSWER_MAX))?;
    Ok(connection)
}

/// Returns a client of `redis://[user:password@]host:port[/db]`.
pub fn client(url: &str) -> Result<Client, OutsideError> {
    Client::open(url).map_err(|error| outside(&error))
}

/// Returns what a cluster's keys begin with.
fn prefix(cluster: ClusterId) -> String {
    format!("aviary:{{{cluster}}}")
}

/// Writes decisions to Redis, each by one script.
pub struct RedisDecisions {
    client: Client,
    prefix: String,
    /// The connection, and as whom it publishes.
    open: Option<(Connection, String)>,
}

impl RedisDecisions {
    /// Returns a publisher of a cluster's decisions.
    pub fn new(client: Client, cluster: ClusterId) -> Self {
        Self { client, prefix: prefix(cluster), open: None }
    }

    fn published(&self) -> String {
        format!("{}:published", self.prefix)
    }

    fn publish_one(
        &self,
        connection: &mut Connection,
        publisher: &str,
        decision: &Decision,
    ) -> Result<i64, RedisError> {
        let Decision { service, sequence, .. } = decision;
        let window = decision.window.as_ref();
        let verdict = window.map(|window| window.verdict().as_str_name().trim_start_matches("VERDICT_"));
        let to_ms = window.map_or(0, |window| window.to_ms);
        let script = Script::new(PUBLISH);
        let mut call = script.prepare_invoke();
        call.key(self.published()).key(format!("{}:rollout:{service}", self.prefix));
        call.key(format!("{}:window:{service}:{}:{to_ms}", self.prefix, decision.rollout_generation));
        call.arg(publisher).arg(sequence).arg(verdict.unwrap_or("")).arg(WINDOW_KEPT_S);
        if window.is_none() {
            let at = decision.decided_time.unwrap_or_default();
            let decided_ms = at.seconds * 1000 + i64::from(at.nanos) / 1_000_000;
            call.arg("sequence").arg(sequence);
            call.arg("kind").arg(decision.kind().as_str_name().trim_start_matches("DECISION_KIND_"));
            call.arg("routing_version").arg(decision.routing_version);
            call.arg("stable").arg(&decision.stable_version).arg("canary").arg(&decision.canary_version);
            call.arg("canary_weight_bp").arg(decision.canary_weight_bp);
            call.arg("transaction_id").arg(&decision.transaction_id);
            call.arg("reasons").arg(decision.reasons.join("; ")).arg("decided_ms").arg(decided_ms);
        }
        call.invoke(connection)
    }
}

impl DecisionSink for RedisDecisions {
    fn open(&mut self) -> Result<Option<Slot>, OutsideError> {
        self.open = None;
        let mut connection = connect(&self.client).map_err(|error| outside(&error))?;
        let publisher = format!("{:032x}", rand::random::<u128>());
        let taken = Script::new(TAKE_OVER).key(self.published()).arg(&publisher).invoke(&mut connection);
        let through: Option<u64> = taken.map_err(|error| outside(&error))?;
        self.open = Some((connection, publisher));
        // The rest of a slot that was published in part is read again; the script passes over what was written.
        Ok(through.map(|through| Slot(Sequence(through).next_slot().0.saturating_sub(1))))
    }

    fn publish(&mut self, decisions: &[Decision], through: Slot) -> Result<(), OutsideError> {
        let Some((mut connection, publisher)) = self.open.take() else {
            return Err(OutsideError::new("redis", "not open"));
        };
        for decision in decisions {
            match self.publish_one(&mut connection, &publisher, decision).map_err(|error| outside(&error))? {
                -1 => return Err(OutsideError::new("redis", "another node publishes by now")),
                -2 => {
                    let why = format!("the window of decision {} was decided otherwise", decision.sequence);
                    return Err(OutsideError::new("redis", why));
                }
                _ => {}
            }
        }
        let script = Script::new(MOVE_ON);
        let moved = script
            .key(self.published())
            .arg(&publisher)
            .arg(Sequence::last_of(through).0)
            .invoke::<i64>(&mut connection);
        if moved.map_err(|error| outside(&error))? < 0 {
            return Err(OutsideError::new("redis", "another node publishes by now"));
        }
        self.open = Some((connection, publisher));
        Ok(())
    }
}

/// Asks whether Redis is there.
pub struct RedisProbe {
    client: Client,
    /// Written to: a Redis that is full, or follows another, answers and takes nothing.
    key: String,
    connection: Option<Connection>,
}

impl RedisProbe {
    /// Returns a probe of what a cluster's publisher needs.
    pub fn new(client: Client, cluster: ClusterId) -> Self {
        Self { client, key: format!("{}:probe", prefix(cluster)), connection: None }
    }
}

impl GuardProbe for RedisProbe {
    fn probe(&mut self) -> Result<(), OutsideError> {
        let mut ask = || {
            let mut connection = match self.connection.take() {
                Some(connection) => connection,
                None => connect(&self.client)?,
            };
            redis::cmd("SET").arg(&self.key).arg(1).arg("EX").arg(PROBE_KEPT_S).query::<String>(&mut connection)?;
            self.connection = Some(connection);
            Ok(())
        };
        ask().map_err(|error: RedisError| outside(&error))
    }
}
