//! Where a rollout of a topic is: the entries of its control topic, and what they add up to.
//!
//! Pure. A phase is entered by writing it, in the same transaction as what it builds on; what is done *in* a phase may be done
//! again after a crash.

use serde::{Deserialize, Serialize};

use super::side::Side;
use super::weights::Weight;

/// The next offset of each partition.
pub type Places = Vec<i64>;

/// Phase of a record router's rollout, as the control topic records it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "lowercase", rename_all_fields = "camelCase")]
pub enum RouterPhase {
    /// The stable service stops reading the source.
    Taking,
    /// Both services are started, each on its own topic.
    Starting {
        /// Where the router begins to read the source: everything before it is the stable service's own.
        from: Places,
    },
    /// The router splits the source's records between both services.
    Running {
        /// Where the router began to read the source.
        from: Places,
    },
    /// The canary stops; what it has not read goes to stable.
    Reclaiming {
        /// Where the router began to read the source.
        from: Places,
    },
    /// Nothing is split any more; the services read what they were given, and stop.
    Draining {
        /// Where the router began to read the source.
        from: Places,
        /// Side whose service continues alone.
        winner: Side,
    },
    /// The winner is started on the source.
    Returning {
        /// Where the router began to read the source.
        from: Places,
        /// Where the winner continues to read the source.
        through: Places,
        /// Side whose service continues alone.
        winner: Side,
    },
    /// The rollout has ended; the topics remain for the audit.
    Done {
        /// Where the router began to read the source.
        from: Places,
        /// Where the winner continued to read the source.
        through: Places,
        /// Side whose service continues alone.
        winner: Side,
    },
}

impl RouterPhase {
    /// Returns where the router began to read the source; none as long as that isn't known, and where it never began.
    pub fn from(&self) -> Option<&Places> {
        match self {
            Self::Taking => None,
            Self::Starting { from } | Self::Running { from } | Self::Reclaiming { from } => Some(from),
            Self::Draining { from, .. } | Self::Returning { from, .. } | Self::Done { from, .. } => {
                Some(from).filter(|from| !from.is_empty())
            }
        }
    }

    /// Returns the phase in words.
    pub fn words(&self) -> &'static str {
        match self {
            Self::Taking => "taking over from the stable service",
            Self::Starting { .. } => "starting both services",
            Self::Running { .. } => "running",
            Self::Reclaiming { .. } => "aborting: the canary's backlog goes to stable",
            Self::Draining { winner: Side::Canary, .. } => "promoting: the services read what they were given",
            Self::Draining { winner: Side::Stable, .. } => "aborting: the services read what they were given",
            Self::Returning { winner: Side::Canary, .. } => "promoting: the canary goes on with the source topic",
            Self::Returning { winner: Side::Stable, .. } => "aborting: stable goes on with the source topic",
            Self::Done { winner: Side::Canary, .. } => "promoted",
            Self::Done { winner: Side::Stable, .. } => "aborted",
        }
    }
}

/// Command of an operator to a record router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", rename_all_fields = "camelCase")]
pub enum ControlCommand {
    /// Sets the canary's share of the keys.
    SetWeight {
        /// New share, 0 to 10000 basis points.
        weight: Weight,
    },
    /// Moves all records to the canary, which then continues alone.
    Promote,
    /// Moves all records to stable, which then continues alone.
    Abort {
        /// Reason that the operator gave, for the log.
        reason: String,
    },
    /// Goes on without records that are gone, at the first that is left.
    SkipLost,
}

/// Who takes part in a rollout. Another rollout needs another name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RolloutIdentity {
    /// The two versions, stable first.
    pub versions: [String; 2],
    /// The consumer groups of their services, stable first.
    pub groups: [String; 2],
}

/// Offsets of a partition of the source that nobody will read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostRange {
    /// Partition of the source.
    pub partition: usize,
    /// First offset that is gone.
    pub from: i64,
    /// Offset after the last that is gone; markers of transactions count too.
    pub until: i64,
}

/// An entry of the control topic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ControlEntry {
    /// The router entered a phase.
    Phase(RouterPhase),
    /// An operator sent a command.
    Command(ControlCommand),
    /// The first entry of a router: whose rollout it is.
    Rollout {
        /// Its versions and groups.
        rollout: RolloutIdentity,
    },
    /// The router went on without records that are gone.
    Lost {
        /// Where they were.
        lost: Vec<LostRange>,
    },
    /// A service is about to be started or stopped.
    Hook {
        /// Whether the hook starts or stops the service.
        call: HookCall,
        /// The side whose service is called.
        side: Side,
        /// The topic that it reads.
        topic: String,
    },
}

/// Call of a hook: start or stop a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HookCall {
    /// Start the service, unless it runs.
    Start,
    /// Stop the service after it has committed what it read.
    Stop,
}

impl HookCall {
    /// Returns the argument that hooks get: `start` or `stop`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
        }
    }
}

/// The end that an operator or the cluster asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RouterEnd {
    /// The canary continues alone, on the source topic.
    Promote,
    /// Stable continues alone; with the reason.
    Abort(String),
}

