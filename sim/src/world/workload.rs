//! The workload: operators with whims, users whose requests fail or not.

use super::*;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TrafficProfile {
    Healthy,
    Errors,
    Slow,
    AllFail,
    Silent,
    OneNode(usize),
}

impl<S: Subject> World<S> {
    pub(super) fn telemetry(&mut self) -> Step {
        self.plan(100_000, Happening::Telemetry);
        for i in 0..self.nodes.len() {
            let Some(view) = self.nodes[i].process.as_ref().filter(|p| !p.paused).and_then(|p| p.view.clone()) else {
                continue;
            };
            let mut observations = Vec::new();
            for (service, shown) in view.services.iter() {
                let index = self.services.iter().position(|s| s == service).unwrap_or(0);
                let profile = self.profiles[index];
                if profile == TrafficProfile::Silent {
                    continue;
                }
                let bp = u64::from(self.nodes[i].effective_bp(self.now, &shown.serving));
                let mut evidence = Evidence::default();
                for _ in 0..self.dice.between(10, 30) {
                    let canary = self.dice.chance(bp);
                    let bad = match profile {
                        TrafficProfile::Errors => canary,
                        TrafficProfile::OneNode(node) => canary && node == i,
                        TrafficProfile::AllFail => true,
                        _ => false,
                    };
                    let latency_us = if canary && profile == TrafficProfile::Slow { 900_000 } else { 5_000 };
                    let stats: &mut Stats = if canary { &mut evidence.canary } else { &mut evidence.stable };
                    stats.record(latency_us, bad);
                }
                let (count, errors) = (evidence.canary.count, evidence.canary.errors);
                let version = shown.serving.routing_version;
                self.fact(Fact::Observed(service, version, count, errors))?;
                observations.push(Observation {
                    service: service.clone(),
                    routing_version: shown.serving.routing_version,
                    evidence,
                });
            }
            if !observations.is_empty() {
                self.give(i, Input::Telemetry(observations))?;
            }
        }
        Ok(())
    }

    /// A version, on one of a few servers.
    fn somewhere(&mut self, version: &str) -> Backend {
        let url = format!("http://server:{}", self.more.between(1, 4));
        Backend::new(VersionId::new(version).expect("valid"), vec![url])
    }

    pub(super) fn spec(&mut self, service: &ServiceId, stable: &Backend, short: bool) -> Arc<Manifest> {
        let choices: Vec<&str> = ["v1", "v2", "v3"].into_iter().filter(|v| *v != stable.version.as_str()).collect();
        let canary = choices[self.dice.below(choices.len())];
        let canary = self.somewhere(canary);
        // Now and then somebody is wrong about where stable is.
        let wrong = !short && self.more.chance(1_500);
        let stable = if wrong { self.somewhere(stable.version.as_str()) } else { stable.clone() };
        let count = if short { 2 } else { self.dice.between(2, 4) };
        let mut bp = 0;
        let mut stages = Vec::new();
        for n in 1..=count {
            bp =
                if n == count { 10_000 } else { bp + self.dice.between(if short { 1_500 } else { 100 }, 3_000) as u16 };
            let hold_ms = if short { 200 } else { self.dice.between(200, 3_000) };
            let manual = !short && self.dice.chance(1_000);
            stages.push(Stage { weight: Weight::from_bp(bp).expect("in range"), hold_ms, manual });
        }
        let analysis = Analysis {
            window_ms: self.dice.between(1_000, 3_000),
            min_samples: self.dice.between(3, 20),
            ..Analysis::default()
        };
        let hold = !short && self.dice.chance(1_000);
        let spec = RolloutSpec {
            bake_ms: if short { 200 } else { self.dice.between(0, 2_000) },
            analysis,
            lease_ms: self.dice.between(1_000, 3_000),
            on_partition: if hold { OnPartition::Hold } else { OnPartition::Stable },
            progress_deadline_ms: if short { 60_000 } else { self.dice.between(2_000, 30_000) },
            ..RolloutSpec::new(service.clone(), stable, canary, stages)
        };
        Arc::new(spec.checked().expect("drawn within the rules"))
    }

