//! A rollout as its author wrote it: the two versions, the stages, how traffic is assigned and judged.
//!
//! `file` is its shape as people write it, [`Manifest`] is how the log keeps it.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::analysis::Analysis;
use super::assignment::{HashFunction, Salt, UserAssignment};
use super::classes::ErrorClasses;
use super::ids::{ServiceId, VersionId};
use super::limits::{self, OutOfRange};
use super::weights::Weight;

pub mod file;
mod known;
mod manifest;

pub use manifest::{Manifest, ManifestError, UnknownKey};

/// One version of a service and where it is served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Backend {
    /// Name of the version; routing, metrics and answers use it.
    pub version: VersionId,
    /// Base URLs (`http://host:port`, `h2c://host:port` for HTTP/2); empty: the node answers the assignment itself, as JSON,
    /// and what it answers is no evidence.
    pub urls: Vec<String>,
    /// Probe of each server; none: only its answers decide whether it is ejected.
    pub health_check: Option<HealthCheck>,
}

/// HTTP probe that a healthy server answers with 2xx.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HealthCheck {
    /// Path of the probe's GET request.
    pub path: String,
    /// Interval of the probes, in milliseconds.
    pub interval_ms: u64,
}

impl Backend {
    /// Returns a version that these servers serve.
    pub fn new(version: VersionId, urls: Vec<String>) -> Self {
        Self { version, urls, health_check: None }
    }

    /// Returns true when both are the same version on the same servers, in any order, with the same health check.
    pub fn is_same(&self, other: &Self) -> bool {
        let sorted = |urls: &[String]| {
            let mut urls = urls.to_vec();
            urls.sort();
            urls
        };
        self.version == other.version
            && self.health_check == other.health_check
            && sorted(&self.urls) == sorted(&other.urls)
    }

    /// Returns its servers and its health check in words.
    pub fn servers(&self) -> String {
        let urls = if self.urls.is_empty() { "no server of its own".into() } else { self.urls.join(", ") };
        match &self.health_check {
            Some(check) => format!("{urls} (healthCheck {} each {} ms)", check.path, check.interval_ms),
            None => urls,
        }
    }
}

/// A step of the rollout: a weight and the wait before the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// The canary's share at this stage.
    pub weight: Weight,
    /// Minimum time at this stage, in milliseconds.
    pub hold_ms: u64,
    /// True if the rollout waits here for an operator's `promote`.
    pub manual: bool,
}

/// Part of a request that assigns it to a version, always the same one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum HashOn {
    /// The value of this request header (lower case); requests without it are drawn at random.
    Header(String),
    /// The value of this cookie.
    Cookie(String),
    /// The address that the connection comes from.
    ClientAddress,
}

/// How much of a service a node carries at once, so that one service or server doesn't take what others need. Each node counts by
/// itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLimits {
    /// Requests of the service at once; none: as many as the node's own limit leaves.
    pub max_requests: Option<u64>,
    /// Requests at each of its servers at once; none: no limit. An HTTP/1.1 connection carries one of them.
    pub max_requests_per_server: Option<u64>,
    /// Requests that may wait for a place at a version's servers.
    pub max_pending: u64,
    /// How long each of them may wait, in milliseconds.
    pub pending_timeout_ms: u64,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self { max_requests: None, max_requests_per_server: None, max_pending: 100, pending_timeout_ms: 1_000 }
    }
}

/// The cookie that the data plane gives to clients without it, so that they keep their version from the first answer on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetCookie {
    /// How long a client keeps it, in milliseconds; none: as long as its session.
    pub max_age_ms: Option<u64>,
}

/// Time limits of a service's requests, in milliseconds; none: the node's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timeouts {
    /// Longest wait for the first byte of an answer.
    pub first_byte_ms: Option<u64>,
    /// Longest silence within an answer's body.
    pub idle_ms: Option<u64>,
    /// Longest time to the answer's last byte; 0: without end.
    pub total_ms: Option<u64>,
}

