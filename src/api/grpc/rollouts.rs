//! `RolloutService`: the verbs of `service`; here is how they are asked for and answered over gRPC.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{HeaderMap, header};
use tonic::{Request, Response, Status};

use super::super::auth::Actor;
use super::super::service::{self, Caller, ChangeVerb};
use super::super::show::{self, ListQuery};
use super::super::state::ApiState;
use crate::code::Code;
use crate::decisions::timestamp;
use crate::domain::ids::{IdError, NodeId, ServiceId, VersionId};
use crate::domain::rollout::Phase;
use crate::domain::weights::Weight;
use crate::model::rollout::AnswerCounts;
use crate::model::{self, ChangeDetails, Changed, Problem, RolloutList, RolloutView, WriteConsistency};
use crate::protocol::Mode;
use crate::schema::v1::rollout_service_server::RolloutService;
use crate::schema::v1::*;
use crate::status;

/// Changes rollouts, and shows them.
pub struct Rollouts(pub ApiState);

/// Returns who asks for a write, under which key, and whether the answer waits for all live nodes.
fn caller<T>(request: &Request<T>, idempotency_key: &str, everywhere: bool) -> Result<Caller, Status> {
    let mut headers = HeaderMap::new();
    if !idempotency_key.is_empty() {
        let key = idempotency_key.parse().map_err(|_| Status::invalid_argument("idempotency_key is not text"))?;
        headers.insert("idempotency-key", key);
    }
    // The coordinator asks for it again.
    if let Some(token) = request.metadata().get(header::AUTHORIZATION.as_str()).and_then(|token| token.to_str().ok())
        && let Ok(token) = token.parse()
    {
        headers.insert(header::AUTHORIZATION, token);
    }
    let actor = request.extensions().get::<Actor>().cloned();
    let consistency = if everywhere { WriteConsistency::Everywhere } else { WriteConsistency::Node };
    Ok(Caller { actor, headers, consistency })
}

impl From<Problem> for Status {
    fn from(problem: Problem) -> Self {
        let why = problem.detail;
        match problem.code {
            Code::Aborted => Self::aborted(why),
            Code::Refused => Self::failed_precondition(why),
            Code::InvalidArgument | Code::TooLarge => Self::invalid_argument(why),
            Code::NotFound => Self::not_found(why),
            Code::KeyReused => Self::already_exists(why),
            Code::Busy => Self::resource_exhausted(why),
            Code::NoQuorum | Code::OutcomeUnknown | Code::Unavailable => Self::unavailable(why),
            Code::Unauthenticated => Self::unauthenticated(why),
            Code::PermissionDenied => Self::permission_denied(why),
            Code::MethodNotAllowed => Self::unimplemented(why),
            Code::Internal | Code::Unknown => Self::internal(why),
        }
    }
}

impl From<model::Reach> for Reach {
    fn from(reach: model::Reach) -> Self {
        let names = |nodes: Vec<NodeId>| nodes.into_iter().map(String::from).collect();
        let missing = reach.missing.into_iter().map(|(node, why)| (node.into(), why)).collect();
        Self { served_by: names(reach.served_by), away: names(reach.away), missing }
    }
}

impl From<Changed> for ChangeResult {
    fn from(changed: Changed) -> Self {
        Self {
            transaction_id: changed.txid.to_string(),
            sequence: changed.sequence.map(|sequence| sequence.0),
            repeated: changed.repeated,
            routing_version: changed.state.map(|state| state.version).unwrap_or_default(),
            status: match changed.status {
                model::ChangeStatus::Committed => ChangeStatus::Committed.into(),
                model::ChangeStatus::Unchanged => ChangeStatus::Unchanged.into(),
            },
            slot: changed.slot.map(|slot| slot.0),
            reason: changed.reason,
            rolled_back: changed.rolled_back,
            reach: changed.reach.map(Reach::from),
        }
    }
}

