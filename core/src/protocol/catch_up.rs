//! How a node gets what was decided without it: records from a peer's log in their order, or a peer's checkpoint.

use std::collections::BTreeMap;

use crate::domain::ids::{Incarnation, NodeId};

use super::context::{CATCH_UP_RECORDS, Context};
use super::log::checkpoint::{Checkpoint, Incoming, Part};
use super::log::ledger::Ledger;
use super::log::record::{Chosen, Slot};

/// What came in before it could be used.
#[derive(Debug, Clone, Default)]
pub(super) struct CatchUp {
    /// Chosen records that came before their predecessors.
    early: BTreeMap<Slot, Chosen>,
    /// A peer's checkpoint, as far as it came.
    incoming: Incoming,
}

impl CatchUp {
    /// Returns the chosen records that wait for their predecessors.
    pub fn early(&self) -> &BTreeMap<Slot, Chosen> {
        &self.early
    }

    /// Takes in a chosen record; returns it when it is the next one to learn. `catch_up`: the sender was asked for it.
    pub fn take(
        &mut self,
        ctx: &mut Context,
        from: &NodeId,
        incarnation: Incarnation,
        chosen: Chosen,
        catch_up: bool,
    ) -> Option<Chosen> {
        let (slot, head) = (chosen.record.slot, ctx.ledger.head);
        if let Some(peer) = ctx.peers.get_mut(from) {
            peer.head = peer.head.max(Some(slot));
        }
        if slot == head {
            assert_eq!(chosen.record.hash(), ctx.ledger.head_hash, "I1: one record in slot {slot}");
            if chosen.is_in_doubt() && ctx.ledger.mark_in_doubt(slot) {
                ctx.outdated.all = true;
            }
            return None;
        }
        if slot < head || !ctx.counts(from, incarnation) && !catch_up {
            return None;
        }
        if slot > head.next() {
            ctx.beat_to(from);
            if slot.0 - head.0 <= 2 * CATCH_UP_RECORDS {
                self.early.insert(slot, chosen);
            }
            return None;
        }
        Some(chosen)
    }

    /// Returns the record that follows the last one learned, if it came already.
    pub fn next(&mut self, ctx: &Context) -> Option<Chosen> {
        self.forget(ctx.ledger.head);
        self.early.remove(&ctx.ledger.head.next())
    }

    /// Forgets records of slots that are known to be decided.
    pub fn forget(&mut self, decided: Slot) {
        self.early.retain(|early, _| *early > decided);
    }

    /// Asks a peer for its next records once a batch of them is learned.
    pub fn ask_for_more(&self, ctx: &mut Context, from: &NodeId) {
        let slot = ctx.ledger.head;
        let behind = ctx.peers.get(from).is_some_and(|peer| peer.head > Some(slot));
        if behind && (slot.0 + 1).is_multiple_of(CATCH_UP_RECORDS) {
            ctx.beat_to(from);
        }
    }

    /// Takes in a part of a peer's checkpoint; returns it, and the ledger in it, when it was the last one missing.
    pub fn take_part(&mut self, ctx: &mut Context, from: &NodeId, part: Part) -> Option<(Checkpoint, Ledger)> {
        if part.slot <= ctx.ledger.head {
            return None;
        }
        let checkpoint = self.incoming.take(part)?;
        match checkpoint.ledger() {
            Ok(ledger) if ledger.cluster == ctx.settings.cluster => return Some((checkpoint, ledger)),
            Ok(ledger) => ctx.reject(from, format!("its checkpoint is of cluster {}", ledger.cluster)),
            Err(error) => ctx.reject(from, format!("its checkpoint: {error}")),
        };
        None
    }
}
