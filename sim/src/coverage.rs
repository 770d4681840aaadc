//! "Sometimes" assertions: what every long enough run must have reached, and died at.
//!
//! A moment is one output of a commit at its point, for one kind of record, in one role. A process that dies just before
//! carrying one out dies at it; dying after one is dying before the next.

use std::collections::BTreeMap;

use aviary_core::protocol::message::{Answer, Decision, Message};
use aviary_core::protocol::{Event, Outcome, Output};

/// Points of a commit that know their record.
const POINTS: [&str; 4] = ["PREPARE", "PROPOSE", "CHOSEN", "append"];
/// Points that concern any record.
const OTHER_POINTS: [&str; 6] = ["vote", "accept", "refusal", "persist", "publish", "reply"];
const ROLES: [&str; 2] = ["coordinator", "participant"];
const KINDS: [&str; 12] = [
    "Start", "Promote", "Rollback", "Pause", "Resume", "Revert", "Refused", "Cordon", "Uncordon", "Readmit", "Add",
    "Remove",
];
/// How many moments there are.
pub const MOMENTS: usize = POINTS.len() * KINDS.len() * ROLES.len() + OTHER_POINTS.len() * ROLES.len();

/// Things that happen somewhere in enough runs.
const EVENTS: [&str; 22] = [
    "committed",
    "committed, asked again",
    "aborted",
    "aborted, asked again",
    "refused",
    "key reused",
    "no quorum",
    "in doubt",
    "busy",
    "linearizable read",
    "voted yes",
    "voted no",
    "abstained",
    "local_hold",
    "lease lost",
    "rollback enforced",
    "coordinator changed",
    "log rebuilt",
    "checkpoint taken over",
    "increase chosen in doubt",
    "old ballot refused",
    "bit flipped",
];

/// What was reached how often.
#[derive(Clone)]
pub struct Coverage {
    reached: [u64; MOMENTS],
    died: [u64; MOMENTS],
    events: [u64; EVENTS.len()],
    /// How often each of `FAULTS` was injected.
    pub faults: BTreeMap<&'static str, u64>,
}

impl Default for Coverage {
    fn default() -> Self {
        Self { reached: [0; MOMENTS], died: [0; MOMENTS], events: [0; EVENTS.len()], faults: BTreeMap::new() }
    }
}

impl Coverage {
    /// Counts an output that is carried out, or, for `died`, was about to be.
    pub fn output(&mut self, output: &Output, coordinates: bool, died: bool) {
        let Some(moment) = moment(output, coordinates) else { return };
        let counts = if died { &mut self.died } else { &mut self.reached };
        counts[moment] += 1;
        if !died {
            self.notice(output);
        }
    }

    fn notice(&mut self, output: &Output) {
        match output {
            Output::Reply(_, outcome) => self.event(match outcome {
                Outcome::Committed { repeated: false, .. } => "committed",
                Outcome::Committed { .. } => "committed, asked again",
                Outcome::Aborted { repeated: false, .. } => "aborted",
                Outcome::Aborted { .. } => "aborted, asked again",
                Outcome::Unchanged { .. } | Outcome::Refused(_) | Outcome::NotReady { .. } => "refused",
                Outcome::KeyReused { .. } => "key reused",
                Outcome::NoQuorum { .. } => "no quorum",
                Outcome::InDoubt => "in doubt",
                Outcome::Busy => "busy",
                Outcome::Current(_) => "linearizable read",
            }),
            Output::Send { message, .. } => {
                if let Message::Vote(vote) = &**message
                    && let Answer::Refuse(aviary_core::protocol::message::Refusal::Stale(_)) = vote.answer
                {
                    self.event("old ballot refused");
                }
            }
            _ => {}
        }
    }

    /// Returns true when an output is this moment.
    pub fn is_at(moment_wanted: usize, output: &Output, coordinates: bool) -> bool {
        moment(output, coordinates) == Some(moment_wanted)
    }

    /// Counts what a node says of itself.
    pub fn announced(&mut self, event: &Event) {
        match event {
            Event::Voted { vote, .. } if vote == "yes" => self.event("voted yes"),
            Event::Voted { vote, .. } if vote == "no" => self.event("voted no"),
            Event::Voted { .. } => self.event("abstained"),
            Event::LocalHold { .. } => self.event("local_hold"),
            Event::Lease { held: false } => self.event("lease lost"),
            Event::Enforced { .. } => self.event("rollback enforced"),
            Event::Coordinator { .. } => self.event("coordinator changed"),
            _ => {}
        }
    }

