//! What the cluster decides, told to others: the log is the truth, and whoever tells follows it.
//!
//! Every node makes the same [`Decision`] of the same record, so that streams, topics and stores say the same.

use prost_types::Timestamp;

use crate::domain::analysis;
use crate::domain::rollout::Change;
use crate::domain::trial::{Judgement, Summary};
use crate::protocol::record::{Act, Chosen};
use crate::schema::v1::{Decision, DecisionKind, Verdict, VersionSummary, WindowVerdict};

pub mod follow;
pub mod guard;
pub mod publish;

/// Returns what a record decides about a service; none for what is no service's.
pub fn decision(chosen: &Chosen) -> Option<Decision> {
    let record = &chosen.record;
    let act = &record.intent.act;
    let state = record.state.as_ref()?;
    let (window, rollout_version) = match act {
        Act::Judge { judgement, since_version, .. } => (Some(window(judgement)), *since_version),
        _ => (None, 0),
    };
    let at_ms = record.intent.at.0;
    Some(Decision {
        sequence: record.slot.0,
        service: state.service.to_string(),
        kind: kind(act).into(),
        transaction_id: record.intent.tx.to_string(),
        routing_version: state.version,
        stable_version: state.stable_model_id.to_string(),
        canary_version: state.canary_model_id.as_ref().map(ToString::to_string).unwrap_or_default(),
        canary_weight_bp: state.canary_weight().bp().into(),
        reasons: act.reasons(),
        decision_time: Some(Timestamp { seconds: (at_ms / 1000) as i64, nanos: (at_ms % 1000 * 1_000_000) as i32 }),
        window,
        rollout_version,
    })
}

fn kind(act: &Act) -> DecisionKind {
    match act {
        Act::Change(_, Change::Start(_)) => DecisionKind::Start,
        Act::Change(_, Change::Promote { .. }) => DecisionKind::Promote,
        Act::Change(_, Change::Pause { .. }) => DecisionKind::Pause,
        Act::Change(_, Change::Resume) => DecisionKind::Resume,
        Act::Change(_, Change::Rollback { .. }) => DecisionKind::Rollback,
        Act::Revert { .. } => DecisionKind::Revert,
        Act::Abort { .. } => DecisionKind::Abort,
        Act::Judge { .. } => DecisionKind::Verdict,
        Act::Genesis { .. } | Act::Config(_) => DecisionKind::Unspecified,
    }
}

fn window(judgement: &Judgement) -> WindowVerdict {
    let Judgement { from_ms, to_ms, verdict, stable, canary, odds, is_window: _ } = judgement;
    let verdict = match verdict {
        analysis::Verdict::Promote => Verdict::Promote,
        analysis::Verdict::Hold(_) => Verdict::Hold,
        analysis::Verdict::Pause(_) => Verdict::Pause,
        analysis::Verdict::Rollback(_) => Verdict::Rollback,
    };
    WindowVerdict {
        verdict: verdict.into(),
        from_ms: *from_ms,
        to_ms: *to_ms,
        stable: Some(summary(stable)),
        canary: Some(summary(canary)),
        e_value: odds.map(|odds| odds.e_value),
        e_value_bound: odds.map(|odds| odds.bound),
        alpha_spent: odds.map(|odds| odds.alpha_spent),
    }
}

fn summary(summary: &Summary) -> VersionSummary {
    let Summary { count, errors, p50_ms, p95_ms, p99_ms } = summary;
    VersionSummary { count: *count, errors: *errors, p50_ms: *p50_ms, p95_ms: *p95_ms, p99_ms: *p99_ms }
}
