//! Events of the cluster as lines for people.
//!
//! A line is made from the same typed [`Event`] that nodes announce. A newer node may announce what this program doesn't know; that is
//! shown with all its fields.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::show;
use crate::client::visible_json;
use crate::domain::ids::ServiceId;
use crate::domain::routing::RoutingState;
use crate::domain::run::{AnswerSummary, WindowVerdict};
use crate::domain::verdict::Verdict;
use crate::protocol::{Announcement, Event};

/// An event from the API's stream.
#[derive(Debug)]
pub struct Announced {
    /// The event as it was sent, with hidden characters escaped; null where that was no JSON.
    pub json: Value,
    /// The same, typed; none where this program doesn't know it.
    known: Option<Announcement>,
    /// What every event may have, of this build or of a later one.
    common: CommonFields,
}

/// Fields that any event may have, and all others by name.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CommonFields {
    event: String,
    at: Option<EventTime>,
    slot: Option<u64>,
    reported_by: Option<String>,
    service: Option<String>,
    phase: Option<String>,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// A time as nodes send it, and as those before version 0.2 did.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum EventTime {
    Text(String),
    Millis(u64),
}

impl Announced {
    /// Reads the data of an event.
    pub fn read(data: &str) -> Self {
        let json = serde_json::from_str(data).map_or(Value::Null, visible_json);
        let known = Announcement::deserialize(&json).ok();
        let common = CommonFields::deserialize(&json).unwrap_or_default();
        Self { json, known, common }
    }

    /// Returns the event; none where this program doesn't know it.
    pub fn event(&self) -> Option<&Event> {
        self.known.as_ref().map(|announcement| &announcement.event)
    }

    /// Returns when it happened, with date and zone.
    pub fn time(&self) -> String {
        match (&self.known, &self.common.at) {
            (Some(announcement), _) => show::time(announcement.at),
            (None, Some(EventTime::Text(time))) => time.replacen('T', " ", 1),
            (None, Some(EventTime::Millis(ms))) => show::time_of(*ms),
            (None, None) => String::new(),
        }
    }

    /// Returns the node that reports it.
    pub fn reporter(&self) -> String {
        self.common.reported_by.clone().unwrap_or_default()
    }

    /// Returns the service that it is about; empty where it is about nodes.
    pub fn service(&self) -> String {
        match self.event() {
            Some(event) => event.service().map(ServiceId::to_string).unwrap_or_default(),
            None => self.common.service.clone().unwrap_or_default(),
        }
    }

    /// Returns the event as one line, without its time.
    pub fn line(&self) -> String {
        let parts = match self.event() {
            Some(Event::Routing { slot, kind, refused, state, phase, reasons, took_ms, actor, .. }) => {
                let RoutingState { service, version, weights, status, .. } = state;
                vec![
                    format!("slot {slot}"),
                    status.to_string(),
                    match refused {
                        Some(refused) => format!("{}({refused})", kind.name()),
                        None => kind.name().into(),
                    },
                    service.to_string(),
                    show::weights(weights),
                    format!("version {version}"),
                    phase.map(|phase| phase.to_string()).unwrap_or_default(),
                    format!("by {actor}"),
                    took_ms.map(|ms| format!("{ms} ms")).unwrap_or_default(),
                    reasons.join("; "),
                ]
            }
            Some(Event::Membership { slot, kind, node, actor, .. }) => {
                vec![format!("slot {slot}"), kind.name().into(), format!("node {node}"), format!("by {actor}")]
            }
            Some(Event::DefaultService { slot, service, actor, .. }) => {
                vec![format!("slot {slot}"), "SetDefault".into(), service.to_string(), format!("by {actor}")]
            }
            Some(Event::Verdict { service, routing_version: _, verdict, samples }) => {
                vec!["verdict".into(), service.to_string(), words(verdict), format!("{samples} samples")]
            }
            Some(Event::Analyzed { service, window_verdict, .. }) => analyzed(service, window_verdict),
            Some(Event::Enforced { service, slot, took_ms }) => {
                let took = format!("{took_ms} ms");
                vec![format!("slot {slot}"), "enforced everywhere".into(), service.to_string(), took]
            }
            Some(
                Event::Voted { .. }
                | Event::LocalHold { .. }
                | Event::Lease { .. }
                | Event::Coordinator { .. }
                | Event::Peer { .. }
                | Event::Rejected { .. },
            )
            | None => self.common.words(),
        };
        show::line(parts)
    }
}

