//! Messages and operations in short words, for traces.

use super::*;

pub(super) fn brief_op(asked: &OperatorRequest) -> String {
    match asked {
        OperatorRequest::Apply(spec) => {
            format!("Apply {} {} → {}", spec.service, spec.stable.version, spec.canary.version)
        }
        other => format!("{other:?}"),
    }
}

pub(super) fn brief(message: &Message) -> String {
    match message {
        Message::Prepare(p) => format!(
            "PREPARE {} slot {} {} {} recovery {}",
            p.ballot,
            p.slot,
            p.intent.operation.name(),
            p.intent.tx,
            p.recovery
        ),
        Message::Vote(v) => format!("VOTE {} slot {} {:?}", v.ballot, v.slot, v.answer),
        Message::Decision(Decision::Propose(b, r)) => {
            format!("PROPOSE {b} slot {} {} {}", r.slot, r.intent.operation.name(), r.intent.tx)
        }
        Message::Decision(Decision::Chosen(c)) => {
            format!("CHOSEN slot {} {}", c.record.slot, c.record.intent.operation.name())
        }
        Message::Decision(Decision::Checkpoint(part)) => {
            format!("CHECKPOINT slot {} part {} of {}", part.slot, part.index, part.parts)
        }
        Message::Decision(Decision::CatchUp(c)) => {
            format!("CATCHUP slot {} {}", c.record.slot, c.record.intent.operation.name())
        }
        Message::Heartbeat(h) => format!(
            "HEARTBEAT nonce {:?} ack {:?} head {} open {:?} in doubt {:?} {:?}",
            h.nonce,
            h.acknowledges,
            h.head,
            h.open.as_ref().map(|b| b.to_string()),
            h.in_doubt,
            h.membership
        ),
        Message::HealthSnapshot(h) => {
            format!("HEALTH v{} hold {:?} effective {} bp", h.routing_version, h.local_hold, h.effective_bp)
        }
    }
}
