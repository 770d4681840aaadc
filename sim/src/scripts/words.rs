//! Outputs in a line each; what only keeps time or shows state has none.

use aviary_core::protocol::message::{Answer, Decision, GateVote, Message, Refusal};
use aviary_core::protocol::record::{AcceptorState, Ballot, Intent};
use aviary_core::protocol::{Event, Outcome, Output};

/// Tells an output in a line; none for heartbeats, evidence, leases, views and saved analysis.
pub fn told(output: &Output) -> Option<String> {
    Some(match output {
        Output::Persist(acceptor) => persisted(acceptor),
        Output::Append(chosen) => format!("appends slot {} {}", chosen.record.slot, named(&chosen.record.intent)),
        Output::Send { to, message } => format!("-> {to} {}", said(message)?),
        Output::SendLog { to, from, through } => format!("-> {to} log {from}..{through}"),
        Output::Checkpoint { checkpoint, .. } => format!("keeps checkpoint {}", checkpoint.slot),
        Output::Install(checkpoint) => format!("installs checkpoint {}", checkpoint.slot),
        Output::Announce(Event::Voted { vote, reason, .. }) => format!("votes {vote}: {reason}"),
        Output::Announce(Event::LocalHold { service, reason }) => format!("stops the canary of {service}: {reason}"),
        Output::Announce(Event::Lease { held }) => (if *held { "holds a lease" } else { "lost its lease" }).into(),
        Output::Announce(Event::Rejected { node, reason }) => format!("rejects a message from {node}: {reason}"),
        Output::Reply(..) | Output::Announce(_) | Output::Publish(_) | Output::Lease(_) | Output::SaveRun(..) => {
            return None;
        }
    })
}

fn persisted(acceptor: &AcceptorState) -> String {
    let promised = acceptor.promised.as_ref().map_or("nothing".into(), Ballot::to_string);
    let accepted = acceptor.accepted.as_ref().map(|accepted| {
        format!(", accepted {} slot {} {}", accepted.ballot, accepted.record.slot, named(&accepted.record.intent))
    });
    format!("persists promised {promised}{}", accepted.unwrap_or_default())
}

fn named(intent: &Intent) -> String {
    format!("{} {}", intent.operation.name(), intent.tx)
}

/// Tells a message; none for heartbeats and evidence.
pub fn said(message: &Message) -> Option<String> {
    Some(match message {
        Message::Prepare(prepare) => {
            format!("PREPARE {} slot {} {}", prepare.ballot, prepare.slot, named(&prepare.intent))
        }
        Message::Vote(vote) => format!("VOTE {} slot {} {}", vote.ballot, vote.slot, answered(&vote.answer)),
        Message::Decision(Decision::Propose(ballot, record)) => {
            format!("DECISION propose {ballot} slot {} {}", record.slot, named(&record.intent))
        }
        Message::Decision(Decision::Chosen(chosen)) => {
            format!("DECISION chosen slot {} {}", chosen.record.slot, named(&chosen.record.intent))
        }
        Message::Decision(Decision::CatchUp(chosen)) => format!("DECISION catch-up slot {}", chosen.record.slot),
        Message::Decision(Decision::Checkpoint(part)) => format!("DECISION checkpoint {}", part.slot),
        Message::Heartbeat(_) | Message::HealthSnapshot(_) => return None,
    })
}

fn answered(answer: &Answer) -> String {
    match answer {
        Answer::Gate { accepted, gate } => {
            let gate = match gate {
                GateVote::Yes(_) => "yes",
                GateVote::No(_) => "no",
                GateVote::Abstain(_) => "abstain",
            };
            let with =
                accepted.as_ref().map(|told| format!(", accepted {} {}", told.ballot, named(&told.record.intent)));
            format!("{gate}{}", with.unwrap_or_default())
        }
        Answer::Accept => "accept".into(),
        Answer::Refuse(Refusal::Stale(ballot)) => format!("refuse: promised {ballot}"),
        Answer::Refuse(refusal) => format!("refuse: {refusal:?}"),
    }
}

/// Returns the words in which scripts show an answer.
pub fn outcome(outcome: &Outcome) -> String {
    let again = |repeated: bool| if repeated { ", again" } else { "" };
    match outcome {
        Outcome::Committed { slot, repeated, .. } => format!("COMMITTED slot {slot}{}", again(*repeated)),
        Outcome::Aborted { slot, reasons, repeated } => {
            format!("ABORTED slot {slot}{}: {}", again(*repeated), reasons.join("; "))
        }
        Outcome::Unchanged { .. } => "UNCHANGED".into(),
        other => format!("{other:?}"),
    }
}
