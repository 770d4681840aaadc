//! The OpenAPI document of the HTTP API, made from the types that it answers with.
//!
//! `operations` lists every operation once, with its handler and its description: the router and the document are made from the same
//! list. Schemas, and the words in them, are those of the types.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use axum::response::IntoResponse;
use axum::routing::get;
use bytes::Bytes;
use http::header;
use schemars::generate::{Contract, SchemaSettings};
use schemars::{SchemaGenerator, json_schema};
use serde_json::{Map, Value, json};

mod operation;
mod operations;
mod simplify;

use super::admission;
use crate::code::Code;
use crate::model::{Problem, problem::PROBLEM_JSON};
use operation::{ApiOperation, Content, MakeSchema, Parameter, ParameterPlace};

/// Where schemas are, as references name them.
const SCHEMAS: &str = "/components/schemas";

const ABOUT: &str = "Operators' API of a node of Aviary. Every node answers every request; writes go through the coordinator.\n\n\
    A write that got no answer, or the code BUSY, OUTCOME_UNKNOWN or UNAVAILABLE, may be sent again under the same Idempotency-Key, to \
    any node. Errors are problem details (RFC 9457) with a stable `code`. Later builds may add members to answers, and codes.";

/// Returns every operation of the API but gRPC's: the router serves these, and the document describes these.
pub fn operations() -> Vec<ApiOperation> {
    const TYPES: &[(&str, MakeSchema)] =
        &[("application/json", |_| json_schema!({ "type": "object", "additionalProperties": true }))];
    let answer = Content { about: "The document.", types: TYPES, required: true };
    let own = ApiOperation::get("/v1/openapi.json", "get_openapi", "Returns this document.", answer, get(serve));
    operations::operations().into_iter().chain([own]).collect()
}

/// Answers `GET /v1/openapi.json`.
async fn serve() -> impl IntoResponse {
    static TEXT: LazyLock<Bytes> = LazyLock::new(|| Bytes::from(format!("{:#}\n", document())));
    ([(header::CONTENT_TYPE, "application/json")], TEXT.clone())
}

/// Returns the document.
pub fn document() -> Value {
    let mut schemas = Schemas::new();
    let mut paths = Map::new();
    for operation in operations() {
        let described = schemas.describe(&operation);
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method.as_str().to_lowercase()] = described;
    }
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Aviary", "version": env!("CARGO_PKG_VERSION"), "description": ABOUT,
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "servers": [{ "url": "http://127.0.0.1:50051", "description": "A node of the demo cluster." }],
        "paths": paths,
        "components": {
            "schemas": schemas.all(),
            "securitySchemes": {
                "token": {
                    "type": "http", "scheme": "bearer",
                    "description": "A token of the node's tokens file, which `aviary token` makes. A node that has no such file listens on loopback \
                                    only, and needs none.",
                },
            },
        },
    });
    simplify::simplify(&mut document);
    if let Some(Value::Object(schemas)) = document.pointer_mut(SCHEMAS) {
        schemas.iter_mut().for_each(|(name, schema)| simplify::name_alternatives(name, schema));
    }
    document
}

/// Schemas of what clients send, and of what nodes answer: a member with a default may be left out of the one, and is in the other.
struct Schemas {
    requests: SchemaGenerator,
    answers: SchemaGenerator,
}

impl Schemas {
    fn new() -> Self {
        let generator = |contract: Contract| {
            let mut settings = SchemaSettings::draft2020_12();
            settings.definitions_path = SCHEMAS.into();
            settings.contract = contract;
            settings.into_generator()
        };
        Self { requests: generator(Contract::Deserialize), answers: generator(Contract::Serialize) }
    }

    fn describe(&mut self, operation: &ApiOperation) -> Value {
        let parameters: Vec<_> = operation.parameters.iter().map(|parameter| self.parameter(parameter)).collect();
        let mut described = json!({
            "operationId": operation.id, "summary": operation.summary, "parameters": parameters,
            "responses": self.responses(operation),
        });
        if let Some(Content { about, types, required }) = operation.body {
            let types = types.iter().map(|(media, schema)| (*media, json!({ "schema": schema(&mut self.requests) })));
            let content: BTreeMap<_, _> = types.collect();
            described["requestBody"] = json!({ "description": about, "required": required, "content": content });
        }
        match admission::needed(&operation.method, operation.path) {
            None => described["security"] = json!([]),
            Some(role) => {
                described["security"] = json!([{ "token": [] }, {}]);
                described["description"] = format!("Needs a token of role {role}, where the node has tokens.").into();
            }
        }
        described
    }

    fn parameter(&mut self, Parameter { place, name, about, schema }: &Parameter) -> Value {
        let place = match place {
            ParameterPlace::Path => "path",
            ParameterPlace::Query => "query",
            ParameterPlace::Header => "header",
        };
        let schema = schema(&mut self.requests);
        json!({ "in": place, "name": name, "description": about, "required": place == "path", "schema": schema })
    }

    fn responses(&mut self, operation: &ApiOperation) -> Value {
        let Content { about, types, .. } = operation.answer;
        let types = types.iter().map(|(media, schema)| (*media, json!({ "schema": schema(&mut self.answers) })));
        let content: BTreeMap<_, _> = types.collect();
        let mut responses = Map::from_iter([("200".to_string(), json!({ "description": about, "content": content }))]);
        for (status, codes) in problems(operation) {
            let names: Vec<_> = codes.iter().map(|code| json!(code)).collect();
            let words = codes.iter().map(|code| code.words()).collect::<Vec<_>>().join(", ");
            let content = json!({ PROBLEM_JSON: { "schema": self.answers.subschema_for::<Problem>() } });
            let response = json!({ "description": format!("Problem: {words}."), "x-codes": names, "content": content });
            responses.insert(status.to_string(), response);
        }
        responses.into()
    }

    /// Returns all schemas, by name.
    fn all(mut self) -> Map<String, Value> {
        let mut all = self.answers.take_definitions(true);
        for (name, schema) in self.requests.take_definitions(true) {
            let answered = all.insert(name.clone(), schema.clone());
            assert!(answered.is_none_or(|answered| answered == schema), "{name} is sent and answered in two shapes");
        }
        all
    }
}

/// Returns the codes of an operation's problems, by their HTTP status.
fn problems(operation: &ApiOperation) -> BTreeMap<u16, Vec<Code>> {
    let mut problems = BTreeMap::<u16, Vec<Code>>::new();
    let token = admission::needed(&operation.method, operation.path).is_some();
    let tokens = [Code::Unauthenticated, Code::PermissionDenied].map(|code| (code.status().as_u16(), code));
    let all = operation.codes.iter().chain(tokens.iter().filter(|_| token));
    for (status, code) in all {
        let codes = problems.entry(*status).or_default();
        if !codes.contains(code) {
            codes.push(*code);
        }
    }
    problems
}
