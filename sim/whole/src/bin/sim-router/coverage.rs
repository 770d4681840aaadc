//! What enough runs must reach.

/// Things that happen somewhere in enough runs.
const EVENTS: [&str; 44] = [
    "died: new",
    "died: taking over from the stable service",
    "died: starting both services",
    "died: running",
    "died: aborting: the canary's backlog goes to stable",
    "died: promoting: the services read what they were given",
    "died: aborting: the services read what they were given",
    "died: promoting: the canary goes on with the source topic",
    "died: aborting: stable goes on with the source topic",
    "died: promoted",
    "died: aborted",
    "call failed before it had an effect",
    "call failed after it had its effect",
    "ambiguous commit of records",
    "ambiguous commit of a phase",
    "entry left in an open transaction",
    "transaction expired",
    "broker unavailable",
    "hook failed before it had an effect",
    "hook failed after it had its effect",
    "takeover in the middle of a call",
    "takeover between turns",
    "zombie fenced",
    "zombie fenced with records written",
    "weight changed",
    "buckets waited",
    "weight waited for the canary's lag",
    "partition held",
    "records reclaimed",
    "reclaiming resumed",
    "group still had members",
    "aborted records in the source",
    "uncommitted records in the source",
    "lease lost",
    "abort of a promotion",
    "abort after it was too late",
    "abort while a change waits",
    "cluster's end taken over",
    "place set by an operator",
    "retention took unread records",
    "promoted",
    "aborted",
    "settled without an end",
    "a rollout that was rolled back isn't begun",
];

/// What was reached how often.
#[derive(Clone)]
pub struct RouterCoverage([u64; EVENTS.len()]);

impl Default for RouterCoverage {
    fn default() -> Self {
        Self([0; EVENTS.len()])
    }
}

impl RouterCoverage {
    /// Counts that one of [`EVENTS`] happened.
    pub fn event(&mut self, name: &str) {
        let place = EVENTS.iter().position(|event| *event == name);
        self.0[place.unwrap_or_else(|| panic!("{name:?} is no event"))] += 1;
    }

    /// Adds another run's counts to these.
    pub fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(sum, count)| *sum += count);
    }

    /// Returns each event and how often it was seen.
    pub fn lines(&self) -> impl Iterator<Item = String> {
        EVENTS.iter().zip(self.0).map(|(event, count)| format!("{count:>9}  {event}"))
    }

    /// Returns what was never seen.
    pub fn never(&self) -> Vec<&'static str> {
        EVENTS.iter().zip(self.0).filter(|(_, count)| *count == 0).map(|(event, _)| *event).collect()
    }
}
