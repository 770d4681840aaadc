//! What applying a rollout file does: one table of the file (stable S, canary C) and the service's state. Nodes decide by it,
//! and `aviary diff` tells by it.
//!
//! The first row that fits counts.
//!
//! | state of the service | file | what happens |
//! |---|---|---|
//! | unknown | any | START |
//! | a rollout is under way | the same rollout | UNCHANGED, exit code 0 |
//! | a rollout is under way | C is what serves as stable | ABORT |
//! | a rollout is under way | any other | REFUSED |
//! | no rollout is under way | C is what serves as stable | UNCHANGED, exit code 0 |
//! | the last one was rolled back | the same rollout | UNCHANGED, exit code 1 |
//! | no rollout is under way | S is another version than serves | REFUSED |
//! | no rollout is under way | S is on other servers than serve | REFUSED |
//! | no rollout is under way | any other | START |
//!
//! Files are of the same rollout when all is the same but for labels, annotations, a salt that the file doesn't ask for, and the
//! addresses of stable, as long as
//! those are where stable serves or where the last rollout's file had them: so that a loop that applies a file again and again
//! goes on to be told the same after stable's servers were moved. What serves is told by the name of its version.

use std::fmt;

use super::assignment::Salt;
use super::plan::{Backend, RolloutSpec};
use super::rollout::{ChangeError, Phase, Rollout, Service};
use super::weights::Weight;

/// A service as far as applying a file depends on it.
#[derive(Debug, Clone, Copy)]
pub struct Standing<'s> {
    /// What serves as stable.
    pub stable: &'s Backend,
    /// The last rollout's file.
    pub last: &'s RolloutSpec,
    /// Phase of the last rollout.
    pub phase: Phase,
    /// The canary's committed share.
    pub weight: Weight,
    /// Why the last rollout is paused or was rolled back; empty otherwise.
    pub reason: &'s str,
    /// False where the last rollout's start was decided in doubt and reverted, so that nothing of it was ever served.
    pub was_served: bool,
}

/// What applying a file comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApplyEffect {
    /// The file's rollout begins.
    Start,
    /// Nothing is done: the cluster is there already, or on its way; with why.
    Unchanged(String),
    /// Nothing is done: this rollout was rolled back, so that only `retry` or another file starts it; with why.
    RolledBackBefore(String),
    /// The rollout under way is aborted: the file's canary is what serves; with why.
    Abort(String),
    /// The file can't be applied as things stand.
    Refused(ChangeError),
}

impl fmt::Display for ApplyEffect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Start => f.write_str("START"),
            Self::Unchanged(why) | Self::RolledBackBefore(why) => write!(f, "UNCHANGED: {why}"),
            Self::Abort(why) => write!(f, "ABORT: {why}"),
            Self::Refused(why) => write!(f, "REFUSED: {why}"),
        }
    }
}

/// Returns what applying `file` does to a service that stands so; none: one that nobody has seen yet.
pub fn effect_of_apply(standing: Option<Standing<'_>>, file: &RolloutSpec) -> ApplyEffect {
    let Some(standing) = standing else { return ApplyEffect::Start };
    let Standing { stable, last, phase, weight, reason, was_served } = standing;
    let (serving, wanted) = (&stable.version, &file.canary.version);
    let same = standing.is_same(file);
    if phase.is_active() {
        let under_way = || format!("the rollout to {wanted} is {phase} at {weight}");
        return match (same, serving == wanted) {
            (true, _) => ApplyEffect::Unchanged(under_way()),
            (false, true) => {
                let aborted = &last.canary.version;
                ApplyEffect::Abort(format!(
                    "the file's canary {wanted} serves as stable: the rollout to {aborted} ends"
                ))
            }
            (false, false) => {
                let version = last.canary.version.clone();
                ApplyEffect::Refused(ChangeError::InProgress { version, phase, weight })
            }
        };
    }
    if serving == wanted {
        return ApplyEffect::Unchanged(serves_already(stable, &file.canary));
    }
    if phase == Phase::RolledBack && was_served && same {
        let why = if reason.is_empty() { "no reason was given" } else { reason };
        let way = "`aviary retry` or a changed file starts it again";
        return ApplyEffect::RolledBackBefore(format!("{wanted} was rolled back: {why}; {way}"));
    }
    match check_stable(stable, &file.stable) {
        Ok(()) => ApplyEffect::Start,
        Err(why) => ApplyEffect::Refused(why),
    }
}

