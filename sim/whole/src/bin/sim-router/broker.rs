//! The broker that routers share: topics, groups, and producers of which only the newest can write.
//!
//! Nothing goes wrong in here: faults are what is between it and a router (`faulty`).

use std::collections::BTreeMap;

use aviary::ports::{Assignment, Commit, Opened, OutsideError, Place, RebuiltPlace, SourceRecord, Topic};
use aviary_core::domain::side::Side;

use super::log::{Fate, Log};
use sim::dice::Dice;

/// A record of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Item {
    /// Key of the record; none for records without one.
    pub key: Option<&'static [u8]>,
    /// Its partition and offset in the source.
    pub origin: (usize, i64),
    /// The weight's number that its router wrote beside it.
    pub weight_version: u64,
}

/// What all routers and services see.
pub struct MemoryBroker {
    /// What became of each transaction, of routers and of others.
    pub fates: Vec<Fate>,
    topics: [Vec<Log<Item>>; 3],
    /// Entries of the control topic, in one partition.
    pub control: Log<String>,
    /// Committed places of the router's group, by partition of the source.
    pub places: Vec<Option<Place>>,
    /// Next offsets of the services' groups.
    pub groups: BTreeMap<(Side, Topic), Vec<Option<i64>>>,
    /// Producer epoch of the newest router; older ones are fenced.
    pub producer_epoch: u64,
    /// Transactions of producers that have not ended, by their number.
    open: BTreeMap<u64, Transaction>,
    /// Seeded bug: an older producer can go on.
    pub unfenced: bool,
    /// Seeded bug: the router sees what isn't committed.
    pub uncommitted: bool,
}

/// A router's open transaction: its number, and what it wrote so far.
#[derive(Clone)]
pub struct Transaction {
    number: usize,
    /// What it wrote: the version's topic, partition, and offset.
    pub wrote: Vec<(Side, usize, i64)>,
}

/// What a router holds of the broker: its producer epoch, and how far it has read.
pub struct Handle {
    /// Producer epoch, which fences older ones; 0 before the first.
    pub producer_epoch: u64,
    at: Vec<i64>,
    entries_at: i64,
    /// Last offsets since the last commit.
    written: Vec<[Option<i64>; 2]>,
}

impl Handle {
    /// Returns a connection that has done nothing yet.
    pub fn new(partitions: usize) -> Self {
        Self { producer_epoch: 0, at: vec![0; partitions], entries_at: 0, written: vec![[None; 2]; partitions] }
    }

    /// Says whether records were written since the last commit.
    pub fn has_written(&self) -> bool {
        self.written.iter().flatten().any(Option::is_some)
    }
}

fn place_of(topic: Topic) -> usize {
    match topic {
        Topic::Source => 0,
        Topic::Of(side) => 1 + side as usize,
    }
}

impl MemoryBroker {
    /// Returns a broker whose source partitions begin at these offsets.
    pub fn new(bases: &[i64]) -> Self {
        let empty = || bases.iter().map(|_| Log::new(0)).collect();
        let groups = Side::BOTH.into_iter().flat_map(|side| [(side, Topic::Source), (side, Topic::Of(side))]);
        Self {
            fates: Vec::new(),
            topics: [bases.iter().map(|base| Log::new(*base)).collect(), empty(), empty()],
            control: Log::new(0),
            places: vec![None; bases.len()],
            groups: groups.map(|group| (group, vec![None; bases.len()])).collect(),
            producer_epoch: 0,
            open: BTreeMap::new(),
            unfenced: false,
            uncommitted: false,
        }
    }

    /// Returns the partitions of a topic.
    pub fn topic(&self, topic: Topic) -> &[Log<Item>] {
        &self.topics[place_of(topic)]
    }

    /// Returns the next committed record of a partition.
    pub fn next(&self, topic: Topic, partition: usize, from: i64) -> Option<(i64, Item)> {
        self.topic(topic)[partition].next(&self.fates, from).map(|(offset, item)| (offset, *item))
    }

    /// Begins a transaction of anybody's.
    pub fn begin(&mut self) -> usize {
        self.fates.push(Fate::Open);
        self.fates.len() - 1
    }

    /// Commits or aborts a transaction in every partition that it wrote to.
    pub fn end(&mut self, number: usize, fate: Fate) {
        self.fates[number] = fate;
        self.topics.iter_mut().flatten().for_each(|log| log.end(number));
        self.control.end(number);
    }

    /// Appends a record to the source.
    pub fn emit(&mut self, partition: usize, key: Option<&'static [u8]>, transaction: Option<usize>) -> i64 {
        let log = &mut self.topics[0][partition];
        log.append(Item { key, origin: (partition, log.high()), weight_version: 0 }, transaction)
    }

    /// Says whether a newer router has taken over.
    pub fn is_fenced(&self, handle: &Handle) -> bool {
        handle.producer_epoch != self.producer_epoch && !self.unfenced
    }

    /// Makes a router the only one.
    pub fn open(&mut self, handle: &mut Handle) -> Opened {
        self.producer_epoch += 1;
        let before = if self.unfenced { handle.producer_epoch + 1 } else { self.producer_epoch };
        let former: Vec<u64> = self.open.range(..before).map(|(producer_epoch, _)| *producer_epoch).collect();
        for producer_epoch in former {
            if !self.unfenced || producer_epoch == handle.producer_epoch {
                let transaction = self.open.remove(&producer_epoch).expect("it was listed");
                self.end(transaction.number, Fate::Aborted);
            }
        }
        handle.producer_epoch = self.producer_epoch;
        handle.written.fill([None; 2]);
        handle.entries_at = 0;
        let entries = self.entries(handle);
        Opened { places: self.places.clone(), entries }
    }

