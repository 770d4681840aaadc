//! What the log adds up to: who votes, every service as agreed, and the outcome of every transaction.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::domain::apply::check_stable;
use crate::domain::ids::{ClusterId, Incarnation, NodeId, ServiceId, TxId};
use crate::domain::plan::Manifest;
use crate::domain::rollout::{Change, ChangeError, Phase, Service, Stamp};
use crate::domain::routing::RoutingState;
use crate::domain::run::WindowVerdict;
use crate::domain::time::Wall;
use crate::protocol::feature::Feature;

use super::codec;
use super::record::{
    Accepted, Chosen, ConfigChange, Hash, Initiator, Intent, Member, Members, Operation, Record, ServiceVerdict, Slot,
    TransactionKey, VERDICTS_MAX,
};

/// Transactions whose outcome is remembered: those of this many last slots. A key that comes back later than that is
/// a new transaction.
pub const SETTLED_MAX: usize = 16_384;

/// Most bytes of an encoded ledger: what can be read back from disk and from a peer. The other bounds follow from it.
pub const LEDGER_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Most services that a cluster knows.
pub const SERVICES_MAX: usize = 10_000;
/// Most bytes that the rollouts of all services may need in the ledger: half of [`LEDGER_BYTES_MAX`]. The other half
/// is for what needs no permission to grow: the outcomes of transactions, and each service's state and reasons.
pub const SPECS_BYTES_MAX: usize = LEDGER_BYTES_MAX / 2;

/// How a transaction ended, kept for clients that repeat its key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    /// Slot of the transaction's only record.
    pub slot: Slot,
    /// Fingerprint of the request, to refuse another one with the same key.
    pub digest: u64,
    /// Who refused and why; none when it was committed.
    pub refused: Option<Vec<String>>,
}

/// State of one service, and the record that led to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceState {
    /// State after the service's last change.
    pub service: Service,
    /// The last record that concerned it.
    pub slot: Slot,
    /// Hash of the record that led to the state.
    pub hash: Hash,
    /// The last rise in exposure, while nothing has lowered it since.
    pub increase: Option<Increase>,
    /// The windows of its rollout are decided up to here, in milliseconds since its start.
    pub decided_ms: u64,
}

/// A rise in exposure that could still be undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Increase {
    /// Slot of the increase.
    pub slot: Slot,
    /// State of the service before the increase.
    pub before: Service,
    /// True when it was decided in doubt: no node routes with it.
    pub in_doubt: bool,
}