/// Checks that a rollout leaves stable's traffic where it is: its stable is the version that serves, on the servers that
/// serve it.
pub fn check_stable(serving: &Backend, found: &Backend) -> Result<(), ChangeError> {
    if serving.version != found.version {
        let (expected, found) = (serving.version.clone(), found.version.clone());
        return Err(ChangeError::Stable { expected, found });
    }
    if !serving.is_same(found) {
        let (version, serving, found) = (serving.version.clone(), serving.servers(), found.servers());
        return Err(ChangeError::StableServers { version, serving, found });
    }
    Ok(())
}

fn serves_already(stable: &Backend, canary: &Backend) -> String {
    let version = &stable.version;
    if stable.is_same(canary) {
        return format!("{version} serves already");
    }
    format!("{version} serves already, at {}; the file has {}", stable.servers(), canary.servers())
}

impl<'s> From<&'s Service> for Standing<'s> {
    fn from(service: &'s Service) -> Self {
        let Rollout { spec, phase, reason, rollout_generation, .. } = &service.rollout;
        let (weight, was_served) = (service.routing.canary_weight(), *rollout_generation > 0);
        Self { stable: &service.stable, last: spec, phase: *phase, weight, reason, was_served }
    }
}

impl Standing<'_> {
    /// Returns true when the file is of the last rollout.
    fn is_same(&self, file: &RolloutSpec) -> bool {
        let Self { stable, last, .. } = self;
        let known = [&last.stable, stable].into_iter().any(|known| known.is_same(&file.stable));
        let bare = |spec: &RolloutSpec| RolloutSpec {
            labels: Default::default(),
            annotations: Default::default(),
            stable: Backend::new(spec.stable.version.clone(), Vec::new()),
            salt: Salt::Unsaid,
            ..spec.clone()
        };
        known && is_same_salt(last.salt, file.salt) && bare(last) == bare(file)
    }
}

