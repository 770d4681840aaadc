//! Errors of the HTTP API, as problem details (RFC 9457).

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::Full;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::code::Code;
use crate::domain::ids::{NodeId, ServiceId, TxId};
use crate::protocol::Mode;
use crate::protocol::record::Slot;

use super::telemetry::BatchReceipt;

/// Media type of a problem.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Problem {
    /// Stable name of the kind of problem: `urn:aviary:problem:` and the code's words with dashes.
    #[serde(rename = "type", default)]
    pub urn: String,
    /// The kind of problem in a few words, the same for every problem of its type.
    #[serde(default)]
    pub title: String,
    /// HTTP status of the answer.
    pub status: u16,
    /// What is wrong with this request, in words for people.
    #[serde(default)]
    pub detail: String,
    /// What programs branch on.
    pub code: Code,
    /// What else is known.
    #[serde(flatten)]
    pub facts: Box<ProblemFacts>,
}

/// What a problem says beside its words; what doesn't apply is left out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ProblemFacts {
    /// Id of the transaction, which is the write's idempotency key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub txid: Option<TxId>,
    /// Slot of the record that decided it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
    /// True when an earlier request with this key was answered the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repeated: Option<bool>,
    /// Reasons of the nodes that refused, each with its node.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub reasons: Vec<String>,
    /// Nodes that answered, where they were too few.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reached: Option<Vec<NodeId>>,
    /// Number of voters that a majority needs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub needed: Option<usize>,
    /// Services that are known, where an unknown one was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub known: Option<Vec<ServiceId>>,
    /// What the node is able to do, where that is why it is not ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// What became of a batch of events of which none counts.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub receipt: Option<BatchReceipt>,
}

impl Problem {
    /// Returns a problem with its code's status.
    pub fn new(code: Code, detail: impl Into<String>) -> Self {
        Self {
            urn: format!("urn:aviary:problem:{}", code.words().replace(' ', "-")),
            title: code.words().into(),
            status: code.status().as_u16(),
            detail: detail.into(),
            code,
            facts: Box::default(),
        }
    }

    /// Returns a problem that is known by its HTTP status alone.
    pub fn of_status(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status: status.as_u16(), ..Self::new(Code::of(status), detail) }
    }

    /// Returns the problem that a node found no majority.
    pub fn no_quorum(reached: Vec<NodeId>, needed: usize) -> Self {
        let names: Vec<_> = reached.iter().map(NodeId::as_str).collect();
        let mut problem =
            Self::new(Code::NoQuorum, format!("no quorum: reached {}, expected {needed} nodes", names.join(", ")));
        (problem.facts.reached, problem.facts.needed) = (Some(reached), Some(needed));
        problem
    }

    /// Returns what an answer that is no success says. Where it is no problem, or its code isn't known here, its status counts.
    pub fn read(status: StatusCode, body: &[u8]) -> Self {
        match serde_json::from_slice::<Self>(body) {
            Ok(problem) if problem.code == Code::Unknown => Self { code: Code::of(status), ..problem },
            Ok(problem) => problem,
            Err(_) => {
                let text = String::from_utf8_lossy(body);
                let detail =
                    if text.trim().is_empty() { status.to_string() } else { format!("{status}: {}", text.trim()) };
                Self::of_status(status, detail)
            }
        }
    }

    /// Returns it as an answer of HTTP.
    pub fn response(&self) -> Response<Full<Bytes>> {
        let body = serde_json::to_string(self).unwrap_or_default();
        let mut response = Response::new(Full::from(format!("{body}\n")));
        *response.status_mut() = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_problem_has_the_members_of_rfc_9457_and_its_code() {
        let node = |name| NodeId::new(name).unwrap();
        let json = serde_json::to_value(Problem::no_quorum(vec![node("a")], 2)).unwrap();
        let expected = json!({
            "type": "urn:aviary:problem:no-quorum", "title": "no quorum", "status": 503, "code": "NO_QUORUM",
            "detail": "no quorum: reached a, expected 2 nodes", "reached": ["a"], "needed": 2,
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn a_problem_is_read_as_it_was_written() {
        let mut problem = Problem::new(Code::Aborted, "node b: errors: 9 %");
        *problem.facts = ProblemFacts {
            txid: TxId::new("k").ok(),
            slot: Some(Slot(4)),
            repeated: Some(true),
            reasons: vec!["node b: errors: 9 %".into()],
            ..ProblemFacts::default()
        };
        let text = serde_json::to_vec(&problem).unwrap();
        assert_eq!(Problem::read(StatusCode::CONFLICT, &text), problem);
    }

    #[test]
    fn what_is_no_problem_and_what_is_unknown_counts_by_its_status() {
        let read = |status, body: &str| Problem::read(status, body.as_bytes());
        let foreign = read(StatusCode::SERVICE_UNAVAILABLE, "upstream connect error");
        assert_eq!(
            (foreign.code, foreign.detail.as_str()),
            (Code::Unavailable, "503 Service Unavailable: upstream connect error")
        );
        assert_eq!(read(StatusCode::GATEWAY_TIMEOUT, "").detail, "504 Gateway Timeout");
        let newer = r#"{"type":"urn:aviary:problem:frozen","status":409,"code":"FROZEN","detail":"frozen","until":9}"#;
        let newer = read(StatusCode::CONFLICT, newer);
        assert_eq!((newer.code, newer.detail.as_str()), (Code::Refused, "frozen"));
    }

    #[test]
    fn an_answer_of_a_problem_has_its_status_and_media_type() {
        let response = Problem::of_status(StatusCode::UNSUPPORTED_MEDIA_TYPE, "no").response();
        assert_eq!(response.status(), StatusCode::UNSUPPORTED_MEDIA_TYPE);
        assert_eq!(response.headers()[header::CONTENT_TYPE], PROBLEM_JSON);
    }
}
