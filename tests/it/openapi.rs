//! The OpenAPI document: it describes every route of the API's port, and what nodes really answer.

use std::collections::{BTreeMap, BTreeSet};

use aviary::api::openapi;
use aviary::code::Code;
use aviary::domain::ids::{NodeId, ServiceId, TxId};
use aviary::domain::rollout::Phase;
use aviary::domain::routing::RoutingState;
use aviary::domain::run::{SequentialEvidence, WindowVerdict};
use aviary::domain::time::Wall;
use aviary::domain::verdict::Verdict;
use aviary::model::{
    BatchReceipt, ChangeDetails, Changed, MemberData, MemberName, Problem, ProblemFacts, Reach, ReadConsistency,
    RejectedEvent, WriteConsistency,
};
use aviary::protocol::record::{Initiator, RecordKind, Sequence, Slot};
use aviary::protocol::{Announcement, DecidedVerdict, Event, Mode};
use jsonschema::Validator;
use serde::Serialize;
use serde_json::{Value, json};

use crate::api::{ROLLOUT, exchange, http, node, rollback, started};

/// Methods that a path may take.
const METHODS: [&str; 5] = ["GET", "POST", "PUT", "DELETE", "PATCH"];

/// Returns the paths of the document, each with its methods.
fn paths(document: &Value) -> BTreeMap<String, BTreeSet<String>> {
    let methods = |path: &Value| path.as_object().unwrap().keys().map(|method| method.to_uppercase()).collect();
    document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(path, methods_of)| (path.clone(), methods(methods_of)))
        .collect()
}