    /// Ends the newest router's transaction, as if it had taken too long; returns whether there was one.
    pub fn expire(&mut self) -> bool {
        let Some(transaction) = self.open.remove(&self.producer_epoch) else { return false };
        self.end(transaction.number, Fate::Aborted);
        self.producer_epoch += 1;
        true
    }

    /// Returns the control topic's entries that this router has not seen.
    pub fn entries(&self, handle: &mut Handle) -> Vec<String> {
        let mut entries = Vec::new();
        while let Some((offset, entry)) = self.control.next(&self.fates, handle.entries_at) {
            entries.push(entry.clone());
            handle.entries_at = offset + 1;
        }
        entries
    }

    /// Says what the committed copies tell of each partition.
    pub fn rebuild(&self) -> Vec<RebuiltPlace> {
        let mut found = vec![RebuiltPlace::default(); self.places.len()];
        for side in Side::BOTH {
            for (partition, place) in found.iter_mut().enumerate() {
                let mut at = 0;
                while let Some((offset, item)) = self.next(Topic::Of(side), partition, at) {
                    place.given[side as usize] += 1;
                    place.last[side as usize] = Some(offset);
                    place.next = place.next.max(Some(item.origin.1 + 1));
                    at = offset + 1;
                }
            }
        }
        found
    }

    /// Goes on reading the source elsewhere.
    pub fn seek(&self, handle: &mut Handle, next: &[i64]) {
        handle.at.iter_mut().zip(next).for_each(|(at, next)| *at = *next);
    }

    /// Copies records, partition after partition in chunks, until `most` are copied or, at random, time is up.
    pub fn copy(
        &mut self,
        handle: &mut Handle,
        dice: &mut Dice,
        most: usize,
        held: &[bool],
        assign: &mut dyn FnMut(SourceRecord<'_>) -> Assignment,
    ) -> usize {
        let mut count = 0;
        for _ in 0..2 * handle.at.len() {
            let partition = dice.below(handle.at.len());
            let chunk = dice.between(0, 6) as usize;
            for _ in 0..chunk.min(most - count) {
                let at = handle.at[partition];
                let next = match self.uncommitted {
                    true => self.topics[0][partition].next_uncommitted(at).map(|(offset, item)| (offset, *item)),
                    false => self.next(Topic::Source, partition, at),
                };
                let Some((offset, item)) = next.filter(|_| held.get(partition) != Some(&true)) else { break };
                let stamp = assign(SourceRecord { partition, offset, key: item.key });
                self.write(handle, stamp.side, partition, Item { weight_version: stamp.weight_version, ..item });
                handle.at[partition] = offset + 1;
                count += 1;
            }
        }
        count
    }

    /// Copies the canary's records to stable's topic; returns how many, and the offset after the last of them.
    pub fn reclaim(
        &mut self,
        handle: &mut Handle,
        partition: usize,
        (from, until): (i64, i64),
        most: usize,
        weight_version: u64,
    ) -> (u64, i64) {
        let (mut count, mut at) = (0, from);
        while (count as usize) < most
            && let Some((offset, item)) =
                self.next(Topic::Of(Side::Canary), partition, at).filter(|(at, _)| *at < until)
        {
            self.write(handle, Side::Stable, partition, Item { weight_version, ..item });
            (at, count) = (offset + 1, count + 1);
        }
        (count, at)
    }

    fn write(&mut self, handle: &mut Handle, side: Side, partition: usize, item: Item) {
        if self.is_fenced(handle) {
            // The client learns later that what it queued was refused.
            handle.written[partition][side as usize] = Some(i64::MAX - 1);
            return;
        }
        let number = self.transaction(handle).number;
        let offset = self.topics[place_of(Topic::Of(side))][partition].append(item, Some(number));
        self.transaction(handle).wrote.push((side, partition, offset));
        handle.written[partition][side as usize] = Some(offset);
    }

    fn transaction(&mut self, handle: &Handle) -> &mut Transaction {
        let fates = &mut self.fates;
        self.open.entry(handle.producer_epoch).or_insert_with(|| {
            fates.push(Fate::Open);
            Transaction { number: fates.len() - 1, wrote: Vec::new() }
        })
    }

    /// Returns the last offsets written since the last commit.
    pub fn flush(&self, handle: &Handle) -> Result<Vec<[Option<i64>; 2]>, OutsideError> {
        self.refuse_fenced(handle)?;
        Ok(handle.written.clone())
    }

    fn refuse_fenced(&self, handle: &Handle) -> Result<(), OutsideError> {
        match self.is_fenced(handle) {
            true => Err(OutsideError::new("broker", "fenced by a newer router")),
            false => Ok(()),
        }
    }

    /// Appends an entry in the open transaction, without ending it.
    pub fn append(&mut self, handle: &Handle, entry: &str) -> Result<(), OutsideError> {
        self.refuse_fenced(handle)?;
        let number = self.transaction(handle).number;
        self.control.append(entry.to_string(), Some(number));
        Ok(())
    }

    /// Commits the open transaction; returns what it wrote.
    pub fn commit(&mut self, handle: &mut Handle, commit: &Commit) -> Result<Transaction, OutsideError> {
        self.refuse_fenced(handle)?;
        if let Some(entry) = &commit.entry {
            self.append(handle, entry)?;
        }
        let transaction = self.transaction(handle).clone();
        self.open.remove(&handle.producer_epoch);
        self.end(transaction.number, Fate::Committed);
        for (partition, place) in &commit.places {
            self.places[*partition] = Some(place.clone());
        }
        for (side, topic, next) in &commit.groups {
            let group = self.groups.get_mut(&(*side, *topic)).expect("groups are few, and known");
            next.iter().for_each(|(partition, next)| group[*partition] = Some(*next));
        }
        handle.written.fill([None; 2]);
        Ok(transaction)
    }
}