fn phase(phase: Phase) -> RolloutPhase {
    match phase {
        Phase::Progressing => RolloutPhase::Progressing,
        Phase::Paused => RolloutPhase::Paused,
        Phase::Baking => RolloutPhase::Baking,
        Phase::Completed => RolloutPhase::Completed,
        Phase::RolledBack => RolloutPhase::RolledBack,
    }
}

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Normal => "normal",
        Mode::FailSafe => "fail_safe",
        Mode::Learner => "learner",
    }
}

fn summaries(answers: &BTreeMap<VersionId, AnswerCounts>) -> BTreeMap<String, VersionSummary> {
    let summary = |AnswerCounts { count, errors, p50_ms, p95_ms, p99_ms, .. }: &AnswerCounts| VersionSummary {
        count: *count,
        errors: *errors,
        p50_ms: *p50_ms,
        p95_ms: *p95_ms,
        p99_ms: *p99_ms,
    };
    answers.iter().map(|(version, counts)| (version.to_string(), summary(counts))).collect()
}

impl From<RolloutView> for Rollout {
    fn from(view: RolloutView) -> Self {
        let RolloutView { name, metadata, routing: shown, health, manifest, was_served, .. } = view;
        let (rollout_generation, waits_for_operator) = (shown.rollout_generation, shown.waits_for_operator);
        let routing = &shown.routing;
        let effective = routing.canary_model_id.as_ref().and_then(|canary| shown.effective_weights.get(canary));
        let sequential = health.sequential.map(|found| SequentialEvidence {
            e_value: found.e_value,
            bound: found.bound,
            e_errors: found.e_errors,
            e_latency: found.e_latency,
            alpha_spent: found.alpha_spent,
        });
        Self {
            service: name.to_string(),
            phase: phase(shown.phase).into(),
            step: shown.stage as u32 + 1,
            stable_version: routing.stable_model_id.to_string(),
            canary_version: routing.canary_model_id.as_ref().map(ToString::to_string).unwrap_or_default(),
            canary_weight_bp: routing.canary_weight().bp().into(),
            effective_canary_weight_bp: effective.map_or(0, |share| (share * f64::from(Weight::WHOLE)).round() as u32),
            routing_version: routing.version,
            verdict: health.verdict.unwrap_or_default(),
            verdict_reason: health.verdict_reason.unwrap_or_default(),
            waiting_for: shown.waiting_for,
            reason: shown.reason,
            labels: metadata.labels.into_iter().collect(),
            annotations: metadata.annotations.into_iter().collect(),
            node: shown.node.to_string(),
            slot: shown.slot.0,
            hash: shown.hash,
            mode: mode(shown.mode).into(),
            steps: shown.stages as u32,
            held_back: shown.held_back.unwrap_or_default(),
            lease_ms_left: shown.lease_ms_left,
            enforced: shown.enforced,
            transaction_id: routing.txid.to_string(),
            proposed_time: Some(timestamp(routing.timestamp)),
            window_ms: health.window_ms,
            local_answers: summaries(&health.local),
            cluster_answers: summaries(&health.cluster),
            sequential,
            manifest: manifest.to_string(),
            rollout_generation,
            waits_for_operator,
            was_served,
        }
    }
}

