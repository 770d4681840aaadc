//! Names of errors that programs branch on. The words beside them are for people, and change.

use http::StatusCode;
use serde::{Deserialize, Serialize};

/// Why a request was not done: the field `code` of every error, in capitals. New ones may come; none changes its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Code {
    /// The request itself is wrong.
    InvalidArgument,
    /// There is no known token.
    Unauthenticated,
    /// The token's role is too low.
    PermissionDenied,
    /// What was named is unknown.
    NotFound,
    /// The path takes no such method.
    MethodNotAllowed,
    /// The body is larger than what is read.
    TooLarge,
    /// The idempotency key stands for another request.
    KeyReused,
    /// Not possible as things stand: nothing was decided.
    Refused,
    /// Voters refused: that is decided, and the same key gets the same answer.
    Aborted,
    /// Too many requests are waiting. May be repeated.
    Busy,
    /// No majority answered, and nothing was proposed. Repeating it at once leads to the same answer.
    NoQuorum,
    /// Proposed, but not confirmed in time: repeated under the same key, the outcome is told.
    OutcomeUnknown,
    /// This node can't answer at the moment; another may.
    Unavailable,
    /// Something is wrong with this node.
    Internal,
}

impl Code {
    /// Returns the code of an error that says no more than its HTTP status.
    pub fn of(status: StatusCode) -> Self {
        match status {
            StatusCode::UNAUTHORIZED => Self::Unauthenticated,
            StatusCode::FORBIDDEN => Self::PermissionDenied,
            StatusCode::NOT_FOUND => Self::NotFound,
            StatusCode::METHOD_NOT_ALLOWED => Self::MethodNotAllowed,
            StatusCode::PAYLOAD_TOO_LARGE => Self::TooLarge,
            StatusCode::CONFLICT => Self::Refused,
            StatusCode::TOO_MANY_REQUESTS => Self::Busy,
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => Self::Unavailable,
            status if status.is_client_error() => Self::InvalidArgument,
            _ => Self::Internal,
        }
    }
}