    /// Counts that one of [`EVENTS`] happened.
    pub fn event(&mut self, name: &str) {
        let place = EVENTS.iter().position(|event| *event == name);
        self.events[place.unwrap_or_else(|| panic!("{name} is no event"))] += 1;
    }

    /// Adds another run's counts to these.
    pub fn add(&mut self, other: &Self) {
        let add = |sums: &mut [u64], counts: &[u64]| sums.iter_mut().zip(counts).for_each(|(sum, n)| *sum += n);
        add(&mut self.reached, &other.reached);
        add(&mut self.died, &other.died);
        add(&mut self.events, &other.events);
        other.faults.iter().for_each(|(name, n)| *self.faults.entry(name).or_default() += n);
    }

    /// Returns the report: how many of each, and all that never was.
    pub fn report(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let mut line = |what: &str, counts: &[u64], name: &dyn Fn(usize) -> String| {
            let hit = counts.iter().filter(|n| **n > 0).count();
            lines.push(format!("coverage: {hit} of {} {what}", counts.len()));
            let never = (0..counts.len()).filter(|at| counts[*at] == 0).map(name).collect::<Vec<_>>();
            if !never.is_empty() {
                lines.push(format!("  never: {}", never.join(", ")));
            }
        };
        line("moments reached", &self.reached, &moment_name);
        line("moments died at", &self.died, &moment_name);
        line("events seen", &self.events, &|at| EVENTS[at].into());
        let faults: Vec<_> = self.faults.iter().map(|(name, n)| format!("{name} {n}")).collect();
        lines.push(format!("faults: {}", faults.join(", ")));
        lines
    }

    /// Returns what was never reached, died at or seen, of what a long enough run must.
    pub fn never(&self) -> Vec<String> {
        let missing = |counts: &[u64], name: &dyn Fn(usize) -> String| {
            (0..counts.len()).filter(|at| counts[*at] == 0).map(name).collect::<Vec<_>>()
        };
        let mut never = missing(&self.reached, &|at| format!("reached {}", moment_name(at)));
        never.extend(missing(&self.died, &|at| format!("died at {}", moment_name(at))));
        never.extend(missing(&self.events, &|at| EVENTS[at].into()));
        never
    }
}

fn moment(output: &Output, coordinates: bool) -> Option<usize> {
    let role = usize::from(!coordinates);
    let about = |point: usize, kind: &str| {
        let kind = KINDS.iter().position(|known| *known == kind)?;
        Some((point * KINDS.len() + kind) * ROLES.len() + role)
    };
    let other = |point: usize| Some(POINTS.len() * KINDS.len() * ROLES.len() + point * ROLES.len() + role);
    match output {
        Output::Send { message, .. } => match &**message {
            Message::Prepare(prepare) => about(0, prepare.intent.operation.name()),
            Message::Decision(Decision::Propose(_, record)) => about(1, record.intent.operation.name()),
            Message::Decision(Decision::Chosen(chosen)) => about(2, chosen.record.intent.operation.name()),
            Message::Vote(vote) => other(match vote.answer {
                Answer::Gate { .. } => 0,
                Answer::Accept => 1,
                Answer::Refuse(_) => 2,
            }),
            _ => None,
        },
        Output::Append(chosen) => about(3, chosen.record.intent.operation.name()),
        Output::Persist(_) => other(3),
        Output::Publish(_) => other(4),
        Output::Reply(..) => other(5),
        _ => None,
    }
}

fn moment_name(at: usize) -> String {
    let role = ROLES[at % ROLES.len()];
    let known = POINTS.len() * KINDS.len();
    match at / ROLES.len() {
        about if about < known => format!("{} {} as {role}", POINTS[about / KINDS.len()], KINDS[about % KINDS.len()]),
        other => format!("{} as {role}", OTHER_POINTS[other - known]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_moment_has_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = (0..MOMENTS).map(moment_name).collect();
        assert_eq!(names.len(), MOMENTS);
        assert!(names.contains("PREPARE Start as coordinator") && names.contains("reply as participant"));
    }
}
