//! What a failure means: what is done next, and what of it is evidence. One table for both paths. Pure.
//!
//! Evidence is what a version did wrong. What the proxy lacks, what a client did, and what no server implements never counts
//! against a version.

use crate::domain::side::Side;

/// Why an attempt brought no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// This proxy lacks a descriptor, a port or memory: nothing was sent.
    Local,
    /// Every server of the version has as many requests as it may (`routing.limits`): nothing was sent.
    Full,
    /// No connection could be made: nothing was sent.
    Unreachable,
    /// The canary lost its share before the request was sent.
    Withdrawn,
    /// The canary lost its share while the request waited for its answer, and its grace is over.
    Overstayed,
    /// A connection that had served before ended before anything came back.
    Stale,
    /// The server said that it did not process the request (RFC 9113, 8.7).
    Unprocessed,
    /// No first byte in time.
    Late,
    /// The server broke off, or sent what is no answer.
    Broken,
    /// The client broke off, stopped sending, or sent what is no body.
    Client,
    /// The request asks for a protocol that the server's connections don't have.
    Unsupported,
}

/// What is known about the request that failed.
#[derive(Debug, Clone, Copy)]
pub struct TriedRequest {
    /// Side whose server was tried.
    pub side: Side,
    /// Doing it twice is doing it once (RFC 9110, 9.2.2).
    pub is_idempotent: bool,
    /// The whole request can be sent again.
    pub is_whole: bool,
    /// It was repeated before.
    pub is_repeat: bool,
    /// The version has a server that was not tried.
    pub has_other: bool,
    /// Nobody waits for the answer.
    pub is_copy: bool,
}

/// What is done after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextTry {
    /// Another server of the same version is tried.
    OtherServer,
    /// The same version is tried again, on a connection that served nothing before.
    NewConnection,
    /// Stable is tried: a canary that can't be reached, or may serve no more, costs users nothing.
    Stable,
    /// The client gets an answer with this status.
    Answer(u16),
}

/// What follows from a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Consequence {
    /// What is done.
    pub next: NextTry,
    /// It counts against the server, which may be ejected.
    pub blames_server: bool,
    /// It counts against the version: evidence, and the circuit breaker's.
    pub blames_version: bool,
}

/// Returns what follows from a failure.
pub fn after(kind: FailureKind, attempt: &TriedRequest) -> Consequence {
    let TriedRequest { side, is_idempotent, is_whole, is_repeat, has_other, is_copy } = *attempt;
    let consequence = |next, blames_server, blames_version| Consequence { next, blames_server, blames_version };
    match kind {
        FailureKind::Local => consequence(NextTry::Answer(503), false, false),
        // Stable takes what the canary has no place for: less canary traffic is always allowed.
        FailureKind::Full if side == Side::Canary && !is_copy => consequence(NextTry::Stable, false, false),
        FailureKind::Full => consequence(NextTry::Answer(503), false, false),
        FailureKind::Client => consequence(NextTry::Answer(408), false, false),
        FailureKind::Unsupported => consequence(NextTry::Answer(501), false, false),
        FailureKind::Withdrawn if !is_copy => consequence(NextTry::Stable, false, false),
        FailureKind::Overstayed if is_idempotent && is_whole && !is_copy => consequence(NextTry::Stable, false, false),
        FailureKind::Withdrawn | FailureKind::Overstayed => consequence(NextTry::Answer(503), false, false),
        FailureKind::Unreachable if has_other => consequence(NextTry::OtherServer, true, false),
        FailureKind::Unreachable if side == Side::Canary && !is_copy => consequence(NextTry::Stable, true, true),
        FailureKind::Unreachable => consequence(NextTry::Answer(502), true, true),
        FailureKind::Stale if is_idempotent && is_whole && !is_repeat => {
            consequence(NextTry::NewConnection, false, false)
        }
        FailureKind::Unprocessed if is_whole && !is_repeat => consequence(NextTry::NewConnection, false, false),
        FailureKind::Stale | FailureKind::Unprocessed | FailureKind::Broken => {
            consequence(NextTry::Answer(502), true, true)
        }
        FailureKind::Late => consequence(NextTry::Answer(504), true, true),
    }
}

/// Returns true for a status that is a failure of the version: 5xx, except what says that the request asks for something that
/// nobody implements (501, 505).
pub fn is_failure(status: u16) -> bool {
    status >= 500 && !matches!(status, 501 | 505)
}

