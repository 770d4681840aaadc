//! What a script's commands do.

use std::sync::Arc;

use aviary_core::domain::analysis::Analysis;
use aviary_core::domain::ids::{ServiceId, TxId, VersionId};
use aviary_core::domain::plan::{Backend, Manifest, RolloutSpec, Stage};
use aviary_core::domain::weights::Weight;
use aviary_core::domain::window::Evidence;
use aviary_core::protocol::record::ConfigChange;
use aviary_core::protocol::{Command, Input, Observation, OperatorRequest, RequestId};

use super::cluster::ScriptCluster;
use super::node;
use crate::subject::Subject;
use crate::truth::Fact;

fn service() -> ServiceId {
    ServiceId::new("s").expect("a valid name")
}

/// Does what one line says. Panics on a line that says nothing known: scripts are part of the source.
pub fn obey<S: Subject>(cluster: &mut ScriptCluster<S>, line: &str) {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words.as_slice() {
        ["ask", at, tx, operation @ ..] => ask(cluster, at, tx, operation),
        ["deliver", from, to] => deliver(cluster, from, to, 1),
        ["deliver", from, to, count] => deliver(cluster, from, to, number(count)),
        ["lose", from, to] => cluster.lose(&node(from), &node(to)),
        ["hold", from, to] => drop(cluster.held.insert((node(from), node(to)))),
        ["release", from, to] => drop(cluster.held.remove(&(node(from), node(to)))),
        ["cut", from, to] => drop(cluster.cut.insert((node(from), node(to)))),
        ["heal"] => cluster.cut.clear(),
        ["settle"] => cluster.settle(),
        ["run", ms] => cluster.run_for(number(ms)),
        ["crash", at] => cluster.crash(&node(at)),
        ["start", at] => cluster.start(&node(at)),
        ["die", at, moment @ ..] => disk(cluster, at).dies_before = Some(moment.join(" ")),
        ["wipe", at] => {
            disk(cluster, at).acceptor = None;
            disk(cluster, at).log.truncate(1);
        }
        ["shorten", at, count] => disk(cluster, at).log.truncate(number(count) as usize),
        ["observe", at, canary, failed] => observe(cluster, at, number(canary), number(failed)),
        ["trip", at] => trip(cluster, at),
        ["show"] => show(cluster),
        ["log", at] => {
            let log = &disk(cluster, at).log;
            let names: Vec<_> =
                log.iter().map(|c| format!("{} {}", c.record.slot, c.record.intent.operation.name())).collect();
            cluster.story.push(names.join(", "));
        }
        _ => panic!("{line:?} is no command"),
    }
}

fn number(word: &str) -> u64 {
    word.parse().unwrap_or_else(|_| panic!("{word:?} is no number"))
}

fn disk<'a, S>(cluster: &'a mut ScriptCluster<S>, at: &str) -> &'a mut super::cluster::ScriptNode<S> {
    cluster.nodes.get_mut(&node(at)).unwrap_or_else(|| panic!("{at:?} is no node"))
}

fn deliver<S: Subject>(cluster: &mut ScriptCluster<S>, from: &str, to: &str, count: u64) {
    for _ in 0..count {
        // A node that broke a rule may have said something else before.
        let said = cluster.deliver(&node(from), &node(to));
        if said.is_none() && !cluster.over {
            cluster.story.push(format!("nothing is under way from {from} to {to}"));
        }
    }
}

