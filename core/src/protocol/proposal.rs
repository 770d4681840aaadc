//! What is asked for, and what it comes to as things stand.

use std::sync::Arc;

use crate::domain::ids::{Incarnation, NodeId, ServiceId};
use crate::domain::plan::Manifest;
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
            Self::OperatorRequest(asked) => match asked {
                OperatorRequest::Abort { .. }
                | OperatorRequest::Undo { .. }
                | OperatorRequest::Config(ConfigChange::Cordon(_) | ConfigChange::Remove(_)) => true,
                OperatorRequest::Config(
                    ConfigChange::Add(..) | ConfigChange::Readmit(..) | ConfigChange::Uncordon(_),
                )
                | OperatorRequest::Apply(_)
                | OperatorRequest::Promote { .. }
                | OperatorRequest::Pause { .. }
                | OperatorRequest::Resume { .. }
                | OperatorRequest::Retry { .. }
                | OperatorRequest::SetDefault { .. } => false,
            },
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
            | Self::SetDefault { service } => Some(service),
            Self::Config(_) => None,
        }
    }
}

/// What stands in the way of a proposal.
pub(super) enum Obstacle {
    /// The cluster is there already.
    Unchanged,
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
        return Err(Obstacle::Unchanged);
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
        OperatorRequest::Apply(spec) => apply(known, spec)?,
        OperatorRequest::Promote { full, .. } => Change::Promote { to: known_or()?.next(*full), full: *full },
        OperatorRequest::Pause { reason, .. } => Change::Pause { reason: reason.clone() },
        OperatorRequest::Resume { .. } => Change::Resume,
        OperatorRequest::Abort { reason, .. } => match known_or()?.rollout.phase {
            Phase::RolledBack => return Err(Obstacle::Unchanged),
            _ => Change::Rollback { reason: reason.clone() },
        },
        OperatorRequest::Retry { .. } => {
            let rollout = &known_or()?.rollout;
            if rollout.phase != Phase::RolledBack {
                let version = rollout.spec.canary.version.clone();
                return Err(ChangeError::Phase { version, phase: rollout.phase, expected: "RolledBack" }.into());
            }
            Change::Start(rollout.spec.clone())
        }
        OperatorRequest::Undo { .. } => match &known_or()?.rollout {
            rollout if rollout.phase == Phase::Completed => Change::Start(reversed(&rollout.spec)?),
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

/// A key that this build doesn't know can't be turned round.
fn reversed(spec: &Manifest) -> Result<Arc<Manifest>, Obstacle> {
    spec.known().map_err(|why| Obstacle::Refused(why.to_string()))?;
    spec.reversed().map(Arc::new).map_err(|error| Obstacle::Refused(error.to_string()))
}

fn apply(known: Option<&Service>, spec: &Arc<Manifest>) -> Result<Change, Obstacle> {
    match known.map(|service| &service.rollout) {
        Some(rollout) if rollout.spec == *spec && rollout.phase != Phase::RolledBack => Err(Obstacle::Unchanged),
        _ => Ok(Change::Start(spec.clone())),
    }
}
