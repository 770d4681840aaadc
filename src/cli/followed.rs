//! A rollout that somebody waits for: what is new of it, and how it ended. Pure: `status` reads the events and the snapshots.
//!
//! A rollout is told from others of its service by its generation, the routing version that it began with. A node that lags behind what
//! was told is not believed.

use super::Exit;
use super::announced::Announced;
use super::show;
use crate::domain::rollout::Phase;
use crate::domain::routing::Status;
use crate::model::{Changed, RoutingView};
use crate::protocol::Event;
use crate::protocol::record::RecordKind;

/// How a wait for a rollout ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The canary became stable.
    Completed,
    /// All traffic went back to stable.
    RolledBack,
    /// The rollout goes on only when a person says so; with what it waits for, empty where that isn't known.
    Waits(String),
    /// Another rollout of the service began since; with what it is.
    Replaced(String),
}

impl End {
    /// Returns how the program ends by it; a rollout that waits for a person is a success where `success_on_pause` says so.
    pub fn exit(&self, success_on_pause: bool) -> Exit {
        match self {
            Self::Completed => Exit::Done,
            Self::RolledBack => Exit::Refused,
            Self::Waits(_) if success_on_pause => Exit::Done,
            Self::Waits(_) => Exit::Waits,
            Self::Replaced(_) => Exit::Replaced,
        }
    }

    fn of(phase: Phase) -> Option<Self> {
        match phase {
            Phase::Completed => Some(Self::Completed),
            Phase::RolledBack => Some(Self::RolledBack),
            Phase::Paused => Some(Self::Waits(String::new())),
            Phase::Progressing | Phase::Baking => None,
        }
    }
}

/// What an event or a snapshot says that wasn't known before.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct News {
    /// Line for people; none when there is nothing to tell.
    pub line: Option<String>,
    /// How the wait ended; none while it goes on.
    pub end: Option<End>,
}

/// The rollout that is waited for, and what was told of it.
#[derive(Debug, Clone)]
pub struct Followed {
    service: String,
    /// Slot of the newest record that was told; older ones are not told again.
    slot: Option<u64>,
    /// Routing version that the rollout began with; none until a node said.
    generation: Option<u64>,
    /// The latest version that it can have begun with: that of the write's answer; none without a write.
    latest: Option<u64>,
    /// What it waited for, when that was last told.
    waiting_for: String,
}

impl Followed {
    /// Returns the rollout that `service` is in, or the one that a write was answered with.
    pub fn new(service: String, answer: Option<&Changed>) -> Self {
        let slot = answer.and_then(|changed| changed.slot).map(|slot| slot.0);
        let latest = answer.and_then(|changed| changed.state.as_ref()).map(|state| state.version);
        Self { service, slot, generation: None, latest, waiting_for: String::new() }
    }

    /// Returns what a node's view of the service says that is new.
    pub fn snapshot(&mut self, view: &RoutingView) -> News {
        if self.slot > Some(view.slot.0) {
            return News::default();
        }
        if self.is_other(view.rollout_generation) {
            return News { line: None, end: Some(self.replaced_by(view.routing.canary_model_id.as_ref())) };
        }
        if view.rollout_generation > 0 {
            self.generation = Some(view.rollout_generation);
        }
        let is_new = self.slot < Some(view.slot.0);
        let waits = without_numbers(&view.waiting_for) != without_numbers(&self.waiting_for);
        self.slot = Some(view.slot.0);
        self.waiting_for.clone_from(&view.waiting_for);
        let line = (is_new || (waits && !view.waiting_for.is_empty())).then(|| self.line(view));
        let waits = view.waits_for_operator && view.held_back.is_none();
        let end = match End::of(view.phase) {
            Some(End::Waits(_)) | None => waits.then(|| End::Waits(view.waiting_for.clone())),
            end => end,
        };
        News { line, end }
    }

    /// Returns what an event says that is new; nothing when it concerns something else, changes nothing, or was told.
    pub fn event(&mut self, announced: &Announced) -> News {
        if announced.service() != self.service {
            return News::default();
        }
        let mut end = None;
        if let Some(Event::Routing { slot, kind, state, phase, .. }) = announced.event() {
            if state.status == Status::Prepared || self.slot >= Some(slot.0) {
                return News::default();
            }
            self.slot = Some(slot.0);
            end = phase.and_then(End::of);
            if *kind == RecordKind::Start {
                match self.is_other(state.version) {
                    true => end = Some(self.replaced_by(state.canary_model_id.as_ref())),
                    false => self.generation = Some(state.version),
                }
            }
        }
        News { line: Some(format!("{}  {}", announced.time(), announced.line())), end }
    }