impl Rollouts {
    async fn change(
        &self,
        mut caller: Caller,
        service: &str,
        verb: ChangeVerb,
        details: ChangeDetails,
    ) -> Result<ChangeResult, Status> {
        caller.headers.insert(header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
        let body = Bytes::from(serde_json::to_vec(&details).map_err(|why| Status::internal(why.to_string()))?);
        Ok(service::change(&self.0, &caller, service, verb, &body).await?.into())
    }

    /// Waits, where that is asked for, until this node knows every change answered so far.
    async fn caught_up(&self, current: bool) -> Result<(), Status> {
        match current {
            true => status::caught_up(&self.0.node).await.map_err(|problem| Status::unavailable(problem.detail)),
            false => Ok(()),
        }
    }
}

#[tonic::async_trait]
impl RolloutService for Rollouts {
    async fn apply_rollout(
        &self,
        request: Request<ApplyRolloutRequest>,
    ) -> Result<Response<ApplyRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key, request.get_ref().everywhere)?;
        let body = Bytes::from(request.into_inner().rollout);
        let result = service::apply(&self.0, &caller, &body).await?.into();
        Ok(Response::new(ApplyRolloutResponse { result: Some(result) }))
    }

    async fn promote_rollout(
        &self,
        request: Request<PromoteRolloutRequest>,
    ) -> Result<Response<PromoteRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key, request.get_ref().everywhere)?;
        let PromoteRolloutRequest { service, full, skip_wait, .. } = request.into_inner();
        let details = ChangeDetails { full, skip_wait, ..ChangeDetails::default() };
        let result = self.change(caller, &service, ChangeVerb::Promote, details).await?;
        Ok(Response::new(PromoteRolloutResponse { result: Some(result) }))
    }

    async fn pause_rollout(
        &self,
        request: Request<PauseRolloutRequest>,
    ) -> Result<Response<PauseRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key, request.get_ref().everywhere)?;
        let PauseRolloutRequest { service, reason, .. } = request.into_inner();
        let details = ChangeDetails { reason: Some(reason), ..ChangeDetails::default() };
        let result = self.change(caller, &service, ChangeVerb::Pause, details).await?;
        Ok(Response::new(PauseRolloutResponse { result: Some(result) }))
    }

    async fn resume_rollout(
        &self,
        request: Request<ResumeRolloutRequest>,
    ) -> Result<Response<ResumeRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key, request.get_ref().everywhere)?;
        let result =
            self.change(caller, &request.into_inner().service, ChangeVerb::Resume, ChangeDetails::default()).await?;
        Ok(Response::new(ResumeRolloutResponse { result: Some(result) }))
    }

    async fn abort_rollout(
        &self,
        request: Request<AbortRolloutRequest>,
    ) -> Result<Response<AbortRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key, request.get_ref().everywhere)?;
        let AbortRolloutRequest { service, reason, .. } = request.into_inner();
        let details = ChangeDetails { reason: Some(reason), ..ChangeDetails::default() };
        let result = self.change(caller, &service, ChangeVerb::Abort, details).await?;
        Ok(Response::new(AbortRolloutResponse { result: Some(result) }))
    }

    async fn retry_rollout(
        &self,
        request: Request<RetryRolloutRequest>,
    ) -> Result<Response<RetryRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key, request.get_ref().everywhere)?;
        let result =
            self.change(caller, &request.into_inner().service, ChangeVerb::Retry, ChangeDetails::default()).await?;
        Ok(Response::new(RetryRolloutResponse { result: Some(result) }))
    }

    async fn undo_rollout(
        &self,
        request: Request<UndoRolloutRequest>,
    ) -> Result<Response<UndoRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key, request.get_ref().everywhere)?;
        let UndoRolloutRequest { service, now, .. } = request.into_inner();
        let details = ChangeDetails { now, ..ChangeDetails::default() };
        let result = self.change(caller, &service, ChangeVerb::Undo, details).await?;
        Ok(Response::new(UndoRolloutResponse { result: Some(result) }))
    }

    async fn get_rollout(&self, request: Request<GetRolloutRequest>) -> Result<Response<GetRolloutResponse>, Status> {
        let GetRolloutRequest { service: name, current } = request.into_inner();
        self.caught_up(current).await?;
        let found = show::known(&self.0, &name)?;
        Ok(Response::new(GetRolloutResponse { rollout: Some(found.into()) }))
    }

    async fn list_rollouts(
        &self,
        request: Request<ListRolloutsRequest>,
    ) -> Result<Response<ListRolloutsResponse>, Status> {
        let ListRolloutsRequest { current, selector, limit, after } = request.into_inner();
        self.caught_up(current).await?;
        let wrong = |why: IdError| Status::invalid_argument(format!("after: {why}"));
        let after = (!after.is_empty()).then(|| ServiceId::new(after)).transpose().map_err(wrong)?;
        let limit = (limit > 0).then_some(limit as usize);
        let RolloutList { rollouts, next } = show::page(&self.0, ListQuery { selector, limit, after })?;
        let next = next.map(String::from).unwrap_or_default();
        Ok(Response::new(ListRolloutsResponse { rollouts: rollouts.into_iter().map(Into::into).collect(), next }))
    }
}
