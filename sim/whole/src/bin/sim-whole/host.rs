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

use crate::cluster::{Cluster, NAMES};
use crate::trace::{SharedTrace, Traced};
use sim::dice::Dice;
use sim::{first_acceptor, genesis_of};

/// Ports, the same on each host.
pub const DATA: u16 = 8080;
pub const API: u16 = 50051;
const CONTROL: u16 = 7001;

/// Returns the disks of three nodes that never ran.
pub fn new_disks() -> [Arc<Mutex<MemoryStore>>; 3] {
    let (genesis, _) = genesis_of(3);
    [0, 1, 2].map(|i| {
        let acceptor = first_acceptor(i, &genesis);
        Arc::new(Mutex::new(MemoryStore::new(Some(acceptor), vec![genesis.clone()])))
    })
}

/// Returns the hashes of the records on a disk, from genesis on.
pub fn log_of(disk: &MemoryStore) -> Vec<(Slot, Hash)> {
    disk.survivors(usize::MAX).log.iter().map(|chosen| (chosen.record.slot, chosen.record.hash())).collect()
}

/// One life of a node's process: begins with what its disk kept, and ends only by an error.
pub async fn live(i: usize, cluster: Cluster) -> turmoil::Result {
    let elapsed = turmoil::sim_elapsed().unwrap_or_default().as_micros() as u64;
    let mut dice = Dice::new(cluster.seed ^ elapsed.rotate_left(17) ^ i as u64);
    // What was appended and not synced is there in part, or not at all.
    let store = {
        let mut disk = cluster.disks[i].lock().expect("nobody panics with it");
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
            speaks: cluster.versions[i].max,
        },
        acceptor: contents.acceptor.clone(),
        log: log.to_vec(),
        saved: contents.runs.clone(),
        ledger,
        runs: Box::new(store.clone()),
        store: Box::new(store),
        network: Arc::new(Simulated { host: NAMES[i], trace: cluster.trace.clone() }),
        listen: format!("0.0.0.0:{CONTROL}"),
        peers,
        versions: cluster.versions[i],
        facts: BTreeMap::new(),
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
    let data = HttpListener(TcpListener::bind(("0.0.0.0", DATA)).await?);
    tokio::task::spawn_local(proxy::serve_here(data, handle.clone(), settings, shutdown.clone()));
    let listener = HttpListener(TcpListener::bind(("0.0.0.0", API)).await?);
    // Nobody forwards: any node may decide, and the network between operators and nodes is not the one that is cut.
    let state = ApiState::new(handle, BTreeMap::new(), None, api::metrics::install(), shutdown);
    tokio::spawn(api::serve(listener, state));
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

/// turmoil's TCP between the nodes, from one host.
struct Simulated {
    host: &'static str,
    trace: SharedTrace,
}

impl Simulated {
    fn connection(&self, stream: TcpStream, address: String) -> Connection {
        let stream = Traced::new(stream, self.trace.clone(), self.host);
        Connection { stream: Box::new(stream), peer: None, address }
    }
}

impl Network for Simulated {
    fn connect<'a>(&'a self, _: &'a NodeId, address: &'a str) -> Later<'a, io::Result<Connection>> {
        Box::pin(async move {
            let stream = TcpStream::connect(address).await?;
            Ok(self.connection(stream, address.into()))
        })
    }

    fn listen<'a>(&'a self, address: &'a str) -> Later<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(async move {
            let listener = TcpListener::bind(address).await?;
            let network = Self { host: self.host, trace: self.trace.clone() };
            Ok(Box::new(Control { listener, network }) as Box<dyn Listener>)
        })
    }
}

struct Control {
    listener: TcpListener,
    network: Simulated,
}

impl Listener for Control {
    fn accept(&mut self) -> Later<'_, io::Result<Later<'static, io::Result<Connection>>>> {
        Box::pin(async move {
            let (stream, from) = self.listener.accept().await?;
            let connection = self.network.connection(stream, from.to_string());
            let handshake = async move { Ok(connection) };
            Ok(Box::pin(handshake) as Later<'static, io::Result<Connection>>)
        })
    }

    fn address(&self) -> io::Result<String> {
        Ok(self.listener.local_addr()?.to_string())
    }
}

/// Turmoil's listener as a port that serves HTTP.
struct HttpListener(TcpListener);

impl Accept for HttpListener {
    type Stream = TcpStream;

    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        self.0.accept().await
    }
}
