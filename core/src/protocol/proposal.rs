//! What is asked for, and what it comes to as things stand.

use std::sync::Arc;

use crate::domain::apply::{ApplyEffect, Standing, effect_of_apply};
use crate::domain::assignment::Salt;
use crate::domain::ids::{Incarnation, NodeId, ServiceId};
use crate::domain::plan::{Manifest, RolloutSpec, SpecError};
use crate::domain::rollout::{Change, ChangeError, Phase, Service};

use super::OperatorRequest;
use super::context::Context;
use super::feature::Feature;
use super::log::record::{ConfigChange, Intent, Operation};

/// What is asked for: by an operator, or by the node itself.
#[derive(Debug, Clone)]
pub(super) enum Proposal {
    /// A change that an operator requested.
    OperatorRequest(OperatorRequest),
    /// A change that the autopilot wants.
    Operation(Operation),
    /// Settle what a lost coordinator left open: propose what was accepted; of what was only voted on, do what lowers exposure, and
    /// abort the rest.
    Settle(Option<Intent>),
}

impl Proposal {
    /// Returns the service it concerns.
    pub fn service(&self) -> Option<&ServiceId> {
        match self {
            Self::OperatorRequest(asked) => asked.service(),
            Self::Operation(operation) => operation.service(),
            Self::Settle(_) => None,
        }
    }

    /// Returns true when some node must serve less canary by it.
    pub fn decreases(&self) -> bool {
        match self {
            Self::OperatorRequest(asked) => asked.decreases(),
            Self::Operation(operation) => operation.decreases_exposure(),
            Self::Settle(_) => false,
        }
    }

    pub fn concerns(&self, service: &ServiceId) -> bool {
        self.service() == Some(service)
    }

    /// Returns what it comes to as things stand.
    pub fn operation(&self, ctx: &Context) -> Result<Operation, Obstacle> {
        match self {
            Self::Operation(operation) => Ok(operation.clone()),
            Self::Settle(_) => {
                Ok(Operation::Refused { service: None, refused: "Settle".into(), reasons: vec!["an open slot".into()] })
            }
            Self::OperatorRequest(OperatorRequest::Config(change)) => {
                if let ConfigChange::Readmit(node, incarnation) | ConfigChange::Add(node, incarnation) = change {
                    check_readmission(ctx, node, *incarnation).map_err(Obstacle::Refused)?;
                }
                Ok(Operation::Config(change.clone()))
            }
            Self::OperatorRequest(OperatorRequest::SetDefault { service }) => {
                default_for(ctx, service).map(Operation::SetDefault)
            }
            Self::OperatorRequest(asked) => change_for(ctx, asked).map(|(id, change)| Operation::Change(id, change)),
        }
    }
}

impl Proposal {
    /// Returns what has to be decided before it: the first rollout of a service whose name comes before all others' would take
    /// the requests that name no service, so the log says first that they stay where they are.
    pub fn needs_first(&self, ctx: &Context) -> Option<Operation> {
        let Self::OperatorRequest(OperatorRequest::Apply(spec)) = self else { return None };
        let current = ctx.ledger.default_service()?;
        (!ctx.ledger.is_default_set() && spec.service < *current).then(|| Operation::SetDefault(current.clone()))
    }
}

impl OperatorRequest {
    /// Returns true when some node must serve less canary by it, or may have to.
    pub fn decreases(&self) -> bool {
        match self {
            Self::Abort { .. }
            | Self::Undo { .. }
            | Self::Config(ConfigChange::Cordon(_) | ConfigChange::Remove(_)) => true,
            Self::Config(ConfigChange::Add(..) | ConfigChange::Readmit(..) | ConfigChange::Uncordon(_))
            | Self::Apply(_)
            | Self::Promote { .. }
            | Self::Pause { .. }
            | Self::Resume { .. }
            | Self::Retry { .. }
            | Self::SetDefault { .. }
            | Self::SkipWait { .. } => false,
        }
    }

    /// Returns the service it concerns.
    pub fn service(&self) -> Option<&ServiceId> {
        match self {
            Self::Apply(spec) => Some(&spec.service),
            Self::Promote { service, .. }
            | Self::Pause { service, .. }
            | Self::Resume { service }
            | Self::Abort { service, .. }
            | Self::Retry { service }
            | Self::Undo { service }
            | Self::SetDefault { service }
            | Self::SkipWait { service } => Some(service),
            Self::Config(_) => None,
        }
    }
}