/// Why a record can't be the next one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The record is not for the next slot.
    #[error("record is for slot {found}, expected slot {expected}")]
    Slot {
        /// Slot after the ledger's head.
        expected: Slot,
        /// Slot that the record is for.
        found: Slot,
    },
    /// The record continues another history.
    #[error("record follows {found}, expected {expected}")]
    History {
        /// Hash of the ledger's head.
        expected: Hash,
        /// Hash that the record names as its predecessor's.
        found: Hash,
    },
    /// The transaction has its outcome already.
    #[error("transaction {tx} is settled in slot {slot}, expected one that is not in the log")]
    Settled {
        /// Transaction that is decided already.
        tx: TxId,
        /// Slot of its record.
        slot: Slot,
    },
    /// The change can't be made.
    #[error(transparent)]
    Change(#[from] ChangeError),
    /// Verdicts that aren't ordered by service, or too few or too many of them.
    #[error("a record of {found} verdicts, expected 1 to {} of different services, ordered by service", VERDICTS_MAX.0)]
    Verdicts {
        /// How many there are.
        found: usize,
    },
    /// The verdict's rollout isn't under way.
    #[error("a verdict of {service} on rollout generation {found}, expected the one under way")]
    NoRollout {
        /// The service.
        service: ServiceId,
        /// The routing version that the verdict's rollout began with.
        found: u64,
    },
    /// Not the window that is next to be decided.
    #[error("window {} to {} ms of {service}, expected one from {expected} ms on that ends with a window", found.0, found.1)]
    Window {
        /// The service.
        service: ServiceId,
        /// Where the next one begins, in milliseconds since the rollout's start.
        expected: u64,
        /// The verdict's beginning and end.
        found: (u64, u64),
    },
    /// There is nothing to revert.
    #[error("slot {0} is not the last increase of its service, expected one that can be reverted")]
    NoIncrease(Slot),
    /// The membership change can't be made.
    #[error("node {0} {1}")]
    Member(NodeId, &'static str),
    /// The state doesn't follow from the change.
    #[error("the record's state is not what its change leads to")]
    State,
    /// A voter's Yes is missing.
    #[error("no Yes of {0} in the certificate, expected every gate voter's")]
    Certificate(String),
    /// The record starts a rollout of one service too many.
    #[error("service {service} would be one of {found} services, expected at most {SERVICES_MAX}")]
    Services {
        /// The service that a rollout would add.
        service: ServiceId,
        /// The services that the cluster would know.
        found: usize,
    },
    /// The ledger would become larger than a checkpoint that can be read back.
    #[error("the rollouts of all services would need {found} bytes, expected at most {SPECS_BYTES_MAX}")]
    Bytes {
        /// The bytes that they would need.
        found: usize,
    },
    /// The service is the default already.
    #[error("service {0} is the default already")]
    Default(ServiceId),
    /// A genesis record at a slot other than 0.
    #[error("a genesis record at slot {0}, expected it at slot 0 only")]
    Genesis(Slot),
}

/// The sum of a log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// Cluster that the log belongs to.
    pub cluster: ClusterId,
    /// Slot of the last record.
    pub head: Slot,
    /// Hash of the last record.
    pub head_hash: Hash,
    /// Members of the cluster: the voters.
    pub members: Members,
    /// Incarnations that another one replaced. What such a disk promised since is on another disk, or nowhere: its votes
    /// never count again.
    retired: BTreeSet<(NodeId, Incarnation)>,
    /// Services that the log knows, by name.
    pub services: BTreeMap<ServiceId, ServiceState>,
    /// The outcomes of the last [`SETTLED_MAX`] transactions.
    pub settled: BTreeMap<TransactionKey, Settled>,
    /// The same transactions, oldest first.
    order: VecDeque<TransactionKey>,
    /// The last record that lowered some exposure; slot 0 when none did.
    pub last_decrease: Slot,
    /// Bytes that the rollouts of all services need, as [`bytes_of`] counts them. Known from `services`, so not encoded.
    #[serde(skip)]
    specs_bytes: usize,
    /// The service that gets the requests that name none, once a record said so. Encoded beside the rest, from format 4 of a
    /// checkpoint on.
    #[serde(skip)]
    pub(super) set_default: Option<ServiceId>,
}

/// Returns the bytes that a rollout may need in the ledger: its service holds it twice while its last increase can be
/// undone.
fn bytes_of(spec: &Manifest) -> usize {
    2 * codec::encode(spec).len()
}

/// What an act leads to.
enum Effect {
    Nothing,
    Service(Box<Service>),
    /// The service stays as it is; the transaction's own status is ABORTED.
    Refused(Box<RoutingState>, Phase),
    Members(Members),
    /// The windows of these services are decided up to here.
    Judged(Vec<(ServiceId, u64)>),
    /// Requests that name no service go to this one.
    Default(ServiceId),
}

impl Effect {
    /// Returns the routing and the phase that a record of it holds.
    fn state(&self) -> (Option<&RoutingState>, Option<Phase>) {
        match self {
            Self::Service(service) => (Some(&service.routing), Some(service.rollout.phase)),
            Self::Refused(routing, phase) => (Some(routing), Some(*phase)),
            Self::Nothing | Self::Members(_) | Self::Judged(_) | Self::Default(_) => (None, None),
        }
    }
}

impl Ledger {
    /// Returns the sum of a log that holds only its genesis; none when `genesis` isn't one.
    pub fn new(genesis: &Chosen) -> Option<Self> {
        let Record { slot: Slot(0), intent: Intent { operation: Operation::Genesis { cluster, members }, .. }, .. } =
            &genesis.record
        else {
            return None;
        };
        Some(Self {
            cluster: *cluster,
            head: Slot(0),
            head_hash: genesis.record.hash(),
            members: members.clone(),
            retired: BTreeSet::new(),
            services: BTreeMap::new(),
            settled: BTreeMap::new(),
            order: VecDeque::new(),
            last_decrease: Slot(0),
            specs_bytes: 0,
            set_default: None,
        })
    }