/// Requests with all of these header values (name in lower case, exact value) are the canary's while it has traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Match {
    /// Header names in lower case, and their exact values.
    pub headers: Vec<(String, String)>,
}

/// Behaviour of a node that has lost its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnPartition {
    /// The node sends all traffic to stable.
    Stable,
    /// Keep the last weights: for stables that can't take the whole load at once.
    Hold,
}

/// A rollout as its file describes it. [`RolloutSpec::checked`] makes it a [`Manifest`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RolloutSpec {
    /// Service that the rollout changes.
    pub service: ServiceId,
    /// Labels that users select services by; kept, and never interpreted.
    pub labels: BTreeMap<String, String>,
    /// Notes of other tools; kept, and never interpreted.
    pub annotations: BTreeMap<String, String>,
    /// Version that serves before the rollout.
    pub stable: Backend,
    /// Version that the rollout introduces.
    pub canary: Backend,
    /// True if the file says `answer: node` of both versions: no server answers, so that nodes do.
    pub node_answers: bool,
    /// The stages: not empty, with weights that never decrease, the last one 100 %.
    pub stages: Vec<Stage>,
    /// How long the canary is analysed at 100 % before it becomes stable, in milliseconds.
    pub bake_ms: u64,
    /// Stickiness; none: a uniform draw for each request.
    pub hash_on: Option<HashOn>,
    /// The cookie of `hash_on` is set where a client has none; none: applications set it.
    pub set_cookie: Option<SetCookie>,
    /// Function that makes tickets of the users that `hash_on` tells apart.
    pub hash_function: HashFunction,
    /// Salt of these tickets.
    pub salt: Salt,
    /// Requests that go to the canary whatever the draw.
    pub matches: Vec<Match>,
    /// Time limits of its requests.
    pub timeouts: Timeouts,
    /// A request ends at its server, too, once an HTTP/1.x client has ended its side of the connection.
    pub cancel_on_disconnect: bool,
    /// The share of stable's requests that the canary gets a copy of, its answers unused.
    pub mirror: Weight,
    /// How much of the service a node carries at once.
    pub limits: RequestLimits,
    /// How long a server that was ejected gets a growing share of its requests, in milliseconds; 0: all at once.
    pub slow_start_ms: u64,
    /// Rules by which the canary is judged.
    pub analysis: Analysis,
    /// Statuses that count as errors, of both versions.
    pub error_classes: ErrorClasses,
    /// How long canary traffic outlives the last contact with a majority, in milliseconds.
    pub lease_ms: u64,
    /// Behaviour of a node whose lease has ended.
    pub on_partition: OnPartition,
    /// Longest time without progress before the rollout is rolled back, in milliseconds.
    pub progress_deadline_ms: u64,
}

