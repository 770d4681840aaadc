//! One node of the world: its process, its disk, and what carrying out an output means there.

use super::*;

pub(super) struct Process<S> {
    pub core: S,
    pub incarnation: Incarnation,
    pub view: Option<Arc<View>>,
    pub lease: Option<Mono>,
    pub pending: VecDeque<Output>,
    pub writing: Option<Box<AcceptorState>>,
    pub inbox: VecDeque<Input>,
    pub paused: bool,
}

pub(super) struct Node<S> {
    pub id: NodeId,
    pub acceptor: Option<AcceptorState>,
    /// The whole log as this node would have it, also what it keeps only the sum of.
    pub log: Vec<Chosen>,
    /// The sum it starts from.
    pub checkpoint: Option<Checkpoint>,
    pub runs: BTreeMap<ServiceId, SavedRun>,
    /// The first slot whose record it can still read.
    pub first: usize,
    pub durable: usize,
    pub process: Option<Process<S>>,
    pub generation: u64,
    pub mono_base: u64,
    pub mono_from: u64,
    pub ppm: i64,
    pub wall: u64,
    pub crash_after: Option<u64>,
    pub damaged: bool,
    /// The disk fails at the next write: the process ends, and nobody knows what is on the disk.
    pub write_fails: bool,
    /// The process ends just before it carries out this moment of a commit.
    pub crash_at: Option<usize>,
}

impl<S> Node<S> {
    pub fn now(&self, at: u64) -> Now {
        node_now(self.mono_base, self.mono_from, self.ppm, self.wall, at)
    }

    /// What the data plane would serve: `node::handle::Published::effective_bp`.
    pub fn effective_bp(&self, at: u64, serving: &aviary_core::protocol::Serving) -> u16 {
        let Some((_, bp)) = &serving.canary else { return 0 };
        let Some(process) = &self.process else { return 0 };
        match (serving.lease_ms, process.lease) {
            (None, _) => *bp,
            (Some(lease_ms), Some(from)) if self.now(at).mono < from.after_ms(lease_ms) => *bp,
            (Some(_), _) => 0,
        }
    }
}

impl<S: Subject> World<S> {
    pub(super) fn node(index: usize, genesis: &Chosen, dice: &mut Dice) -> Node<S> {
        Node {
            id: name(index),
            acceptor: Some(first_acceptor(index, genesis)),
            log: vec![genesis.clone()],
            checkpoint: None,
            runs: BTreeMap::new(),
            first: 0,
            durable: 1,
            process: None,
            generation: 0,
            mono_base: dice.between(1_000_000, 1_000_000_000_000),
            mono_from: 0,
            ppm: dice.between(0, 20_000) as i64 - 10_000,
            wall: 1_790_000_000_000 + dice.between(0, 60_000),
            crash_after: None,
            damaged: false,
            write_fails: false,
            crash_at: None,
        }
    }

    pub(super) fn start(&mut self, i: usize) -> Step {
        if self.nodes[i].process.is_some() {
            return Ok(());
        }
        let fresh_incarnation = Incarnation(self.dice.any() | 1 << 63);
        let seed = self.dice.any();
        let reboots = self.dice.chance(2_000);
        if reboots {
            self.nodes[i].mono_base = self.dice.between(1_000_000, 1_000_000_000);
            self.nodes[i].mono_from = self.now;
        }
        let (at, count) = (self.now, self.nodes.len());
        let node = &mut self.nodes[i];
        node.generation += 1;
        node.crash_after = None;
        let setup = Setup {
            node: node.id.clone(),
            cluster: ClusterId([7; 16]),
            timings: self.timings,
            seed,
            fresh_incarnation,
            retention: self.retention,
            peers: (0..count).map(name).collect(),
            runs: node.runs.clone(),
        };
        let incarnation = node.acceptor.as_ref().map_or(fresh_incarnation, |acceptor| acceptor.incarnation);
        let (acceptor, log, now) = (node.acceptor.clone(), node.log.clone(), node.now(at));
        let checkpoint = node.checkpoint.clone();
        self.trace.line(at, node.id.as_str(), "starts", || {
            let known = acceptor
                .as_ref()
                .map(|r| format!("promised {:?} head {}", r.promised.as_ref().map(|b| b.to_string()), r.head));
            format!("{} records, acceptor state {known:?}", log.len())
        });
        let (core, outputs) = guarded(|| {
            let ledger = match &checkpoint {
                Some(checkpoint) => checkpoint.ledger().expect("a checkpoint that was kept"),
                None => Ledger::new(&log[0]).expect("a log begins with its genesis"),
            };
            let after = ledger.head.0 as usize + 1;
            S::start(setup, acceptor, ledger, &log[after..], now)
        })?;
        node.process = Some(Process {
            core,
            incarnation,
            view: None,
            lease: None,
            pending: outputs.into(),
            writing: None,
            inbox: VecDeque::new(),
            paused: false,
        });
        let (id, generation) = (node.id.clone(), node.generation);
        self.fact(Fact::Started(&id, &log))?;
        self.plan(1_000, Happening::Tick(i, generation));
        self.carry_out(i)
    }

