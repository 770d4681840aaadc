//! What was refused on the control port: counted by class, and logged at a pace that an attacker doesn't set.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::node::frame::FrameError;

/// Why a connection was refused or closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// The bytes do not begin with the protocol's magic.
    Magic,
    /// The peer speaks no version that this node speaks.
    Version,
    /// A kind of frame that doesn't exist or may not come.
    Kind,
    /// A frame above the limit.
    TooLong,
    /// The checksum of a frame does not match.
    Checksum,
    /// An intact frame with an impossible message.
    Malformed,
    /// The peer belongs to another cluster.
    Cluster,
    /// Another node than it should be, or one that nobody configured.
    Sender,
    /// The connection ended within a frame.
    Truncated,
    /// The peer sent no HELLO before the deadline.
    HelloDeadline,
    /// A frame that didn't arrive in time.
    BodyDeadline,
    /// The peer sent nothing for longer than the idle limit.
    Idle,
    /// Too many connections without HELLO.
    HalfOpen,
    /// The transport's own handshake failed.
    Transport,
    /// One of our own messages, too long for any peer.
    Outgoing,
}

impl Class {
    /// All classes of rejections, in the order of their counters.
    pub const ALL: [Self; 15] = [
        Self::Magic,
        Self::Version,
        Self::Kind,
        Self::TooLong,
        Self::Checksum,
        Self::Malformed,
        Self::Cluster,
        Self::Sender,
        Self::Truncated,
        Self::HelloDeadline,
        Self::BodyDeadline,
        Self::Idle,
        Self::HalfOpen,
        Self::Transport,
        Self::Outgoing,
    ];

    /// Returns the class's name, as metrics label it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Magic => "magic",
            Self::Version => "version",
            Self::Kind => "kind",
            Self::TooLong => "too_long",
            Self::Checksum => "checksum",
            Self::Malformed => "malformed",
            Self::Cluster => "cluster",
            Self::Sender => "sender",
            Self::Truncated => "truncated",
            Self::HelloDeadline => "hello_deadline",
            Self::BodyDeadline => "body_deadline",
            Self::Idle => "idle",
            Self::HalfOpen => "half_open",
            Self::Transport => "transport",
            Self::Outgoing => "outgoing",
        }
    }
}

impl From<&FrameError> for Class {
    fn from(error: &FrameError) -> Self {
        match error {
            FrameError::Magic { .. } => Self::Magic,
            FrameError::Version { .. } => Self::Version,
            FrameError::Kind { .. } => Self::Kind,
            FrameError::TooLong { .. } => Self::TooLong,
            FrameError::Checksum { .. } => Self::Checksum,
            FrameError::Malformed(_) | FrameError::Lacks { .. } => Self::Malformed,
            FrameError::Cluster { .. } => Self::Cluster,
            FrameError::Sender { .. } => Self::Sender,
        }
    }
}

/// Counts of refusals since the start, by class.
#[derive(Debug, Default)]
pub struct Rejections {
    counts: [AtomicU64; Class::ALL.len()],
    lines: Mutex<[Pace; Class::ALL.len()]>,
}

impl Rejections {
    /// Counts a refusal, and logs it unless its class was logged less than a second ago.
    pub(super) fn refuse(&self, class: Class, peer: &str, why: &dyn std::fmt::Display) {
        self.counts[class as usize].fetch_add(1, Ordering::Relaxed);
        metrics::counter!("aviary_connections_refused_total", "port" => "control", "class" => class.name())
            .increment(1);
        let mut lines = self.lines.lock().expect("nothing panics while it holds the paces");
        let Some(suppressed) = lines[class as usize].line(Instant::now()) else { return };
        drop(lines);
        tracing::warn!(class = class.name(), peer, suppressed, "control connection refused: {why}");
    }

    /// Returns how often `class` was refused.
    pub fn count(&self, class: Class) -> u64 {
        self.counts[class as usize].load(Ordering::Relaxed)
    }

    /// Returns all counts by their class's name.
    pub fn snapshot(&self) -> BTreeMap<&'static str, u64> {
        Class::ALL.into_iter().map(|class| (class.name(), self.count(class))).collect()
    }
}

/// At most one line a second.
#[derive(Debug, Clone, Copy, Default)]
struct Pace {
    last: Option<Instant>,
    suppressed: u64,
}

impl Pace {
    const BETWEEN: Duration = Duration::from_secs(1);

    /// Returns how many lines were left out since the last one, when it is time for one; counts one otherwise.
    fn line(&mut self, now: Instant) -> Option<u64> {
        if self.last.is_some_and(|last| now.duration_since(last) < Self::BETWEEN) {
            self.suppressed += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_one_line_a_second_that_tells_how_many_it_stands_for() {
        let start = Instant::now();
        let mut pace = Pace::default();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(pace.line(at(0)), Some(0));
        assert_eq!((0..500).filter_map(|ms| pace.line(at(ms))).count(), 0);
        assert_eq!(pace.line(at(1_000)), Some(500));
        assert_eq!(pace.line(at(1_999)), None);
        assert_eq!(pace.line(at(2_000)), Some(1));
    }

    #[test]
    fn every_class_counts_for_itself() {
        let rejections = Rejections::default();
        for (n, class) in Class::ALL.into_iter().enumerate() {
            (0..=n).for_each(|_| rejections.refuse(class, "127.0.0.1:1", &"a reason"));
        }
        let counts: Vec<_> = Class::ALL.into_iter().map(|class| rejections.snapshot()[class.name()]).collect();
        assert_eq!(counts, (1..=Class::ALL.len() as u64).collect::<Vec<_>>());
    }
}
