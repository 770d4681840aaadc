//! A service and the rollout it is in: which changes are possible, and what each leads to.

use std::fmt;
use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::ids::{ServiceId, TxId, VersionId};
use super::limits;
use super::plan::file::checked_url;
use super::plan::{Backend, Manifest};
use super::routing::{RoutingState, Status};
use super::time::Wall;
use super::weights::{Weight, Weights};

/// Phase of a rollout, named as in Argo Rollouts and Flagger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// The rollout takes its steps.
    Progressing,
    /// The weight is held until an operator resumes, promotes or aborts.
    Paused,
    /// The canary is at 100 % and still analysed; stable stays available.
    Baking,
    /// The rollout ended: the canary became the stable version.
    Completed,
    /// The rollout ended: all traffic went back to stable.
    RolledBack,
}

impl Phase {
    /// Returns true while the canary may have traffic and the rollout can go on.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Progressing | Self::Paused | Self::Baking)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Progressing => "Progressing",
            Self::Paused => "Paused",
            Self::Baking => "Baking",
            Self::Completed => "Completed",
            Self::RolledBack => "RolledBack",
        })
    }
}

/// A rollout and how far it has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    /// The checked rollout file that its Start recorded.
    pub spec: Arc<Manifest>,
    /// Current phase; the last one remains after the rollout's end.
    pub phase: Phase,
    /// Index of the current stage, or of the last one if the rollout ended.
    pub stage: usize,
    /// Why it is paused or rolled back; empty otherwise.
    pub reason: String,
    /// The routing version that it began with.
    pub rollout_generation: u64,
    /// Time at which the rollout was proposed.
    pub since: Wall,
}

impl Rollout {
    /// Returns true while the rollout goes on only when an operator says so: it is paused, or at a step that asks for one.
    pub fn waits_for_operator(&self) -> bool {
        self.phase == Phase::Paused || (self.phase.is_active() && self.spec.stages[self.stage].manual)
    }
}

/// A service: its routing, its stable backend, and its last rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Routing that the cluster committed.
    pub routing: RoutingState,
    /// Version and servers of stable.
    pub stable: Backend,
    /// The rollout in progress or the last one.
    pub rollout: Rollout,
}

/// Where a promotion leads to: a later stage, or the end of the rollout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// The stage with this index.
    Stage(usize),
    /// The end of the rollout: the canary becomes stable.
    Complete,
}

/// A change of one service that a transaction proposes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Begins a rollout at its first stage. Increases the canary's weight.
    Start(Arc<Manifest>),
    /// Goes on to a later stage, or completes the rollout. Increases the canary's weight.
    Promote {
        /// Stage or end that the promotion leads to.
        to: Target,
        /// True when an operator asked to skip the stages between and the wait for samples.
        full: bool,
    },
    /// Sends all traffic back to stable.
    Rollback {
        /// Reason, recorded in the log.
        reason: String,
    },
    /// Holds the weight until the rollout is resumed.
    Pause {
        /// Reason, recorded in the log.
        reason: String,
    },
    /// Continues a paused rollout at the same weight.
    Resume,
    /// What serves as stable is on these servers from here on. No rollout may be under way.
    SetServers(Vec<String>),
}

impl Change {
    /// Returns true when the canary may get more traffic by it, which needs every node's Yes.
    pub fn increases_exposure(&self) -> bool {
        matches!(self, Self::Start(_) | Self::Promote { .. })
    }

    /// Returns true when the canary gets less traffic by it, which nodes obey before they remember it.
    pub fn decreases_exposure(&self) -> bool {
        matches!(self, Self::Rollback { .. })
    }
}

