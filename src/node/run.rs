//! The loop: one input, one call of the core, its outputs in order.
//!
//! It has a thread of its own, with everything of the control plane on it, so that a commit crosses no thread between
//! socket and disk. A slow disk stops it: a node whose disk hangs should lose its lease. Traffic is elsewhere and goes
//! on by the last published view, whose lease ends by itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::{broadcast, mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::domain::ids::{NodeId, ServiceId};
use crate::ports::{Clock, LogReader, Network, RunStore, Store};
use crate::protocol::checkpoint::{Checkpoint, Outgoing};
use crate::protocol::ledger::Ledger;
use crate::protocol::message::{Decision, Message};
use crate::protocol::record::{AcceptorState, Chosen, SavedRun, Slot};
use crate::protocol::{Announcement, Command, Core, Input, Outcome, Output, RequestId, Settings};

use super::failpoint::Failpoint;
use super::frame::Versions;
use super::greeting::Greeting;
use super::handle::{NodeHandle, NodeRequest, NodeRequests, Published};
use super::link::{Identity, Inbox, LinkLimits, Links};

/// Parts that a node is built from.
pub struct Parts {
    /// Identity, timings and limits of the node.
    pub settings: Settings,
    /// Durable store of acceptor state and log.
    pub store: Box<dyn Store>,
    /// Acceptor state read from the store; none if it was lost.
    pub acceptor: Option<AcceptorState>,
    /// The sum of the log that `log` builds on.
    pub ledger: Ledger,
    /// The log on it, after that.
    pub log: Vec<Chosen>,
    /// The analysis runs that it saved.
    pub saved: BTreeMap<ServiceId, SavedRun>,
    /// Store of the saved analysis runs.
    pub runs: Box<dyn RunStore>,
    /// The way to its peers.
    pub network: Arc<dyn Network>,
    /// Address of its control port, `host:port`.
    pub listen: String,
    /// Addresses of the peers' control ports, by name.
    pub peers: BTreeMap<NodeId, String>,
    /// The protocol versions that it speaks.
    pub versions: Versions,
    /// What it says about itself to its peers, by name.
    pub facts: BTreeMap<String, String>,
    /// Monotonic clock and time of day.
    pub clock: Arc<dyn Clock>,
    /// Where a test wants it to die.
    pub failpoint: Option<Failpoint>,
}

/// A running node, with the handle to talk to it.
pub struct Running {
    /// Handle through which API and data plane talk to the node.
    pub handle: NodeHandle,
    /// Its control port, as bound.
    pub control: String,
    /// Ends when the loop does; an error is why the process must stop.
    pub thread: JoinHandle<anyhow::Result<()>>,
}

/// Longest time between two inputs: see the contract in [`crate::protocol`].
const TICK: Duration = Duration::from_millis(20);
/// Messages that may wait for the loop; links wait beyond that.
const INPUTS_MAX: usize = 1024;

/// Prepares a node: its handle, and its loop, which runs on whatever runtime polls it until `shutdown`. The loop says
/// through `bound` at which address its control port is open, or why it isn't.
pub fn prepare(
    parts: Parts,
    bound: impl FnOnce(std::io::Result<String>) + Send,
    shutdown: CancellationToken,
) -> (NodeHandle, impl Future<Output = anyhow::Result<()>> + Send) {
    let Parts {
        settings,
        store,
        acceptor,
        ledger,
        log,
        saved,
        runs,
        network,
        listen,
        peers,
        versions,
        facts,
        clock,
        failpoint,
    } = parts;
    if let Some(failpoint) = &failpoint {
        warn!(?failpoint, "this process will abort itself: AVIARY_FAILPOINT is set");
    }
    let (core, outputs) = Core::start(settings, acceptor, ledger, &log, saved, clock.now());
    drop(log);
    let published = Published::new(core.view().clone(), clock.clone());
    let reader = store.reader();
    let (handle, requests, events) = NodeHandle::new(published.clone(), reader.clone());
    let greetings = handle.greetings.clone();
    greetings.put(core.view().node.clone(), Greeting { versions, facts });
    let body = async move {
        let (inputs, receiver) = mpsc::channel(INPUTS_MAX);
        let inbox = Inbox { inputs, greetings };
        let view = core.view().clone();
        let limits = LinkLimits { versions, ..LinkLimits::default() };
        let identity = Identity { cluster: view.cluster, node: view.node.clone(), incarnation: view.incarnation };
        let (replies, outgoing) = (BTreeMap::new(), BTreeMap::new());
        let is_checkpoint_damaged = false;
        let mut shell = Shell {
            core,
            store,
            runs,
            reader,
            published,
            events,
            clock,
            replies,
            outgoing,
            is_checkpoint_damaged,
            failpoint,
        };
        // Nothing is sent before the start itself is durable: `boot` makes this process's ballots its own.
        let early = outputs.into_iter().partition::<Vec<_>, _>(|output| matches!(output, Output::Persist(_)));
        shell.carry_out_local(early.0)?;
        match Links::start(limits, network, identity, &listen, peers, inbox, shutdown.clone()).await {
            Ok(links) => {
                bound(Ok(links.address().to_string()));
                shell.run(links, early.1, requests, receiver, shutdown).await
            }
            Err(error) => {
                bound(Err(error));
                Ok(())
            }
        }
    };
    (handle, body)
}