    pub(super) fn give(&mut self, i: usize, input: Input) -> Step {
        let Some(process) = &mut self.nodes[i].process else { return Ok(()) };
        if process.inbox.len() < 2_000 {
            process.inbox.push_back(input);
        }
        self.carry_out(i)
    }

    /// Carries out what is pending, then hands over what waits, until the node is busy, stopped or idle.
    pub(super) fn carry_out(&mut self, i: usize) -> Step {
        loop {
            let at = self.now;
            let node = &mut self.nodes[i];
            let Some(process) = &mut node.process else { return Ok(()) };
            if process.paused || process.writing.is_some() {
                return Ok(());
            }
            if let Some(output) = process.pending.pop_front() {
                let coordinates = process.view.as_ref().is_some_and(|view| view.coordinator == node.id);
                if node.crash_at.is_some_and(|moment| Coverage::is_at(moment, &output, coordinates)) {
                    (node.crash_after, node.crash_at) = (Some(0), None);
                }
                let dies = node.crash_after == Some(0);
                self.coverage.output(&output, coordinates, dies);
                match &mut node.crash_after {
                    Some(0) => {
                        self.crash(i)?;
                        return Ok(());
                    }
                    Some(left) => *left -= 1,
                    None => {}
                }
                self.carry_out_one(i, output)?;
                continue;
            }
            let Some(input) = process.inbox.pop_front() else { return Ok(()) };
            let clock = node_now(node.mono_base, node.mono_from, node.ppm, node.wall, at);
            let core = &mut process.core;
            process.pending = guarded(|| core.handle(clock, input))?.into();
        }
    }

