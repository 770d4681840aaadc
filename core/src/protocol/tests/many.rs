//! What many services cost must not grow with their number: what concerns one is done for one.

use super::*;
use crate::protocol::context::Context;

fn context_of(known: &[&str]) -> Context {
    let settings = Settings {
        node: node("a"),
        cluster: CLUSTER,
        timings: Timings::default(),
        seed: 1,
        fresh_incarnation: Incarnation(9),
        retention: Retention::default(),
        peers: BTreeSet::new(),
        speaks: crate::protocol::feature::PROTOCOL,
    };
    let mut rig = Rig::new();
    for (number, name) in known.iter().enumerate() {
        rig.asked("a", number as u64, OperatorRequest::Apply(named(name)));
    }
    let mut ledger = Ledger::new(&genesis()).unwrap();
    rig.logs[&node("a")].iter().skip(1).for_each(|chosen| ledger.apply(chosen).unwrap());
    let acceptor = rig.acceptors[&node("a")].clone();
    let mut context = Context::new(settings, acceptor, ledger, rig.now_of(&node("a")));
    context.outdated = Default::default();
    context
}

fn named(service: &str) -> Arc<Manifest> {
    let spec = fixtures::rollout(&[fixtures::manual(500), fixtures::held(10_000, 0)], Analysis::default());
    Arc::new(RolloutSpec { service: ServiceId::new(service).unwrap(), ..spec }.checked().unwrap())
}

#[test]
fn a_service_that_begins_makes_no_other_be_shown_anew() {
    let mut context = context_of(&["s1", "s2"]);
    let start = |name: &str| {
        Operation::Change(ServiceId::new(name).unwrap(), crate::domain::rollout::Change::Start(named(name)))
    };
    context.outdate(&start("s3"));
    assert!(!context.outdated.all && context.outdated.cluster && context.outdated.services.is_empty());
    context.outdate(&start("s2"));
    assert_eq!(context.outdated.services.iter().map(ServiceId::as_str).collect::<Vec<_>>(), ["s2"]);
}

#[test]
fn views_in_which_no_service_changed_share_them() {
    let mut rig = Rig::new();
    rig.asked("a", 1, OperatorRequest::Apply(named("s1")));
    rig.run_for(3_000);
    let before = rig.cores[&node("b")].view().clone();
    rig.asked("a", 2, OperatorRequest::Config(ConfigChange::Cordon(node("c"))));
    rig.run_for(3_000);
    let after = rig.cores[&node("b")].view();
    assert!(after.head > before.head);
    assert!(Arc::ptr_eq(&before.services, &after.services), "a cordon of c changes nothing that b shows of services");
}

#[test]
fn evidence_of_many_services_is_published_four_times_a_second_at_most() {
    let mut rig = Rig::new();
    let names: Vec<_> = (0..20).map(|n| format!("s{n}")).collect();
    for (number, name) in names.iter().enumerate() {
        rig.asked("a", number as u64, OperatorRequest::Apply(named(name)));
    }
    let (mut publications, mut before) = (0, rig.cores[&node("a")].view().clone());
    for round in 0..40 {
        // Each service's analysis changes its mind at another moment: as it has 100 canary answers.
        for (number, name) in names.iter().enumerate() {
            let service = ServiceId::new(name).unwrap();
            let mut evidence = Evidence::default();
            (0..number + 3).for_each(|_| evidence.canary.record(1_000, false));
            let routing_version = before.services[&service].service.routing.version;
            rig.handle(&node("a"), Input::Telemetry(vec![Observation { service, routing_version, evidence }]));
            let view = rig.cores[&node("a")].view();
            publications += usize::from(!Arc::ptr_eq(view, &before));
            before = view.clone();
        }
        rig.run_for(100);
        let view = rig.cores[&node("a")].view();
        publications += usize::from(!Arc::ptr_eq(view, &before));
        before = view.clone();
        assert!(publications <= 2 + (round + 1) * 100 / 250, "{publications} by round {round}");
    }
    let shown = before.services.values().map(|view| view.cluster.canary.count).min();
    assert!(shown > Some(100) && publications >= 8, "{shown:?}, {publications}");
}

#[test]
fn a_node_that_stood_still_does_not_tell_of_all_services_at_once() {
    let context = context_of(&["s1"]);
    let state = context.ledger.services.values().next().unwrap().clone();
    let mut many = context.clone();
    many.ledger.services = (0..1_000).map(|n| (ServiceId::new(format!("s{n}")).unwrap(), state.clone())).collect();
    let mut gates = crate::protocol::gate::Gates::new(many.now.mono);
    gates.restart(&many);
    let mut told = BTreeSet::new();
    // A peer's queue takes 256 messages, of which snapshots must leave some to votes.
    for turn in 1..=5 {
        let services = gates.next_turn(many.now.mono.after_ms(2_000 * turn));
        assert_eq!(services.len(), 200);
        told.extend(services);
    }
    assert_eq!(told.len(), 1_000, "and each has its turn before one has a second");
}
