//! Every operation of the API but gRPC's and the document's own.

use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use schemars::json_schema;

use super::super::service::{ChangeVerb, MemberVerb};
use super::super::{backup, events, metrics, show, telemetry, write};
use super::operation::{ApiOperation, Content, MakeSchema, Parameter, ParameterPlace, of};
use crate::code::Code;
use crate::domain::ids::{ServiceId, TxId};
use crate::domain::plan::file::RolloutFile;
use crate::model::{
    BatchReceipt, ChangeDetails, Changed, ClusterView, HealthView, History, LeaseView, MemberData, MemberName,
    ProbeView, ReadConsistency, RolloutList, RolloutView, RoutingView, ServiceName, ServiceServers, WriteConsistency,
};
use crate::protocol::record::Sequence;
use crate::telemetry::event::Json as ReportedJson;

const TEXT: MakeSchema = |_| json_schema!({ "type": "string" });
const BYTES: MakeSchema = |_| json_schema!({ "type": "string", "format": "binary" });

const fn query(name: &'static str, about: &'static str, schema: MakeSchema) -> Parameter {
    Parameter { place: ParameterPlace::Query, name, about, schema }
}
const NAME: Parameter =
    Parameter { place: ParameterPlace::Path, name: "name", about: "Name of the service.", schema: of::<ServiceId> };
const KEY: Parameter = Parameter {
    place: ParameterPlace::Header,
    name: "Idempotency-Key",
    about: "The same request with the same key is carried out once, and becomes the transaction's id. None: a random key.",
    schema: of::<TxId>,
};
const LAST_EVENT_ID: Parameter = Parameter {
    place: ParameterPlace::Header,
    name: "Last-Event-ID",
    about: "The decisions after this sequence come first; none: the stream begins with what happens next.",
    schema: of::<Sequence>,
};
const FILE_NAME: Parameter = Parameter {
    place: ParameterPlace::Header,
    name: "X-Aviary-File",
    about: "Name of the file, for errors.",
    schema: |_| json_schema!({ "type": "string", "maxLength": 255, "pattern": "^[ -~]*$" }),
};
const SELECTOR: Parameter = query(
    "selector",
    "Labels that the rollouts must have: `key`, `key=value` or `key!=value`, with commas between them.",
    |_| {
        json_schema!({
            "type": "string",
            "pattern": "^([^=!,]*[^=!,\\s][^=!,]*((==?|!=)[^=!,]*)?(,[^=!,]*[^=!,\\s][^=!,]*((==?|!=)[^=!,]*)?)*)?$",
        })
    },
);
const LIMIT: Parameter = query(
    "limit",
    "Most rollouts of this page.",
    |_| json_schema!({ "type": "integer", "minimum": 1, "maximum": show::PAGE_MAX, "default": show::PAGE_MAX }),
);
const AFTER: Parameter =
    query("after", "Name after which the page begins: `next` of the page before.", of::<ServiceId>);
const SERVICE: Parameter = query("service", "Name of a service; none: the first one.", of::<ServiceId>);
const READ: Parameter = query("consistency", "What the answer has to know.", of::<ReadConsistency>);
const QUORUM: Parameter =
    query("quorum", "Asks as well for contact with a majority; its value doesn't matter.", of::<String>);
const WRITE: Parameter = query("consistency", "When the write is answered.", of::<WriteConsistency>);