    pub(super) fn carry_out_one(&mut self, i: usize, output: Output) -> Step {
        let at = self.now;
        let id = self.nodes[i].id.clone();
        match output {
            Output::Persist(acceptor) => {
                let slow = self.dice.between(0, self.mix.write_us_max);
                let generation = self.nodes[i].generation;
                let process = self.nodes[i].process.as_mut().expect("it acts");
                process.writing = Some(acceptor);
                if std::mem::take(&mut self.nodes[i].write_fails) {
                    self.trace.line(at, id.as_str(), "can't write", String::new);
                    return self.crash(i);
                }
                if slow == 0 || self.calm {
                    return self.written(i);
                }
                self.plan(slow, Happening::Written(i, generation));
            }
            Output::Append(chosen) => {
                self.trace.line(at, id.as_str(), "appends", || {
                    format!(
                        "slot {} {} in {:?}",
                        chosen.record.slot,
                        chosen.record.intent.operation.name(),
                        chosen.ballot.as_ref().map(|b| b.to_string())
                    )
                });
                self.fact(Fact::Appended(&id, &chosen))?;
                self.nodes[i].log.push(*chosen);
            }
            Output::Send { to, message } => self.send(i, &to, *message)?,
            Output::Checkpoint { checkpoint, keep_from } => {
                self.trace.line(at, id.as_str(), "sums up", || format!("slot {}", checkpoint.slot));
                self.fact(Fact::SummedUp(&id, &checkpoint))?;
                let node = &mut self.nodes[i];
                (node.checkpoint, node.first) = (Some(checkpoint), keep_from.0 as usize);
                node.durable = node.log.len();
            }
            Output::Install(checkpoint) => self.install(i, checkpoint)?,
            Output::SendLog { to, from, .. } if (from.0 as usize) < self.nodes[i].first => {
                let parts = self.nodes[i].checkpoint.as_ref().map(Checkpoint::parts).unwrap_or_default();
                for part in parts {
                    self.send(i, &to, Message::Decision(Decision::Checkpoint(part)))?;
                }
            }
            Output::SendLog { to, from, through } => {
                let most = from.0 + 64;
                let records = self.nodes[i]
                    .log
                    .iter()
                    .filter(|c| c.record.slot >= from && c.record.slot <= through && c.record.slot.0 < most);
                for chosen in records.cloned().collect::<Vec<_>>() {
                    self.send(i, &to, Message::Decision(Decision::CatchUp(Box::new(chosen))))?;
                }
            }
            Output::SaveRun(service, Some(run)) => drop(self.nodes[i].runs.insert(service, *run)),
            Output::SaveRun(service, None) => drop(self.nodes[i].runs.remove(&service)),
            Output::Publish(view) => {
                for (service, shown) in view.services.iter() {
                    let (routing_version, stable) = (shown.serving.routing_version, &shown.serving.stable);
                    self.fact(Fact::Stable { node: &id, service, routing_version, stable })?;
                }
                self.nodes[i].process.as_mut().expect("it acts").view = Some(view);
            }
            Output::Lease(from) => {
                self.nodes[i].process.as_mut().expect("it acts").lease = from;
            }
            Output::Reply(request, outcome) => {
                self.trace.line(at, id.as_str(), "answers", || format!("{} {outcome:?}", request.0));
                self.trace.fold(request.0);
                self.fact(Fact::Replied(request, &outcome))?;
                self.replies.insert(request.0, outcome);
            }
            Output::Announce(event) => {
                self.trace.line(at, id.as_str(), "announces", || format!("{event:?}"));
                self.coverage.announced(&event);
                if let Event::LocalHold { service, .. } = &event {
                    self.fact(Fact::LocalHold(&id, service))?;
                }
            }
        }
        Ok(())
    }

    /// Takes a peer's checkpoint for what was really decided: it must sum that up.
    pub(super) fn install(&mut self, i: usize, checkpoint: Checkpoint) -> Step {
        let id = self.nodes[i].id.clone();
        self.trace.line(self.now, id.as_str(), "installs", || format!("slot {}", checkpoint.slot));
        let ledger = checkpoint.ledger().expect("the core checked it");
        let decided = self.truth.chosen(checkpoint.slot).map(|known| known.hash);
        if decided != Some(ledger.head_hash) {
            let what = format!("{id} installs a sum of slot {} that ends in {}", checkpoint.slot, ledger.head_hash);
            return Err(broken!(invariants::CHAIN, "{what}"));
        }
        self.fact(Fact::SummedUp(&id, &checkpoint))?;
        for slot in self.nodes[i].log.len()..=checkpoint.slot.0 as usize {
            let known = &self.truth.log[slot];
            let voted = known.record.certificate.as_ref().map(|certificate| &certificate.ballot);
            let ballot = voted.filter(|ballot| known.ballots.contains(ballot)).or(known.ballots.first()).cloned();
            let chosen = Chosen { ballot, decided_at: known.record.intent.at, record: known.record.clone() };
            self.fact(Fact::Appended(&id, &chosen))?;
            self.nodes[i].log.push(chosen);
        }
        let node = &mut self.nodes[i];
        node.first = node.log.len();
        node.durable = node.log.len();
        node.checkpoint = Some(checkpoint);
        self.summary.installs += 1;
        self.coverage.event("checkpoint taken over");
        Ok(())
    }

