//! Seeded bugs: the real core behind a door that breaks one rule. A world that lets one of them live has no teeth.
//!
//! The bugs are in the door, not in the core: nothing of them is in the program that people run.

use aviary_core::domain::ids::Incarnation;
use aviary_core::domain::time::Now;
use aviary_core::protocol::ledger::Ledger;
use aviary_core::protocol::message::{Answer, Decision, GateVote, Message};
use aviary_core::protocol::record::{AcceptorState, Chosen};
use aviary_core::protocol::{Core, Input, Observation, Output, View};
use std::sync::Arc;

use crate::subject::{Setup, Subject};
use crate::world::{Options, World};

/// A seeded bug.
pub struct Tooth {
    /// What is wrong.
    pub name: &'static str,
    /// Runs one seed; returns the invariant that broke, and how.
    run: fn(Options) -> Option<(&'static str, String)>,
}

const PROMISE: u8 = 0;
const ACCEPT: u8 = 1;
const WIPED: u8 = 2;
const IGNORED: u8 = 3;
const MAJORITY: u8 = 4;
const SUFFIX: u8 = 5;
const RECEIPT: u8 = 6;
const GRANTED: u8 = 7;
const EARLY: u8 = 8;
const IN_DOUBT: u8 = 9;
const STALE: u8 = 10;
const REUSED: u8 = 11;
const UNSYNCED: u8 = 12;
const REPEATED: u8 = 13;

/// All of them.
pub const ALL: [Tooth; 14] = [
    Tooth { name: "a promise is forgotten by a restart", run: run::<PROMISE> },
    Tooth { name: "an accepted record is forgotten by a restart", run: run::<ACCEPT> },
    Tooth { name: "a wiped voter votes", run: run::<WIPED> },
    Tooth { name: "what votes tell of accepted records is ignored", run: run::<IGNORED> },
    Tooth { name: "a promotion goes by majority, not unanimity", run: run::<MAJORITY> },
    Tooth { name: "a log that lost its end is trusted", run: run::<SUFFIX> },
    Tooth { name: "the lease is measured from the answer's receipt", run: run::<RECEIPT> },
    Tooth { name: "a lease is granted whatever was accepted since", run: run::<GRANTED> },
    Tooth { name: "a record is served and told before it is durable", run: run::<EARLY> },
    Tooth { name: "a raise that was decided in doubt is served", run: run::<IN_DOUBT> },
    Tooth { name: "evidence of an earlier step counts for this one", run: run::<STALE> },
    Tooth { name: "a ballot is used again after a restart", run: run::<REUSED> },
    Tooth { name: "a vote leaves before the write it promises", run: run::<UNSYNCED> },
    Tooth { name: "the writes that were answered are forgotten", run: run::<REPEATED> },
];

fn run<const BUG: u8>(options: Options) -> Option<(&'static str, String)> {
    World::<Toothed<BUG>>::new(options).run().err().map(|violation| (violation.invariant, violation.what))
}

impl Tooth {
    /// Runs seeds until the bug is caught; returns how many that took, and what broke.
    pub fn hunt(&self, options: Options, budget: u64) -> Option<(u64, &'static str, String)> {
        (1..=budget).find_map(|seed| (self.run)(Options { seed, ..options }).map(|(name, what)| (seed, name, what)))
    }
}

/// The real core, with one rule broken on the way in or out.
struct Toothed<const BUG: u8> {
    core: Core,
    view: Option<Arc<View>>,
    /// The traffic it saw last.
    seen: Vec<Observation>,
}

impl<const BUG: u8> Subject for Toothed<BUG> {
    fn start(
        setup: Setup,
        acceptor: Option<AcceptorState>,
        ledger: Ledger,
        log: &[Chosen],
        now: Now,
    ) -> (Self, Vec<Output>) {
        let node = setup.node.clone();
        let cluster = setup.cluster;
        let last = log.last().map_or((ledger.head, ledger.head_hash), |last| (last.record.slot, last.record.hash()));
        let mut log = log;
        let acceptor = match (BUG, acceptor) {
            (WIPED, None) => {
                // It takes the place it had, as if it remembered everything.
                let bound = ledger.members.0.get(&node).map_or(Incarnation(1), |member| member.incarnation);
                let (head, head_hash) = last;
                Some(AcceptorState {
                    cluster,
                    node,
                    incarnation: bound,
                    boot: 0,
                    promised: None,
                    accepted: None,
                    head,
                    head_hash,
                })
            }
            (_, None) => None,
            (PROMISE, Some(acceptor)) => Some(AcceptorState { promised: None, ..acceptor }),
            (ACCEPT, Some(acceptor)) => Some(AcceptorState { accepted: None, ..acceptor }),
            (SUFFIX, Some(acceptor)) if acceptor.head > last.0 => {
                Some(AcceptorState { head: last.0, head_hash: last.1, ..acceptor })
            }
            (REUSED, Some(acceptor)) => Some(AcceptorState { boot: acceptor.boot.saturating_sub(1), ..acceptor }),
            (REPEATED, Some(acceptor)) if log.len() > 1 => {
                // It believes the log to end before its last record.
                log = &log[..log.len() - 1];
                let (head, head_hash) = log.last().map_or(last, |last| (last.record.slot, last.record.hash()));
                let accepted = None;
                Some(AcceptorState { head: head.min(acceptor.head), head_hash, accepted, ..acceptor })
            }
            (_, acceptor) => acceptor,
        };
        let (core, outputs) = <Core as Subject>::start(setup, acceptor, ledger, log, now);
        let mut toothed = Self { core, view: None, seen: Vec::new() };
        let outputs = toothed.bend(now, outputs);
        (toothed, outputs)
    }

