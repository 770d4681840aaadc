//! What is simulated: the seam between this world and the protocol core.

use aviary::domain::ids::{ClusterId, Incarnation, NodeId};
use aviary::domain::time::Now;
use aviary::protocol::record::{Chosen, Register};
use aviary::protocol::{Input, Output, Timings};

/// What a node's process is started with.
pub struct Setup {
    /// The node.
    pub node: NodeId,
    /// The cluster.
    pub cluster: ClusterId,
    /// Durations.
    pub timings: Timings,
    /// The process's own seed.
    pub seed: u64,
    /// The incarnation it takes if its memory is gone.
    pub fresh_incarnation: Incarnation,
}

/// One node's process.
pub trait Subject: Sized {
    /// Starts it on what its disk holds.
    fn start(setup: Setup, register: Option<Register>, log: Vec<Chosen>, now: Now) -> (Self, Vec<Output>);
    /// Hands it one input.
    fn handle(&mut self, now: Now, input: Input) -> Vec<Output>;
}

/// A process that only keeps its register: what the world runs while there is no core.
pub struct Mute(#[expect(dead_code, reason = "it has no use for its start")] (Timings, u64));

impl Subject for Mute {
    fn start(setup: Setup, register: Option<Register>, log: Vec<Chosen>, _: Now) -> (Self, Vec<Output>) {
        let genesis = &log.first().expect("a log begins with genesis").record;
        let mut register = register.unwrap_or(Register {
            cluster: setup.cluster,
            node: setup.node,
            incarnation: setup.fresh_incarnation,
            boot: 0,
            promised: None,
            accepted: None,
            head: genesis.slot,
            head_hash: genesis.hash(),
        });
        register.boot += 1;
        (Self((setup.timings, setup.seed)), vec![Output::Persist(Box::new(register))])
    }

    fn handle(&mut self, _: Now, _: Input) -> Vec<Output> {
        Vec::new()
    }
}

/// What the simulator runs.
pub type Real = Mute;