    pub(super) fn written(&mut self, i: usize) -> Step {
        let node = &mut self.nodes[i];
        let Some(acceptor) = node.process.as_mut().and_then(|process| process.writing.take()) else { return Ok(()) };
        node.acceptor.replace((*acceptor).clone());
        node.durable = node.log.len();
        let id = node.id.clone();
        self.trace.fold_bytes(&codec::encode(&*acceptor));
        self.trace.line(self.now, id.as_str(), "persists", || {
            let accepted = acceptor
                .accepted
                .as_ref()
                .map(|a| format!("{} slot {} {}", a.ballot, a.record.slot, a.record.intent.operation.name()));
            format!(
                "promised {:?} accepted {accepted:?} head {}",
                acceptor.promised.as_ref().map(|b| b.to_string()),
                acceptor.head
            )
        });
        let chosen = self.truth.persisted(&id, &acceptor)?;
        self.fact(Fact::Persisted(&id, &acceptor))?;
        if let Some((record, ballot)) = chosen {
            let known = self.truth.chosen(record.slot).expect("just chosen");
            self.summary.increases += u64::from(record.intent.operation.increases_exposure());
            self.summary.in_doubt += u64::from(!known.certain);
            if !known.certain {
                self.coverage.event("increase chosen in doubt");
            }
            self.trace.line(self.now, "*", "chosen", || {
                format!("slot {} {} {} in {ballot}", record.slot, record.intent.operation.name(), record.intent.tx)
            });
            self.fact(Fact::Chosen(&record, &ballot))?;
        }
        Ok(())
    }

    /// Returns how much longer a message takes on a clogged link, in microseconds.
    fn clog(&mut self, from: usize, to: usize) -> u64 {
        match self.clogged.get(&(from, to)) {
            Some(until) if *until > self.now => self.more.between(0, CLOG_US_MAX),
            _ => 0,
        }
    }

    pub(super) fn send(&mut self, i: usize, to: &NodeId, message: Message) -> Step {
        let at = self.now;
        let from = self.nodes[i].id.clone();
        let incarnation = self.nodes[i].process.as_ref().expect("it acts").incarnation;
        let bytes = codec::encode(&message);
        self.trace.fold_bytes(&bytes);
        self.trace.line(at, from.as_str(), "sends", || format!("to {to}: {}", brief(&message)));
        self.fact(Fact::Sent(&from, incarnation, &message))?;
        let Some(target) = self.nodes.iter().position(|node| node.id == *to) else {
            return Err(broken!("network", "{from} sends to {to}, who doesn't exist"));
        };
        if self.cut.contains(&(i, target)) {
            return Ok(());
        }
        if self.nodes[target].process.is_none() {
            if self.dice.chance(3_000) {
                self.plan(1_000, Happening::Refused(i, to.clone()));
            }
            return Ok(());
        }
        if self.calm {
            let delay = self.dice.between(100, 5_000);
            self.plan(delay, Happening::Deliver(target, from, incarnation, Box::new(message)));
            return Ok(());
        }
        if self.dice.chance(self.mix.drop_bp) {
            return Ok(());
        }
        let copies = 1 + u64::from(self.dice.chance(self.mix.twice_bp));
        for copy in 0..copies {
            let most = if copy > 0 { self.mix.delay_us_max * 5 } else { self.mix.delay_us_max };
            let delay = self.dice.between(100, most) + self.clog(i, target);
            self.plan(delay, Happening::Deliver(target, from.clone(), incarnation, Box::new(message.clone())));
        }
        Ok(())
    }
}

pub(super) fn node_now(base: u64, from: u64, ppm: i64, wall: u64, at: u64) -> Now {
    let ran = at - from;
    let skewed = (ran as i64 + ran as i64 * ppm / 1_000_000) as u64;
    Now { mono: Mono(base + skewed), wall: Wall(wall + at / 1000) }
}

fn guarded<T>(operation: impl FnOnce() -> T) -> Result<T, Violation> {
    catch_unwind(AssertUnwindSafe(operation)).map_err(|cause| {
        let text = cause.downcast_ref::<String>().cloned();
        let text = text.or_else(|| cause.downcast_ref::<&str>().map(|text| text.to_string()));
        broken!("panic", "{}", text.unwrap_or_default())
    })
}