    /// Returns the service that gets the requests that name none: the one that a record named, before that the first by name.
    pub fn default_service(&self) -> Option<&ServiceId> {
        self.set_default.as_ref().or_else(|| self.services.keys().next())
    }

    /// Returns true once a record said which service is the default.
    pub fn is_default_set(&self) -> bool {
        self.set_default.is_some()
    }

    /// Returns the features that the log made use of: a build that doesn't know one of them can't go on from it.
    pub fn uses(&self) -> Vec<Feature> {
        Feature::ALL
            .into_iter()
            .filter(|feature| match feature {
                Feature::DefaultService => self.is_default_set(),
                // Older builds keep the rollout as it is, and give its canary no traffic.
                Feature::RolloutSalt => false,
            })
            .collect()
    }

    /// Returns a decoded ledger with what isn't encoded.
    pub(super) fn measured(mut self) -> Self {
        self.specs_bytes =
            self.services.values().map(|service_state| bytes_of(&service_state.service.rollout.spec)).sum();
        self
    }

    /// Returns the record that `intent` makes next, or why it can't be proposed.
    pub fn next_record(
        &self,
        intent: Intent,
        certificate: Option<super::record::Certificate>,
    ) -> Result<Record, RecordError> {
        self.check_start(&intent.operation)?;
        self.record_of(intent, certificate)
    }

    /// Checks that a voter may accept a proposed record: it may be the next one, and what it starts may start.
    pub fn check_proposal(&self, record: &Record) -> Result<(), RecordError> {
        self.check(record)?;
        self.check_start(&record.intent.operation)
    }

    /// Checks that a rollout leaves stable's traffic where it is, and that the ledger stays small enough to be read back.
    /// Only proposals are held to that: what is chosen already must be taken in, whatever the rules were when it was.
    fn check_start(&self, operation: &Operation) -> Result<(), RecordError> {
        let Operation::Change(id, Change::Start(spec)) = operation else { return Ok(()) };
        let known = self.service(id);
        if let Some(service) = known.filter(|service| !service.rollout.phase.is_active()) {
            check_stable(&service.stable, &spec.stable)?;
        }
        let found = self.services.len() + 1;
        if known.is_none() && found > SERVICES_MAX {
            return Err(RecordError::Services { service: id.clone(), found });
        }
        let before = known.map_or(0, |service| bytes_of(&service.rollout.spec));
        let found = self.specs_bytes - before + bytes_of(spec);
        // A rollout that needs no more than the one before is always allowed.
        if found > SPECS_BYTES_MAX && found > self.specs_bytes {
            return Err(RecordError::Bytes { found });
        }
        Ok(())
    }

    fn record_of(
        &self,
        intent: Intent,
        certificate: Option<super::record::Certificate>,
    ) -> Result<Record, RecordError> {
        let effect = self.effect(&intent)?;
        let (state, phase) = effect.state();
        let (slot, prev_hash, state) = (self.head.next(), self.head_hash, state.cloned());
        Ok(Record { slot, prev_hash, intent, state, phase, certificate })
    }

    /// Checks that `record` may be the next one: position, history, one outcome per transaction, the state that its
    /// change leads to, and every gate voter's Yes where exposure rises.
    pub fn check(&self, record: &Record) -> Result<(), RecordError> {
        self.checked(record).map(drop)
    }

    fn checked(&self, record: &Record) -> Result<Effect, RecordError> {
        let expected = self.head.next();
        if record.slot != expected {
            return Err(RecordError::Slot { expected, found: record.slot });
        }
        if record.prev_hash != self.head_hash {
            return Err(RecordError::History { expected: self.head_hash, found: record.prev_hash });
        }
        if let Some(settled) = self.settled.get(&record.intent.key()) {
            return Err(RecordError::Settled { tx: record.intent.tx.clone(), slot: settled.slot });
        }
        if record.intent.operation.increases_exposure() {
            let yes = record.certificate.as_ref().map(|c| &c.yes);
            let missing: Vec<_> = self
                .members
                .gate_voters()
                .filter(|node| !yes.is_some_and(|yes| yes.contains_key(*node)))
                .map(NodeId::as_str)
                .collect();
            if !missing.is_empty() || yes.is_none_or(BTreeMap::is_empty) {
                return Err(RecordError::Certificate(missing.join(", ")));
            }
        }
        let effect = self.effect(&record.intent)?;
        match effect.state() == (record.state.as_ref(), record.phase) {
            true => Ok(effect),
            false => Err(RecordError::State),
        }
    }

