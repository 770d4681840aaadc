//! What the cluster decides, told to others: the log is the truth, and streams and publishers follow it.
//!
//! Every node makes the same [`Decision`] of the same record's event, so that streams, topics and stores say the same.

use prost_types::Timestamp;

use crate::domain::routing::RoutingState;
use crate::domain::run::{AnswerSummary, WindowVerdict};
use crate::domain::time::Wall;
use crate::domain::verdict;
use crate::protocol::Event;
use crate::protocol::record::{RecordKind, Sequence};
use crate::schema::v1::{self, Decision, DecisionKind, Verdict, VersionSummary};

pub mod follow;
pub mod guard;
pub mod publish;

/// Returns what an event decides about a service; none for what is no decision, or no service's.
pub fn decision(event: &Event) -> Option<Decision> {
    match event {
        Event::Routing { slot, kind, actor, state, phase, reasons, decided_at: Some(decided_at), .. } => {
            Some(Decision {
                sequence: Sequence::of(*slot, 0).0,
                kind: decision_kind(*kind).into(),
                reasons: reasons.clone(),
                proposed_time: Some(timestamp(state.timestamp)),
                decided_time: Some(timestamp(*decided_at)),
                actor: actor.clone(),
                phase: phase.map(|phase| phase.to_string()).unwrap_or_default(),
                transaction_id: state.txid.to_string(),
                ..of_routing(state)
            })
        }
        Event::Analyzed {
            sequence: Some(sequence),
            rollout_generation,
            window_verdict,
            decided: Some(decided),
            ..
        } => {
            let reasons = vec![window_verdict.verdict.reason().to_string()];
            Some(Decision {
                sequence: sequence.0,
                kind: DecisionKind::Verdict.into(),
                reasons: reasons.into_iter().filter(|reason| !reason.is_empty()).collect(),
                proposed_time: Some(timestamp(decided.proposed_at)),
                decided_time: Some(timestamp(decided.decided_at)),
                transaction_id: decided.txid.to_string(),
                window: Some(window(window_verdict)),
                rollout_generation: *rollout_generation,
                ..of_routing(&decided.state)
            })
        }
        _ => None,
    }
}

fn of_routing(state: &RoutingState) -> Decision {
    Decision {
        service: state.service.to_string(),
        routing_version: state.version,
        stable_version: state.stable_model_id.to_string(),
        canary_version: state.canary_model_id.as_ref().map(ToString::to_string).unwrap_or_default(),
        canary_weight_bp: state.canary_weight().bp().into(),
        ..Decision::default()
    }
}

/// Returns a time as protobuf has it.
pub fn timestamp(at: Wall) -> Timestamp {
    Timestamp { seconds: (at.0 / 1000) as i64, nanos: (at.0 % 1000 * 1_000_000) as i32 }
}

fn decision_kind(kind: RecordKind) -> DecisionKind {
    match kind {
        RecordKind::Start => DecisionKind::Start,
        RecordKind::Promote => DecisionKind::Promote,
        RecordKind::Pause => DecisionKind::Pause,
        RecordKind::Resume => DecisionKind::Resume,
        RecordKind::SetServers => DecisionKind::SetServers,
        RecordKind::Rollback => DecisionKind::Rollback,
        RecordKind::Revert => DecisionKind::Revert,
        RecordKind::Refused => DecisionKind::Refused,
        RecordKind::Verdict => DecisionKind::Verdict,
        RecordKind::Genesis
        | RecordKind::Cordon
        | RecordKind::Uncordon
        | RecordKind::Readmit
        | RecordKind::Add
        | RecordKind::Remove
        | RecordKind::SetDefault => DecisionKind::Unspecified,
    }
}

fn window(window_verdict: &WindowVerdict) -> v1::WindowVerdict {
    let WindowVerdict { from_ms, to_ms, verdict, stable, canary, sequential, is_window: _ } = window_verdict;
    let verdict = match verdict {
        verdict::Verdict::Promote => Verdict::Promote,
        verdict::Verdict::Hold(_) => Verdict::Hold,
        verdict::Verdict::Pause(_) => Verdict::Pause,
        verdict::Verdict::Rollback(_) => Verdict::Rollback,
    };
    v1::WindowVerdict {
        verdict: verdict.into(),
        from_ms: *from_ms,
        to_ms: *to_ms,
        stable: Some(summary(stable)),
        canary: Some(summary(canary)),
        e_value: sequential.map(|sequential| sequential.e_value),
        e_value_bound: sequential.map(|sequential| sequential.bound),
        alpha_spent: sequential.map(|sequential| sequential.alpha_spent),
    }
}

