//! The API's gRPC services, through a client made from the schema.

use std::time::Duration;

use aviary::schema::v1::decision_service_client::DecisionServiceClient;
use aviary::schema::v1::rollout_service_client::RolloutServiceClient;
use aviary::schema::v1::telemetry_service_client::TelemetryServiceClient;
use aviary::schema::v1::watch_decisions_response::Event;
use aviary::schema::v1::{
    AbortRolloutRequest, ApplyRolloutRequest, GetRolloutRequest, ListRolloutsRequest, PauseRolloutRequest,
    PromoteRolloutRequest, ResumeRolloutRequest, RetryRolloutRequest, RolloutPhase,
};
use aviary::schema::v1::{Decision, DecisionKind, ReportTelemetryRequest, TelemetryEvent, WatchDecisionsRequest};
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Streaming};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use super::harness::{Cluster, MANUAL, Upstream, rollout, wait};

async fn channel(cluster: &Cluster, node: usize) -> Channel {
    let address = format!("http://127.0.0.1:{}", cluster.nodes[node].api);
    // A client that doesn't read can be sent a few decisions, and no more.
    let endpoint = Endpoint::from_shared(address).unwrap().initial_stream_window_size(1_024);
    endpoint.timeout(Duration::from_secs(20)).connect().await.unwrap()
}

async fn watch(
    cluster: &Cluster,
    node: usize,
    after_sequence: Option<u64>,
) -> Result<Streaming<aviary::schema::v1::WatchDecisionsResponse>, tonic::Status> {
    let mut client = DecisionServiceClient::new(channel(cluster, node).await);
    let request = WatchDecisionsRequest { service: "svc".into(), after_sequence };
    Ok(client.watch_decisions(request).await?.into_inner())
}

/// Returns the next so many decisions, and how many signs of life came before them.
async fn decisions(
    stream: &mut Streaming<aviary::schema::v1::WatchDecisionsResponse>,
    count: usize,
) -> (Vec<Decision>, usize) {
    let (mut found, mut beats) = (Vec::new(), 0);
    while found.len() < count {
        match stream.next().await.expect("the stream goes on").unwrap().event.unwrap() {
            Event::Decision(decision) => found.push(decision),
            Event::Heartbeat(_) => beats += 1,
        }
    }
    (found, beats)
}