    /// Adds a chosen record, if it continues the log.
    pub fn apply(&mut self, chosen: &Chosen) -> Result<(), RecordError> {
        let record = &chosen.record;
        let effect = self.checked(record)?;
        let hash = record.hash();
        let operation = &record.intent.operation;
        match (effect, operation.service()) {
            (Effect::Service(service), Some(id)) => {
                let increase = self.increase_after(chosen, &service);
                let since = service.rollout.rollout_generation;
                let before = self
                    .services
                    .get(id)
                    .filter(|service_state| service_state.service.rollout.rollout_generation == since);
                let decided_ms = before.map_or(0, |service_state| service_state.decided_ms);
                let service_state = ServiceState { service: *service, slot: record.slot, hash, increase, decided_ms };
                self.put(id, service_state);
            }
            (Effect::Judged(services), _) => {
                for (id, until) in services {
                    self.services.get_mut(&id).expect("a service whose window was just checked").decided_ms = until;
                }
            }
            (Effect::Members(members), _) => {
                for (node, member) in std::mem::replace(&mut self.members, members).0 {
                    if !self.members.counts(&node, member.incarnation) {
                        self.retired.insert((node, member.incarnation));
                    }
                }
            }
            (Effect::Default(service), _) => self.set_default = Some(service),
            (Effect::Refused(..), Some(id)) => {
                let service_state = self.services.get_mut(id).expect("a service that was just looked up");
                (service_state.slot, service_state.hash) = (record.slot, hash);
            }
            (Effect::Nothing, _) | (Effect::Service(_) | Effect::Refused(..), None) => {}
        }
        let refused = match operation {
            Operation::Refused { reasons, .. } => Some(reasons.clone()),
            _ => None,
        };
        // A window can't be decided again in any case: it needs no room among the outcomes that clients may ask for.
        if !operation.is_verdict() {
            let settled = Settled { slot: record.slot, digest: record.intent.digest, refused };
            self.settled.insert(record.intent.key(), settled);
            self.order.push_back(record.intent.key());
        }
        if self.order.len() > SETTLED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.settled.remove(&oldest);
        }
        if operation.decreases_exposure() {
            self.last_decrease = record.slot;
        }
        self.head = record.slot;
        self.head_hash = hash;
        Ok(())
    }

    fn put(&mut self, id: &ServiceId, service_state: ServiceState) {
        let spec = service_state.service.rollout.spec.clone();
        match self.services.insert(id.clone(), service_state) {
            Some(before) if before.service.rollout.spec == spec => {}
            before => {
                let before = before.map_or(0, |before| bytes_of(&before.service.rollout.spec));
                self.specs_bytes = self.specs_bytes - before + bytes_of(&spec);
            }
        }
    }

    /// Returns what another cluster begins with that takes over from this log, which lost its majority: the same services,
    /// all of their traffic on stable, other members and another id.
    pub fn refounded(self, cluster: ClusterId, members: Members, at: Wall) -> Result<Self, RecordError> {
        self.continued(cluster, members, at, "the cluster was founded anew from one node")
    }

    /// Returns what another cluster begins with that is restored from this log's backup: the same services with all of their
    /// traffic on stable, because the evidence for a canary is gone; other members and another id; and no outcome of a
    /// transaction, because only the old cluster's clients know those ids. `source` names the backup.
    pub fn restored(self, cluster: ClusterId, members: Members, at: Wall, source: &str) -> Result<Self, RecordError> {
        let mut ledger = self.continued(cluster, members, at, &format!("restored from {source}"))?;
        ledger.settled.clear();
        ledger.order.clear();
        Ok(ledger)
    }

    /// Ends every rollout that is under way, and puts another cluster's id and members in place.
    fn continued(mut self, cluster: ClusterId, members: Members, at: Wall, reason: &str) -> Result<Self, RecordError> {
        let active =
            self.services.iter().filter(|(_, service_state)| service_state.service.routing.canary_model_id.is_some());
        for (number, id) in active.map(|(id, _)| id.clone()).collect::<Vec<_>>().into_iter().enumerate() {
            let tx = TxId::new(format!("refound-{cluster}-{number}")).expect("made of id characters");
            let intent = Intent {
                initiator: Initiator::Node,
                tx,
                actor: "force-new".into(),
                digest: 0,
                at,
                operation: Operation::Change(id, Change::Rollback { reason: reason.to_string() }),
            };
            let record = self.next_record(intent, None)?;
            self.apply(&Chosen { ballot: None, decided_at: at, record })?;
        }
        self.cluster = cluster;
        self.members = members;
        self.retired.clear();
        Ok(self)
    }

    /// Records that the increase at `slot`, if it is still some service's last, was completed by a later ballot.
    /// Returns true when that is news.
    pub fn mark_in_doubt(&mut self, slot: Slot) -> bool {
        let increases = self.services.values_mut().filter_map(|service_state| service_state.increase.as_mut());
        increases
            .filter(|increase| increase.slot == slot && !increase.in_doubt)
            .map(|increase| increase.in_doubt = true)
            .count()
            > 0
    }

    /// Returns the first raise that was decided in doubt and not undone.
    pub fn in_doubt(&self) -> Option<(&ServiceId, &Increase)> {
        self.services.iter().find_map(|(id, service_state)| {
            Some((id, service_state.increase.as_ref().filter(|increase| increase.in_doubt)?))
        })
    }

    /// Returns true when accepting this record means that some node must serve less.
    pub fn decrease_in(accepted: Option<&Accepted>) -> Option<Slot> {
        accepted.filter(|a| a.record.intent.operation.decreases_exposure()).map(|a| a.record.slot)
    }

    fn effect(&self, intent: &Intent) -> Result<Effect, RecordError> {
        let stamp = Stamp { tx: intent.tx.clone(), at: intent.at };
        let service = |service| Ok(Effect::Service(Box::new(service)));
        match &intent.operation {
            Operation::Genesis { .. } => Err(RecordError::Genesis(self.head.next())),
            Operation::Change(id, change) => {
                if matches!(change, Change::Start(spec) if &spec.service != id) {
                    return Err(RecordError::State);
                }
                service(Service::after(self.service(id), id, change, &stamp)?)
            }
            Operation::Revert { service: id, increased, reason } => {
                let service_state = self.services.get(id).ok_or(RecordError::NoIncrease(*increased))?;
                match &service_state.increase {
                    Some(increase) if increase.slot == *increased => {
                        service(increase.before.restored(service_state.service.routing.version, reason, &stamp))
                    }
                    _ => Err(RecordError::NoIncrease(*increased)),
                }
            }
            Operation::Refused { service: id, .. } => match id.as_ref().and_then(|id| self.service(id)) {
                Some(current) => Ok(Effect::Refused(Box::new(current.refused(&stamp)), current.rollout.phase)),
                None => Ok(Effect::Nothing),
            },
            Operation::Config(change) => Ok(Effect::Members(self.members_after(change)?)),
            Operation::SetDefault(id) if self.service(id).is_none() => {
                Err(ChangeError::UnknownService(id.clone()).into())
            }
            Operation::SetDefault(id) if self.set_default.as_ref() == Some(id) => Err(RecordError::Default(id.clone())),
            Operation::SetDefault(id) => Ok(Effect::Default(id.clone())),
            Operation::Verdicts(verdicts) => {
                let is_in_order = verdicts.windows(2).all(|pair| pair[0].routing.service < pair[1].routing.service);
                if verdicts.is_empty() || verdicts.len() > VERDICTS_MAX.0 || !is_in_order {
                    return Err(RecordError::Verdicts { found: verdicts.len() });
                }
                verdicts.iter().map(|verdict| self.judged(verdict)).collect::<Result<_, _>>().map(Effect::Judged)
            }
        }
    }

    /// Returns how far the windows of a service are decided by this verdict, or why it can't be the next one.
    fn judged(&self, verdict: &ServiceVerdict) -> Result<(ServiceId, u64), RecordError> {
        let ServiceVerdict { routing, rollout_generation, window_verdict } = verdict;
        let WindowVerdict { from_ms, to_ms, .. } = window_verdict;
        let known = self.services.get(&routing.service);
        let active = known.filter(|service_state| service_state.service.rollout.phase.is_active());
        let Some(ServiceState { service, decided_ms, .. }) =
            active.filter(|known| known.service.rollout.rollout_generation == *rollout_generation)
        else {
            return Err(RecordError::NoRollout { service: routing.service.clone(), found: *rollout_generation });
        };
        if service.routing != *routing {
            return Err(RecordError::State);
        }
        let length = service.rollout.spec.analysis.window_ms;
        match from_ms == decided_ms && to_ms > from_ms && to_ms % length == 0 {
            true => Ok((routing.service.clone(), *to_ms)),
            false => Err(RecordError::Window {
                service: routing.service.clone(),
                expected: *decided_ms,
                found: (*from_ms, *to_ms),
            }),
        }
    }

    fn service(&self, id: &ServiceId) -> Option<&Service> {
        self.services.get(id).map(|service_state| &service_state.service)
    }

    fn increase_after(&self, chosen: &Chosen, after: &Service) -> Option<Increase> {
        let operation = &chosen.record.intent.operation;
        let current = operation.service().and_then(|id| self.services.get(id));
        if operation.increases_exposure() {
            let stamp = Stamp { tx: chosen.record.intent.tx.clone(), at: chosen.record.intent.at };
            let before = match (current, operation) {
                // A retried or new rollout of a known service falls back to the service as it was, with the new
                // rollout on record, so that `retry` starts that one.
                (Some(current), Operation::Change(_, Change::Start(spec))) => {
                    Service::before_start(Some(&current.service), spec, &stamp)
                }
                (Some(current), _) => current.service.clone(),
                (None, _) => Service::before_start(None, &after.rollout.spec, &stamp),
            };
            return Some(Increase { slot: chosen.record.slot, before, in_doubt: chosen.is_in_doubt() });
        }
        match operation {
            Operation::Refused { .. } | Operation::Change(_, Change::Pause { .. } | Change::Resume) => {
                current?.increase.clone()
            }
            // A change of the weights by itself; the others concern no service's weights.
            Operation::Change(..)
            | Operation::Revert { .. }
            | Operation::Genesis { .. }
            | Operation::Config(_)
            | Operation::SetDefault(_)
            | Operation::Verdicts(_) => None,
        }
    }

    fn members_after(&self, change: &ConfigChange) -> Result<Members, RecordError> {
        let mut members = self.members.clone();
        let node = change.node();
        let error = |why| Err(RecordError::Member(node.clone(), why));
        let retired = |incarnation: &Incarnation| self.retired.contains(&(node.clone(), *incarnation));
        let member = members.0.get(node).copied();
        let next = match (change, member) {
            (ConfigChange::Add(..), Some(_)) => return error("is a member already"),
            (ConfigChange::Add(_, incarnation) | ConfigChange::Readmit(_, incarnation), _) if retired(incarnation) => {
                return error("had that incarnation before: an old disk never counts again");
            }
            (ConfigChange::Add(_, incarnation), None) => Some(Member { incarnation: *incarnation, cordoned: false }),
            (_, None) => return error("is not a member, expected one of the cluster's"),
            (ConfigChange::Cordon(_), Some(member)) if member.cordoned => return error("is cordoned already"),
            (ConfigChange::Uncordon(_), Some(member)) if !member.cordoned => return error("is not cordoned"),
            (ConfigChange::Readmit(_, incarnation), Some(member)) if member.incarnation == *incarnation => {
                return error("has that incarnation already");
            }
            (ConfigChange::Cordon(_), Some(member)) => Some(Member { cordoned: true, ..member }),
            (ConfigChange::Uncordon(_), Some(member)) => Some(Member { cordoned: false, ..member }),
            (ConfigChange::Readmit(_, incarnation), Some(member)) => {
                Some(Member { incarnation: *incarnation, ..member })
            }
            // The one that stays could not settle the removal alone, should it not have heard that it was decided.
            (ConfigChange::Remove(_), Some(_)) if members.0.len() == 2 => {
                return error(
                    "is one of the last two: stop it, and found a cluster of one with `aviary cluster force-new`",
                );
            }
            (ConfigChange::Remove(_), Some(_)) => None,
        };
        match next {
            Some(member) => drop(members.0.insert(node.clone(), member)),
            None => drop(members.0.remove(node)),
        }
        if members.gate_voters().next().is_none() {
            return Err(RecordError::Member(node.clone(), "is the last gate voter, expected one to remain"));
        }
        Ok(members)
    }
}