/// What stands in the way of a proposal.
pub(super) enum Obstacle {
    /// The cluster is there already, or on its way; or what is asked for was rolled back before.
    Unchanged {
        /// Why there is nothing to do, in words; may be empty.
        reason: String,
        /// True when it was rolled back before.
        rolled_back: bool,
    },
    /// The request can't be carried out, for the reason in words.
    Refused(String),
    /// These members don't know the feature that it needs.
    NotReady(Feature, Vec<NodeId>),
}

impl From<ChangeError> for Obstacle {
    fn from(error: ChangeError) -> Self {
        Self::Refused(error.to_string())
    }
}

/// A node is added or readmitted as what it is now: a request that was overtaken by another wipe must not bind an
/// incarnation that is gone, nor take the vote from a node that has it.
fn check_readmission(ctx: &Context, node: &NodeId, incarnation: Incarnation) -> Result<(), String> {
    let own = *node == ctx.settings.node;
    let heard = ctx.peers.get(node).filter(|_| ctx.is_alive(node)).and_then(|peer| peer.incarnation);
    match if own { Some(ctx.acceptor.incarnation) } else { heard } {
        Some(found) if found == incarnation => unable_to_read(ctx, node).map_or(Ok(()), Err),
        Some(found) => Err(format!("node {node} has incarnation {found}, expected {incarnation}, as asked")),
        None => Err(format!("node {node} is not heard from: start it, then ask again")),
    }
}

/// Returns why a node can't read what the log holds already, so that it would never have all of it; none if it can.
fn unable_to_read(ctx: &Context, node: &NodeId) -> Option<String> {
    let expected = ctx.ledger.uses().into_iter().map(Feature::protocol).max().unwrap_or(0);
    let found = ctx.speaks(node).unwrap_or(0);
    (found < expected).then(|| {
        format!(
            "node {node} speaks protocol {found}, expected {expected} or newer, which the log needs: upgrade it first"
        )
    })
}

/// Returns the service that is to be the default, if it is known, isn't that already, and every member can read the record.
fn default_for(ctx: &Context, service: &ServiceId) -> Result<ServiceId, Obstacle> {
    if !ctx.ledger.services.contains_key(service) {
        return Err(ChangeError::UnknownService(service.clone()).into());
    }
    if ctx.ledger.is_default_set() && ctx.ledger.default_service() == Some(service) {
        return Err(Obstacle::Unchanged { reason: format!("{service} is the default"), rolled_back: false });
    }
    let lacking = ctx.lacking(Feature::DefaultService);
    match lacking.is_empty() {
        true => Ok(service.clone()),
        false => Err(Obstacle::NotReady(Feature::DefaultService, lacking)),
    }
}

fn change_for(ctx: &Context, asked: &OperatorRequest) -> Result<(ServiceId, Change), Obstacle> {
    let id = asked.service().expect("an operation that is no Config concerns a service").clone();
    let known = ctx.ledger.services.get(&id).map(|service_state| &service_state.service);
    let known_or = || known.ok_or_else(|| ChangeError::UnknownService(id.clone()));
    let change = match asked {
        OperatorRequest::Apply(spec) => apply(ctx, known, spec)?,
        OperatorRequest::Promote { full, .. } => Change::Promote { to: known_or()?.next(*full), full: *full },
        // A step asked for as a full promotion: nodes that hold for samples say Yes to it, and it leads no further.
        OperatorRequest::SkipWait { .. } => Change::Promote { to: known_or()?.next(false), full: true },
        OperatorRequest::Pause { reason, .. } => match known_or()?.rollout.phase {
            Phase::Paused => return Err(Obstacle::already("the rollout is paused")),
            _ => Change::Pause { reason: reason.clone() },
        },
        OperatorRequest::Resume { .. } => match known_or()?.rollout.phase {
            Phase::Progressing | Phase::Baking => return Err(Obstacle::already("the rollout goes on")),
            _ => Change::Resume,
        },
        OperatorRequest::Abort { reason, .. } => match known_or()?.rollout.phase {
            Phase::RolledBack => return Err(Obstacle::already("the rollout was rolled back")),
            _ => Change::Rollback { reason: reason.clone() },
        },
        OperatorRequest::Retry { .. } => {
            let rollout = &known_or()?.rollout;
            if rollout.phase != Phase::RolledBack {
                let version = rollout.spec.canary.version.clone();
                return Err(ChangeError::Phase { version, phase: rollout.phase, expected: "RolledBack" }.into());
            }
            Change::Start(readable(ctx, on_stable_of(known_or()?, &rollout.spec)?)?)
        }
        OperatorRequest::Undo { .. } => match &known_or()?.rollout {
            rollout if rollout.phase == Phase::Completed => {
                let spec = Arc::new(reversed(ctx, &rollout.spec)?);
                Change::Start(on_stable_of(known_or()?, &spec)?)
            }
            rollout if rollout.phase.is_active() => Change::Rollback { reason: "undo".into() },
            rollout => {
                let version = rollout.spec.canary.version.clone();
                return Err(ChangeError::NotInProgress { version, phase: rollout.phase }.into());
            }
        },
        OperatorRequest::Config(_) | OperatorRequest::SetDefault { .. } => {
            unreachable!("changes no rollout, so not here")
        }
    };
    Ok((id, change))
}