/// Why a change can't be made to a service as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ChangeError {
    /// No rollout was ever applied for the service.
    #[error("service {0} is unknown, expected one that a rollout was applied for")]
    UnknownService(ServiceId),
    /// Another rollout is in progress.
    #[error("the rollout to {version} is {phase} at {weight}, expected none in progress: abort it first")]
    InProgress {
        /// Canary of the rollout in progress.
        version: VersionId,
        /// Phase in which that rollout is.
        phase: Phase,
        /// Committed weight of that rollout's canary.
        weight: Weight,
    },
    /// No rollout is in progress.
    #[error("the rollout to {version} is {phase}, expected one in progress")]
    NotInProgress {
        /// Canary of the last rollout.
        version: VersionId,
        /// Phase in which that rollout ended.
        phase: Phase,
    },
    /// The rollout's phase doesn't allow the change.
    #[error("the rollout to {version} is {phase}, expected {expected}")]
    Phase {
        /// Canary of the rollout that the change is for.
        version: VersionId,
        /// Phase in which that rollout is.
        phase: Phase,
        /// The phase the change needs.
        expected: &'static str,
    },
    /// The rollout file names another stable version than the cluster serves.
    #[error("stable is {found} in the rollout, expected {expected}, which the cluster serves")]
    Stable {
        /// Stable version that the cluster serves.
        expected: VersionId,
        /// Stable version that the rollout file names.
        found: VersionId,
    },
    /// The rollout file names other servers of stable than those that serve.
    #[error(
        "stable {version} is at {found} in the rollout, expected {serving}, which serves: a rollout never moves stable's traffic"
    )]
    StableServers {
        /// The stable version.
        version: VersionId,
        /// Servers that serve it, in words.
        serving: String,
        /// Servers that the rollout file names, in words.
        found: String,
    },
    /// The servers that stable should have are none, too many, or not addressed as servers are.
    #[error("stable should have the servers {0}, expected 1 to {max} such as http://host:port", max = limits::URLS_MAX)]
    Servers(String),
    /// The promotion does not lead to the next stage.
    #[error("promotion to {found:?} at stage {stage} of {stages}, expected the next one")]
    NotNext {
        /// Where it was to lead.
        found: Target,
        /// Index of the current stage.
        stage: usize,
        /// How many stages it has.
        stages: usize,
    },
}

/// A transaction's identity, as it marks the state it leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    /// Id by which clients repeat the transaction, and the log names it.
    pub tx: TxId,
    /// Time at which the coordinator proposed it.
    pub at: Wall,
}

impl Service {
    /// Returns the service before any canary traffic of `spec`: everything on what serves stable, which for a service that
    /// nobody has seen yet is the rollout's stable. What serves keeps serving as it does. Only a build that didn't check
    /// `apply::check_stable` decided a rollout whose stable is elsewhere; what it decided stays as it was.
    pub fn before_start(current: Option<&Self>, spec: &Arc<Manifest>, stamp: &Stamp) -> Self {
        let kept = current.map(|current| &current.stable).filter(|stable| stable.is_same(&spec.stable));
        let stable = kept.unwrap_or(&spec.stable).clone();
        let routing = RoutingState {
            service: spec.service.clone(),
            version: current.map_or(0, |current| current.routing.version),
            stable_model_id: stable.version.clone(),
            canary_model_id: None,
            weights: Weights::all_to(stable.version.clone()),
            status: Status::Committed,
            txid: stamp.tx.clone(),
            timestamp: stamp.at,
        };
        let rollout = Rollout {
            spec: spec.clone(),
            phase: Phase::RolledBack,
            stage: 0,
            reason: String::new(),
            rollout_generation: 0,
            since: stamp.at,
        };
        Self { routing, stable, rollout }
    }

    /// Returns the service after `change`, or why that can't be. `now` is none for a service nobody has seen yet.
    pub fn after(
        current: Option<&Self>,
        service: &ServiceId,
        change: &Change,
        stamp: &Stamp,
    ) -> Result<Self, ChangeError> {
        if let Change::Start(spec) = change {
            return Self::started(current, spec, stamp);
        }
        let Some(current) = current else { return Err(ChangeError::UnknownService(service.clone())) };
        let Rollout { spec, phase, stage, .. } = &current.rollout;
        let version = spec.canary.version.clone();
        if let Change::SetServers(urls) = change {
            return current.on_servers(urls, stamp);
        }
        if !phase.is_active() {
            return Err(ChangeError::NotInProgress { version, phase: *phase });
        }
        match change {
            Change::Start(_) | Change::SetServers(_) => unreachable!("handled above"),
            Change::Promote { to, full } => {
                if !current.leads_to(*to, *full) {
                    return Err(ChangeError::NotNext { found: *to, stage: *stage, stages: spec.stages.len() });
                }
                Ok(match to {
                    Target::Stage(next) => current.at_stage(*next, stamp),
                    Target::Complete => current.completed(stamp),
                })
            }
            Change::Rollback { reason } => Ok(current.rolled_back(reason, stamp)),
            Change::Pause { .. } if *phase == Phase::Paused => {
                Err(ChangeError::Phase { version, phase: *phase, expected: "Progressing or Baking" })
            }
            Change::Pause { reason } => Ok(current.in_phase(Phase::Paused, reason.clone(), stamp)),
            Change::Resume if *phase != Phase::Paused => {
                Err(ChangeError::Phase { version, phase: *phase, expected: "Paused" })
            }
            Change::Resume => Ok(current.in_phase(current.phase_at(*stage), String::new(), stamp)),
        }
    }

    /// Returns the routing as a refused transaction reports it: unchanged, with that transaction's id and the status ABORTED.
    /// The service itself keeps its state and status.
    pub fn refused(&self, stamp: &Stamp) -> RoutingState {
        self.stamped(Status::Aborted, stamp).routing
    }

