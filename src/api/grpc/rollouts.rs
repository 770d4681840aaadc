//! `RolloutService`: the verbs of `service`; here is how they are asked for and answered over gRPC.

use bytes::Bytes;
use http::{HeaderMap, header};
use tonic::{Request, Response, Status};

use super::super::auth::Actor;
use super::super::service::{self, Caller, Details};
use super::super::state::ApiState;
use crate::code::Code;
use crate::domain::ids::ServiceId;
use crate::domain::rollout::Phase;
use crate::model::{Changed, Problem};
use crate::protocol::ServiceView;
use crate::schema::v1::rollout_service_server::RolloutService;
use crate::schema::v1::*;
use crate::status;

/// Changes rollouts, and shows them.
pub struct Rollouts(pub ApiState);

/// Returns who asks for a write, under which key.
fn caller<T>(request: &Request<T>, idempotency_key: &str) -> Result<Caller, Status> {
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
    Ok(Caller { actor: request.extensions().get::<Actor>().cloned(), headers })
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

impl From<Changed> for ChangeResult {
    fn from(changed: Changed) -> Self {
        Self {
            transaction_id: changed.txid.to_string(),
            sequence: changed.sequence.map(|sequence| sequence.0),
            repeated: changed.repeated,
            routing_version: changed.state.map(|state| state.version).unwrap_or_default(),
            reason: changed.reason,
            rolled_back: changed.rolled_back,
        }
    }
}

impl Rollouts {
    async fn change(
        &self,
        mut caller: Caller,
        service: &str,
        verb: &str,
        details: Details,
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

    fn shown(&self, found: &ServiceView) -> Rollout {
        let (routing, rollout) = (&found.service.routing, &found.service.rollout);
        let phase = match rollout.phase {
            Phase::Progressing => RolloutPhase::Progressing,
            Phase::Paused => RolloutPhase::Paused,
            Phase::Baking => RolloutPhase::Baking,
            Phase::Completed => RolloutPhase::Completed,
            Phase::RolledBack => RolloutPhase::RolledBack,
        };
        let verdict = found.verdict.as_ref();
        Rollout {
            service: routing.service.to_string(),
            phase: phase.into(),
            step: rollout.stage as u32 + 1,
            stable_version: routing.stable_model_id.to_string(),
            canary_version: routing.canary_model_id.as_ref().map(ToString::to_string).unwrap_or_default(),
            canary_weight_bp: routing.canary_weight().bp().into(),
            effective_canary_weight_bp: self.0.node.published.effective_bp(&found.serving).into(),
            routing_version: routing.version,
            verdict: verdict.map(|verdict| verdict.word().to_string()).unwrap_or_default(),
            verdict_reason: verdict.map(|verdict| verdict.reason().to_string()).unwrap_or_default(),
            waiting_for: found.waiting_for.clone(),
            reason: rollout.reason.clone(),
        }
    }
}

#[tonic::async_trait]
impl RolloutService for Rollouts {
    async fn apply_rollout(
        &self,
        request: Request<ApplyRolloutRequest>,
    ) -> Result<Response<ApplyRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key)?;
        let body = Bytes::from(request.into_inner().rollout);
        let result = service::apply(&self.0, &caller, &body).await?.into();
        Ok(Response::new(ApplyRolloutResponse { result: Some(result) }))
    }

    async fn promote_rollout(
        &self,
        request: Request<PromoteRolloutRequest>,
    ) -> Result<Response<PromoteRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key)?;
        let PromoteRolloutRequest { service, full, skip_wait, .. } = request.into_inner();
        let details = Details { full, skip_wait, reason: None };
        let result = self.change(caller, &service, "promote", details).await?;
        Ok(Response::new(PromoteRolloutResponse { result: Some(result) }))
    }

    async fn pause_rollout(
        &self,
        request: Request<PauseRolloutRequest>,
    ) -> Result<Response<PauseRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key)?;
        let PauseRolloutRequest { service, reason, .. } = request.into_inner();
        let result =
            self.change(caller, &service, "pause", Details { reason: Some(reason), ..Details::default() }).await?;
        Ok(Response::new(PauseRolloutResponse { result: Some(result) }))
    }

    async fn resume_rollout(
        &self,
        request: Request<ResumeRolloutRequest>,
    ) -> Result<Response<ResumeRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key)?;
        let result = self.change(caller, &request.into_inner().service, "resume", Details::default()).await?;
        Ok(Response::new(ResumeRolloutResponse { result: Some(result) }))
    }

    async fn abort_rollout(
        &self,
        request: Request<AbortRolloutRequest>,
    ) -> Result<Response<AbortRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key)?;
        let AbortRolloutRequest { service, reason, .. } = request.into_inner();
        let result =
            self.change(caller, &service, "abort", Details { reason: Some(reason), ..Details::default() }).await?;
        Ok(Response::new(AbortRolloutResponse { result: Some(result) }))
    }

    async fn retry_rollout(
        &self,
        request: Request<RetryRolloutRequest>,
    ) -> Result<Response<RetryRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key)?;
        let result = self.change(caller, &request.into_inner().service, "retry", Details::default()).await?;
        Ok(Response::new(RetryRolloutResponse { result: Some(result) }))
    }

    async fn undo_rollout(
        &self,
        request: Request<UndoRolloutRequest>,
    ) -> Result<Response<UndoRolloutResponse>, Status> {
        let caller = caller(&request, &request.get_ref().idempotency_key)?;
        let result = self.change(caller, &request.into_inner().service, "undo", Details::default()).await?;
        Ok(Response::new(UndoRolloutResponse { result: Some(result) }))
    }

    async fn get_rollout(&self, request: Request<GetRolloutRequest>) -> Result<Response<GetRolloutResponse>, Status> {
        let GetRolloutRequest { service: name, current } = request.into_inner();
        self.caught_up(current).await?;
        let view = self.0.node.published.view();
        let found = ServiceId::new(&name).ok().and_then(|id| view.services.get(&id));
        let found = found.ok_or_else(|| Status::not_found(format!("rollout {name:?} is unknown")))?;
        Ok(Response::new(GetRolloutResponse { rollout: Some(self.shown(found)) }))
    }

    async fn list_rollouts(
        &self,
        request: Request<ListRolloutsRequest>,
    ) -> Result<Response<ListRolloutsResponse>, Status> {
        self.caught_up(request.into_inner().current).await?;
        let view = self.0.node.published.view();
        let rollouts = view.services.values().map(|found| self.shown(found)).collect();
        Ok(Response::new(ListRolloutsResponse { rollouts }))
    }
}
