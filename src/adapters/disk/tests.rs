//! The disk store against crashes and damage, on real files.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tempfile::TempDir;

use super::power::in_memory;
use super::*;
use crate::adapters::conformance::{self, Found, StoreUnderTest, acceptor, chain, chain_of, sum};

/// A data directory that goes away with the test.
struct Disk(TempDir);

impl StoreUnderTest for Disk {
    type Store = DiskStore;

    fn create(acceptor: &AcceptorState, genesis: &Chosen) -> Self {
        let dir = TempDir::new().unwrap();
        DiskStore::create(dir.path(), acceptor, genesis).unwrap();
        Self(dir)
    }

    fn open(&mut self) -> Found<DiskStore> {
        let Recovered { store, acceptor, ledger, log, notes } = DiskStore::open(self.0.path()).unwrap();
        assert_eq!(notes, Vec::<String>::new());
        Found { store, acceptor, ledger, log }
    }

    fn close(&mut self, _: DiskStore) {}
}

impl Disk {
    /// Starts a process on it; returns the log with its genesis.
    fn begin(&mut self) -> (DiskStore, Option<AcceptorState>, Vec<Chosen>) {
        let opened = open(self.0.path()).unwrap();
        assert_eq!(opened.notes, Vec::<String>::new());
        (opened.store, opened.acceptor, opened.log)
    }
}

#[test]
fn the_disk_store_keeps_the_contract() {
    conformance::check::<Disk>();
}

const RECORDS: u64 = 30;

/// Writes `RECORDS` records with the acceptor state at the last of them, and closes the store.
fn written() -> (Disk, Vec<Chosen>) {
    let log = chain(RECORDS);
    let mut disk = Disk::create(&acceptor(1, 0), &log[0]);
    let (mut store, ..) = disk.begin();
    for chosen in &log[1..] {
        store.append(chosen).unwrap();
        store.persist(&acceptor(chosen.record.slot.0 + 1, chosen.record.slot.0)).unwrap();
    }
    (disk, log)
}

/// Like [`written`], with everything in the journal: the acceptor state's newest slot carries no records.
fn settled() -> (Disk, Vec<Chosen>) {
    let (mut disk, log) = written();
    let (mut store, ..) = disk.begin();
    store.persist(&acceptor(RECORDS, RECORDS - 1)).unwrap();
    (disk, log)
}

/// What was found, without a checkpoint: the log with its genesis.
struct Opened {
    store: DiskStore,
    acceptor: Option<AcceptorState>,
    log: Vec<Chosen>,
    notes: Vec<String>,
}

fn open(dir: &Path) -> Result<Opened, OpenError> {
    let Recovered { store, acceptor, ledger, log, notes } = DiskStore::open_within(dir, Duration::from_secs(2))?;
    let whole = store.reader().read(Slot(0), usize::MAX).unwrap();
    assert_eq!((&ledger, &log[..]), (&Ledger::new(&whole[0]).unwrap(), &whole[1..]));
    Ok(Opened { store, acceptor, log: whole, notes })
}

/// Copies everything but the lock, as a power cut would leave it that loses nothing written.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => fs::copy(entry.path(), target).map(|_| ()).unwrap(),
        }
    }
}

fn files(dir: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.extend([path]),
        }
    }
    found
}

/// Opens a directory with one damaged file: a prefix of what was written is there, and the store works.
/// Returns how many records were left.
fn survives(dir: &Path, log: &[Chosen], what: &str) -> usize {
    let mut recovered = open(dir).unwrap_or_else(|error| panic!("{what}: {error}"));
    let length = recovered.log.len();
    assert!((1..=log.len()).contains(&length), "{what}: {length} records");
    assert_eq!(recovered.log, log[..length], "{what}");
    let Some(promises) = &recovered.acceptor else {
        recovered.store.persist(&acceptor(50, 0)).unwrap();
        drop(recovered.store);
        assert_eq!(open(dir).unwrap().acceptor, Some(acceptor(50, 0)), "{what}");
        return length;
    };
    assert!((RECORDS - 1..=RECORDS).contains(&promises.boot), "{what}: {promises:?}");
    let promises = acceptor(60, RECORDS - 1);
    log[length..].iter().for_each(|chosen| recovered.store.append(chosen).unwrap());
    recovered.store.persist(&promises).unwrap();
    drop(recovered.store);
    let again = open(dir).unwrap();
    assert_eq!((again.acceptor, again.log), (Some(promises), log.to_vec()), "{what}");
    length
}