const fn json(about: &'static str, types: &'static [(&'static str, MakeSchema)]) -> Content {
    Content { about, types, required: true }
}

/// A body of JSON with the shape of a type.
macro_rules! json {
    ($about:literal, $type:ty) => {
        json($about, &[("application/json", of::<$type>)])
    };
}

/// Codes of a transaction that was not committed.
const TRANSACTION: [Code; 7] = [
    Code::Refused,
    Code::Aborted,
    Code::KeyReused,
    Code::Busy,
    Code::NoQuorum,
    Code::OutcomeUnknown,
    Code::Unavailable,
];
const CHANGED: Content = json!("The write is decided, or there was nothing to do.", Changed);

/// Returns these operations.
pub fn operations() -> Vec<ApiOperation> {
    [rollouts(), changes(), cluster(), streams(), status()].into_iter().flatten().collect()
}

fn rollouts() -> Vec<ApiOperation> {
    let file =
        json("A rollout file.", &[("application/yaml", of::<RolloutFile>), ("application/json", of::<RolloutFile>)]);
    vec![
        ApiOperation::get(
            "/v1/rollouts",
            "list_rollouts",
            "Lists the last rollout of each service, by name, a page at a time.",
            json!("A page of rollouts.", RolloutList),
            get(show::list),
        )
        .takes(&[SELECTOR, LIMIT, AFTER])
        .fails(&[Code::InvalidArgument]),
        ApiOperation::post(
            "/v1/rollouts",
            "apply_rollout",
            "Starts the rollout of a file.",
            file,
            CHANGED,
            post(write::apply),
        )
        .takes(&[KEY, FILE_NAME, WRITE])
        .fails(&TRANSACTION),
        ApiOperation::get(
            "/v1/rollouts/{name}",
            "get_rollout",
            "Returns the last rollout of a service.",
            json!("The rollout.", RolloutView),
            get(show::rollout),
        )
        .takes(&[NAME])
        .fails(&[Code::InvalidArgument, Code::NotFound]),
        ApiOperation::get(
            "/v1/rollouts/{name}/history",
            "get_history",
            "Returns the newest records that changed a service or were to, oldest first.",
            json!("The records.", History),
            get(show::history),
        )
        .takes(&[NAME])
        .fails(&[Code::InvalidArgument, Code::NotFound, Code::Internal]),
    ]
}

fn changes() -> Vec<ApiOperation> {
    let details = Content { required: false, ..json!("Details of the change; none: the defaults.", ChangeDetails) };
    let verbs = [
        (
            ChangeVerb::Promote,
            "/v1/rollouts/{name}/promote",
            "promote_rollout",
            "Promotes the canary to the next step.",
        ),
        (
            ChangeVerb::Pause,
            "/v1/rollouts/{name}/pause",
            "pause_rollout",
            "Holds the weight until the rollout is resumed.",
        ),
        (ChangeVerb::Resume, "/v1/rollouts/{name}/resume", "resume_rollout", "Continues a paused rollout."),
        (ChangeVerb::Abort, "/v1/rollouts/{name}/abort", "abort_rollout", "Sends all traffic back to stable."),
        (ChangeVerb::Retry, "/v1/rollouts/{name}/retry", "retry_rollout", "Starts a rolled-back rollout again."),
        (
            ChangeVerb::Undo,
            "/v1/rollouts/{name}/undo",
            "undo_rollout",
            "Starts a rollout back to the former version; aborts a rollout in progress.",
        ),
    ];
    let operation = |(verb, path, id, summary)| {
        let operation = ApiOperation::post(path, id, summary, details, CHANGED, write::change(verb));
        operation.takes(&[NAME, KEY, WRITE]).fails(&TRANSACTION)
    };
    verbs.into_iter().map(operation).collect()
}

fn cluster() -> Vec<ApiOperation> {
    let (name, data) = (json!("The member.", MemberName), json!("The member and its data.", MemberData));
    let verbs = [
        (MemberVerb::Cordon, "/v1/cluster/cordon", "cordon_node", "Excludes a node from promotion votes.", name),
        (
            MemberVerb::Uncordon,
            "/v1/cluster/uncordon",
            "uncordon_node",
            "Includes a node in promotion votes again.",
            name,
        ),
        (MemberVerb::Remove, "/v1/cluster/remove", "remove_node", "Removes a node from the cluster.", name),
        (
            MemberVerb::Readmit,
            "/v1/cluster/readmit",
            "readmit_node",
            "Restores a node's vote after its disk was replaced.",
            data,
        ),
        (MemberVerb::Add, "/v1/cluster/add", "add_node", "Adds a node to the cluster.", data),
    ];
    let operation = |(verb, path, id, summary, body)| {
        let operation = ApiOperation::post(path, id, summary, body, CHANGED, write::configure(verb));
        operation.takes(&[KEY, WRITE]).fails(&TRANSACTION)
    };
    let mut all: Vec<_> = verbs.into_iter().map(operation).collect();
    let set_default = ApiOperation::post(
        "/v1/cluster/set-default",
        "set_default_service",
        "Sends the requests that name no service to this one.",
        json!("The service.", ServiceName),
        CHANGED,
        post(write::set_default),
    );
    all.push(set_default.takes(&[KEY, WRITE]).fails(&TRANSACTION));
    let set_servers = ApiOperation::post(
        "/v1/cluster/set-servers",
        "set_stable_servers",
        "Has a service's stable version served by these servers, once each of them takes a connection.",
        json!("The service and the servers.", ServiceServers),
        CHANGED,
        post(write::set_servers),
    );
    all.push(set_servers.takes(&[KEY, WRITE]).fails(&TRANSACTION));
    all.push(ApiOperation::get(
        "/v1/cluster",
        "get_cluster",
        "Returns members, coordinator and log positions.",
        json!("The cluster as the node that answers sees it.", ClusterView),
        get(show::cluster),
    ));
    let backup = ApiOperation::get(
        "/v1/cluster/backup",
        "get_backup",
        "Streams a backup of the cluster from the node's disk; `aviary cluster restore` reads it.",
        json("The backup; a body that breaks off is none.", &[("application/octet-stream", BYTES)]),
        get(backup::stream),
    );
    all.push(backup.fails(&[Code::NotFound, Code::Busy, Code::Internal]));
    all
}

fn streams() -> Vec<ApiOperation> {
    let batch = json(
        "Events: a list, an object with a list, or a line for each.",
        &[("application/json", telemetry::batch_schema), ("application/x-ndjson", of::<ReportedJson>)],
    );
    let handler = post(telemetry::report).layer(DefaultBodyLimit::max(telemetry::BATCH_BYTES_MAX));
    vec![
        ApiOperation::get(
            "/v1/events",
            "follow_events",
            "Streams what happens, as server-sent events. The data of each is an Announcement; the id of a decision is its sequence, \
             with which any node continues the stream.",
            json("A stream that doesn't end by itself.", &[("text/event-stream", events::schema)]),
            get(events::follow),
        )
        .takes(&[LAST_EVENT_ID])
        .fails(&[Code::InvalidArgument, Code::Busy]),
        ApiOperation::post(
            "/v1/telemetry",
            "report_telemetry",
            "Counts reported events.",
            batch,
            json!("At least one event counts, or there were none.", BatchReceipt),
            handler,
        )
        .fails_as(422, Code::InvalidArgument),
        ApiOperation::get(
            "/metrics",
            "get_metrics",
            "Returns metrics in the text format of Prometheus.",
            json("The metrics.", &[("text/plain", TEXT)]),
            get(metrics::scrape),
        ),
    ]
}

fn status() -> Vec<ApiOperation> {
    let status = || get(show::status);
    let look = |path, id, summary, answer| {
        let operation = ApiOperation::get(path, id, summary, answer, status()).takes(&[SERVICE, READ]);
        operation
            .fails(&[Code::InvalidArgument, Code::NotFound, Code::NoQuorum, Code::Unavailable])
            .fails_as(503, Code::Refused)
    };
    vec![
        look(
            "/routing/state",
            "get_routing_state",
            "Returns a service's routing as the node serves it.",
            json!("The routing.", RoutingView),
        ),
        look(
            "/health/snapshot",
            "get_health_snapshot",
            "Returns the evidence on a service's canary.",
            json!("The evidence.", HealthView),
        ),
        ApiOperation::get(
            "/livez",
            "get_liveness",
            "Says that the process answers.",
            json!("It does.", ProbeView),
            status(),
        ),
        ApiOperation::get(
            "/readyz",
            "get_readiness",
            "Says whether the node can serve requests; with quorum, whether it can change something, too.",
            json!("It can.", ProbeView),
            status(),
        )
        .takes(&[QUORUM])
        .fails(&[Code::Unavailable]),
        ApiOperation::get(
            "/lease/{name}",
            "get_lease",
            "Says whether the node may send canary traffic of a service: a health check for load balancers.",
            json!("It may.", LeaseView),
            status(),
        )
        .takes(&[NAME])
        .fails(&[Code::Unavailable]),
    ]
}