/// Starts a node on a thread of its own; returns once its control port is bound. `shutdown` ends it.
pub fn start(parts: Parts, shutdown: CancellationToken) -> anyhow::Result<Running> {
    let node = parts.settings.node.clone();
    let (started, bound) = std::sync::mpsc::channel();
    let tell = move |address| {
        // Nobody waits any more when the start was given up.
        let _ = started.send(address);
    };
    let (handle, body) = prepare(parts, tell, shutdown);
    let name = format!("control-{node}");
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let outcome = runtime.block_on(body);
        if let Err(failure) = &outcome {
            error!("{failure:#}");
        }
        outcome
    })?;
    let control = match bound.recv() {
        Ok(bound) => bound.with_context(|| format!("node {node}"))?,
        Err(_) => {
            return match thread.join() {
                Ok(outcome) => outcome.and_then(|()| anyhow::bail!("node {node} ended before it began")),
                Err(panic) => std::panic::resume_unwind(panic),
            };
        }
    };
    info!(control, "control port open");
    Ok(Running { handle, control, thread })
}

struct Shell {
    core: Core,
    store: Box<dyn Store>,
    runs: Box<dyn RunStore>,
    reader: Arc<dyn LogReader>,
    published: Published,
    events: broadcast::Sender<Arc<Announcement>>,
    clock: Arc<dyn Clock>,
    replies: BTreeMap<RequestId, oneshot::Sender<Outcome>>,
    /// Checkpoints on their way to peers that lag.
    outgoing: BTreeMap<NodeId, Outgoing>,
    /// The checkpoint could not be read from disk when a peer needed it.
    is_checkpoint_damaged: bool,
    failpoint: Option<Failpoint>,
}

impl Shell {
    async fn run(
        mut self,
        links: Links,
        start: Vec<Output>,
        mut requests: NodeRequests,
        mut inputs: mpsc::Receiver<Input>,
        shutdown: CancellationToken,
    ) -> anyhow::Result<()> {
        self.carry_out(&links, start).await?;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut next_request = 0;
        loop {
            let input = tokio::select! {
                biased;
                () = shutdown.cancelled() => return Ok(()),
                _ = tick.tick() => Input::Tick,
                Some(input) = inputs.recv() => input,
                Some(request) = requests.recv() => self.input_of(request, &mut next_request),
            };
            let outputs = self.core.handle(self.clock.now(), input);
            self.carry_out(&links, outputs).await?;
        }
    }

    fn input_of(&mut self, request: NodeRequest, next: &mut u64) -> Input {
        *next += 1;
        let id = RequestId(*next);
        match request {
            NodeRequest::Submit { tx, actor, asked, reply } => {
                self.replies.insert(id, reply);
                Input::Operator(Command { request: id, tx, actor, asked })
            }
            NodeRequest::Read { reply } => {
                self.replies.insert(id, reply);
                Input::Read(id)
            }
            NodeRequest::Observed(observations) => Input::Telemetry(observations),
            NodeRequest::Measured(measurement) => Input::Measured(measurement),
            NodeRequest::Guarded(unavailable) => Input::Guarded(unavailable),
            NodeRequest::CircuitBreakerTripped { service, routing_version, reason } => {
                Input::CircuitBreakerTripped { service, routing_version, reason }
            }
        }
    }

    /// Carries out what needs no peer.
    fn carry_out_local(&mut self, outputs: Vec<Output>) -> anyhow::Result<()> {
        for output in outputs {
            if let Output::Persist(acceptor) = output {
                self.store.persist(&acceptor).context("the acceptor state can't be written")?;
            }
        }
        Ok(())
    }