    fn handle(&mut self, now: Now, input: Input) -> Vec<Output> {
        let input = self.bend_input(input);
        let outputs = Subject::handle(&mut self.core, now, input);
        self.bend(now, outputs)
    }
}

impl<const BUG: u8> Toothed<BUG> {
    fn bend_input(&mut self, mut input: Input) -> Input {
        if let (STALE, Input::Telemetry(observations)) = (BUG, &mut input) {
            self.add_stale(observations);
        }
        let Input::Received { message, .. } = &mut input else { return input };
        match (BUG, &mut **message) {
            (IGNORED, Message::Vote(vote)) => {
                if let Answer::Gate { accepted, .. } = &mut vote.answer {
                    *accepted = None;
                }
            }
            (MAJORITY, Message::Vote(vote)) => {
                if let Answer::Gate { gate, .. } = &mut vote.answer
                    && !matches!(gate, GateVote::Yes(_))
                {
                    *gate = GateVote::Yes("the others are for it".into());
                }
            }
            (IN_DOUBT, Message::Decision(Decision::Chosen(chosen) | Decision::CatchUp(chosen))) => {
                if let Some(certificate) = &chosen.record.certificate {
                    chosen.ballot = Some(certificate.ballot.clone());
                }
            }
            _ => {}
        }
        input
    }

    /// What was observed at the step before comes again, as if it were observed at this one.
    fn add_stale(&mut self, observations: &mut Vec<Observation>) {
        let Some(view) = &self.view else { return };
        let now = |seen: &Observation| {
            let routing_version = view.services.get(&seen.service)?.service.routing.version;
            (routing_version == seen.routing_version + 1).then(|| Observation { routing_version, ..seen.clone() })
        };
        let stale: Vec<_> = self.seen.iter().filter_map(now).collect();
        self.seen.extend(observations.iter().cloned());
        let spare = self.seen.len().saturating_sub(32);
        self.seen.drain(..spare);
        observations.extend(stale);
    }

    fn bend(&mut self, now: Now, mut outputs: Vec<Output>) -> Vec<Output> {
        for output in &mut outputs {
            match output {
                Output::Publish(view) => self.view = Some(view.clone()),
                Output::Lease(Some(from)) if BUG == RECEIPT => *from = now.mono,
                Output::Send { message, .. } if BUG == GRANTED => {
                    if let Message::Heartbeat(heartbeat) = &mut **message
                        && let Some(acknowledgement) = &mut heartbeat.acknowledges
                    {
                        acknowledgement.granted = true;
                    }
                }
                _ => {}
            }
        }
        let first = |output: &Output| match output {
            Output::Publish(_) | Output::Reply(..) => BUG == EARLY,
            Output::Send { .. } => BUG == EARLY || BUG == UNSYNCED,
            _ => false,
        };
        // In order, but before the writes.
        let (mut early, late): (Vec<_>, Vec<_>) = outputs.into_iter().partition(first);
        early.extend(late);
        early
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_door_alone_breaks_nothing() {
        const NONE: u8 = 255;
        let options = Options { ms: 5_000, ..Options::of(3) };
        let outcome = World::<Toothed<NONE>>::new(options).run();
        assert!(outcome.is_ok(), "{:?}", outcome.err());
    }
}