impl Obstacle {
    fn already(reason: &str) -> Self {
        Self::Unchanged { reason: reason.into(), rolled_back: false }
    }
}

/// A key that this build doesn't know can't be turned round. The way back is a rollout with a salt of its own.
fn reversed(ctx: &Context, spec: &Manifest) -> Result<Manifest, Obstacle> {
    spec.known().map_err(|why| Obstacle::Refused(why.to_string()))?;
    let refused = |error: SpecError| Obstacle::Refused(error.to_string());
    let reversed = spec.reversed().map_err(refused)?;
    match reversed.salt {
        Salt::Rollout(_) => reversed.with_salt(own_salt(ctx)).map_err(refused),
        Salt::Unsaid | Salt::None => Ok(reversed),
    }
}

/// Returns the salt of a rollout that starts in the next slot, as far as every member can follow it.
fn own_salt(ctx: &Context) -> Salt {
    match ctx.lacking(Feature::RolloutSalt).is_empty() {
        true => Salt::Rollout(Some(ctx.ledger.head.next().0)),
        false => Salt::Unsaid,
    }
}

/// Returns a rollout as its Start records it: what the file leaves to the cluster is said. The service's own salt is what a
/// recorded rollout without any has, as builds that know no other wrote it. A later build's key would be lost, and no node
/// would vote for it.
fn salted(ctx: &Context, spec: &Arc<Manifest>) -> Result<Arc<Manifest>, Obstacle> {
    let salt = match spec.salt {
        _ if spec.known().is_err() => return Ok(spec.clone()),
        Salt::Rollout(_) => {
            readable(ctx, spec.clone())?;
            own_salt(ctx)
        }
        Salt::Unsaid if spec.takes_salt() => own_salt(ctx),
        Salt::Unsaid | Salt::None => Salt::Unsaid,
    };
    if salt == spec.salt {
        return Ok(spec.clone());
    }
    spec.with_salt(salt).map(Arc::new).map_err(|error| Obstacle::Refused(error.to_string()))
}

/// Returns a rollout if every member can tell its users, or names those that can't.
fn readable(ctx: &Context, spec: Arc<Manifest>) -> Result<Arc<Manifest>, Obstacle> {
    let lacking = ctx.lacking(Feature::RolloutSalt);
    match spec.salt {
        Salt::Rollout(_) if !lacking.is_empty() => Err(Obstacle::NotReady(Feature::RolloutSalt, lacking)),
        Salt::Rollout(_) | Salt::Unsaid | Salt::None => Ok(spec),
    }
}

/// Returns a recorded rollout as it starts again: its stable is on the servers that serve it, wherever they were then.
fn on_stable_of(service: &Service, spec: &Arc<Manifest>) -> Result<Arc<Manifest>, Obstacle> {
    if service.stable.is_same(&spec.stable) {
        return Ok(spec.clone());
    }
    spec.known().map_err(|why| Obstacle::Refused(why.to_string()))?;
    let spec = RolloutSpec { stable: service.stable.clone(), ..(***spec).clone() };
    spec.checked().map(Arc::new).map_err(|error| Obstacle::Refused(error.to_string()))
}

fn apply(ctx: &Context, known: Option<&Service>, spec: &Arc<Manifest>) -> Result<Change, Obstacle> {
    match effect_of_apply(known.map(Standing::from), spec) {
        ApplyEffect::Start => salted(ctx, spec).map(Change::Start),
        ApplyEffect::Abort(reason) => Ok(Change::Rollback { reason }),
        ApplyEffect::Unchanged(reason) => Err(Obstacle::Unchanged { reason, rolled_back: false }),
        ApplyEffect::RolledBackBefore(reason) => Err(Obstacle::Unchanged { reason, rolled_back: true }),
        ApplyEffect::Refused(why) => Err(why.into()),
    }
}