fn flip(path: &Path, at: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn truncate(path: &Path, length: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(length).unwrap();
}

#[test]
fn an_empty_directory_holds_no_genesis() {
    let dir = TempDir::new().unwrap();
    for path in [dir.path().to_path_buf(), dir.path().join("missing")] {
        let Err(error) = open(&path) else { panic!("opened") };
        assert!(matches!(&error, OpenError::NoGenesis { dir } if *dir == path));
        assert!(error.to_string().contains("run `aviary cluster init`"), "{error}");
    }
}

#[test]
fn a_directory_in_use_is_refused_even_if_only_a_reader_is_left() {
    let (mut disk, log) = written();
    let (store, ..) = disk.begin();
    assert!(matches!(open(disk.0.path()), Err(OpenError::Locked { .. })));
    let reader = store.reader();
    drop(store);
    assert!(matches!(open(disk.0.path()), Err(OpenError::Locked { .. })));
    drop(reader);
    assert_eq!(open(disk.0.path()).unwrap().log, log);
}

#[test]
fn a_node_that_exists_is_never_created_again() {
    let (disk, log) = written();
    let create = || DiskStore::create(disk.0.path(), &acceptor(1, 0), &log[0]);
    assert!(matches!(create(), Err(OpenError::Occupied { found: "acceptor", .. })));
    fs::remove_file(disk.0.path().join("acceptor")).unwrap();
    assert!(matches!(create(), Err(OpenError::Occupied { found: "journal", .. })));
}

#[test]
fn the_acceptor_files_tail_heals_a_journal_that_lost_what_was_never_synced() {
    let log = chain(20);
    let mut disk = Disk::create(&acceptor(1, 0), &log[0]);
    let (mut store, ..) = disk.begin();
    log[1..5].iter().for_each(|chosen| store.append(chosen).unwrap());
    drop(store);
    // The acceptor file carries records that the journal has, and records that never reached it.
    let mut file = AcceptorFile::open(&disk.0.path().join("acceptor")).unwrap().file;
    let tail: Vec<_> = log[3..].iter().map(encode_entry).collect();
    file.write(7, &codec::encode(&acceptor(2, 19)), tail.iter().map(Vec::as_slice)).unwrap();
    let (mut store, promises, found) = disk.begin();
    assert_eq!((promises, &found), (Some(acceptor(2, 19)), &log));
    assert_eq!(store.reader().read(Slot(0), 99).unwrap(), log);
    // What was healed is in the journal: the next promise need not carry it.
    store.persist(&acceptor(3, 19)).unwrap();
    assert!(store.tail.is_empty());
    drop(store);
    assert_eq!(disk.begin().2, log);
}

#[test]
fn a_tail_that_does_not_continue_the_journal_is_not_taken() {
    let (disk, log) = settled();
    let mut file = AcceptorFile::open(&disk.0.path().join("acceptor")).unwrap().file;
    let tail = encode_entry(&chain(RECORDS + 2)[RECORDS as usize + 1]);
    file.write(7, &codec::encode(&acceptor(RECORDS, 0)), [tail.as_slice()].into_iter()).unwrap();
    let recovered = open(disk.0.path()).unwrap();
    assert_eq!(recovered.log, log);
    assert!(recovered.notes[0].contains("don't continue the journal: slot 30 is missing"), "{:?}", recovered.notes);
}

#[test]
fn records_too_big_for_the_acceptor_file_wait_for_the_journal() {
    let log = chain_of(12, 50_000);
    let mut disk = Disk::create(&acceptor(1, 0), &log[0]);
    let (mut store, ..) = disk.begin();
    log[1..].iter().for_each(|chosen| store.append(chosen).unwrap());
    store.persist(&acceptor(2, 11)).unwrap();
    assert!(store.tail.len() <= 1, "the tail holds {} records of 50 kB", store.tail.len());
    drop(store);
    assert_eq!(open(disk.0.path()).unwrap().log, log);
}

#[test]
fn a_value_that_could_not_be_read_back_is_refused() {
    let log = chain_of(2, 70_000);
    let mut disk = Disk::create(&acceptor(1, 0), &log[0]);
    let (mut store, ..) = disk.begin();
    let error = store.append(&log[1]).unwrap_err().to_string();
    assert!(error.contains("expected at most 65536"), "{error}");
    let error = store.persist(&acceptor(2, 0)).unwrap_err().to_string();
    assert!(error.contains("an earlier write failed"), "{error}");
}

#[test]
fn a_failed_background_sync_stops_the_store() {
    let log = chain(3);
    let mut disk = Disk::create(&acceptor(1, 0), &log[0]);
    let (mut store, ..) = disk.begin();
    store.append(&log[1]).unwrap();
    store.syncer.fail("no such disk");
    let error = store.persist(&acceptor(2, 1)).unwrap_err().to_string();
    assert!(
        error.contains("could not sync the journal in the background") && error.contains("no such disk"),
        "{error}"
    );
    assert!(store.append(&log[2]).unwrap_err().to_string().contains("an earlier write failed"));
    drop(store);
    assert_eq!(open(disk.0.path()).unwrap().acceptor, Some(acceptor(1, 0)));
}

#[test]
fn a_full_disk_is_named_as_such() {
    let error = trouble(Path::new("acceptor"), "write the acceptor file", io::Error::from_raw_os_error(28)).to_string();
    assert!(error.contains("the disk is full: free space"), "{error}");
}

#[test]
fn a_journal_is_not_blamed_for_the_machine() {
    for code in [28, 13, 30, 5, 24] {
        assert!(matches!(io::Error::from_raw_os_error(code).into(), OpenFailure::Refused(_)), "os error {code}");
    }
    let (disk, log) = settled();
    let db = sled::open(disk.0.path().join("journal")).unwrap();
    let Err(error) = open(disk.0.path()) else { panic!("opened") };
    assert!(error.to_string().contains("could not open the journal"), "{error}");
    drop(db);
    let recovered = open(disk.0.path()).unwrap();
    assert_eq!((recovered.log, recovered.notes), (log, vec![]));
}

#[test]
fn a_rotten_slot_costs_the_vote_unless_the_other_is_surely_newer() {
    // create wrote both slots, so 29 promises later the newest one is in slot 0.
    let newest = acceptor(RECORDS, RECORDS - 1);
    for (at, expected) in [(40, None), (SLOT_BYTES as u64 + 40, Some(&newest)), (4000, None)] {
        let (disk, log) = written();
        flip(&disk.0.path().join("acceptor"), at);
        let recovered = open(disk.0.path()).unwrap();
        assert_eq!((recovered.acceptor.as_ref(), &recovered.log), (expected, &log), "byte {at}");
        let notes = recovered.notes;
        assert!(notes[0].contains("of the acceptor file is damaged: the checksum of sector"), "{notes:?}");
        assert_eq!(notes[0].contains("the newest promise may be lost"), expected.is_none(), "{notes:?}");
    }
    // Where nothing shows what the damaged slot held, it may have been the newest; zeros and an end show nothing.
    let slot = SLOT_BYTES as u64;
    let ruins: [(u64, &[u8]); 4] =
        [(slot, &[0xa5; SLOT_BYTES]), (slot, &[0; SLOT_BYTES]), (512, &[0; 512]), (slot, &[])];
    for (at, ruin) in ruins {
        let (disk, log) = written();
        let file = OpenOptions::new().write(true).open(disk.0.path().join("acceptor")).unwrap();
        match ruin {
            [] => file.set_len(at).unwrap(),
            ruin => file.write_all_at(ruin, at).unwrap(),
        }
        let mut recovered = open(disk.0.path()).unwrap();
        assert_eq!((recovered.acceptor, &recovered.log), (None, &log), "{} bytes at {at}", ruin.len());
        // The next promise makes both slots whole again.
        recovered.store.persist(&acceptor(70, RECORDS - 1)).unwrap();
        drop(recovered.store);
        let recovered = open(disk.0.path()).unwrap();
        assert_eq!((recovered.acceptor, recovered.notes), (Some(acceptor(70, RECORDS - 1)), vec![]));
    }
}

#[test]
fn a_write_cut_off_between_any_sectors_leaves_the_promise_before_it() {
    let mut random = SmallRng::seed_from_u64(7);
    // Small acceptor states, and some that carry records over many sectors.
    for bytes in [100, 9_000] {
        let log = chain_of(6, bytes);
        let mut disk = Disk::create(&acceptor(1, 0), &log[0]);
        let (mut store, ..) = disk.begin();
        let path = disk.0.path().join("acceptor");
        for boot in 2..6u64 {
            let before = fs::read(&path).unwrap();
            store.append(&log[boot as usize - 1]).unwrap();
            store.persist(&acceptor(boot, boot - 1)).unwrap();
            let after = fs::read(&path).unwrap();
            let changed: Vec<_> =
                (0..after.len() / 512).filter(|i| before[i * 512..][..512] != after[i * 512..][..512]).collect();
            assert!(changed.len() >= 8, "{} sectors written", changed.len());
            for round in 0..60 {
                let mut torn = before.clone();
                let kept = changed.iter().enumerate().filter(|(i, _)| match round {
                    0..20 => *i < round * changed.len() / 20,
                    20..40 => *i > (round - 20) * changed.len() / 20,
                    _ => random.random(),
                });
                let kept: Vec<_> = kept.map(|(_, sector)| *sector).collect();
                kept.iter().for_each(|i| torn[i * 512..][..512].copy_from_slice(&after[i * 512..][..512]));
                let copy = in_memory();
                let copy = copy.path().join("acceptor");
                fs::write(&copy, torn).unwrap();
                let found = AcceptorFile::open(&copy).unwrap();
                let whole = kept.len() == changed.len();
                let expected = acceptor(if whole { boot } else { boot - 1 }, boot - 1 - u64::from(!whole));
                let found_acceptor = found.saved.map(|saved| saved.acceptor);
                assert_eq!(found_acceptor, Some(expected), "round {round}: {kept:?} of {changed:?}: {:?}", found.notes);
            }
        }
    }
}

/// What is on disk, but for the lock.
fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    files(dir).into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

/// The first version of stored records that this program doesn't know.
const LATER: u8 = JOURNAL.newest as u8 + 1;

/// Returns a record as the next version might write it: another content, in the header that all versions share.
fn later_entry() -> Vec<u8> {
    let body = b"a later content";
    let crc = crc32c::crc32c_append(crc32c::crc32c(&[LATER]), body);
    [&[LATER][..], &crc.to_le_bytes(), body].concat()
}

/// Opens a journal that was in use just now: sled gives up its lock a moment after its last handle is gone.
#[expect(clippy::disallowed_methods, reason = "a test waits by the real clock")]
fn reopened(journal: &Path) -> sled::Db {
    let began = std::time::Instant::now();
    loop {
        match sled::open(journal) {
            Ok(db) => return db,
            Err(why) => assert!(began.elapsed() < Duration::from_secs(5), "{why}"),
        }
        // Pause between two tries.
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn put_later_record(journal: &Path) {
    let db = reopened(journal);
    db.open_tree("log").unwrap().insert((RECORDS + 1).to_be_bytes(), later_entry()).unwrap();
    db.flush().unwrap();
}

#[test]
fn records_of_a_later_format_stay_even_in_a_journal_that_is_not_marked() {
    let (disk, log) = summed();
    let journal = disk.0.path().join("journal");
    let read = |slot: u64| {
        let db = reopened(&journal);
        db.open_tree("log").unwrap().get(slot.to_be_bytes()).unwrap().unwrap().to_vec()
    };
    put_later_record(&journal);
    fs::remove_file(disk.0.path().join("journal.format")).unwrap();
    let Err(error) = DiskStore::open(disk.0.path()) else { panic!("opened") };
    assert!(error.to_string().contains("journal: the log's record has format 5, expected 3 or 4"), "{error}");
    assert_eq!((read(RECORDS + 1), read(RECORDS)), (later_entry(), encode_entry(&log[RECORDS as usize])));
    let names = || fs::read_dir(disk.0.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(!names().any(|name| name.starts_with("quarantine") || name == "journal.format"));
}

#[test]
fn a_file_of_a_later_format_stops_the_node_with_both_numbers_and_stays_as_it_is() {
    type MakeLater = fn(&Path);
    let later: [(&str, &str, MakeLater); 5] = [
        ("acceptor: the acceptor file has format 9, expected 7 or 8", "acceptor", |path| {
            // A node of the next version wrote once: the slot of the older promise.
            let mut bytes = fs::read(path).unwrap();
            let sector = &mut bytes[SLOT_BYTES..][..512];
            sector[7] = 9;
            let place = (1u64 << 32).to_le_bytes();
            let head = [&[9], &sector[8..16], &place[..]].concat();
            let crc = crc32c::crc32c_append(crc32c::crc32c(&head), &sector[20..]);
            sector[16..20].copy_from_slice(&crc.to_le_bytes());
            fs::write(path, bytes).unwrap();
        }),
        ("acceptor: the log's record has format 5, expected 3 or 4", "acceptor", |path| {
            let mut file = AcceptorFile::open(path).unwrap().file;
            let entry = later_entry();
            file.write(7, &codec::encode(&acceptor(RECORDS + 4, RECORDS + 3)), [&entry[..]].into_iter()).unwrap();
        }),
        ("genesis: the log's record has format 5, expected 3 or 4", "genesis", |path| {
            fs::write(path, later_entry()).unwrap()
        }),
        ("checkpoint: the checkpoint has format 5, expected 3 or 4", "checkpoint", |path| {
            let mut bytes = fs::read(path).unwrap();
            bytes[7] = 5;
            let hash = blake3::Hasher::new().update(&bytes[..16]).update(&bytes[48..]).finalize();
            bytes[16..48].copy_from_slice(hash.as_bytes());
            fs::write(path, bytes).unwrap();
        }),
        ("journal: the log's record has format 5, expected 3 or 4", "journal", |path| {
            put_later_record(path);
            fs::write(path.with_extension("format"), format::marker(LATER)).unwrap();
        }),
    ];
    let (disk, _) = summed();
    for (expected, name, make_later) in later {
        let dir = in_memory();
        copy(disk.0.path(), dir.path());
        make_later(&dir.path().join(name));
        let before = contents(dir.path());
        for _ in 0..2 {
            let Err(error) = DiskStore::open(dir.path()) else { panic!("{expected}: opened") };
            assert!(matches!(&error, OpenError::Format(_)), "{error}");
            let text = error.to_string();
            assert!(text.contains(expected) && text.contains("start the version of aviary that wrote it"), "{text}");
            assert!(contents(dir.path()) == before, "{expected}: the files changed");
        }
    }
}

/// Returns the record after another one, as a version before the first default service can't read it.
fn set_default(before: &Chosen) -> Chosen {
    let mut chosen = before.clone();
    let record = &mut chosen.record;
    (record.slot, record.prev_hash) = (before.record.slot.next(), before.record.hash());
    record.intent.operation = Operation::SetDefault("s".parse().unwrap());
    chosen
}

#[test]
fn the_journal_is_marked_before_it_holds_a_record_of_the_newer_format() {
    let (mut disk, mut log) = written();
    let (mut store, ..) = disk.begin();
    let marker = disk.0.path().join("journal.format");
    assert_eq!(fs::read(&marker).unwrap(), format::marker(3).into_bytes());
    let newer = set_default(log.last().unwrap());
    store.append(&newer).unwrap();
    assert_eq!(fs::read(&marker).unwrap(), format::marker(4).into_bytes(), "before anything is synced");
    store.persist(&acceptor(RECORDS + 1, RECORDS)).unwrap();
    drop(store);
    log.push(newer.clone());
    assert_eq!(open(disk.0.path()).unwrap().log, log);
    assert_eq!((encode_entry(&newer)[0], encode_entry(&log[0])[0]), (4, 3));
    // A mark that was lost is made anew by what the journal holds.
    fs::remove_file(&marker).unwrap();
    assert_eq!(open(disk.0.path()).unwrap().log, log);
    assert_eq!(fs::read(&marker).unwrap(), format::marker(4).into_bytes());
    let mut misfit = encode_entry(&log[0]);
    misfit[0] = 4;
    let sum = crc32c::crc32c_append(crc32c::crc32c(&[4]), &misfit[5..]);
    misfit[1..5].copy_from_slice(&sum.to_le_bytes());
    assert!(matches!(decode_entry(&misfit), Err(EntryDamage::Misfit { found: 4, expected: 3 })));
}

#[test]
fn promises_have_the_newer_format_as_long_as_their_record_needs_it() {
    let (mut disk, log) = settled();
    let path = disk.0.path().join("acceptor");
    let versions = || {
        let bytes = fs::read(&path).unwrap();
        BTreeSet::from([bytes[7], bytes[SLOT_BYTES + 7]])
    };
    let (mut store, ..) = disk.begin();
    assert_eq!(versions(), BTreeSet::from([7]));
    let Chosen { ballot, record, .. } = set_default(log.last().unwrap());
    let ballot = ballot.unwrap();
    let promises = acceptor(RECORDS + 1, RECORDS - 1);
    let promises = AcceptorState { accepted: Some(crate::protocol::record::Accepted { ballot, record }), ..promises };
    store.persist(&promises).unwrap();
    drop(store);
    assert_eq!(versions(), BTreeSet::from([7, 8]));
    assert_eq!(open(disk.0.path()).unwrap().acceptor, Some(promises));
    let (mut store, ..) = disk.begin();
    for boot in [RECORDS + 2, RECORDS + 3] {
        store.persist(&acceptor(boot, RECORDS - 1)).unwrap();
    }
    assert_eq!(versions(), BTreeSet::from([7]));
}

#[test]
fn an_acceptor_file_of_an_older_format_is_refused_with_both_numbers() {
    let (disk, _) = written();
    let path = disk.0.path().join("acceptor");
    let mut bytes = fs::read(&path).unwrap();
    (bytes[7], bytes[SLOT_BYTES + 7]) = (6, 6);
    fs::write(&path, bytes).unwrap();
    let Err(error) = open(disk.0.path()) else { panic!("opened") };
    assert!(error.to_string().contains("the acceptor file has format 6, expected 7 or 8"), "{error}");
}

#[test]
fn promises_under_their_older_name_are_not_overlooked() {
    let (disk, log) = written();
    let (now, older) = (disk.0.path().join("acceptor"), disk.0.path().join("register"));
    fs::rename(&now, &older).unwrap();
    let Err(error) = open(disk.0.path()) else { panic!("opened") };
    assert!(error.to_string().contains("it is of format 5 or older, expected a file named acceptor"), "{error}");
    assert!(!now.exists(), "nothing was changed");
    fs::rename(&older, &now).unwrap();
    assert_eq!(open(disk.0.path()).unwrap().log, log);
}

#[test]
fn a_snapshot_that_sled_did_not_finish_is_removed() {
    let (disk, log) = written();
    let left = disk.0.path().join("journal/snap.0000000000000000.generating");
    fs::write(&left, b"half").unwrap();
    let recovered = open(disk.0.path()).unwrap();
    assert_eq!((recovered.log, recovered.notes), (log, vec![]));
    assert!(!left.exists());
}

#[test]
fn a_bad_record_cuts_the_log_before_it_and_is_named() {
    let (mut disk, log) = settled();
    for (slot, value, why) in [
        (21u64, None, "slot 21 is missing"),
        (17, Some(encode_entry(&log[16])), "slot 17 holds the record of slot 16"),
        (13, Some(vec![3, 0, 0, 0, 0, 9]), "slot 13: its checksum is"),
        (9, Some(encode_entry(&chain_of(10, 50)[9])), "slot 9 follows"),
        (
            0,
            Some(encode_entry(&Chosen { ballot: log[1].ballot.clone(), ..log[0].clone() })),
            "differs from the genesis",
        ),
    ] {
        {
            let db = sled::open(disk.0.path().join("journal")).unwrap();
            let tree = db.open_tree("log").unwrap();
            match value {
                Some(value) => tree.insert(slot.to_be_bytes(), value).unwrap(),
                None => tree.remove(slot.to_be_bytes()).unwrap(),
            };
        }
        let recovered = open(disk.0.path()).unwrap();
        assert_eq!(recovered.log, log[..(slot as usize).max(1)], "{why}");
        assert!(
            recovered.notes.iter().any(|note| note.contains(why) && note.contains("quarantine-")),
            "{:?}",
            recovered.notes
        );
        drop(recovered.store);
        assert_eq!(disk.begin().2, log[..(slot as usize).max(1)]);
    }
}

#[test]
fn genesis_comes_from_its_file_or_from_the_journal() {
    let (mut disk, log) = settled();
    let genesis = disk.0.path().join("genesis");
    let saved = fs::read(&genesis).unwrap();
    flip(&genesis, 9);
    let recovered = open(disk.0.path()).unwrap();
    assert_eq!((recovered.log, recovered.notes.len()), (log.clone(), 1));
    drop(recovered.store);
    assert_eq!(fs::read(&genesis).unwrap(), saved, "the file is written again");
    fs::remove_dir_all(disk.0.path().join("journal")).unwrap();
    let (store, promises, found) = disk.begin();
    assert_eq!((promises, found), (Some(acceptor(RECORDS, RECORDS - 1)), log[..1].to_vec()));
    drop(store);
    flip(&genesis, 9);
    fs::remove_dir_all(disk.0.path().join("journal")).unwrap();
    let Err(error) = open(disk.0.path()) else { panic!("opened") };
    assert!(error.to_string().contains("copy the file `genesis` from another node"), "{error}");
}

#[test]
fn every_file_may_be_cut_zeroed_or_deleted() {
    let (disk, log) = settled();
    for file in files(disk.0.path()) {
        let name = file.strip_prefix(disk.0.path()).unwrap();
        let length = fs::metadata(&file).unwrap().len();
        for damage in ["empty", "half", "zeros", "deleted"] {
            let dir = in_memory();
            copy(disk.0.path(), dir.path());
            let target = dir.path().join(name);
            match damage {
                "empty" => truncate(&target, 0),
                "half" => truncate(&target, length / 2),
                "zeros" => fs::write(&target, vec![0; length as usize]).unwrap(),
                _ => fs::remove_file(&target).unwrap(),
            }
            survives(dir.path(), &log, &format!("{} {damage}", name.display()));
        }
    }
}

#[test]
fn random_damage_never_alters_a_record_nor_makes_a_hole() {
    let disks = [written(), settled()];
    let mut dice = SmallRng::seed_from_u64(20_261_121);
    let mut shorter = 0;
    for round in 0..120 {
        let (disk, log) = &disks[round % 2];
        let names: Vec<_> = files(disk.0.path()).into_iter().collect();
        let dir = in_memory();
        copy(disk.0.path(), dir.path());
        let name = names[dice.random_range(0..names.len())].strip_prefix(disk.0.path()).unwrap();
        let target = dir.path().join(name);
        // Damage lands where bytes are: most of sled's file and of the acceptor state is padding.
        let bytes = fs::read(&target).unwrap();
        let used: Vec<_> = bytes.iter().enumerate().filter(|(_, byte)| **byte != 0).map(|(at, _)| at as u64).collect();
        if used.is_empty() {
            continue;
        }
        let mut place = || used[dice.random_range(0..used.len())];
        match round / 2 % 3 {
            0 => (0..3).for_each(|_| flip(&target, place())),
            1 => truncate(&target, place()),
            _ => OpenOptions::new().write(true).open(&target).unwrap().write_all_at(&[0; 512], place()).unwrap(),
        }
        let survivors = survives(dir.path(), log, &format!("round {round}: {}", name.display()));
        shorter += usize::from(survivors < log.len());
    }
    println!("{shorter} logs came back shorter");
    assert!(shorter > 5, "only {shorter} damages hit the log: the test tests nothing");
}

#[test]
#[expect(clippy::disallowed_methods, reason = "it measures the disk")]
fn a_promise_costs_one_sync() {
    let log = chain(400);
    let mut disk = Disk::create(&acceptor(1, 0), &log[0]);
    let (mut store, ..) = disk.begin();
    let mut micros: Vec<_> = log[1..]
        .iter()
        .map(|chosen| {
            let start = std::time::Instant::now();
            store.append(chosen).unwrap();
            store.persist(&acceptor(2, chosen.record.slot.0)).unwrap();
            start.elapsed().as_micros()
        })
        .collect();
    micros.sort_unstable();
    println!("append+persist: p50 {} µs, p99 {} µs", micros[micros.len() / 2], micros[micros.len() * 99 / 100]);
}

/// Like [`settled`], with a checkpoint at the last record and the five before it as history; then three more records.
fn summed() -> (Disk, Vec<Chosen>) {
    let (mut disk, _) = settled();
    let log = chain(RECORDS + 3);
    let (mut store, ..) = disk.begin();
    let ledger = sum(&log[..RECORDS as usize]);
    store.checkpoint(&Checkpoint::of(&ledger).unwrap(), Slot(RECORDS - 5)).unwrap();
    for chosen in &log[RECORDS as usize..] {
        store.append(chosen).unwrap();
    }
    store.persist(&acceptor(RECORDS + 3, RECORDS + 2)).unwrap();
    (disk, log)
}

#[test]
fn whatever_is_damaged_beside_a_checkpoint_the_log_is_a_prefix_and_its_sum_is_right() {
    let (disk, log) = summed();
    let mut random = SmallRng::seed_from_u64(5);
    let mut lengths = BTreeSet::new();
    for path in files(disk.0.path()) {
        let name = path.strip_prefix(disk.0.path()).unwrap();
        let length = fs::metadata(&path).unwrap().len();
        if name.ends_with("lock") || length == 0 {
            continue;
        }
        for round in 0..12 {
            let copied = in_memory();
            copy(disk.0.path(), copied.path());
            let victim = copied.path().join(name);
            let at = random.random_range(0..length);
            let what = format!("{} round {round} at {at}", name.display());
            match round % 3 {
                0 => flip(&victim, at),
                1 => truncate(&victim, at),
                _ => fs::remove_file(&victim).unwrap(),
            }
            let found = DiskStore::open_within(copied.path(), Duration::from_secs(2));
            let Recovered { mut store, ledger, log: after, .. } = found.unwrap_or_else(|e| panic!("{what}: {e}"));
            let (base, length) = (ledger.head.0 as usize, ledger.head.0 as usize + 1 + after.len());
            assert_eq!(ledger, sum(&log[..=base]), "{what}");
            assert_eq!(after, log[base + 1..length], "{what}");
            lengths.insert(length);
            // What is missing can be taken over from a peer, and is there at the next start.
            if length < log.len() {
                store.install(&Checkpoint::of(&sum(&log)).unwrap()).unwrap();
                drop(store);
                let again = DiskStore::open_within(copied.path(), Duration::from_secs(2)).unwrap();
                assert_eq!((again.ledger, again.log, again.notes), (sum(&log), vec![], vec![]), "{what}");
            }
        }
    }
    // Without the checkpoint, only genesis is left; without the journal, what the checkpoint sums up.
    let whole = log.len();
    assert!([1, whole].iter().all(|length| lengths.contains(length)), "{lengths:?}");
}

#[test]
fn a_crash_while_a_peers_checkpoint_is_taken_over_leaves_the_checkpoint() {
    let (disk, _) = settled();
    let log = chain(RECORDS + 30);
    let newer = Checkpoint::of(&sum(&log)).unwrap();
    checkpoint::write(&disk.0.path().join("checkpoint"), &newer).unwrap();
    let Recovered { store, ledger, log: after, notes, .. } = DiskStore::open(disk.0.path()).unwrap();
    assert_eq!((ledger, after, notes), (sum(&log), vec![], vec![]));
    assert_eq!(store.reader().read(Slot(0), 9).unwrap(), []);
}

#[test]
fn another_clusters_checkpoint_is_moved_aside() {
    let (disk, log) = settled();
    let mut ledger = sum(&log);
    ledger.cluster = crate::domain::ids::ClusterId([8; 16]);
    checkpoint::write(&disk.0.path().join("checkpoint"), &Checkpoint::of(&ledger).unwrap()).unwrap();
    let opened = open(disk.0.path()).unwrap();
    assert_eq!(opened.log, log);
    assert!(opened.notes[0].contains("it is of cluster 0808"), "{:?}", opened.notes);
}

/// Writes `count` records as a node does, with its checkpoints; returns the directory.
fn grown(count: u64) -> Disk {
    let retention = crate::protocol::Retention::default();
    let log = chain(1);
    let mut disk = Disk::create(&acceptor(1, 0), &log[0]);
    let (mut store, ..) = disk.begin();
    let mut ledger = Ledger::new(&log[0]).unwrap();
    for slot in 1..=count {
        let operation = Operation::Refused { service: None, refused: "Start".into(), reasons: vec!["x".repeat(300)] };
        let tx = crate::domain::ids::TxId::new(format!("tx-{slot}")).unwrap();
        let at = crate::domain::time::Wall(slot);
        let intent = crate::protocol::record::Intent {
            initiator: crate::protocol::record::Initiator::Client,
            tx,
            actor: "test".into(),
            digest: slot,
            at,
            operation,
        };
        let record = ledger.next_record(intent, None).unwrap();
        let chosen = Chosen { ballot: log[0].ballot.clone(), decided_at: at, record };
        ledger.apply(&chosen).unwrap();
        store.append(&chosen).unwrap();
        if slot % 64 == 0 {
            store.persist(&acceptor(slot, slot)).unwrap();
        }
        if slot % retention.checkpoint_every == 0 {
            store
                .checkpoint(&Checkpoint::of(&ledger).unwrap(), Slot(slot.saturating_sub(retention.history) + 1))
                .unwrap();
        }
    }
    disk
}

fn size(dir: &Path) -> u64 {
    files(dir).iter().map(|path| fs::metadata(path).unwrap().len()).sum()
}

/// Prints bytes on disk and the time a start takes, for growing logs.
#[test]
#[ignore = "takes minutes; cargo test --release --lib bounded -- --ignored --nocapture"]
fn disk_and_start_up_stay_bounded() {
    let mut sizes = Vec::new();
    for count in [20_000, 100_000, 1_000_000] {
        let disk = grown(count);
        let began = tokio::time::Instant::now();
        let recovered = DiskStore::open(disk.0.path()).unwrap();
        let took = began.elapsed();
        assert_eq!(recovered.ledger.head.0 + recovered.log.len() as u64, count);
        let bytes = size(disk.0.path());
        println!("{count:>9} records: {:>6.1} MB on disk, start in {:.2} s", bytes as f64 / 1e6, took.as_secs_f64());
        assert!(took < Duration::from_secs(2));
        sizes.push(bytes);
    }
    assert!(sizes[2] < 3 * sizes[1], "{sizes:?}");
}
