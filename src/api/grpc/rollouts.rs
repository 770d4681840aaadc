//! `RolloutService`: the HTTP API's verbs. What they do is written there; here is how it is asked and answered.

use axum::Extension;
use axum::extract::{Path, State};
use axum::response::Response as Answer;
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tonic::{Request, Response, Status};

use super::super::auth::Actor;
use super::super::state::ApiState;
use super::super::write;
use crate::domain::ids::ServiceId;
use crate::domain::rollout::Phase;
use crate::protocol::record::{Sequence, Slot};
use crate::protocol::{Outcome, ServiceView};
use crate::schema::v1::rollout_service_server::RolloutService;
use crate::schema::v1::*;

/// Changes rollouts, and shows them.
pub struct Rollouts(pub ApiState);

/// Parts of a request that the HTTP API needs: its owner and its headers.
struct Caller {
    actor: Option<Extension<Actor>>,
    headers: HeaderMap,
}

impl Caller {
    fn new<T>(request: &Request<T>, idempotency_key: &str) -> Result<Self, Status> {
        let mut headers = HeaderMap::new();
        if !idempotency_key.is_empty() {
            let key = idempotency_key.parse().map_err(|_| Status::invalid_argument("idempotency_key is not text"))?;
            headers.insert("idempotency-key", key);
        }
        // The coordinator asks for it again.
        if let Some(token) =
            request.metadata().get(header::AUTHORIZATION.as_str()).and_then(|token| token.to_str().ok())
            && let Ok(token) = token.parse()
        {
            headers.insert(header::AUTHORIZATION, token);
        }
        Ok(Self { actor: request.extensions().get::<Actor>().cloned().map(Extension), headers })
    }
}

impl Rollouts {
    async fn change(
        &self,
        caller: Caller,
        service: String,
        verb: &str,
        details: Value,
    ) -> Result<ChangeResult, Status> {
        let (Caller { actor, mut headers }, body) = (caller, Bytes::from(details.to_string()));
        headers.insert(header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
        let path = Path((service, verb.to_string()));
        result(write::change(State(self.0.clone()), path, actor, headers, body).await).await
    }

    /// Waits, where that is asked for, until this node knows every change answered so far.
    async fn caught_up(&self, current: bool) -> Result<(), Status> {
        if !current {
            return Ok(());
        }
        match self.0.node.read().await {
            Outcome::Current(_) => Ok(()),
            Outcome::NoQuorum { reached, needed } => {
                let reached = reached.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
                Err(Status::unavailable(format!("no quorum: reached {reached}, expected {needed} nodes")))
            }
            Outcome::Refused(why) => Err(Status::unavailable(why)),
            _ => Err(Status::unavailable("the read could not be confirmed; try again")),
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

/// Returns what an answer of the HTTP API means here.
async fn result(answer: Answer) -> Result<ChangeResult, Status> {
    let (head, body) = answer.into_parts();
    let body = body.collect().await.map_err(|why| Status::internal(why.to_string()))?.to_bytes();
    let json: Value = serde_json::from_slice(&body).unwrap_or_default();
    if head.status.is_success() {
        return Ok(ChangeResult {
            transaction_id: json["txid"].as_str().unwrap_or_default().into(),
            sequence: json["slot"].as_u64().map(|slot| Sequence::of(Slot(slot), 0).0),
            repeated: json["repeated"].as_bool().unwrap_or_default(),
            routing_version: json["state"]["version"].as_u64().unwrap_or_default(),
        });
    }
    let reasons =
        json["reasons"].as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join("; ");
    let why = json["error"].as_str().map_or(reasons, str::to_string);
    Err(match head.status {
        StatusCode::CONFLICT if json["status"] == "ABORTED" => Status::aborted(why),
        StatusCode::CONFLICT => Status::failed_precondition(why),
        StatusCode::BAD_REQUEST => Status::invalid_argument(why),
        StatusCode::NOT_FOUND => Status::not_found(why),
        StatusCode::UNPROCESSABLE_ENTITY => Status::already_exists(why),
        StatusCode::TOO_MANY_REQUESTS => Status::resource_exhausted(why),
        StatusCode::SERVICE_UNAVAILABLE => Status::unavailable(why),
        StatusCode::UNAUTHORIZED => Status::unauthenticated(why),
        StatusCode::FORBIDDEN => Status::permission_denied(why),
        _ => Status::internal(why),
    })
}

#[tonic::async_trait]
impl RolloutService for Rollouts {
    async fn apply_rollout(
        &self,
        request: Request<ApplyRolloutRequest>,
    ) -> Result<Response<ApplyRolloutResponse>, Status> {
        let Caller { actor, headers } = Caller::new(&request, &request.get_ref().idempotency_key)?;
        let body = Bytes::from(request.into_inner().rollout);
        let result = result(write::apply(State(self.0.clone()), actor, headers, body).await).await?;
        Ok(Response::new(ApplyRolloutResponse { result: Some(result) }))
    }

    async fn promote_rollout(
        &self,
        request: Request<PromoteRolloutRequest>,
    ) -> Result<Response<PromoteRolloutResponse>, Status> {
        let caller = Caller::new(&request, &request.get_ref().idempotency_key)?;
        let PromoteRolloutRequest { service, full, .. } = request.into_inner();
        let result = self.change(caller, service, "promote", json!({"full": full})).await?;
        Ok(Response::new(PromoteRolloutResponse { result: Some(result) }))
    }

    async fn pause_rollout(
        &self,
        request: Request<PauseRolloutRequest>,
    ) -> Result<Response<PauseRolloutResponse>, Status> {
        let caller = Caller::new(&request, &request.get_ref().idempotency_key)?;
        let PauseRolloutRequest { service, reason, .. } = request.into_inner();
        let result = self.change(caller, service, "pause", json!({"reason": reason})).await?;
        Ok(Response::new(PauseRolloutResponse { result: Some(result) }))
    }

    async fn resume_rollout(
        &self,
        request: Request<ResumeRolloutRequest>,
    ) -> Result<Response<ResumeRolloutResponse>, Status> {
        let caller = Caller::new(&request, &request.get_ref().idempotency_key)?;
        let result = self.change(caller, request.into_inner().service, "resume", json!({})).await?;
        Ok(Response::new(ResumeRolloutResponse { result: Some(result) }))
    }

    async fn abort_rollout(
        &self,
        request: Request<AbortRolloutRequest>,
    ) -> Result<Response<AbortRolloutResponse>, Status> {
        let caller = Caller::new(&request, &request.get_ref().idempotency_key)?;
        let AbortRolloutRequest { service, reason, .. } = request.into_inner();
        let result = self.change(caller, service, "abort", json!({"reason": reason})).await?;
        Ok(Response::new(AbortRolloutResponse { result: Some(result) }))
    }

    async fn retry_rollout(
        &self,
        request: Request<RetryRolloutRequest>,
    ) -> Result<Response<RetryRolloutResponse>, Status> {
        let caller = Caller::new(&request, &request.get_ref().idempotency_key)?;
        let result = self.change(caller, request.into_inner().service, "retry", json!({})).await?;
        Ok(Response::new(RetryRolloutResponse { result: Some(result) }))
    }

    async fn undo_rollout(
        &self,
        request: Request<UndoRolloutRequest>,
    ) -> Result<Response<UndoRolloutResponse>, Status> {
        let caller = Caller::new(&request, &request.get_ref().idempotency_key)?;
        let result = self.change(caller, request.into_inner().service, "undo", json!({})).await?;
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
