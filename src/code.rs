//! Names of errors that programs branch on. The words beside them are for people, and change.

use http::StatusCode;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Why a request was not done: the field `code` of every error, in capitals. New ones may come; none changes its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
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
    /// A code that this build doesn't know: only ever received.
    #[serde(other)]
    Unknown,
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

    /// Returns the HTTP status of an error with this code, where nothing else gives it another one.
    pub fn status(self) -> StatusCode {
        match self {
            Self::InvalidArgument => StatusCode::BAD_REQUEST,
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
            Self::PermissionDenied => StatusCode::FORBIDDEN,
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::KeyReused => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Refused | Self::Aborted => StatusCode::CONFLICT,
            Self::Busy => StatusCode::TOO_MANY_REQUESTS,
            Self::NoQuorum | Self::OutcomeUnknown | Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal | Self::Unknown => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// Returns the code in a few words: the title of its problem type, and with dashes the end of the type's URN.
    pub fn words(self) -> &'static str {
        match self {
            Self::InvalidArgument => "invalid argument",
            Self::Unauthenticated => "unauthenticated",
            Self::PermissionDenied => "permission denied",
            Self::NotFound => "not found",
            Self::MethodNotAllowed => "method not allowed",
            Self::TooLarge => "too large",
            Self::KeyReused => "key reused",
            Self::Refused => "refused",
            Self::Aborted => "aborted",
            Self::Busy => "busy",
            Self::NoQuorum => "no quorum",
            Self::OutcomeUnknown => "outcome unknown",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
            Self::Unknown => "unknown",
        }
    }

    /// Returns true when the same write should be sent again under the same key: the node is busy, can't answer at the moment, or
    /// doesn't know the outcome. That there is no quorum is an answer, and isn't repeated.
    pub fn may_be_repeated(self) -> bool {
        matches!(self, Self::Busy | Self::OutcomeUnknown | Self::Unavailable)
    }
}
