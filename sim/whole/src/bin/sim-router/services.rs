//! The two services, as far as a router sees them: readers of a topic, each with a group.
//!
//! Processing a record and committing it never come apart here: a service that forgets what it did is not the router's fault.

use aviary::ports::Topic;
use aviary_core::domain::router_state::HookCall;
use aviary_core::domain::side::Side;

use super::broker::MemoryBroker;
use super::truth::RouterTruth;
use sim::Violation;
use sim::dice::Dice;

/// A service as the reader of one topic.
pub struct SimulatedService {
    /// Side of the rollout that the service is.
    pub side: Side,
    /// Topic that the service reads at present.
    pub topic: Topic,
    state: ServiceRun,
    /// The next offset that it reads.
    at: Vec<i64>,
    /// Commits only from time to time; else after each record.
    lazy: bool,
    /// Its client's place skips markers and aborted records at the end.
    skips: bool,
    /// Most records that it processes at a time.
    speed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ServiceRun {
    Off,
    On,
    /// Was told to stop, and processes records until it does.
    Stops {
        until_ms: u64,
    },
    /// Has stopped, and its group doesn't know that yet.
    Lingers {
        until_ms: u64,
    },
}

impl SimulatedService {
    /// Returns a service that doesn't run.
    pub fn new(side: Side, topic: Topic, dice: &mut Dice) -> Self {
        let (lazy, skips, speed) = (dice.chance(4000), dice.chance(5000), dice.between(1, 6));
        Self { side, topic, state: ServiceRun::Off, at: Vec::new(), lazy, skips, speed }
    }

    /// Starts or stops the service, as a hook would.
    pub fn call(&mut self, call: HookCall, broker: &mut MemoryBroker, dice: &mut Dice, now_ms: u64) {
        match (call, self.state) {
            (HookCall::Start, ServiceRun::Off | ServiceRun::Lingers { .. }) => {
                let lows = broker.topic(self.topic).iter().map(|log| log.low());
                let next = &broker.groups[&(self.side, self.topic)];
                self.at = lows.zip(next).map(|(low, next)| next.unwrap_or(low).max(low)).collect();
                self.state = ServiceRun::On;
            }
            (HookCall::Start, ServiceRun::Stops { .. }) => self.state = ServiceRun::On,
            (HookCall::Stop, ServiceRun::On) if dice.chance(5000) => {
                self.state = ServiceRun::Stops { until_ms: now_ms + dice.between(1, 400) };
            }
            (HookCall::Stop, ServiceRun::On) => self.stop(broker, dice, now_ms),
            (HookCall::Start, ServiceRun::On)
            | (HookCall::Stop, ServiceRun::Off | ServiceRun::Stops { .. } | ServiceRun::Lingers { .. }) => {}
        }
    }

    fn stop(&mut self, broker: &mut MemoryBroker, dice: &mut Dice, now_ms: u64) {
        self.commit(broker);
        let linger = if dice.chance(5000) { 0 } else { dice.between(1, 600) };
        self.state = ServiceRun::Lingers { until_ms: now_ms + linger };
        self.tick(broker, dice, now_ms);
    }

    fn commit(&self, broker: &mut MemoryBroker) {
        let group = broker.groups.get_mut(&(self.side, self.topic)).expect("groups are few, and known");
        for (next, at) in group.iter_mut().zip(&self.at) {
            // A client that has read nothing of a partition commits nothing there.
            if next.is_some() || *at > 0 {
                *next = Some(*at);
            }
        }
    }

    /// Lets virtual time pass: what is due by then happens.
    pub fn tick(&mut self, broker: &mut MemoryBroker, dice: &mut Dice, now_ms: u64) {
        match self.state {
            ServiceRun::Stops { until_ms } if until_ms <= now_ms => self.stop(broker, dice, now_ms),
            ServiceRun::Lingers { until_ms } if until_ms <= now_ms => self.state = ServiceRun::Off,
            ServiceRun::Off | ServiceRun::On | ServiceRun::Stops { .. } | ServiceRun::Lingers { .. } => {}
        }
    }

    /// Returns whether it may process records.
    pub fn runs(&self) -> bool {
        matches!(self.state, ServiceRun::On | ServiceRun::Stops { .. })
    }

    /// Returns how many consumers its group has.
    pub fn members(&self) -> usize {
        usize::from(self.state != ServiceRun::Off)
    }

    /// Processes some records; returns how many.
    pub fn work(
        &mut self,
        broker: &mut MemoryBroker,
        truth: &mut RouterTruth,
        dice: &mut Dice,
    ) -> Result<u64, Violation> {
        if !self.runs() {
            return Ok(0);
        }
        let most = dice.between(0, self.speed);
        let mut count = 0;
        for _ in 0..most {
            let partition = dice.below(self.at.len());
            count += u64::from(self.process(broker, truth, partition)?);
        }
        if !self.lazy || dice.chance(1500) {
            self.commit(broker);
        }
        Ok(count)
    }

    /// Processes everything there is; returns how many.
    pub fn finish(&mut self, broker: &mut MemoryBroker, truth: &mut RouterTruth) -> Result<u64, Violation> {
        let mut count = 0;
        for partition in 0..if self.runs() { self.at.len() } else { 0 } {
            while self.process(broker, truth, partition)? {
                count += 1;
            }
        }
        if self.runs() {
            self.commit(broker);
        }
        Ok(count)
    }

    fn process(
        &mut self,
        broker: &mut MemoryBroker,
        truth: &mut RouterTruth,
        partition: usize,
    ) -> Result<bool, Violation> {
        let Some((offset, item)) = broker.next(self.topic, partition, self.at[partition]) else {
            if self.skips {
                self.at[partition] = self.at[partition].max(broker.topic(self.topic)[partition].stable());
            }
            return Ok(false);
        };
        self.at[partition] = offset + 1;
        truth.processed(broker, (self.side, self.topic), partition, item)?;
        Ok(true)
    }
}