fn ask<S: Subject>(cluster: &mut ScriptCluster<S>, at: &str, tx: &str, operation: &[&str]) {
    let request = RequestId(cluster.asked.len() as u64 + 1);
    cluster.asked.insert(request.0, tx.into());
    let (service, reason) = (service(), "test".to_string());
    let asked = match operation {
        ["apply", stages @ ..] => OperatorRequest::Apply(rollout(stages)),
        ["promote"] => OperatorRequest::Promote { service, full: false },
        ["promote", "skip-wait"] => OperatorRequest::SkipWait { service },
        ["promote", "full"] => OperatorRequest::Promote { service, full: true },
        ["pause"] => OperatorRequest::Pause { service, reason },
        ["resume"] => OperatorRequest::Resume { service },
        ["abort"] => OperatorRequest::Abort { service, reason },
        ["undo", "now"] => OperatorRequest::UndoNow { service },
        ["retry"] => OperatorRequest::Retry { service },
        ["cordon", name] => OperatorRequest::Config(ConfigChange::Cordon(node(name))),
        ["readmit", name] => {
            let view = cluster.nodes[&node(name)].process.as_ref().and_then(|process| process.view.as_ref());
            let incarnation = view.expect("a node that is readmitted runs").incarnation;
            OperatorRequest::Config(ConfigChange::Readmit(node(name), incarnation))
        }
        _ => panic!("{operation:?} is no operation"),
    };
    cluster.fact(&Fact::Asked(request, tx, &asked));
    let tx = TxId::new(tx).expect("a valid transaction id");
    cluster.give(&node(at), Input::Operator(Command { request, tx, actor: "client".into(), asked }));
}

/// A rollout from v1 to v2 with a lease of 2 s. A stage is `BP`, which an operator ends, or `BP:MS`, held so long at least.
fn rollout(stages: &[&str]) -> Arc<Manifest> {
    let backend = |name| Backend::new(VersionId::new(name).expect("a valid name"), vec![]);
    let stage = |word: &&str| {
        let (bp, hold_ms) = word.split_once(':').map_or((*word, None), |(bp, ms)| (bp, Some(number(ms))));
        let weight = Weight::from_bp(number(bp) as u16).expect("at most 10000");
        Stage { weight, hold_ms: hold_ms.unwrap_or(0), manual: hold_ms.is_none() }
    };
    let spec = RolloutSpec {
        analysis: Analysis { window_ms: 3_000, min_samples: 10, ..Analysis::default() },
        progress_deadline_ms: 60_000,
        ..RolloutSpec::new(service(), backend("v1"), backend("v2"), stages.iter().map(stage).collect())
    };
    Arc::new(spec.checked().expect("a rollout within the rules"))
}

fn observe<S: Subject>(cluster: &mut ScriptCluster<S>, at: &str, canary: u64, failed: u64) {
    let view = cluster.nodes[&node(at)].process.as_ref().and_then(|process| process.view.clone());
    let Some(routing_version) = view.and_then(|view| Some(view.services.get(&service())?.serving.routing_version))
    else {
        return;
    };
    let mut evidence = Evidence::default();
    (0..canary).for_each(|n| evidence.canary.record(5_000, n < failed));
    (0..canary).for_each(|_| evidence.stable.record(5_000, false));
    cluster.fact(&Fact::Observed(&service(), routing_version, canary, failed));
    cluster.give(&node(at), Input::Telemetry(vec![Observation { service: service(), routing_version, evidence }]));
}

fn trip<S: Subject>(cluster: &mut ScriptCluster<S>, at: &str) {
    let view = cluster.nodes[&node(at)].process.as_ref().and_then(|process| process.view.clone());
    let shown = view.as_ref().and_then(|view| view.services.get(&service()));
    let routing_version = shown.expect("the node knows the service").serving.routing_version;
    let reason = "canary answers failed".into();
    cluster.give(&node(at), Input::CircuitBreakerTripped { service: service(), routing_version, reason });
}

fn show<S: Subject>(cluster: &mut ScriptCluster<S>) {
    let ids: Vec<_> = cluster.nodes.keys().cloned().collect();
    for id in ids {
        let line = match cluster.nodes[&id].process.as_ref().and_then(|process| process.view.as_ref()) {
            None => format!("{id} is down"),
            Some(view) => format!(
                "{id}: {:?}, head {}, canary {} bp, coordinator {}",
                view.membership,
                view.head,
                cluster.share(&id, &service()),
                view.coordinator
            ),
        };
        cluster.story.push(line);
    }
}