fn summary(summary: &AnswerSummary) -> VersionSummary {
    let AnswerSummary { count, errors, p50_ms, p95_ms, p99_ms } = summary;
    VersionSummary { count: *count, errors: *errors, p50_ms: *p50_ms, p95_ms: *p95_ms, p99_ms: *p99_ms }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::{ClusterId, NodeId, ServiceId, TxId};
    use crate::domain::rollout::{Change, Phase, Service, Stamp, Target};
    use crate::domain::run::SequentialEvidence;
    use crate::protocol::record::{
        Chosen, ConfigChange, Hash, Initiator, Intent, Members, Operation, Record, ServiceVerdict, Slot,
    };

    const AT_MS: u64 = 1_700_000_000_123;
    const ROLLOUT: &str = "apiVersion: aviary/v1\nkind: Rollout\nmetadata: { name: svc }\nspec:\n  \
        stable: { version: v1, answer: node }\n  canary: { version: v2, answer: node }\n  steps:\n    - setWeight: 5\n    - setWeight: 100\n";

    fn id() -> ServiceId {
        ServiceId::new("svc").unwrap()
    }

    fn start() -> (Change, Service) {
        let spec = crate::config::rollout::parse(ROLLOUT, "rollout").unwrap_or_else(|why| panic!("{why}"));
        let change = Change::Start(std::sync::Arc::new(spec));
        let stamp = Stamp { tx: TxId::new("before").unwrap(), at: Wall(1) };
        (change.clone(), Service::after(None, &id(), &change, &stamp).unwrap())
    }

    /// Returns the first decision that a record of this operation makes of a canary at 5 %.
    fn of(operation: Operation, has_state: bool) -> Option<Decision> {
        let (tx, at, actor) = (TxId::new("tx-9").unwrap(), Wall(AT_MS), "alice".into());
        let intent = Intent { initiator: Initiator::Client, tx, actor, digest: 0, at, operation };
        let state = has_state.then(routing);
        let (slot, prev_hash, phase) = (Slot(9), Hash::default(), has_state.then_some(Phase::Progressing));
        let record = Record { slot, prev_hash, intent, state, phase, certificate: None };
        let chosen = Chosen { ballot: None, decided_at: Wall(AT_MS + 38), record };
        Event::of(&chosen).first().and_then(|(_, event)| decision(event))
    }

    fn routing() -> RoutingState {
        let tx = TxId::new("tx-9").unwrap();
        RoutingState { txid: tx, timestamp: Wall(AT_MS), ..start().1.routing }
    }

    fn expected(kind: DecisionKind, reasons: &[&str]) -> Decision {
        Decision {
            sequence: 9 * 4096,
            service: "svc".into(),
            kind: kind.into(),
            transaction_id: "tx-9".into(),
            routing_version: 1,
            stable_version: "v1".into(),
            canary_version: "v2".into(),
            canary_weight_bp: 500,
            reasons: reasons.iter().map(ToString::to_string).collect(),
            proposed_time: Some(Timestamp { seconds: 1_700_000_000, nanos: 123_000_000 }),
            decided_time: Some(Timestamp { seconds: 1_700_000_000, nanos: 161_000_000 }),
            actor: "alice".into(),
            phase: "Progressing".into(),
            window: None,
            rollout_generation: 0,
        }
    }

    #[test]
    fn each_record_of_a_service_is_one_decision() {
        let change = |change| of(Operation::Change(id(), change), true);
        let promote = Change::Promote { to: Target::Stage(1), full: false };
        assert_eq!(change(start().0), Some(expected(DecisionKind::Start, &[])));
        assert_eq!(change(promote), Some(expected(DecisionKind::Promote, &[])));
        assert_eq!(change(Change::Resume), Some(expected(DecisionKind::Resume, &[])));
        let pause = Change::Pause { reason: String::new() };
        assert_eq!(change(pause), Some(expected(DecisionKind::Pause, &[])), "an empty reason is none");
        let rollback = Change::Rollback { reason: "errors: 9 %".into() };
        assert_eq!(change(rollback), Some(expected(DecisionKind::Rollback, &["errors: 9 %"])));
        let revert = Operation::Revert { service: id(), increased: Slot(8), reason: "in doubt".into() };
        assert_eq!(of(revert, true), Some(expected(DecisionKind::Revert, &["in doubt"])));
        let reasons = vec!["b: no".to_string(), "c: silent".to_string()];
        let refused = Operation::Refused { service: Some(id()), refused: "Promote".into(), reasons };
        assert_eq!(of(refused, true), Some(expected(DecisionKind::Refused, &["b: no", "c: silent"])));
    }

    #[test]
    fn a_windows_verdict_is_a_decision_with_its_evidence() {
        let sequential =
            SequentialEvidence { e_value: 7.5, bound: 100.0, e_errors: 1.0, e_latency: 2.0, alpha_spent: 0.01 };
        let canary = AnswerSummary { count: 40, errors: 9, p50_ms: Some(1.5), p95_ms: None, p99_ms: Some(8.0) };
        let window_verdict = WindowVerdict {
            verdict: verdict::Verdict::Rollback("worse".into()),
            canary,
            sequential: Some(sequential),
            ..WindowVerdict::unseen(3_000, 6_000)
        };
        let verdict = ServiceVerdict { routing: routing(), rollout_generation: 4, window_verdict };
        let found = of(Operation::Verdicts(vec![verdict]), false);
        let window = v1::WindowVerdict {
            verdict: Verdict::Rollback.into(),
            from_ms: 3_000,
            to_ms: 6_000,
            stable: Some(VersionSummary::default()),
            canary: Some(VersionSummary { count: 40, errors: 9, p50_ms: Some(1.5), p95_ms: None, p99_ms: Some(8.0) }),
            e_value: Some(7.5),
            e_value_bound: Some(100.0),
            alpha_spent: Some(0.01),
        };
        let base =
            Decision { actor: String::new(), phase: String::new(), ..expected(DecisionKind::Verdict, &["worse"]) };
        assert_eq!(found, Some(Decision { window: Some(window), rollout_generation: 4, ..base }));
    }

    #[test]
    fn what_is_no_services_is_no_decision() {
        let node = NodeId::new("c").unwrap();
        let cluster = ClusterId([1; 16]);
        assert_eq!(of(Operation::Config(ConfigChange::Cordon(node)), false), None);
        assert_eq!(of(Operation::Genesis { cluster, members: Members::default() }, false), None);
        let refused = Operation::Refused { service: None, refused: "Cordon".into(), reasons: Vec::new() };
        assert_eq!(of(refused, false), None);
    }
}