#[tokio::test]
async fn a_node_serves_what_the_document_describes_and_nothing_else() {
    let (a, document) = (node("a", "a", &[], None).await, openapi::document());
    let paths = paths(&document);
    assert!(paths.len() > 20, "{} paths", paths.len());
    let mut wrong = Vec::new();
    for (path, methods) in &paths {
        let filled = path.replace("{name}", "svc");
        for method in METHODS {
            // A stream doesn't end.
            if (method, path.as_str()) == ("GET", "/v1/events") {
                continue;
            }
            let (head, body) = exchange(a.port, method, &filled, "", "").await;
            let status = head.split(' ').nth(1).unwrap_or_default();
            let allow = head.lines().find_map(|line| line.strip_prefix("allow: ")).unwrap_or_default();
            let unknown = body.contains("is unknown, GET /v1/openapi.json");
            let served = status != "405" && !unknown;
            if served != methods.contains(method) {
                wrong.push(format!("{method} {path}: {status}, described: {methods:?}"));
            }
            let allowed: BTreeSet<_> = allow.split(',').map(str::trim).filter(|name| *name != "HEAD").collect();
            if status == "405" && allowed != methods.iter().map(String::as_str).collect() {
                wrong.push(format!("{method} {path}: Allow is {allow:?}, described: {methods:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    let (status, body, served) = http(a.port, "GET", "/v1/openapi.json", "", "").await;
    assert_eq!((status, &served), (200, &document), "{body}");
}

/// Returns the validator of one schema of the document.
fn validator(document: &Value, schema: &Value) -> Validator {
    let mut whole = json!({ "components": document["components"] });
    whole.as_object_mut().unwrap().extend(schema.as_object().unwrap().clone());
    jsonschema::validator_for(&whole).unwrap_or_else(|why| panic!("{why}: {schema}"))
}

fn named(name: &str) -> Value {
    json!({ "$ref": format!("#/components/schemas/{name}") })
}

/// Returns what is wrong with a value by a schema, in words.
fn complaints(document: &Value, schema: &Value, value: &Value) -> Vec<String> {
    let validator = validator(document, schema);
    validator.iter_errors(value).map(|error| format!("{}: {error} in {value}", error.instance_path)).collect()
}

#[tokio::test]
async fn answers_of_a_node_have_the_shapes_that_the_document_gives_them() {
    let (a, document) = (node("a", "a", &[], None).await, openapi::document());
    let mut wrong = Vec::new();
    for (method, path, body, described, expected) in [
        ("GET", "/v1/rollouts?limit=1", "", "/v1/rollouts", 200),
        ("GET", "/v1/rollouts?limit=0", "", "/v1/rollouts", 400),
        ("POST", "/v1/rollouts", ROLLOUT, "/v1/rollouts", 200),
        ("POST", "/v1/rollouts", "kind: nonsense", "/v1/rollouts", 400),
        ("GET", "/v1/rollouts/svc", "", "/v1/rollouts/{name}", 200),
        ("GET", "/v1/rollouts/none", "", "/v1/rollouts/{name}", 404),
        ("GET", "/v1/rollouts/svc/history", "", "/v1/rollouts/{name}/history", 200),
        ("POST", "/v1/rollouts/svc/abort", "{\"reason\":\"odd\"}", "/v1/rollouts/{name}/abort", 200),
        ("POST", "/v1/rollouts/svc/promote", "{\"full\":true}", "/v1/rollouts/{name}/promote", 200),
        ("POST", "/v1/cluster/cordon", "{\"node\":\"c\"}", "/v1/cluster/cordon", 200),
        ("POST", "/v1/cluster/add", "{\"node\":\"c\"}", "/v1/cluster/add", 400),
        ("GET", "/v1/cluster", "", "/v1/cluster", 200),
        ("GET", "/v1/cluster/backup", "", "/v1/cluster/backup", 404),
        ("POST", "/v1/telemetry", "[]", "/v1/telemetry", 200),
        ("POST", "/v1/telemetry", "[{}]", "/v1/telemetry", 422),
        ("GET", "/routing/state", "", "/routing/state", 200),
        ("GET", "/routing/state?consistency=x", "", "/routing/state", 400),
        ("GET", "/health/snapshot?service=svc", "", "/health/snapshot", 200),
        ("GET", "/livez", "", "/livez", 200),
        ("GET", "/readyz", "", "/readyz", 200),
        ("GET", "/readyz?quorum", "", "/readyz", 503),
        ("GET", "/lease/svc", "", "/lease/{name}", 503),
    ] {
        let (status, text, found) = http(a.port, method, path, "", body).await;
        let operation = &document["paths"][described][method.to_lowercase()];
        let content = operation["responses"][status.to_string()]["content"].as_object();
        let schema = content.and_then(|content| content.values().next()).map(|content| &content["schema"]);
        match schema {
            Some(schema) if status == expected => {
                let found = complaints(&document, schema, &found).into_iter();
                wrong.extend(found.map(|why| format!("{method} {path}: {why}")));
            }
            _ => wrong.push(format!("{method} {path}: {status}, expected {expected}, and described: {text}")),
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

fn name<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().unwrap()
}

/// Returns one event of each kind.
fn events() -> Vec<Event> {
    let state: RoutingState = rollback().1.routing;
    let (service, node, txid) = (name::<ServiceId>("svc"), name::<NodeId>("b"), name::<TxId>("tx"));
    let sequential =
        SequentialEvidence { e_value: 7.5, bound: 100.0, e_errors: 1.0, e_latency: 2.0, alpha_spent: 0.01 };
    let window_verdict = WindowVerdict { sequential: Some(sequential), ..WindowVerdict::unseen(0, 1_000) };
    let decided =
        DecidedVerdict { txid: txid.clone(), state: state.clone(), proposed_at: Wall(1), decided_at: Wall(2) };
    let routing = |phase, coordinator: Option<NodeId>| Event::Routing {
        slot: Slot(3),
        kind: RecordKind::Refused,
        refused: Some("Promote".into()),
        initiator: Initiator::Client,
        actor: "alice".into(),
        state: state.clone(),
        phase,
        reasons: vec!["b: errors: 9 %".into()],
        decided_at: coordinator.as_ref().map(|_| Wall(4)),
        took_ms: coordinator.as_ref().map(|_| 3),
        coordinator,
    };
    let analyzed = |sequence, decided| Event::Analyzed {
        sequence,
        service: service.clone(),
        rollout_generation: 1,
        window_verdict: window_verdict.clone(),
        decided,
    };
    let (actor, decided_at) = ("alice".into(), Wall(2));
    vec![
        routing(Some(Phase::Paused), Some(node.clone())),
        routing(None, None),
        Event::Membership {
            slot: Slot(4),
            kind: RecordKind::Cordon,
            node: node.clone(),
            txid: txid.clone(),
            actor,
            decided_at,
        },
        Event::Voted { slot: Slot(4), ballot: "3.b".into(), txid, vote: "no".into(), reason: "errors".into() },
        Event::Verdict { service: service.clone(), routing_version: 2, verdict: Verdict::Promote, samples: 9 },
        Event::Verdict {
            service: service.clone(),
            routing_version: 2,
            verdict: Verdict::Hold("few".into()),
            samples: 9,
        },
        analyzed(None, None),
        analyzed(Some(Sequence(4097)), Some(decided)),
        Event::LocalHold { service: service.clone(), reason: "five failures".into() },
        Event::Enforced { service, slot: Slot(4), took_ms: 7 },
        Event::Lease { held: true },
        Event::Coordinator { node: node.clone() },
        Event::Peer { node: node.clone(), alive: false },
        Event::Rejected { node, reason: "an old ballot".into() },
    ]
}

fn whole_problem() -> Problem {
    let first = RejectedEvent { event: 0, error: "bad".into() };
    let receipt = BatchReceipt { accepted: 0, rejected: [("late".to_string(), 1)].into(), first_rejected: vec![first] };
    let facts = ProblemFacts {
        txid: Some(name("tx")),
        slot: Some(Slot(1)),
        repeated: Some(true),
        reasons: vec!["b: no".into()],
        reached: Some(vec![name("a")]),
        needed: Some(2),
        known: Some(vec![name("svc")]),
        mode: Some(Mode::FailSafe),
        receipt: Some(receipt),
    };
    Problem { facts: Box::new(facts), ..Problem::new(Code::Aborted, "no") }
}

#[test]
fn every_value_that_is_sent_is_one_of_its_schema() {
    let document = openapi::document();
    let mut wrong = Vec::new();
    let mut holds = |schema: &str, value: &dyn erased::Json| {
        wrong.extend(
            complaints(&document, &named(schema), &value.json()).into_iter().map(|why| format!("{schema}: {why}")),
        );
    };
    for event in events() {
        holds("Announcement", &Announcement::new(event, Wall(5), &name("a")));
    }
    holds("Problem", &whole_problem());
    holds("Problem", &Problem::new(Code::Busy, "busy"));
    let state = started().1.routing;
    holds("Changed", &Changed::committed(name("tx"), Slot(4), Some(state.clone()), true));
    holds("Changed", &Changed::unchanged(name("tx"), state, "v1 serves".into(), true));
    let reach =
        Reach { served_by: vec![name("a")], away: vec![name("b")], missing: [(name("c"), "slot 3".into())].into() };
    holds("Changed", &Changed { reach: Some(reach), ..Changed::committed(name("tx"), Slot(4), None, false) });
    holds("ChangeDetails", &ChangeDetails { full: true, skip_wait: true, reason: Some("odd".into()) });
    holds("ChangeDetails", &ChangeDetails::default());
    holds("MemberName", &MemberName { node: name("c") });
    holds("MemberData", &MemberData { node: name("c"), incarnation: "00aa".into() });
    holds("WriteConsistency", &WriteConsistency::Everywhere);
    holds("ReadConsistency", &ReadConsistency::Linearizable);
    let spec = aviary::config::rollout::parse(ROLLOUT, "rollout").unwrap_or_else(|why| panic!("{why}"));
    holds("RolloutFile", &spec.value());
    assert!(wrong.is_empty(), "{wrong:#?}");
}

mod erased {
    use super::*;

    /// A value of any type, as its JSON.
    pub trait Json {
        fn json(&self) -> Value;
    }

    impl<T: Serialize> Json for T {
        fn json(&self) -> Value {
            serde_json::to_value(self).unwrap()
        }
    }
}

#[test]
fn a_value_of_another_shape_is_found() {
    let document = openapi::document();
    let wrong = |name: &str, value: Value| !complaints(&document, &named(name), &value).is_empty();
    assert!(wrong("NodeId", json!("a b")) && wrong("NodeId", json!("")));
    assert!(wrong("Problem", json!({ "code": "BUSY" })));
    assert!(wrong("Code", json!("LAZY")));
    assert!(wrong("MemberName", json!({ "node": "c", "incarnation": "1" })));
    assert!(wrong("Weights", json!({ "v1": 1.5 })));
}

#[test]
fn every_schema_is_described_and_every_reference_leads_somewhere() {
    let document = openapi::document();
    let schemas = document["components"]["schemas"].as_object().unwrap();
    let mut missing: Vec<_> =
        schemas.iter().filter(|(_, schema)| schema["description"].is_null()).map(|(name, _)| name.clone()).collect();
    let text = document.to_string();
    for reference in text.split("\"#/components/schemas/").skip(1).filter_map(|rest| rest.split('"').next()) {
        if !schemas.contains_key(reference) {
            missing.push(format!("#/components/schemas/{reference}"));
        }
    }
    assert!(missing.is_empty(), "{missing:?}");
    assert!(!text.contains("[`"), "a link into the code is left");
    let operations =
        document["paths"].as_object().unwrap().values().flat_map(|path| path.as_object().unwrap().values());
    let ids: Vec<_> = operations.map(|operation| operation["operationId"].as_str().unwrap()).collect();
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), ids.len(), "{ids:?}");
}

/// The rollout of the document and the one of the protobuf schema, and other pairs that tell the same.
struct Pair {
    /// A schema of the document.
    schema: &'static str,
    /// A message of protobuf.
    message: &'static str,
    /// Members of the one that have another name in the other.
    renamed: &'static [(&'static str, &'static str)],
    /// Members that only JSON has, each with why.
    only_json: &'static [(&'static str, &'static str)],
    /// Fields that only protobuf has, each with why.
    only_protobuf: &'static [(&'static str, &'static str)],
}

/// Shapes that JSON and protobuf share. What isn't named here has the same name in both.
const PAIRS: &[Pair] = &[
    Pair {
        schema: "RolloutView",
        message: "Rollout",
        renamed: &[
            ("stage", "step"),
            ("stages", "steps"),
            ("stable_model_id", "stable_version"),
            ("canary_model_id", "canary_version"),
            ("weights", "canary_weight_bp"),
            ("effective_weights", "effective_canary_weight_bp"),
            ("version", "routing_version"),
            ("txid", "transaction_id"),
            ("timestamp", "proposed_time"),
        ],
        only_json: &[
            ("name", "is the service"),
            ("metadata", "its two members are fields of their own"),
            ("health", "its members are fields of their own"),
            ("spec", "a brief of the manifest, for people"),
            ("stable", "what serves as stable; its version is stable_version, and the manifest has servers"),
            ("status", "what is in force is always committed"),
            ("assignment", "follows from the manifest"),
        ],
        only_protobuf: &[
            ("labels", "of metadata"),
            ("annotations", "of metadata"),
            ("verdict", "of health"),
            ("verdict_reason", "of health"),
            ("window_ms", "of health"),
            ("local_answers", "of health"),
            ("cluster_answers", "of health"),
            ("sequential", "of health"),
        ],
    },
    Pair {
        schema: "RolloutMetadata",
        message: "Rollout",
        renamed: &[],
        only_json: &[],
        only_protobuf: &[("*", "the rest is told by RolloutView")],
    },
    Pair {
        schema: "HealthView",
        message: "Rollout",
        renamed: &[("local", "local_answers"), ("cluster", "cluster_answers")],
        only_json: &[],
        only_protobuf: &[("*", "the rest is told by RolloutView")],
    },
    Pair {
        schema: "AnswerCounts",
        message: "VersionSummary",
        renamed: &[],
        only_json: &[("error_rate", "follows from the counts"), ("mean_ms", "no decision rests on it")],
        only_protobuf: &[],
    },
    Pair {
        schema: "SequentialEvidence",
        message: "SequentialEvidence",
        renamed: &[],
        only_json: &[],
        only_protobuf: &[],
    },
    Pair { schema: "RolloutList", message: "ListRolloutsResponse", renamed: &[], only_json: &[], only_protobuf: &[] },
    Pair {
        schema: "Changed",
        message: "ChangeResult",
        renamed: &[("txid", "transaction_id"), ("state", "routing_version")],
        only_json: &[],
        only_protobuf: &[],
    },
    Pair { schema: "Reach", message: "Reach", renamed: &[], only_json: &[], only_protobuf: &[] },
    Pair { schema: "TelemetryEvent", message: "TelemetryEvent", renamed: &[], only_json: &[], only_protobuf: &[] },
    Pair {
        schema: "BatchReceipt",
        message: "ReportTelemetryResponse",
        renamed: &[],
        only_json: &[("first_rejected", "a stream has no one first batch")],
        only_protobuf: &[],
    },
    Pair { schema: "AnswerSummary", message: "VersionSummary", renamed: &[], only_json: &[], only_protobuf: &[] },
    Pair {
        schema: "WindowVerdict",
        message: "WindowVerdict",
        renamed: &[],
        only_json: &[
            ("sequential", "its members are fields of their own"),
            ("is_window", "only closed windows are decisions"),
        ],
        only_protobuf: &[
            ("e_value", "of sequential"),
            ("e_value_bound", "of sequential"),
            ("alpha_spent", "of sequential"),
        ],
    },
    Pair {
        schema: "RoutingState",
        message: "Decision",
        renamed: &[
            ("version", "routing_version"),
            ("stable_model_id", "stable_version"),
            ("canary_model_id", "canary_version"),
            ("weights", "canary_weight_bp"),
            ("txid", "transaction_id"),
            ("timestamp", "proposed_time"),
        ],
        only_json: &[("status", "follows from the kind")],
        only_protobuf: &[
            ("sequence", "of the event: slot × 4096, and the id of the stream"),
            ("kind", "of the event"),
            ("reasons", "of the event"),
            ("window", "of the event"),
            ("rollout_generation", "of the event"),
            ("decided_time", "of the event"),
            ("actor", "of the event"),
            ("phase", "of the event"),
        ],
    },
];

/// Returns the fields of every message of the protobuf schema.
fn messages() -> BTreeMap<String, BTreeSet<String>> {
    use prost::Message as _;
    let files = prost_types::FileDescriptorSet::decode(aviary::schema::v1::DESCRIPTORS).unwrap();
    let fields = |message: prost_types::DescriptorProto| {
        let fields = message.field.into_iter().map(|field| field.name.unwrap()).collect();
        (message.name.unwrap(), fields)
    };
    files.file.into_iter().flat_map(|file| file.message_type).map(fields).collect()
}

#[test]
fn json_and_protobuf_tell_the_same() {
    let (document, messages) = (openapi::document(), messages());
    let mut wrong = Vec::new();
    for Pair { schema, message, renamed, only_json, only_protobuf } in PAIRS {
        let members = document["components"]["schemas"][schema]["properties"].as_object().unwrap();
        let (mut fields, mut excused) = (messages[*message].clone(), BTreeSet::new());
        for member in members.keys().map(String::as_str) {
            let field = renamed.iter().find(|(json, _)| *json == member).map_or(member, |(_, field)| field);
            let reason = only_json.iter().find(|(json, _)| *json == member);
            match (fields.remove(field), reason) {
                (false, None) => wrong.push(format!("{schema}.{member} is not in {message}")),
                (false, Some((name, _))) => drop(excused.insert(*name)),
                (true, _) => {}
            }
        }
        let rest = only_protobuf.iter().any(|(field, _)| *field == "*");
        let unknown = fields.iter().filter(|field| !rest && !only_protobuf.iter().any(|(name, _)| name == *field));
        wrong.extend(unknown.map(|field| format!("{message}.{field} is not in {schema}")));
        let stale = only_json.iter().filter(|(name, _)| !excused.contains(name));
        wrong.extend(stale.map(|(name, _)| format!("{schema}.{name} needs no exception")));
        let stale = renamed.iter().filter(|(name, _)| !members.contains_key(*name));
        wrong.extend(stale.map(|(name, _)| format!("{schema}.{name} is not there to be renamed")));
        let stale = only_protobuf.iter().filter(|(name, _)| *name != "*" && !fields.contains(*name));
        wrong.extend(stale.map(|(name, _)| format!("{message}.{name} needs no exception")));
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
