//! Small makers for the checkers' own tests.

use aviary_core::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId, VersionId};
use aviary_core::domain::plan::{Backend, Manifest, OnPartition, RolloutSpec, Stage};
use aviary_core::domain::rollout::Change;
use aviary_core::domain::routing::{RoutingState, Status};
use aviary_core::domain::time::Wall;
use aviary_core::domain::weights::{Weight, Weights};
use aviary_core::protocol::record::{
    Accepted, AcceptorState, Ballot, Chosen, Initiator, Intent, Operation, Record, Slot,
};
use std::sync::Arc;

use crate::truth::{Served, Truth};
use crate::world::genesis_of;

pub fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

pub fn service() -> ServiceId {
    ServiceId::new("s0").unwrap()
}

pub fn version(name: &str) -> VersionId {
    VersionId::new(name).unwrap()
}

pub fn genesis() -> Chosen {
    genesis_of(3).0
}

pub fn truth() -> Truth {
    let (genesis, members) = genesis_of(3);
    Truth::new(genesis.record, members)
}

pub fn ballot(name: &str, round: u64) -> Ballot {
    Ballot { round, node: node(name), incarnation: Incarnation(1), boot: 1 }
}

pub fn pause(slot: u64, tx: &str) -> Chosen {
    let intent = Intent {
        initiator: Initiator::Client,
        tx: TxId::new(tx).unwrap(),
        actor: "test".into(),
        digest: 0,
        at: Wall(0),
        operation: Operation::Change(service(), Change::Pause { reason: "test".into() }),
    };
    let record = Record {
        slot: Slot(slot),
        prev_hash: genesis().record.hash(),
        intent,
        state: None,
        phase: None,
        certificate: None,
    };
    Chosen { ballot: Some(ballot("a", 1)), decided_at: Wall(0), record }
}

/// A change of the service at `slot`.
pub fn change(slot: u64, change: Change) -> Record {
    let mut record = pause(slot, &format!("t{slot}")).record;
    record.intent.operation = Operation::Change(service(), change);
    record
}

/// A routing of the service at a version.
pub fn routing(routing_version: u64) -> RoutingState {
    RoutingState {
        service: service(),
        version: routing_version,
        stable_model_id: version("v1"),
        canary_model_id: Some(version("v2")),
        weights: Weights::between(version("v1"), version("v2"), Weight::from_bp(500).unwrap()),
        status: Status::Committed,
        txid: TxId::new("x").unwrap(),
        timestamp: Wall(0),
    }
}

/// A rollout from v1 to v2 at 5 % and 100 %, with a lease of 2 s.
pub fn spec() -> Arc<Manifest> {
    let backend = |name| Backend::new(version(name), vec![]);
    let stage = |bp| Stage { weight: Weight::from_bp(bp).unwrap(), hold_ms: 0, manual: false };
    let spec = RolloutSpec {
        bake_ms: 0,
        progress_deadline_ms: 60_000,
        ..RolloutSpec::new(service(), backend("v1"), backend("v2"), vec![stage(500), stage(10_000)])
    };
    Arc::new(spec.checked().unwrap())
}

pub fn acceptor(name: &str, round: u64, tx: &str) -> AcceptorState {
    let accepted = Accepted { ballot: ballot("a", round), record: pause(1, tx).record };
    AcceptorState {
        cluster: ClusterId([7; 16]),
        node: node(name),
        incarnation: Incarnation(1 + u64::from(name.as_bytes()[0] - b'a')),
        boot: 1,
        promised: Some(ballot("a", round)),
        accepted: Some(accepted),
        head: Slot(0),
        head_hash: genesis().record.hash(),
        writes: 1,
        seen: Default::default(),
    }
}

pub fn served<'a>(node: &'a NodeId, service: &'a ServiceId, canary: &'a VersionId, bp: u16) -> Served<'a> {
    Served {
        node,
        service,
        canary,
        slot: Slot(1),
        bp,
        is_writing: false,
        leased: true,
        on_partition: OnPartition::Stable,
    }
}