    /// Returns true for the generation of a rollout that began after the one that is waited for.
    fn is_other(&self, generation: u64) -> bool {
        self.generation.or(self.latest).is_some_and(|own| generation > own)
    }

    fn replaced_by(&self, canary: Option<&impl std::fmt::Display>) -> End {
        let canary = canary.map(|canary| format!(" to {canary}")).unwrap_or_default();
        End::Replaced(format!("another rollout of {}{canary} took its place", self.service))
    }

    fn line(&self, view: &RoutingView) -> String {
        let waiting_for = &view.waiting_for;
        show::line([
            show::time(view.routing.timestamp),
            format!("slot {}", view.slot),
            view.routing.status.to_string(),
            self.service.clone(),
            show::weights(&view.routing.weights),
            format!("version {}", view.routing.version),
            view.phase.to_string(),
            if waiting_for.is_empty() { String::new() } else { format!("waits for {waiting_for}") },
            view.reason.clone(),
        ])
    }
}

/// Returns a text without its digits: seconds that run down and samples that come in are no news.
fn without_numbers(text: &str) -> String {
    text.chars().filter(|letter| !letter.is_ascii_digit()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::cli::announced::tests::{promotion, sent};
    use crate::domain::ids::{NodeId, TxId, VersionId};
    use crate::domain::routing::RoutingState;
    use crate::protocol::Mode;
    use crate::protocol::record::Slot;

    /// Returns the routing of a record in `slot` that gives the service `version`.
    fn state(slot: u64, version: u64) -> RoutingState {
        let Event::Routing { state, .. } = promotion(slot, Status::Committed, Phase::Progressing) else {
            unreachable!()
        };
        RoutingState { version, ..state }
    }

    /// Returns a view after the record in `slot`, of a rollout that began with version `generation`.
    fn view(slot: u64, generation: u64, phase: Phase) -> RoutingView {
        RoutingView {
            routing: state(slot, generation),
            node: NodeId::new("a").unwrap(),
            slot: Slot(slot),
            hash: String::new(),
            mode: Mode::Normal,
            phase,
            stage: 0,
            stages: 2,
            rollout_generation: generation,
            assignment: Default::default(),
            reason: String::new(),
            waits_for_operator: phase == Phase::Paused,
            waiting_for: String::new(),
            held_back: None,
            effective_weights: BTreeMap::new(),
            lease_ms_left: None,
            enforced: true,
        }
    }

    /// Returns the event of a Start in `slot` to `canary` that gives the service `version`.
    fn start(slot: u64, version: u64, canary: &str) -> Announced {
        let mut event = promotion(slot, Status::Committed, Phase::Progressing);
        if let Event::Routing { kind, state, .. } = &mut event {
            *kind = RecordKind::Start;
            state.version = version;
            state.canary_model_id = VersionId::new(canary).ok();
        }
        sent(event)
    }

    fn ended(slot: u64, phase: Phase) -> Announced {
        sent(promotion(slot, Status::Committed, phase))
    }

    /// Returns the rollout that a write in `slot` began with routing version 3.
    fn answered(slot: u64) -> Followed {
        let changed = Changed::committed(TxId::new("k").unwrap(), Slot(slot), Some(state(slot, 3)), false);
        Followed::new("m".into(), Some(&changed))
    }

    fn followed() -> Followed {
        Followed::new("m".into(), None)
    }

    #[test]
    fn a_transition_is_told_once_and_only_when_decided() {
        let mut followed = followed();
        assert_eq!(followed.event(&sent(promotion(3, Status::Prepared, Phase::Progressing))), News::default());
        assert!(followed.event(&ended(3, Phase::Progressing)).line.is_some());
        assert_eq!(followed.event(&ended(3, Phase::Progressing)), News::default());
        assert_eq!(followed.snapshot(&view(3, 3, Phase::Progressing)), News::default());
        assert!(followed.snapshot(&view(4, 3, Phase::Progressing)).line.is_some());
    }

    #[test]
    fn a_node_that_lags_behind_what_was_answered_is_not_believed() {
        let mut followed = answered(9);
        assert_eq!(followed.snapshot(&view(8, 2, Phase::Completed)), News::default());
        assert_eq!(followed.event(&ended(8, Phase::Completed)), News::default());
        assert_eq!(followed.snapshot(&view(9, 3, Phase::Progressing)).end, None);
    }

    #[test]
    fn other_services_are_not_told() {
        let mut other = Followed::new("other".into(), None);
        assert_eq!(other.event(&ended(3, Phase::Completed)), News::default());
    }

    #[test]
    fn each_phase_ends_the_wait_as_documented() {
        let exits = [
            (Phase::Completed, Some((Exit::Done, Exit::Done))),
            (Phase::RolledBack, Some((Exit::Refused, Exit::Refused))),
            (Phase::Paused, Some((Exit::Waits, Exit::Done))),
            (Phase::Progressing, None),
            (Phase::Baking, None),
        ];
        for (phase, expected) in exits {
            let both = |end: End| (end.exit(false), end.exit(true));
            assert_eq!(followed().event(&ended(3, phase)).end.map(both), expected, "event, {phase}");
            assert_eq!(followed().snapshot(&view(3, 3, phase)).end.map(both), expected, "snapshot, {phase}");
        }
    }

    #[test]
    fn a_step_that_waits_for_a_person_ends_the_wait() {
        let waits = |phase, held_back: Option<&str>| RoutingView {
            waits_for_operator: true,
            waiting_for: "an operator: promote or abort".into(),
            held_back: held_back.map(str::to_owned),
            ..view(3, 3, phase)
        };
        for phase in [Phase::Progressing, Phase::Baking] {
            let end = answered(3).snapshot(&waits(phase, None)).end;
            assert_eq!(end, Some(End::Waits("an operator: promote or abort".into())), "{phase}");
            // A canary that is being stopped waits for the rollback first.
            assert_eq!(answered(3).snapshot(&waits(phase, Some("local hold"))).end, None);
        }
    }

    #[test]
    fn what_is_waited_for_is_told_whenever_it_changes_but_for_its_numbers() {
        let mut followed = answered(3);
        let mut told = |waiting_for: &str| {
            let view = RoutingView { waiting_for: waiting_for.into(), ..view(3, 3, Phase::Progressing) };
            followed.snapshot(&view).line
        };
        assert!(told("the pause to end, 9 s left").unwrap().ends_with("waits for the pause to end, 9 s left"));
        assert_eq!(told("the pause to end, 8 s left"), None);
        assert!(told("node c, which is silent").is_some());
        assert!(told("the pause to end, 7 s left").is_some());
        assert_eq!(told(""), None);
    }

    #[test]
    fn another_rollout_that_took_its_place_is_never_its_success() {
        let replaced = |news: News| matches!(news.end, Some(End::Replaced(_)));
        // The stream was cut, and meanwhile another rollout was applied, which completed.
        let mut waiter = answered(5);
        waiter.snapshot(&view(5, 3, Phase::Progressing));
        assert!(replaced(waiter.clone().snapshot(&view(9, 5, Phase::Completed))));
        assert!(replaced(waiter.event(&start(8, 5, "v3"))));
        // The same before any node was asked.
        assert!(replaced(answered(5).snapshot(&view(9, 5, Phase::Completed))));
        assert!(replaced(answered(5).event(&start(8, 5, "v3"))));
        // `status` follows the rollout that it found.
        let mut found = followed();
        found.snapshot(&view(5, 3, Phase::Progressing));
        assert!(replaced(found.snapshot(&view(9, 7, Phase::Completed))));
        let words = followed().replaced_by(Some(&"v3"));
        assert_eq!(words, End::Replaced("another rollout of m to v3 took its place".into()));
        assert_eq!((words.exit(false), words.exit(true)), (Exit::Replaced, Exit::Replaced));
    }

    #[test]
    fn its_own_end_comes_before_the_next_rollout() {
        let mut waiter = answered(5);
        assert_eq!(waiter.event(&start(5, 3, "v2")), News::default(), "its own start was answered");
        assert_eq!(waiter.event(&ended(6, Phase::Completed)).end, Some(End::Completed));
        assert_eq!(answered(5).event(&ended(6, Phase::RolledBack)).end, Some(End::RolledBack));
    }
}