/// Returns true when a file asks for the salt that a rollout began with. One that says nothing takes what the cluster chose.
fn is_same_salt(recorded: Salt, file: Salt) -> bool {
    match file {
        Salt::Unsaid => true,
        Salt::None => !matches!(recorded, Salt::Rollout(_)),
        Salt::Rollout(_) => matches!(recorded, Salt::Rollout(_)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::analysis::Analysis;
    use crate::domain::ids::VersionId;
    use crate::fixtures;

    const PHASES: [Phase; 5] = [Phase::Progressing, Phase::Paused, Phase::Baking, Phase::Completed, Phase::RolledBack];
    const VERSIONS: [&str; 3] = ["v1", "v2", "v3"];
    const PLACES: [&str; 3] = ["http://x:1", "http://x:2", "http://x:3"];

    fn at(version: &str, url: &str) -> Backend {
        Backend::new(VersionId::new(version).unwrap(), vec![url.into()])
    }

    fn file(stable: Backend, canary: Backend, hold_ms: u64) -> RolloutSpec {
        let stages = [fixtures::held(500, hold_ms), fixtures::held(10_000, 0)];
        RolloutSpec { stable, canary, ..fixtures::rollout(&stages, Analysis::default()) }
    }

    fn word(effect: &ApplyEffect) -> &'static str {
        match effect {
            ApplyEffect::Start => "START",
            ApplyEffect::Unchanged(_) => "UNCHANGED 0",
            ApplyEffect::RolledBackBefore(_) => "UNCHANGED 1",
            ApplyEffect::Abort(_) => "ABORT",
            ApplyEffect::Refused(ChangeError::InProgress { .. }) => "REFUSED under way",
            ApplyEffect::Refused(ChangeError::Stable { .. }) => "REFUSED version",
            ApplyEffect::Refused(ChangeError::StableServers { .. }) => "REFUSED servers",
            ApplyEffect::Refused(_) => "REFUSED",
        }
    }

    #[test]
    fn a_file_that_leaves_the_salt_to_the_cluster_is_of_the_rollout_that_it_began() {
        let asked = [Salt::Unsaid, Salt::None, Salt::Rollout(None), Salt::Rollout(Some(4))];
        let same = |recorded| asked.map(|file| is_same_salt(recorded, file));
        assert_eq!(same(Salt::Rollout(Some(3))), [true, false, true, true]);
        assert_eq!(same(Salt::Unsaid), [true, true, false, false], "a recorded rollout that says nothing has none");
    }

    /// Every state (what serves and where, the last rollout's versions and stable's place in it, phase, ever served) and every
    /// file (versions, places, other steps), against the rules said once more in another way.
    #[test]
    fn every_file_in_every_state_comes_to_what_the_table_says() {
        let mut counts = std::collections::BTreeMap::new();
        let pairs = || VERSIONS.into_iter().flat_map(|a| VERSIONS.map(|b| (a, b))).filter(|(a, b)| a != b);
        for ((last_stable, last_canary), phase, was_served) in pairs()
            .flat_map(|pair| PHASES.map(|phase| (pair, phase)))
            .flat_map(|(pair, phase)| [true, false].map(|was_served| (pair, phase, was_served)))
        {
            let completed = phase == Phase::Completed;
            let serving = if completed { last_canary } else { last_stable };
            for (place, file_place, moved_steps, note) in PLACES
                .into_iter()
                .flat_map(|place| PLACES.map(|file_place| (place, file_place)))
                .flat_map(|(a, b)| [(a, b, 0, false), (a, b, 0, true), (a, b, 7, false)])
            {
                let canary_place = "http://x:9";
                let last = file(at(last_stable, PLACES[0]), at(last_canary, canary_place), 0);
                let stable = at(serving, place);
                let weight = if phase.is_active() { Weight::from_bp(500).unwrap() } else { Weight::ZERO };
                let standing =
                    Standing { stable: &stable, last: &last, phase, weight, reason: "it failed", was_served };
                for (s, c) in pairs() {
                    let mut wanted = file(at(s, file_place), at(c, canary_place), moved_steps);
                    if note {
                        wanted.annotations.insert("commit".into(), "f00".into());
                    }
                    let same_file = (s, c, moved_steps) == (last_stable, last_canary, 0)
                        && (file_place == PLACES[0] || place == file_place && serving == s);
                    let active = phase.is_active();
                    let expected = if active && same_file {
                        "UNCHANGED 0"
                    } else if active {
                        if c == serving { "ABORT" } else { "REFUSED under way" }
                    } else if c == serving {
                        "UNCHANGED 0"
                    } else if same_file && phase == Phase::RolledBack && was_served {
                        "UNCHANGED 1"
                    } else if s != serving {
                        "REFUSED version"
                    } else if file_place != place {
                        "REFUSED servers"
                    } else {
                        "START"
                    };
                    let found = word(&effect_of_apply(Some(standing), &wanted));
                    assert_eq!(found, expected, "{standing:?} ← {s} at {file_place}, {c}, {moved_steps} ms");
                    *counts.entry(found).or_insert(0) += 1;
                }
            }
        }
        assert_eq!(counts.len(), 7, "every row was met: {counts:?}");
        assert_eq!(effect_of_apply(None, &file(at("v1", PLACES[0]), at("v2", PLACES[1]), 0)), ApplyEffect::Start);
    }

    #[test]
    fn what_applying_comes_to_is_said_in_words() {
        let (v1, v2, v3) = (at("v1", PLACES[0]), at("v2", PLACES[1]), at("v3", PLACES[2]));
        let last = file(v1.clone(), v2.clone(), 0);
        let standing = |phase, stable| Standing {
            stable,
            last: &last,
            phase,
            weight: Weight::from_bp(5_000).unwrap(),
            reason: "errors: 9 %",
            was_served: true,
        };
        let said = |standing, file: &RolloutSpec| effect_of_apply(Some(standing), file).to_string();
        assert_eq!(
            said(standing(Phase::RolledBack, &v1), &last),
            "UNCHANGED: v2 was rolled back: errors: 9 %; `aviary retry` or a changed file starts it again"
        );
        let before = file(v3.clone(), v1.clone(), 0);
        assert_eq!(
            said(standing(Phase::Progressing, &v1), &before),
            "ABORT: the file's canary v1 serves as stable: the rollout to v2 ends"
        );
        let moved = at("v2", "http://x:4");
        assert_eq!(
            said(standing(Phase::Completed, &moved), &last),
            "UNCHANGED: v2 serves already, at http://x:4; the file has http://x:2"
        );
        assert_eq!(
            said(standing(Phase::Completed, &moved), &file(v2, v3, 0)),
            "REFUSED: stable v2 is at http://x:2 in the rollout, expected http://x:4, which serves: a rollout never moves \
             stable's traffic"
        );
    }
}
