//! What is published: the view of all services, made anew where something changed.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::domain::ids::{Incarnation, NodeId, ServiceId};
use crate::domain::time::Mono;

use super::Output;
use super::context::{Context, Outdated};
use super::message::Membership;
use super::view::{MemberView, OutsiderView, ServiceView, View};

/// Shortest time between two publications that only refresh evidence.
const REFRESH_MS: u64 = 250;

/// The last published view, and what the next one shows of each service.
#[derive(Debug, Clone)]
pub(super) struct Publisher {
    shown: Arc<BTreeMap<ServiceId, Arc<ServiceView>>>,
    refreshed_at: Mono,
    view: Arc<View>,
}

impl Publisher {
    /// Returns a publisher that published nothing yet.
    pub fn new(ctx: &Context) -> Self {
        let view = View {
            node: ctx.settings.node.clone(),
            cluster: ctx.settings.cluster,
            incarnation: ctx.acceptor.incarnation,
            membership: Membership::Learner,
            head: ctx.ledger.head,
            head_hash: ctx.ledger.head_hash,
            coordinator: ctx.coordinator.clone(),
            members: BTreeMap::new(),
            outsiders: BTreeMap::new(),
            open: None,
            default_service: None,
            uses: Vec::new(),
            services: Arc::default(),
        };
        Self { shown: Arc::default(), refreshed_at: ctx.now.mono, view: Arc::new(view) }
    }

    /// Returns the latest published view.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// Returns true when something changed, or the evidence shown is old.
    pub fn is_due(&self, ctx: &Context) -> bool {
        let Outdated { cluster, all, services, .. } = &ctx.outdated;
        *cluster || *all || !services.is_empty() || self.is_old(ctx)
    }

    fn is_old(&self, ctx: &Context) -> bool {
        ctx.now.mono.millis_since(self.refreshed_at) >= REFRESH_MS
    }

    /// Returns the services that must be shown anew before the next publication.
    pub fn take_outdated(&mut self, ctx: &mut Context) -> Vec<ServiceId> {
        let Outdated { all, services, mut evidence, .. } = std::mem::take(&mut ctx.outdated);
        if !all && !self.is_old(ctx) {
            ctx.outdated.evidence = evidence;
            return services.into_iter().collect();
        }
        self.refreshed_at = ctx.now.mono;
        if !all {
            evidence.extend(services);
            return evidence.into_iter().collect();
        }
        if self.shown.keys().any(|id| !ctx.ledger.services.contains_key(id)) {
            Arc::make_mut(&mut self.shown).retain(|id, _| ctx.ledger.services.contains_key(id));
        }
        ctx.ledger.services.keys().cloned().collect()
    }

    /// Shows a service like this from the next publication on.
    pub fn show(&mut self, id: &ServiceId, view: ServiceView) {
        // The map is copied once for all that change until the next publication.
        if self.shown.get(id).is_none_or(|shown| **shown != view) {
            Arc::make_mut(&mut self.shown).insert(id.clone(), Arc::new(view));
        }
    }

    /// Publishes what this node routes with, at this point of the outputs, if it isn't what was published last.
    pub fn publish(&mut self, ctx: &mut Context) {
        let view = Arc::new(self.build(ctx));
        if *view != *self.view {
            self.view = view.clone();
            ctx.put(Output::Publish(view));
        }
    }

    fn build(&self, ctx: &Context) -> View {
        let members = ctx.ledger.members.0.iter().map(|(node, member)| {
            let head = match *node == ctx.settings.node {
                true => Some(ctx.ledger.head),
                false => ctx.peers.get(node).and_then(|peer| peer.head),
            };
            let view = MemberView {
                incarnation: member.incarnation,
                cordoned: member.cordoned,
                alive: ctx.is_alive(node),
                head,
                counts_not: counts_not(ctx, node, member.incarnation),
            };
            (node.clone(), view)
        });
        let outside = ctx.peers.iter().filter(|(node, _)| !ctx.ledger.members.0.contains_key(*node));
        let outsiders = outside.filter_map(|(node, peer)| {
            let view = OutsiderView { incarnation: peer.incarnation?, alive: ctx.is_alive(node), head: peer.head };
            Some((node.clone(), view))
        });
        View {
            node: ctx.settings.node.clone(),
            cluster: ctx.settings.cluster,
            incarnation: ctx.acceptor.incarnation,
            membership: ctx.membership(),
            head: ctx.ledger.head,
            head_hash: ctx.ledger.head_hash,
            coordinator: ctx.coordinator.clone(),
            members: members.collect(),
            outsiders: outsiders.collect(),
            open: ctx.open_slot(),
            default_service: ctx.ledger.default_service().cloned(),
            uses: ctx.ledger.uses(),
            services: self.shown.clone(),
        }
    }
}

/// Returns why a member's vote doesn't count; none when it does.
fn counts_not(ctx: &Context, node: &NodeId, bound: Incarnation) -> Option<String> {
    let own = *node == ctx.settings.node;
    let found = if own { Some(ctx.acceptor.incarnation) } else { ctx.peers.get(node)?.incarnation };
    let membership = if own { Some(ctx.membership()) } else { ctx.peers.get(node)?.membership };
    match found {
        Some(found) if found != bound => Some(format!(
            "its memory is gone: incarnation is {found}, expected {bound}; run `aviary cluster readmit {node} --incarnation {found}`"
        )),
        Some(_) if membership == Some(Membership::Learner) => Some("it is rebuilding its log from its peers".into()),
        _ => None,
    }
}