fn words(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Promote => "Promote".into(),
        Verdict::Hold(why) => format!("Hold: {why}"),
        Verdict::Pause(why) => format!("Pause: {why}"),
        Verdict::Rollback(why) => format!("Rollback: {why}"),
    }
}

fn analyzed(service: &ServiceId, window_verdict: &WindowVerdict) -> Vec<String> {
    let WindowVerdict { from_ms, to_ms, verdict, stable, canary, sequential, is_window: _ } = window_verdict;
    let seconds = |ms: u64| ms as f64 / 1000.0;
    let failed = |AnswerSummary { count, errors, .. }: &AnswerSummary| format!("{errors} of {count} failed");
    vec![
        "analyzed".into(),
        service.to_string(),
        words(verdict),
        format!("{}-{} s", seconds(*from_ms), seconds(*to_ms)),
        format!("canary {}", failed(canary)),
        format!("stable {}", failed(stable)),
        sequential.as_ref().map(show::evidence).unwrap_or_default(),
    ]
}

impl CommonFields {
    /// Returns the event's name and slot, and then every other field.
    fn words(&self) -> Vec<String> {
        let Self { event, at: _, slot, reported_by, service, phase, others } = self;
        let named = [("reported_by", reported_by), ("service", service), ("phase", phase)];
        let named = named.into_iter().filter_map(|(key, value)| Some((key, value.clone()?)));
        let others = others.iter().filter(|(_, value)| !value.is_null());
        let rest: BTreeMap<&str, String> =
            named.chain(others.map(|(key, value)| (key.as_str(), show::word(value)))).collect();
        let mut parts = vec![event.clone(), slot.map(|slot| format!("slot {slot}")).unwrap_or_default()];
        parts.extend(rest.into_iter().map(|(key, value)| format!("{key}={value}")));
        parts
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::domain::ids::{NodeId, TxId, VersionId};
    use crate::domain::rollout::Phase;
    use crate::domain::routing::Status;
    use crate::domain::run::SequentialEvidence;
    use crate::domain::time::Wall;
    use crate::domain::weights::{Weight, Weights};
    use crate::protocol::record::{Initiator, RecordKind, Slot};

    /// Returns an event as a node sends it: node b announces it at 01:02:03.
    pub fn sent(event: Event) -> Announced {
        let node = NodeId::new("b").unwrap();
        let announced =
            Announced::read(&serde_json::to_string(&Announcement { at: Wall(3_723_000), node, event }).unwrap());
        assert!(announced.event().is_some(), "not read back: {}", announced.json);
        announced
    }

    /// Returns that a promotion of service m to 20 % in slot `slot` has this status, and leaves the rollout in this phase.
    pub fn promotion(slot: u64, status: Status, phase: Phase) -> Event {
        let version = |name| VersionId::new(name).unwrap();
        let part = |name, bp| (version(name), Weight::from_bp(bp).unwrap());
        let state = RoutingState {
            service: service(),
            version: 3,
            stable_model_id: version("v1"),
            canary_model_id: Some(version("v2")),
            weights: Weights::new(vec![part("v1", 8_750), part("v2", 1_250)]).unwrap(),
            status,
            txid: TxId::new("tx").unwrap(),
            timestamp: Wall(1),
        };
        Event::Routing {
            slot: Slot(slot),
            kind: RecordKind::Promote,
            refused: None,
            initiator: Initiator::Client,
            actor: "alice".into(),
            state,
            phase: Some(phase),
            reasons: Vec::new(),
            decided_at: Some(Wall(39)),
            took_ms: Some(38),
            coordinator: NodeId::new("a").ok(),
        }
    }

    fn service() -> ServiceId {
        ServiceId::new("m").unwrap()
    }

    #[test]
    fn a_decision_is_one_line() {
        let event = promotion(12, Status::Committed, Phase::Progressing);
        let promoted = sent(event.clone());
        let expected = "slot 12  COMMITTED  Promote  m  v1=87.5% v2=12.5%  version 3  Progressing  by alice  38 ms";
        assert_eq!(promoted.line(), expected);
        assert_eq!((promoted.time().as_str(), promoted.reporter().as_str()), ("1970-01-01 01:02:03Z", "b"));
        let mut event = event;
        if let Event::Routing { kind, refused, reasons, state, .. } = &mut event {
            (*kind, *refused, state.status) = (RecordKind::Refused, Some("Promote".into()), Status::Aborted);
            *reasons = vec!["a: no".into(), "c: silent".into()];
        }
        let refused = sent(event);
        let expected = "slot 12  ABORTED  Refused(Promote)  m  v1=87.5% v2=12.5%  version 3  Progressing  by alice  38 ms  a: no; c: silent";
        assert_eq!(refused.line(), expected);
    }

    #[test]
    fn a_change_of_membership_is_told_of_one_node_by_another() {
        let (node, txid) = (NodeId::new("c").unwrap(), TxId::new("tx").unwrap());
        let changed = sent(Event::Membership {
            slot: Slot(4),
            kind: RecordKind::Cordon,
            node,
            txid,
            actor: "alice".into(),
            decided_at: Wall(1),
        });
        assert_eq!((changed.line().as_str(), changed.reporter().as_str()), ("slot 4  Cordon  node c  by alice", "b"));
    }

    #[test]
    fn the_analysis_is_told_with_its_evidence() {
        let verdict = Verdict::Hold("too few answers".into());
        let held = sent(Event::Verdict { service: service(), routing_version: 3, verdict, samples: 7 });
        assert_eq!(held.line(), "verdict  m  Hold: too few answers  7 samples");
        let sequential =
            SequentialEvidence { e_value: 7.5, bound: 100.0, e_errors: 1.0, e_latency: 2.0, alpha_spent: 0.01 };
        let window_verdict = WindowVerdict {
            verdict: Verdict::Promote,
            canary: AnswerSummary { count: 40, errors: 9, p50_ms: Some(1.5), ..AnswerSummary::default() },
            sequential: Some(sequential),
            ..WindowVerdict::unseen(3_000, 4_500)
        };
        let analyzed = sent(Event::Analyzed {
            sequence: None,
            service: service(),
            rollout_generation: 1,
            window_verdict,
            decided: None,
        });
        let expected = "analyzed  m  Promote  3-4.5 s  canary 9 of 40 failed  stable 0 of 0 failed  \
            e 7.50 of 100, α spent 0.0100";
        assert_eq!(analyzed.line(), expected);
    }

    #[test]
    fn what_is_not_known_is_shown_with_all_its_fields() {
        let peer = sent(Event::Peer { node: NodeId::new("c").unwrap(), alive: false });
        assert_eq!(peer.line(), "peer  alive=false  node=c  reported_by=b");
        let newer = Announced::read(r#"{"event":"frozen","slot":3,"at":1,"service":"m","phase":"Paused","until":9}"#);
        assert!(newer.event().is_none());
        assert_eq!(newer.line(), "frozen  slot 3  phase=Paused  service=m  until=9");
        assert_eq!((newer.service().as_str(), newer.time().as_str()), ("m", "1970-01-01 00:00:00Z"));
    }
}