/// Reason for which a rollout file is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Stable and canary name the same version.
    #[error("canary version is {0}, expected another version than stable")]
    SameVersion(VersionId),
    /// The file has no step with a weight.
    #[error("steps contain no setWeight, expected at least one")]
    NoStages,
    /// The weight of a step is lower than that of the step before.
    #[error("step weight {found} follows {before}, expected weights that never decrease")]
    Falling {
        /// Weight of the step before.
        before: Weight,
        /// Weight of the step, which is lower.
        found: Weight,
    },
    /// The weight of the last step is not 100 %.
    #[error("last step weight is {0}, expected 100%")]
    NotWhole(Weight),
    /// One version has servers, and the other has none.
    #[error(
        "{with} has a url and {without} has none, expected one of both: without a server, nodes would answer for {without} themselves"
    )]
    OneSided {
        /// Version with servers.
        with: VersionId,
        /// Version without any.
        without: VersionId,
    },
    /// No version has servers, and the file doesn't say that this is meant.
    #[error(
        "{stable} and {canary} have no url, expected one of both, or `answer: node` in both if nodes are to answer themselves"
    )]
    NoServers {
        /// The stable version.
        stable: VersionId,
        /// The canary version.
        canary: VersionId,
    },
    /// A required part is missing.
    #[error("{0}")]
    Missing(&'static str),
    /// A list is longer than a record allows.
    #[error("{what}: found {found}, expected at most {max}")]
    TooMany {
        /// The list, as the file names it.
        what: &'static str,
        /// Number of entries that the file has.
        found: usize,
        /// Number of entries that a record holds at most.
        max: usize,
    },
    /// The file of the rollout can't be read back.
    #[error("{0}")]
    Unwritable(String),
    /// A number of the analysis or a duration beyond its limits.
    #[error(transparent)]
    Number(#[from] OutOfRange),
}

impl RolloutSpec {
    /// Returns a rollout whose file names its versions and steps alone: all else as by default.
    pub fn new(service: ServiceId, stable: Backend, canary: Backend, stages: Vec<Stage>) -> Self {
        Self {
            service,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            stable,
            canary,
            node_answers: false,
            stages,
            bake_ms: 60_000,
            hash_on: None,
            set_cookie: None,
            hash_function: HashFunction::default(),
            salt: Salt::default(),
            matches: Vec::new(),
            timeouts: Timeouts::default(),
            cancel_on_disconnect: false,
            mirror: Weight::ZERO,
            limits: RequestLimits::default(),
            slow_start_ms: 0,
            analysis: Analysis::default(),
            error_classes: ErrorClasses::default(),
            lease_ms: 2_000,
            on_partition: OnPartition::Stable,
            progress_deadline_ms: 30 * 60 * 1000,
        }
    }

    /// Returns how its users are assigned.
    pub fn assignment(&self) -> UserAssignment {
        let salt_slot = match self.salt {
            Salt::Rollout(slot) => slot,
            Salt::Unsaid | Salt::None => None,
        };
        UserAssignment { function: self.hash_function, salt_slot }
    }

    /// Returns true where a file that says nothing about the salt gets the rollout's own: users are told apart, and by this
    /// project's function.
    pub fn takes_salt(&self) -> bool {
        self.hash_on.is_some() && self.hash_function == HashFunction::Xxh3
    }

    /// Returns this rollout as the log keeps it, or what is wrong with it.
    pub fn checked(&self) -> Result<Manifest, SpecError> {
        Manifest::of(self)
    }

    /// Checks that both versions have servers, or that the file says that neither has: `answer: node`. Files that people
    /// apply are held to that; older builds recorded others.
    pub fn check_answers(&self) -> Result<(), SpecError> {
        let (stable, canary) = (&self.stable, &self.canary);
        let one_sided = |with: &Backend, without: &Backend| {
            Err(SpecError::OneSided { with: with.version.clone(), without: without.version.clone() })
        };
        match (stable.urls.is_empty(), canary.urls.is_empty()) {
            (false, false) => Ok(()),
            (false, true) => one_sided(stable, canary),
            (true, false) => one_sided(canary, stable),
            (true, true) if self.node_answers => Ok(()),
            (true, true) => {
                Err(SpecError::NoServers { stable: stable.version.clone(), canary: canary.version.clone() })
            }
        }
    }

    /// Checks the values together. Peers check what they receive by the same rules.
    fn check(&self) -> Result<(), SpecError> {
        if self.stable.version == self.canary.version {
            return Err(SpecError::SameVersion(self.canary.version.clone()));
        }
        let at_most = |what, found, max| match found <= max {
            true => Ok(()),
            false => Err(SpecError::TooMany { what, found, max }),
        };
        at_most("steps", self.stages.len(), limits::STAGES_MAX)?;
        at_most("urls of stable", self.stable.urls.len(), limits::URLS_MAX)?;
        at_most("urls of canary", self.canary.urls.len(), limits::URLS_MAX)?;
        at_most("routing matches", self.matches.len(), limits::MATCHES_MAX)?;
        at_most("metrics", self.analysis.metrics.len(), limits::METRICS_MAX)?;
        at_most("queries", self.analysis.queries.len(), limits::QUERIES_MAX)?;
        if self.matches.iter().any(|m| m.headers.is_empty()) {
            return Err(SpecError::Missing(
                "a routing match names no header, expected at least one: it would match everything",
            ));
        }
        if self.analysis.metrics.is_empty() && self.analysis.queries.is_empty() {
            return Err(SpecError::Missing("analysis has no metrics, expected at least one: nothing would be judged"));
        }
        self.analysis.check_numbers()?;
        at_most("labels", self.labels.len(), limits::LABELS_MAX)?;
        at_most("annotations", self.annotations.len(), limits::LABELS_MAX)?;
        for pair in self.stages.windows(2) {
            if pair[1].weight < pair[0].weight {
                return Err(SpecError::Falling { before: pair[0].weight, found: pair[1].weight });
            }
        }
        match self.stages.last() {
            None => return Err(SpecError::NoStages),
            Some(last) if last.weight != Weight::FULL => return Err(SpecError::NotWhole(last.weight)),
            Some(_) => {}
        }
        limits::LEASE.check_whole(self.lease_ms)?;
        limits::BAKE.check_whole(self.bake_ms)?;
        for health in [&self.stable, &self.canary].into_iter().filter_map(|backend| backend.health_check.as_ref()) {
            limits::PROBE_INTERVAL.check_whole(health.interval_ms)?;
            at_most("bytes of healthCheck.path", health.path.len(), limits::PROBE_PATH_BYTES_MAX)?;
            let plain = health.path.starts_with('/') && health.path.bytes().all(|byte| byte.is_ascii_graphic());
            if !plain {
                return Err(SpecError::Missing("healthCheck.path is no path, expected one such as /healthz"));
            }
        }
        let RequestLimits { max_requests, max_requests_per_server, max_pending, pending_timeout_ms } = self.limits;
        max_requests.map(|max| limits::REQUESTS.check_whole(max)).transpose()?;
        max_requests_per_server.map(|max| limits::REQUESTS_PER_SERVER.check_whole(max)).transpose()?;
        limits::PENDING.check_whole(max_pending)?;
        limits::PENDING_TIMEOUT.check_whole(pending_timeout_ms)?;
        limits::SLOW_START.check_whole(self.slow_start_ms)?;
        let Timeouts { first_byte_ms, idle_ms, total_ms } = self.timeouts;
        let max_age_ms = self.set_cookie.and_then(|cookie| cookie.max_age_ms);
        for (limits, found) in [
            (limits::FIRST_BYTE, first_byte_ms),
            (limits::IDLE, idle_ms),
            (limits::TOTAL, total_ms),
            (limits::COOKIE_AGE, max_age_ms),
        ] {
            found.map_or(Ok(0), |found| limits.check_whole(found))?;
        }
        limits::PROGRESS_DEADLINE.check_whole(self.progress_deadline_ms)?;
        limits::WINDOW.check_whole(self.analysis.window_ms)?;
        for query in &self.analysis.queries {
            limits::QUERY_INTERVAL.check_whole(query.interval_ms)?;
        }
        for stage in &self.stages {
            limits::PAUSE.check_whole(stage.hold_ms)?;
        }
        Ok(())
    }

    /// Returns how long it takes by plan, in milliseconds; pauses that wait for an operator count as nothing.
    pub fn planned_ms(&self) -> u64 {
        self.stages.iter().fold(self.bake_ms, |sum, stage| sum.saturating_add(stage.hold_ms))
    }

    /// Returns the rollout the other way round: what `undo` starts.
    pub fn reversed(&self) -> Result<Manifest, SpecError> {
        Self { stable: self.canary.clone(), canary: self.stable.clone(), ..self.clone() }.checked()
    }

    /// Returns the same rollout with another salt.
    pub fn with_salt(&self, salt: Salt) -> Result<Manifest, SpecError> {
        Self { salt, ..self.clone() }.checked()
    }

    /// Returns the index of the last stage, the one at 100 %.
    pub fn last_stage(&self) -> usize {
        self.stages.len() - 1
    }
}