/// State of a router: the sum of its control topic's entries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouterState {
    /// Current phase; none before the first entry.
    pub phase: Option<RouterPhase>,
    /// Weight of the last `SetWeight` command.
    pub weight: Option<Weight>,
    /// Number of `SetWeight` commands so far.
    pub weights: u64,
    /// The end that was asked for; an abort always wins.
    pub end: Option<RouterEnd>,
    /// Number of hook calls so far; the next call gets the next number.
    pub calls: u64,
    /// Whose rollout it is; none before the first entry, and for a router of version 0.2.
    pub rollout: Option<RolloutIdentity>,
    /// An operator allowed to go on without records that are gone; used up by the next that are.
    pub skips_lost: bool,
    /// Records that were gone, at most: markers of transactions count too.
    pub lost: u64,
}

impl RouterState {
    /// Applies the next entry of the control topic.
    pub fn add(&mut self, entry: ControlEntry) {
        match entry {
            ControlEntry::Phase(phase) => self.phase = Some(phase),
            ControlEntry::Command(ControlCommand::SetWeight { weight }) => {
                self.weights += 1;
                self.weight = Some(weight);
            }
            ControlEntry::Command(ControlCommand::Promote) => self.end = self.end.take().or(Some(RouterEnd::Promote)),
            ControlEntry::Command(ControlCommand::Abort { reason }) => self.end = Some(RouterEnd::Abort(reason)),
            ControlEntry::Command(ControlCommand::SkipLost) => self.skips_lost = true,
            ControlEntry::Rollout { rollout } => self.rollout = Some(rollout),
            ControlEntry::Lost { lost } => {
                self.skips_lost = false;
                self.lost += lost.iter().map(|range| u64::try_from(range.until - range.from).unwrap_or(0)).sum::<u64>();
            }
            ControlEntry::Hook { .. } => self.calls += 1,
        }
    }

    /// Returns whether this end would change the one that was asked for: an abort does even after a promotion was.
    pub fn is_changed_by(&self, end: &RouterEnd) -> bool {
        match (&self.end, end) {
            (None, _) | (Some(RouterEnd::Promote), RouterEnd::Abort(_)) => true,
            (Some(RouterEnd::Promote), RouterEnd::Promote) | (Some(RouterEnd::Abort(_)), _) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_lines_that_people_can_read_and_that_come_back() {
        let entries = [
            (ControlEntry::Phase(RouterPhase::Taking), r#"{"phase":"taking"}"#),
            (
                ControlEntry::Phase(RouterPhase::Draining { from: vec![3, 0], winner: Side::Canary }),
                r#"{"phase":"draining","from":[3,0],"winner":"canary"}"#,
            ),
            (
                ControlEntry::Command(ControlCommand::SetWeight { weight: Weight::from_bp(1000).unwrap() }),
                r#"{"command":"set-weight","weight":1000}"#,
            ),
            (ControlEntry::Command(ControlCommand::Promote), r#"{"command":"promote"}"#),
            (
                ControlEntry::Hook { call: HookCall::Stop, side: Side::Stable, topic: "orders".into() },
                r#"{"call":"stop","side":"stable","topic":"orders"}"#,
            ),
            (ControlEntry::Command(ControlCommand::SkipLost), r#"{"command":"skip-lost"}"#),
            (
                ControlEntry::Lost { lost: vec![LostRange { partition: 1, from: 10, until: 80 }] },
                r#"{"lost":[{"partition":1,"from":10,"until":80}]}"#,
            ),
            (
                ControlEntry::Rollout {
                    rollout: RolloutIdentity {
                        versions: ["v1", "v2"].map(Into::into),
                        groups: ["a", "b"].map(Into::into),
                    },
                },
                r#"{"rollout":{"versions":["v1","v2"],"groups":["a","b"]}}"#,
            ),
        ];
        for (entry, line) in entries {
            assert_eq!(serde_json::to_string(&entry).unwrap(), line);
            assert_eq!(serde_json::from_str::<ControlEntry>(line).unwrap(), entry);
        }
    }

    #[test]
    fn what_is_lost_is_counted_and_uses_the_permission_up() {
        let mut state = RouterState::default();
        state.add(ControlEntry::Command(ControlCommand::SkipLost));
        assert!(state.skips_lost);
        let range = |from, until| LostRange { partition: 0, from, until };
        state.add(ControlEntry::Lost { lost: vec![range(10, 80), range(90, 90), range(9, 3)] });
        assert_eq!((state.skips_lost, state.lost), (false, 70));
    }

    #[test]
    fn an_abort_wins_over_a_promotion() {
        let mut state = RouterState::default();
        for command in
            [ControlCommand::Promote, ControlCommand::Abort { reason: "odd".into() }, ControlCommand::Promote]
        {
            state.add(ControlEntry::Command(command));
        }
        assert_eq!(state.end, Some(RouterEnd::Abort("odd".into())));
        assert!(!state.is_changed_by(&RouterEnd::Promote) && !state.is_changed_by(&RouterEnd::Abort("again".into())));
        let promoted = RouterState { end: Some(RouterEnd::Promote), ..RouterState::default() };
        assert!(
            promoted.is_changed_by(&RouterEnd::Abort("odd".into())) && !promoted.is_changed_by(&RouterEnd::Promote)
        );
    }
}