#[test]
fn decisions_are_followed_on_any_node_and_from_any_place() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let mut cluster = Cluster::start();
    let mut live = runtime.block_on(watch(&cluster, 1, None)).unwrap();
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), MANUAL));
    assert_eq!(cluster.promote(1, None).status, 409, "no evidence yet");
    assert_eq!(cluster.post(1, "/v1/rollouts/svc/promote", None, r#"{"full":true}"#).status, 200);
    assert_eq!(cluster.post(2, "/v1/rollouts/svc/abort", None, r#"{"reason":"lunch"}"#).status, 200);
    let (seen, beats) = runtime.block_on(decisions(&mut live, 4));
    assert!(beats >= 1, "a sign of life came first");
    let kinds: Vec<_> = seen.iter().map(|decision| decision.kind()).collect();
    assert_eq!(kinds, [DecisionKind::Start, DecisionKind::Refused, DecisionKind::Promote, DecisionKind::Rollback]);
    let weights: Vec<_> = seen.iter().map(|decision| decision.canary_weight_bp).collect();
    assert_eq!(
        (weights, &*seen[3].reasons, &*seen[3].stable_version),
        (vec![2_000, 2_000, 10_000, 0], &["lunch".to_string()][..], "v1")
    );
    // On another node, and after it was killed, from the beginning and from the middle: the same.
    cluster.kill(2);
    cluster.spawn(2, None);
    cluster.wait_ready(2);
    for (node, after, from) in [(2, 0, 0), (0, seen[0].sequence, 1), (2, seen[1].sequence, 2)] {
        let mut stream = runtime.block_on(watch(&cluster, node, Some(after))).unwrap();
        let (again, _) = runtime.block_on(decisions(&mut stream, 4 - from));
        assert_eq!(again, seen[from..], "node {node} after {after}");
    }
    let ahead = runtime.block_on(watch(&cluster, 0, Some(1_000 << 12))).unwrap_err();
    assert!(ahead.code() == Code::OutOfRange && ahead.message().contains("expected at most"), "{ahead:?}");
    // A client that doesn't read holds up nobody, and misses nothing.
    let mut slow = runtime.block_on(watch(&cluster, 0, Some(0))).unwrap();
    for round in 0..100 {
        let answer = cluster.post(round % 3, "/v1/rollouts/svc/retry", None, "{}");
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(cluster.post(round % 3, "/v1/rollouts/svc/abort", None, "{}").status, 200);
    }
    let (all, _) = runtime.block_on(decisions(&mut slow, 204));
    assert!(all.windows(2).all(|pair| pair[0].sequence < pair[1].sequence), "each once, in order");
    let kinds = all[4..]
        .chunks(2)
        .all(|pair| pair[0].kind() == DecisionKind::Start && pair[1].kind() == DecisionKind::Rollback);
    let told: Vec<_> = all.iter().map(|one| (one.sequence, one.kind())).collect();
    assert!(kinds, "{told:?}");
    cluster.assert_no_panic();
}

#[test]
fn telemetry_is_reported_as_a_stream() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    cluster.apply(0, &rollout(&v1.url(), &v2.url(), MANUAL));
    cluster.agreed(&[0, 1, 2], Duration::from_millis(500));
    let seconds = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() as i64;
    let event = |i: u64, version: &str, latency_ms| TelemetryEvent {
        service: "svc".into(),
        version: version.into(),
        status: 200,
        latency_ms,
        event_time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
        event_id: format!("e{i}"),
    };
    runtime.block_on(async {
        let channel = channel(&cluster, 1).await;
        let mut client = TelemetryServiceClient::new(channel.clone());
        let batch = |first: u64| ReportTelemetryRequest {
            events: (first..first + 100).map(|i| event(i, "v2", if i == 7 { f64::NAN } else { 3.0 })).collect(),
        };
        let batches =
            tokio_stream::iter([batch(0), batch(50), ReportTelemetryRequest { events: vec![event(999, "v9", 1.0)] }]);
        let answer = client.report_telemetry(batches).await.unwrap().into_inner();
        assert_eq!(answer.accepted, 149, "{answer:?}");
        let kinds = ["bad_latency", "duplicate", "unknown_version"].map(|kind| answer.rejected.get(kind).copied());
        assert_eq!(kinds, [Some(1), Some(50), Some(1)], "{answer:?}");
    });
    cluster.assert_no_panic();
}

/// Asks for the health of a service, or of the server as a whole.
async fn health(channel: &Channel, service: &str) -> ServingStatus {
    let request = HealthCheckRequest { service: service.into() };
    HealthClient::new(channel.clone()).check(request).await.unwrap().into_inner().status()
}

#[test]
fn health_and_schema_can_be_asked_for_and_a_node_without_a_majority_takes_no_rollouts() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut cluster = Cluster::start();
    let services = ["", "aviary.v1.RolloutService", "aviary.v1.DecisionService", "aviary.v1.TelemetryService"];
    let asked = runtime.block_on(channel(&cluster, 1));
    let until = |expected: [ServingStatus; 4]| {
        wait("the health of a node", Duration::from_secs(10), || {
            let found = services.map(|service| runtime.block_on(health(&asked, service)));
            (found == expected).then_some(())
        });
    };
    let (down, up) = (ServingStatus::NotServing, ServingStatus::Serving);
    until([up; 4]);
    cluster.kill(0);
    cluster.kill(2);
    // It serves stable, but no rollout changes.
    until([up, down, up, up]);
    cluster.spawn(0, None);
    until([up; 4]);

    let listed = runtime.block_on(async {
        let list = MessageRequest::ListServices(String::new());
        let request = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
        let mut client = ServerReflectionClient::new(asked.clone());
        let answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
        match answers.into_inner().next().await.unwrap().unwrap().message_response.unwrap() {
            MessageResponse::ListServicesResponse(found) => {
                found.service.into_iter().map(|one| one.name).collect::<Vec<_>>()
            }
            other => panic!("found {other:?}, expected a list of services"),
        }
    });
    assert!(services[1..].iter().all(|service| listed.iter().any(|name| name == service)), "{listed:?}");
    cluster.assert_no_panic();
}

#[test]
fn rollouts_are_changed_once_for_each_key_and_refusals_are_statuses() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (v1, v2) = (Upstream::start("v1"), Upstream::start("v2"));
    let cluster = Cluster::start();
    let file = rollout(&v1.url(), &v2.url(), MANUAL);
    runtime.block_on(async {
        // By a node that doesn't coordinate.
        let mut client = RolloutServiceClient::new(channel(&cluster, 2).await);
        let apply = |key: &str, rollout: &str| ApplyRolloutRequest {
            rollout: rollout.into(),
            idempotency_key: key.into(),
            ..Default::default()
        };
        let wrong = client.apply_rollout(apply("k0", &file.replace("steps:", "stebs:"))).await.unwrap_err();
        assert!(wrong.code() == Code::InvalidArgument && wrong.message().contains("did you mean `steps`"), "{wrong:?}");
        let first = client.apply_rollout(apply("k1", &file)).await.unwrap().into_inner().result.unwrap();
        assert_eq!(
            (&*first.transaction_id, first.sequence, first.repeated, first.routing_version),
            ("k1", Some(4096), false, 1)
        );
        let mut other = RolloutServiceClient::new(channel(&cluster, 0).await);
        let again = other.apply_rollout(apply("k1", &file)).await.unwrap().into_inner().result.unwrap();
        assert_eq!((again.sequence, again.repeated), (Some(4096), true));

        let service = || "svc".to_string();
        let promote = PromoteRolloutRequest { service: service(), ..Default::default() };
        let refused = client.promote_rollout(promote).await.unwrap_err();
        assert!(refused.code() == Code::Aborted && refused.message().contains("of 20 canary samples"), "{refused:?}");
        let pause = PauseRolloutRequest {
            service: service(),
            idempotency_key: "k2".into(),
            reason: "lunch".into(),
            ..Default::default()
        };
        client.pause_rollout(pause).await.unwrap();
        let get = || GetRolloutRequest { service: service(), current: true };
        let shown = client.get_rollout(get()).await.unwrap().into_inner().rollout.unwrap();
        assert_eq!(
            (shown.phase(), shown.canary_weight_bp, &*shown.reason, shown.step),
            (RolloutPhase::Paused, 2_000, "lunch", 1)
        );
        let abort =
            |key: &str| AbortRolloutRequest { service: service(), idempotency_key: key.into(), ..Default::default() };
        let reused = client.abort_rollout(abort("k2")).await.unwrap_err();
        assert_eq!(reused.code(), Code::AlreadyExists, "{reused:?}");
        client.resume_rollout(ResumeRolloutRequest { service: service(), ..Default::default() }).await.unwrap();
        client.abort_rollout(abort("k3")).await.unwrap();
        let late =
            client.resume_rollout(ResumeRolloutRequest { service: service(), ..Default::default() }).await.unwrap_err();
        assert_eq!(late.code(), Code::FailedPrecondition, "{late:?}");
        client.retry_rollout(RetryRolloutRequest { service: service(), ..Default::default() }).await.unwrap();
        let current = ListRolloutsRequest { current: true, ..ListRolloutsRequest::default() };
        let all = client.list_rollouts(current).await.unwrap().into_inner().rollouts;
        assert_eq!((all.len(), all[0].phase(), &*all[0].canary_version), (1, RolloutPhase::Progressing, "v2"));
        let unknown =
            client.get_rollout(GetRolloutRequest { service: "nobody".into(), current: false }).await.unwrap_err();
        assert_eq!(unknown.code(), Code::NotFound);
    });
    cluster.assert_no_panic();
}
