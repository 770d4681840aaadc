//! A service and the rollout it is in: which changes are possible, and what each leads to.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::ids::{ServiceId, TxId, VersionId};
use super::plan::{Backend, RolloutSpec};
use super::routing::{RoutingState, Status};
use super::time::Wall;
use super::weights::{Weight, Weights};

/// Where a rollout stands; the words are Argo Rollouts' and Flagger's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Going from step to step.
    Progressing,
    /// Holding its weight until an operator resumes, promotes or aborts.
    Paused,
    /// At 100 %, watched, stable kept warm.
    Baking,
    /// The canary became stable.
    Completed,
    /// Back on stable.
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
    /// What its author wrote.
    pub spec: Arc<RolloutSpec>,
    /// Where it stands.
    pub phase: Phase,
    /// The stage it is at, or was at when it ended.
    pub stage: usize,
    /// Why it is paused or rolled back; empty otherwise.
    pub reason: String,
    /// The routing version that it began with.
    pub rollout_generation: u64,
    /// When it began.
    pub since: Wall,
}

/// One service: its routing, what serves it, and its last rollout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// The committed routing.
    pub routing: RoutingState,
    /// What the stable role is served by.
    pub stable: Backend,
    /// The rollout in progress or the last one.
    pub rollout: Rollout,
}

/// Where a promotion leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Target {
    /// To this stage.
    Stage(usize),
    /// The canary becomes stable.
    Complete,
}

/// A change of one service, as a transaction asks for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Begin a rollout at its first stage. Raises exposure.
    Start(Arc<RolloutSpec>),
    /// Go on. Raises exposure.
    Promote {
        /// To where.
        to: Target,
        /// True when an operator asked to skip the stages between and the wait for samples.
        full: bool,
    },
    /// Everything back to stable.
    Rollback {
        /// Why.
        reason: String,
    },
    /// Hold the weight.
    Pause {
        /// Why.
        reason: String,
    },
    /// Go on after a pause, at the same weight.
    Resume,
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

    /// Returns the change's name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Start(_) => "Start",
            Self::Promote { .. } => "Promote",
            Self::Rollback { .. } => "Rollback",
            Self::Pause { .. } => "Pause",
            Self::Resume => "Resume",
        }
    }
}

/// Why a change can't be made to a service as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum ChangeError {
    /// Nobody has applied a rollout for it.
    #[error("service {0} is unknown, expected one that a rollout was applied for")]
    UnknownService(ServiceId),
    /// Another rollout is under way.
    #[error("the rollout to {version} is {phase} at {weight}, expected none in progress: abort it first")]
    InProgress {
        /// The canary on trial.
        version: VersionId,
        /// Its phase.
        phase: Phase,
        /// Its weight.
        weight: Weight,
    },
    /// No rollout is under way.
    #[error("the rollout to {version} is {phase}, expected one in progress")]
    NotInProgress {
        /// The last canary.
        version: VersionId,
        /// Its phase.
        phase: Phase,
    },
    /// The phase doesn't allow it.
    #[error("the rollout to {version} is {phase}, expected {expected}")]
    Phase {
        /// The canary.
        version: VersionId,
        /// Its phase.
        phase: Phase,
        /// The phase the change needs.
        expected: &'static str,
    },
    /// The file's stable isn't what serves.
    #[error("stable is {found} in the rollout, expected {expected}, which the cluster serves")]
    Stable {
        /// What the cluster serves.
        expected: VersionId,
        /// What the rollout says.
        found: VersionId,
    },
    /// Not the next stage.
    #[error("promotion to {found:?} at stage {stage} of {stages}, expected the next one")]
    NotNext {
        /// Where it was to lead.
        found: Target,
        /// Where the rollout stands.
        stage: usize,
        /// How many stages it has.
        stages: usize,
    },
}

/// A transaction's identity, as it marks the state it leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stamp {
    /// Its id.
    pub tx: TxId,
    /// When it was proposed.
    pub at: Wall,
}

impl Service {
    /// Returns the service that `spec` describes before any canary traffic: everything on its stable version.
    pub fn before_start(spec: &Arc<RolloutSpec>, stamp: &Stamp) -> Self {
        let routing = RoutingState {
            service: spec.service.clone(),
            version: 0,
            stable_model_id: spec.stable.version.clone(),
            canary_model_id: None,
            weights: Weights::all_to(spec.stable.version.clone()),
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
        Self { routing, stable: spec.stable.clone(), rollout }
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
        if !phase.is_active() {
            return Err(ChangeError::NotInProgress { version, phase: *phase });
        }
        match change {
            Change::Start(_) => unreachable!("handled above"),
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

    /// Returns the service after a transaction about it was decided without effect.
    pub fn after_abort(&self, stamp: &Stamp) -> Self {
        self.stamped(Status::Aborted, stamp)
    }

    /// Returns this earlier state, restored after the raise that followed it was reverted; `version` is the raise's.
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

    fn started(current: Option<&Self>, spec: &Arc<RolloutSpec>, stamp: &Stamp) -> Result<Self, ChangeError> {
        let mut service = Self::before_start(spec, stamp);
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
            service.routing.version = current.routing.version;
        }
        service.rollout.rollout_generation = service.routing.version + 1;
        Ok(service.at_stage(0, stamp))
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
