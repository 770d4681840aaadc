//! A node as a host of the simulated network.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use aviary::adapters::memory::MemoryStore;
use aviary::api::{self, ApiState};
use aviary::listener::Accept;
use aviary::node::run::{self, Parts};
use aviary::ports::{Clock, Connection, Later, Listener, Network};
use aviary::proxy;
use aviary::proxy::settings::ProxySettings;
use aviary_core::domain::ids::{Incarnation, NodeId};
use aviary_core::domain::time::{Mono, Now, Wall};
use aviary_core::protocol::record::{Hash, Slot};
use aviary_core::protocol::{Retention, Settings, Timings};
use tokio_util::sync::CancellationToken;
use turmoil::net::{TcpListener, TcpStream};

use super::{NAMES, Town};
use crate::dice::Dice;
use crate::world::{first_register, genesis_of};

/// Ports, the same on each host.
pub const DATA: u16 = 8080;
pub const API: u16 = 50051;
const CONTROL: u16 = 7001;

/// Returns the disks of three nodes that never ran.
pub fn new_disks() -> [Arc<Mutex<MemoryStore>>; 3] {
    let (genesis, _) = genesis_of(3);
    [0, 1, 2].map(|i| {
        let acceptor = first_register(i, &genesis);
        Arc::new(Mutex::new(MemoryStore::new(Some(acceptor), vec![genesis.clone()])))
    })
}

/// Returns the hashes of the records on a disk, from genesis on.
pub fn log_of(disk: &MemoryStore) -> Vec<(Slot, Hash)> {
    disk.survivors(usize::MAX).log.iter().map(|chosen| (chosen.record.slot, chosen.record.hash())).collect()
}

/// One life of a node's process: begins with what its disk kept, and ends only by an error.
pub async fn live(i: usize, town: Town) -> turmoil::Result {
    let elapsed = turmoil::sim_elapsed().unwrap_or_default().as_micros() as u64;
    let mut dice = Dice::new(town.seed ^ elapsed.rotate_left(17) ^ i as u64);
    // What was appended and not synced is there in part, or not at all.
    let store = {
        let mut disk = town.disks[i].lock().expect("nobody panics with it");
        let kept = disk.survivors(dice.below(4));
        *disk = MemoryStore::of(kept);
        disk.clone()
    };
    let node = NodeId::new(NAMES[i])?;
    let others = NAMES.iter().filter(|name| **name != NAMES[i]);
    let peers: BTreeMap<_, _> =
        others.map(|name| Ok((NodeId::new(*name)?, format!("{name}:{CONTROL}")))).collect::<turmoil::Result<_>>()?;
    let contents = store.survivors(usize::MAX);
    let (ledger, log) = contents.recovered();
    let parts = Parts {
        settings: Settings {
            node,
            cluster: ledger.cluster,
            timings: Timings::default(),
            seed: dice.any(),
            fresh_incarnation: Incarnation(dice.any() | 1 << 63),
            retention: Retention::default(),
            peers: peers.keys().cloned().collect(),
        },
        acceptor: contents.acceptor.clone(),
        log: log.to_vec(),
        saved: contents.runs.clone(),
        ledger,
        runs: Box::new(store.clone()),
        store: Box::new(store),
        network: Arc::new(Simulated),
        listen: format!("0.0.0.0:{CONTROL}"),
        peers,
        versions: town.versions[i],
        clock: Arc::new(SimulatedClock),
        failpoint: None,
    };
    let shutdown = CancellationToken::new();
    let (handle, body) = run::prepare(parts, |_| {}, shutdown.clone());
    let body = tokio::spawn(body);
    let settings = ProxySettings {
        connect_timeout_ms: 1_000,
        first_byte_timeout_ms: 5_000,
        idle_timeout_ms: 5_000,
        connections_max: 1_000,
        requests_max: 500,
        ..ProxySettings::default()
    };
    let data = Door(TcpListener::bind(("0.0.0.0", DATA)).await?);
    tokio::task::spawn_local(proxy::serve_here(data, handle.clone(), settings, shutdown.clone()));
    let door = Door(TcpListener::bind(("0.0.0.0", API)).await?);
    // Nobody forwards: any node may decide, and the network between operators and nodes is not the one that is cut.
    let state = ApiState::new(handle, BTreeMap::new(), None, api::metrics::install(), shutdown);
    tokio::spawn(api::serve(door, state));
    match body.await {
        Ok(outcome) => Err(format!("node {} ended: {outcome:?}", NAMES[i]).into()),
        Err(panic) => Err(format!("node {} broke an invariant: {panic}", NAMES[i]).into()),
    }
}

/// turmoil's time as a machine's clocks.
struct SimulatedClock;

impl Clock for SimulatedClock {
    fn now(&self) -> Now {
        let elapsed = turmoil::sim_elapsed().unwrap_or_default();
        let wall = turmoil::since_epoch().unwrap_or_default();
        Now { mono: Mono(1_000_000 + elapsed.as_micros() as u64), wall: Wall(wall.as_millis() as u64) }
    }
}

/// turmoil's TCP between the nodes.
struct Simulated;

impl Network for Simulated {
    fn connect<'a>(&'a self, _: &'a NodeId, address: &'a str) -> Later<'a, io::Result<Connection>> {
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            Ok(Connection { stream: Box::new(stream), peer: None, address: address.into() })
        })
    }

    fn listen<'a>(&'a self, address: &'a str) -> Later<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(async move { Ok(Box::new(Control(TcpListener::bind(address).await?)) as Box<dyn Listener>) })
    }
}

struct Control(TcpListener);

impl Listener for Control {
    fn accept(&mut self) -> Later<'_, io::Result<Later<'static, io::Result<Connection>>>> {
        Box::pin(async move {
            let (stream, from) = self.0.accept().await?;
            let handshake =
                async move { Ok(Connection { stream: Box::new(stream), peer: None, address: from.to_string() }) };
            Ok(Box::pin(handshake) as Later<'static, io::Result<Connection>>)
        })
    }

    fn address(&self) -> io::Result<String> {
        Ok(self.0.local_addr()?.to_string())
    }
}

/// An HTTP port.
struct Door(TcpListener);

impl Accept for Door {
    type Stream = TcpStream;

    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        self.0.accept().await
    }
}
