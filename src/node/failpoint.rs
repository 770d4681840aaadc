//! Deaths on demand, for tests: the process aborts at a named point of a commit.
//!
//! `AVIARY_FAILPOINT=after-prepare` aborts the first time that point is reached; `after-prepare:Promote` only for that
//! record kind. A node started with one says so in its log.

use std::str::FromStr;

use crate::protocol::Output;
use crate::protocol::message::{Decision, Message};

/// A point of a commit, as its coordinator or a participant passes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Before the first PREPARE leaves.
    BeforePrepare,
    /// When every PREPARE has left.
    AfterPrepare,
    /// Before a VOTE leaves, its promise durable.
    BeforeVote,
    /// When the votes are in, before the first proposal leaves.
    BeforePropose,
    /// When every proposal has left.
    AfterPropose,
    /// When a majority accepted, before anybody is told.
    BeforeChosen,
    /// When all peers were told that the record is chosen.
    AfterChosen,
    /// When the record was appended.
    AfterAppend,
}

const POINTS: [(&str, Point); 8] = [
    ("before-prepare", Point::BeforePrepare),
    ("after-prepare", Point::AfterPrepare),
    ("before-vote", Point::BeforeVote),
    ("before-propose", Point::BeforePropose),
    ("after-propose", Point::AfterPropose),
    ("before-chosen", Point::BeforeChosen),
    ("after-chosen", Point::AfterChosen),
    ("after-append", Point::AfterAppend),
];

/// Place in a commit where the process dies, and the kind of record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failpoint {
    point: Point,
    kind: Option<String>,
}

/// A text names no failpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "failpoint {0:?}, expected one of before-prepare, after-prepare, before-vote, before-propose, after-propose, \
         before-chosen, after-chosen, after-append, each optionally with :KIND"
)]
pub struct FailpointError(String);

impl FromStr for Failpoint {
    type Err = FailpointError;

    fn from_str(text: &str) -> Result<Self, FailpointError> {
        let (name, kind) = match text.split_once(':') {
            Some((name, kind)) => (name, Some(kind.to_string())),
            None => (text, None),
        };
        let found = POINTS.iter().find(|(known, _)| *known == name);
        found.map(|(_, point)| Self { point: *point, kind }).ok_or_else(|| FailpointError(text.into()))
    }
}

impl Failpoint {
    /// Returns the failpoint that the environment names.
    pub fn from_environment() -> Result<Option<Self>, FailpointError> {
        std::env::var("AVIARY_FAILPOINT").ok().map(|text| text.parse()).transpose()
    }

    /// Returns true when the process must die before it carries out `output`.
    pub fn before(&self, output: &Output) -> bool {
        let Some((kind, before, _)) = moment(output) else { return false };
        Some(self.point) == before && self.is_about(kind)
    }

    /// Returns true when the process must die once it has carried out `output`, the last of its like in a row.
    pub fn after(&self, output: &Output, next: Option<&Output>) -> bool {
        let Some((kind, _, after)) = moment(output) else { return false };
        let last = next.and_then(moment).is_none_or(|(_, _, next)| next != after);
        last && after == Some(self.point) && self.is_about(kind)
    }

    fn is_about(&self, kind: &str) -> bool {
        self.kind.as_deref().is_none_or(|wanted| wanted == kind)
    }
}

/// The record kind an output is about, and the points before and behind it.
fn moment(output: &Output) -> Option<(&str, Option<Point>, Option<Point>)> {
    match output {
        Output::Append(chosen) => Some((chosen.record.intent.operation.name(), None, Some(Point::AfterAppend))),
        Output::Send { message, .. } => match &**message {
            Message::Prepare(prepare) => {
                Some((prepare.intent.operation.name(), Some(Point::BeforePrepare), Some(Point::AfterPrepare)))
            }
            Message::Vote(_) => Some(("", Some(Point::BeforeVote), None)),
            Message::Decision(Decision::Propose(_, record)) => {
                Some((record.intent.operation.name(), Some(Point::BeforePropose), Some(Point::AfterPropose)))
            }
            Message::Decision(Decision::Chosen(chosen)) => {
                Some((chosen.record.intent.operation.name(), Some(Point::BeforeChosen), Some(Point::AfterChosen)))
            }
            Message::Decision(Decision::CatchUp(_) | Decision::Checkpoint(_))
            | Message::Heartbeat(_)
            | Message::HealthSnapshot(_) => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failpoint_is_a_point_and_maybe_a_kind() {
        let found: Failpoint = "after-prepare:Promote".parse().unwrap();
        assert_eq!(found, Failpoint { point: Point::AfterPrepare, kind: Some("Promote".into()) });
        assert!("after-lunch".parse::<Failpoint>().unwrap_err().to_string().starts_with("failpoint \"after-lunch\""));
    }
}