    async fn carry_out(&mut self, links: &Links, outputs: Vec<Output>) -> anyhow::Result<()> {
        let mut unsent = false;
        let mut outputs = outputs.into_iter().peekable();
        while let Some(output) = outputs.next() {
            if self.failpoint.as_ref().is_some_and(|failpoint| failpoint.before(&output)) {
                die(unsent).await;
            }
            let dies = self.failpoint.as_ref().is_some_and(|failpoint| failpoint.after(&output, outputs.peek()));
            match output {
                Output::Send { to, message } => {
                    links.send(&to, *message);
                    unsent = true;
                }
                Output::Persist(acceptor) => {
                    if std::mem::take(&mut unsent) {
                        // Lets the links write first: peers work while this node's disk does.
                        tokio::task::yield_now().await;
                    }
                    self.store.persist(&acceptor).context("the acceptor state can't be written")?;
                    links.set_incarnation(acceptor.incarnation);
                }
                Output::Append(chosen) => self.store.append(&chosen).context("the log can't be written")?,
                Output::Checkpoint { checkpoint, keep_from } => {
                    self.write_checkpoint(&checkpoint, keep_from)?;
                }
                Output::Install(checkpoint) => {
                    self.store.install(&checkpoint).context("a peer's checkpoint can't be written")?;
                    info!(slot = %checkpoint.slot, bytes = checkpoint.bytes.len(), "a peer's checkpoint taken in");
                }
                Output::SendLog { to, from, through } => {
                    self.send_log(links, &to, from, through)?;
                    unsent = true;
                }
                Output::SaveRun(service, run) => self.runs.save(&service, run),
                Output::Publish(view) => self.published.publish(view),
                Output::Lease(from) => self.published.set_lease(from),
                Output::Reply(request, outcome) => {
                    if let Some(reply) = self.replies.remove(&request) {
                        // The client may have gone.
                        let _ = reply.send(outcome);
                    }
                }
                Output::Announce(event) => {
                    let announcement = Announcement::new(event, self.clock.now().wall, &self.core.view().node);
                    super::log::write(&announcement);
                    // Nobody may be listening.
                    let _ = self.events.send(Arc::new(announcement));
                }
            }
            if dies {
                die(unsent).await;
            }
        }
        self.mend_checkpoint()
    }

    /// Puts the sum of the log, as the core knows it, in the place of a checkpoint that is damaged on disk, once everything is
    /// appended that it sums up. A peer that needs it asks again.
    fn mend_checkpoint(&mut self) -> anyhow::Result<()> {
        if std::mem::take(&mut self.is_checkpoint_damaged)
            && let Some((checkpoint, keep_from)) = self.core.checkpoint()
        {
            self.write_checkpoint(&checkpoint, keep_from)?;
        }
        Ok(())
    }

    fn write_checkpoint(&mut self, checkpoint: &Checkpoint, keep_from: Slot) -> anyhow::Result<()> {
        self.store.checkpoint(checkpoint, keep_from).context("the checkpoint can't be written")?;
        info!(slot = %checkpoint.slot, bytes = checkpoint.bytes.len(), "checkpoint written");
        Ok(())
    }

    fn send_log(&mut self, links: &Links, to: &NodeId, from: Slot, through: Slot) -> anyhow::Result<()> {
        let most = through.0.saturating_sub(from.0) + 1;
        let records = self.reader.read(from, most as usize).context("the log can't be read")?;
        if records.first().is_none_or(|first| first.record.slot != from) {
            // What the peer needs next is gone: it gets the sum, and asks for what follows by itself.
            let checkpoint = match self.reader.checkpoint() {
                Ok(checkpoint) => checkpoint,
                Err(failure) => {
                    error!(peer = %to, %failure, "the checkpoint can't be read: it is written again");
                    self.is_checkpoint_damaged = true;
                    return Ok(());
                }
            };
            let outgoing = self.outgoing.entry(to.clone()).or_default();
            for part in checkpoint.iter().flat_map(|checkpoint| outgoing.turn(checkpoint)) {
                links.send(to, Message::Decision(Decision::Checkpoint(part)));
            }
            return Ok(());
        }
        for chosen in records {
            links.send(to, Message::Decision(Decision::CatchUp(Box::new(chosen))));
        }
        Ok(())
    }
}

/// Aborts the process, once the links have written what was handed to them.
async fn die(unsent: bool) {
    if unsent {
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
    }
    std::process::abort();
}