/// Returns true for a gRPC status that blames the server, as a 5xx does: unknown, deadline exceeded, resource exhausted,
/// internal, unavailable, data loss. Unimplemented (12) is no failure, as 501 is none.
pub fn is_grpc_failure(status: &[u8]) -> bool {
    matches!(status, b"2" | b"4" | b"8" | b"13" | b"14" | b"15")
}

#[cfg(test)]
mod tests {
    use FailureKind::*;

    use super::*;

    const PLAIN: TriedRequest = TriedRequest {
        side: Side::Canary,
        is_idempotent: true,
        is_whole: true,
        is_repeat: false,
        has_other: false,
        is_copy: false,
    };

    #[test]
    fn each_failure_has_its_consequence() {
        let stable = TriedRequest { side: Side::Stable, ..PLAIN };
        let other = TriedRequest { has_other: true, ..PLAIN };
        let post = TriedRequest { is_idempotent: false, ..PLAIN };
        let cut = TriedRequest { is_whole: false, ..PLAIN };
        let repeat = TriedRequest { is_repeat: true, ..PLAIN };
        let copy = TriedRequest { is_copy: true, ..PLAIN };
        // (failure, request) → (next, the server is blamed, the version is blamed)
        let table = [
            (Local, PLAIN, NextTry::Answer(503), false, false),
            (Local, other, NextTry::Answer(503), false, false),
            (Full, PLAIN, NextTry::Stable, false, false),
            (Full, post, NextTry::Stable, false, false),
            (Full, stable, NextTry::Answer(503), false, false),
            (Full, other, NextTry::Stable, false, false),
            (Full, copy, NextTry::Answer(503), false, false),
            (Client, PLAIN, NextTry::Answer(408), false, false),
            (Unsupported, PLAIN, NextTry::Answer(501), false, false),
            (Withdrawn, PLAIN, NextTry::Stable, false, false),
            (Withdrawn, post, NextTry::Stable, false, false),
            (Withdrawn, other, NextTry::Stable, false, false),
            (Withdrawn, copy, NextTry::Answer(503), false, false),
            (Overstayed, PLAIN, NextTry::Stable, false, false),
            (Overstayed, post, NextTry::Answer(503), false, false),
            (Overstayed, cut, NextTry::Answer(503), false, false),
            (Overstayed, copy, NextTry::Answer(503), false, false),
            (Unreachable, PLAIN, NextTry::Stable, true, true),
            (Unreachable, post, NextTry::Stable, true, true),
            (Unreachable, cut, NextTry::Stable, true, true),
            (Unreachable, copy, NextTry::Answer(502), true, true),
            (Unreachable, stable, NextTry::Answer(502), true, true),
            (Unreachable, other, NextTry::OtherServer, true, false),
            (Stale, PLAIN, NextTry::NewConnection, false, false),
            (Stale, stable, NextTry::NewConnection, false, false),
            (Stale, post, NextTry::Answer(502), true, true),
            (Stale, cut, NextTry::Answer(502), true, true),
            (Stale, repeat, NextTry::Answer(502), true, true),
            (Unprocessed, PLAIN, NextTry::NewConnection, false, false),
            (Unprocessed, post, NextTry::NewConnection, false, false),
            (Unprocessed, cut, NextTry::Answer(502), true, true),
            (Unprocessed, repeat, NextTry::Answer(502), true, true),
            (Late, PLAIN, NextTry::Answer(504), true, true),
            (Late, other, NextTry::Answer(504), true, true),
            (Broken, PLAIN, NextTry::Answer(502), true, true),
            (Broken, other, NextTry::Answer(502), true, true),
        ];
        for (kind, attempt, next, blames_server, blames_version) in table {
            let expected = Consequence { next, blames_server, blames_version };
            assert_eq!(after(kind, &attempt), expected, "{kind:?} of {attempt:?}");
        }
    }

    #[test]
    fn what_nobody_implements_is_no_failure() {
        let failures: Vec<_> = (100..=599).filter(|status| is_failure(*status)).collect();
        let expected: Vec<_> = (500..=599).filter(|status| ![501, 505].contains(status)).collect();
        assert_eq!(failures, expected);
        let blamed: Vec<_> = (0..=16).filter(|code: &u8| is_grpc_failure(code.to_string().as_bytes())).collect();
        assert_eq!(blamed, [2, 4, 8, 13, 14, 15]);
    }
}
