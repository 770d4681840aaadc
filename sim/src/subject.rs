//! What is simulated: the seam between this world and the protocol core.

use std::collections::{BTreeMap, BTreeSet};

use aviary_core::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId};
use aviary_core::domain::time::Now;
use aviary_core::protocol::ledger::Ledger;
use aviary_core::protocol::record::{AcceptorState, Chosen, SavedRun};
use aviary_core::protocol::{Input, Output, Retention, Timings};

/// What a node's process is started with.
pub struct Setup {
    /// Node that the process is.
    pub node: NodeId,
    /// Cluster that the node belongs to.
    pub cluster: ClusterId,
    /// Durations of the protocol: leases, timeouts, heartbeats.
    pub timings: Timings,
    /// Seed of the process's own random choices.
    pub seed: u64,
    /// The incarnation it takes if its memory is gone.
    pub fresh_incarnation: Incarnation,
    /// What it keeps of its log.
    pub retention: Retention,
    /// Everybody it may talk with.
    pub peers: BTreeSet<NodeId>,
    /// The analysis runs that it saved, by service.
    pub runs: BTreeMap<ServiceId, SavedRun>,
}

/// One node's process, real or with a seeded bug.
pub trait Subject: Sized {
    /// Starts it on what its disk holds: the acceptor state, and a ledger with the records after it.
    fn start(
        setup: Setup,
        acceptor: Option<AcceptorState>,
        ledger: Ledger,
        log: &[Chosen],
        now: Now,
    ) -> (Self, Vec<Output>);
    /// Hands the process one input at a time `now`; returns what it puts out.
    fn handle(&mut self, now: Now, input: Input) -> Vec<Output>;
}

impl Subject for aviary_core::protocol::Core {
    fn start(
        setup: Setup,
        acceptor: Option<AcceptorState>,
        ledger: Ledger,
        log: &[Chosen],
        now: Now,
    ) -> (Self, Vec<Output>) {
        let Setup { node, cluster, timings, seed, fresh_incarnation, retention, peers, runs } = setup;
        let speaks = aviary_core::protocol::feature::PROTOCOL;
        let settings = aviary_core::protocol::Settings {
            node,
            cluster,
            timings,
            seed,
            fresh_incarnation,
            retention,
            peers,
            speaks,
        };
        Self::start(settings, acceptor, ledger, log, runs, now)
    }

    fn handle(&mut self, now: Now, input: Input) -> Vec<Output> {
        Self::handle(self, now, input)
    }
}

/// Core without a wrapper: what the simulator runs unless it searches for seeded bugs.
pub type Real = aviary_core::protocol::Core;