    pub(super) fn stable_of(&self, i: usize, service: &ServiceId) -> Backend {
        let view = self.nodes[i].process.as_ref().and_then(|process| process.view.as_ref());
        let shown = view.and_then(|view| view.services.get(service));
        let first = || Backend::new(VersionId::new("v1").expect("valid"), vec!["http://server:1".into()]);
        shown.map_or_else(first, |shown| shown.service.stable.clone())
    }

    pub(super) fn operate(&mut self) -> Step {
        let i = self.dice.below(self.nodes.len());
        if self.dice.chance(800) {
            return self.read(i);
        }
        if !self.old.is_empty() && self.dice.chance(1_500) {
            let (tx, asked) = self.old[self.dice.below(self.old.len())].clone();
            return self.ask(i, tx, asked).map(drop);
        }
        let service = self.services[self.dice.below(self.services.len())].clone();
        let reason = || "an operator's whim".to_string();
        let peer = name(self.dice.below(self.nodes.len()));
        let asked = match self.dice.weighted(&[30, 15, 5, 6, 8, 8, 6, 5, 2, 4, 8, 5]) {
            0 => {
                let stable = self.stable_of(i, &service);
                OperatorRequest::Apply(self.spec(&service, &stable, false))
            }
            1 => OperatorRequest::Promote { service, full: false },
            2 => OperatorRequest::Promote { service, full: true },
            3 => OperatorRequest::Pause { service, reason: reason() },
            4 => OperatorRequest::Resume { service },
            5 => OperatorRequest::Abort { service, reason: reason() },
            6 => OperatorRequest::Retry { service },
            7 => OperatorRequest::Undo { service },
            8 => OperatorRequest::Config(ConfigChange::Cordon(peer)),
            9 => OperatorRequest::Config(ConfigChange::Uncordon(peer)),
            11 => OperatorRequest::SkipWait { service },
            _ => match self.unbound().first() {
                Some((node, incarnation)) => OperatorRequest::Config(ConfigChange::Readmit(node.clone(), *incarnation)),
                None => return Ok(()),
            },
        };
        self.submit(i, asked).map(drop)
    }

    /// Returns the running nodes whose votes don't count, with the incarnation to readmit.
    pub(super) fn unbound(&self) -> Vec<(NodeId, Incarnation)> {
        let running = self
            .nodes
            .iter()
            .filter_map(|node| Some((node.id.clone(), node.process.as_ref()?.view.as_ref()?.incarnation)));
        running.filter(|(node, incarnation)| !self.truth.members().counts(node, *incarnation)).collect()
    }

    pub(super) fn submit(&mut self, i: usize, asked: OperatorRequest) -> Result<u64, Violation> {
        let tx = TxId::new(format!("t{}", self.requests)).expect("valid");
        self.old.push((tx.clone(), asked.clone()));
        self.ask(i, tx, asked)
    }

    pub(super) fn ask(&mut self, i: usize, tx: TxId, asked: OperatorRequest) -> Result<u64, Violation> {
        if self.nodes[i].process.is_none() {
            return Ok(0);
        }
        self.requests += 1;
        let request = RequestId(self.requests);
        self.trace
            .line(self.now, self.nodes[i].id.as_str(), "asked", || format!("{} {tx} {}", request.0, brief_op(&asked)));
        self.fact(Fact::Asked(request, tx.as_str(), &asked))?;
        self.give(i, Input::Operator(Command { request, tx, actor: "client".into(), asked }))?;
        Ok(request.0)
    }

    pub(super) fn read(&mut self, i: usize) -> Step {
        if self.nodes[i].process.is_none() {
            return Ok(());
        }
        self.requests += 1;
        let request = RequestId(self.requests);
        self.fact(Fact::Reads(request))?;
        self.give(i, Input::Read(request))
    }
}