    /// Returns this earlier state, restored after the increase that followed it was reverted; `version` is the increase's.
    pub fn restored(&self, version: u64, reason: &str, stamp: &Stamp) -> Self {
        let mut service = self.stamped(Status::Committed, stamp);
        service.routing.version = version + 1;
        service.rollout.reason = reason.into();
        service
    }

    /// Returns where a promotion leads from here, step by step or (`full`) at once.
    pub fn next(&self, full: bool) -> Target {
        let last = self.rollout.spec.last_stage();
        match self.rollout.stage {
            stage if stage == last => Target::Complete,
            _ if full => Target::Stage(last),
            stage => Target::Stage(stage + 1),
        }
    }

    /// Returns true when canary traffic depends on a lease.
    pub fn needs_lease(&self) -> bool {
        self.routing.canary_model_id.is_some()
    }

    fn leads_to(&self, to: Target, full: bool) -> bool {
        to == self.next(false) || (full && to == self.next(true))
    }

    fn phase_at(&self, stage: usize) -> Phase {
        if stage == self.rollout.spec.last_stage() { Phase::Baking } else { Phase::Progressing }
    }

    fn started(current: Option<&Self>, spec: &Arc<Manifest>, stamp: &Stamp) -> Result<Self, ChangeError> {
        let mut service = Self::before_start(current, spec, stamp);
        if let Some(current) = current {
            let Rollout { phase, spec: running, .. } = &current.rollout;
            if phase.is_active() {
                let (version, weight) = (running.canary.version.clone(), current.routing.canary_weight());
                return Err(ChangeError::InProgress { version, phase: *phase, weight });
            }
            let (expected, found) = (current.stable.version.clone(), spec.stable.version.clone());
            if expected != found {
                return Err(ChangeError::Stable { expected, found });
            }
        }
        service.rollout.rollout_generation = service.routing.version + 1;
        Ok(service.at_stage(0, stamp))
    }

    /// Checks that what serves as stable can have these servers.
    pub fn check_servers(&self, urls: &[String]) -> Result<(), ChangeError> {
        let Rollout { phase, spec, .. } = &self.rollout;
        if phase.is_active() {
            let (version, weight) = (spec.canary.version.clone(), self.routing.canary_weight());
            return Err(ChangeError::InProgress { version, phase: *phase, weight });
        }
        let is_plain = |url: &String| checked_url(url).is_ok_and(|checked| checked == *url);
        if urls.is_empty() || urls.len() > limits::URLS_MAX || !urls.iter().all(is_plain) {
            return Err(ChangeError::Servers(urls.join(", ")));
        }
        Ok(())
    }

    /// What serves stays the same version, with the same health check.
    fn on_servers(&self, urls: &[String], stamp: &Stamp) -> Result<Self, ChangeError> {
        self.check_servers(urls)?;
        let mut service = self.stamped(Status::Committed, stamp);
        service.routing.version += 1;
        service.stable.urls = urls.to_vec();
        Ok(service)
    }

    fn at_stage(&self, stage: usize, stamp: &Stamp) -> Self {
        let mut service = self.in_phase(self.phase_at(stage), String::new(), stamp);
        let (stable, canary) = (&self.stable.version, &self.rollout.spec.canary.version);
        service.rollout.stage = stage;
        service.routing.version += 1;
        service.routing.canary_model_id = Some(canary.clone());
        let weight = self.rollout.spec.stages[stage].weight;
        service.routing.weights = Weights::between(stable.clone(), canary.clone(), weight);
        service
    }

    fn completed(&self, stamp: &Stamp) -> Self {
        let backend = self.rollout.spec.canary.clone();
        self.settled(backend, Phase::Completed, String::new(), stamp)
    }

    fn rolled_back(&self, reason: &str, stamp: &Stamp) -> Self {
        self.settled(self.stable.clone(), Phase::RolledBack, reason.into(), stamp)
    }

    /// Everything to one backend, no canary.
    fn settled(&self, backend: Backend, phase: Phase, reason: String, stamp: &Stamp) -> Self {
        let mut service = self.in_phase(phase, reason, stamp);
        service.routing.version += 1;
        service.routing.stable_model_id = backend.version.clone();
        service.routing.canary_model_id = None;
        service.routing.weights = Weights::all_to(backend.version.clone());
        service.stable = backend;
        service
    }

    fn in_phase(&self, phase: Phase, reason: String, stamp: &Stamp) -> Self {
        let mut service = self.stamped(Status::Committed, stamp);
        service.rollout.phase = phase;
        service.rollout.reason = reason;
        service
    }

    fn stamped(&self, status: Status, stamp: &Stamp) -> Self {
        let mut service = self.clone();
        service.routing.status = status;
        service.routing.txid = stamp.tx.clone();
        service.routing.timestamp = stamp.at;
        service
    }
}
