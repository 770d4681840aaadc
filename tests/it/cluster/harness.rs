//! Real processes: nodes and demo model servers on free loopback ports, ended by their pid when a test ends.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

pub const NAMES: [&str; 3] = ["a", "b", "c"];

/// Returns a port that is free and that no other test gets: not in this process, and in no other one that takes its ports
/// here. The system lends none of them to connections: those of the ephemeral range are gone again before a node can bind
/// them.
pub fn free_port() -> u16 {
    static BLOCKS: Mutex<Vec<Block>> = Mutex::new(Vec::new());
    let mut blocks = BLOCKS.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        match blocks.last_mut().and_then(|block| block.ports.next()) {
            Some(port) if TcpListener::bind(("127.0.0.1", port)).is_ok() => return port,
            Some(_) => {}
            None => blocks.push(Block::claim()),
        }
    }
}

/// Ports of this process, for as long as it lives.
struct Block {
    /// Listens on the block's first port: who finds that taken looks for another block.
    _guard: TcpListener,
    ports: std::ops::Range<u16>,
}

impl Block {
    const FIRST: u16 = 12_000;
    const SIZE: u16 = 50;
    const COUNT: u16 = 400;

    fn claim() -> Self {
        let begin = (std::process::id() % u32::from(Self::COUNT)) as u16;
        let mut firsts = (0..Self::COUNT).map(|n| Self::FIRST + (begin + n) % Self::COUNT * Self::SIZE);
        let block = |first: u16| {
            let guard = TcpListener::bind(("127.0.0.1", first)).ok()?;
            Some(Self { _guard: guard, ports: first + 1..first + Self::SIZE })
        };
        firsts.find_map(block).expect("a block of ports that is free")
    }
}

/// One answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|e| panic!("{e}: {} {}", self.status, String::from_utf8_lossy(&self.body)))
    }
}

/// A keep-alive HTTP/1.1 connection, as plain as can be: it shares no code with what it tests.
pub struct Http {
    stream: BufReader<TcpStream>,
}

impl Http {
    pub fn connect(port: u16) -> std::io::Result<Self> {
        Self::connect_to(SocketAddr::from(([127, 0, 0, 1], port)))
    }

    pub fn connect_to(address: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(15)))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    pub fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> std::io::Result<Answer> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {}\r\n", body.len());
        if method == "POST" && !headers.iter().any(|(name, _)| *name == "content-type") {
            head += "content-type: application/json\r\n";
        }
        headers.iter().for_each(|(name, value)| write!(head, "{name}: {value}\r\n").unwrap());
        self.stream.get_mut().write_all(format!("{head}\r\n{body}").as_bytes())?;
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        let bad = || std::io::Error::other(format!("status line {line:?}"));
        let status = line.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(bad)?;
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            self.stream.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_string()));
        }
        let mut answer = Answer { status, headers, body: Vec::new() };
        if let Some(length) = answer.header("content-length").map(|l| l.parse::<usize>().unwrap()) {
            answer.body.resize(length, 0);
            self.stream.read_exact(&mut answer.body)?;
        } else if answer.header("transfer-encoding").is_some() {
            loop {
                let mut size = String::new();
                self.stream.read_line(&mut size)?;
                let size = usize::from_str_radix(size.trim(), 16).map_err(std::io::Error::other)?;
                let mut chunk = vec![0; size + 2];
                self.stream.read_exact(&mut chunk)?;
                answer.body.extend_from_slice(&chunk[..size]);
                if size == 0 {
                    break;
                }
            }
        }
        Ok(answer)
    }
}

/// Sends one request over a connection of its own.
pub fn http(port: u16, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> std::io::Result<Answer> {
    Http::connect(port)?.send(method, path, headers, body)
}

/// A process that dies with its owner.
pub struct Process(pub Child);

impl Process {
    /// SIGKILL, and wait for the end.
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// Waits for it to end by itself.
    pub fn ended_within(&mut self, limit: Duration) -> bool {
        let began = Instant::now();
        loop {
            if self.0.try_wait().unwrap().is_some() {
                return true;
            }
            if began.elapsed() >= limit {
                return false;
            }
            // Pause between two looks.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

pub fn aviary() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_aviary"));
    command.stdin(Stdio::null()).env_remove("AVIARY_FAILPOINT").env_remove("AVIARY_API");
    command
}

/// Returns the program that node `i` runs. `AVIARY_OTHER=PATH` is another version's binary: node c's, to see that the
/// two work together in every test here.
fn node_binary(i: usize) -> Command {
    let mut command = aviary();
    if let Some(other) = std::env::var_os("AVIARY_OTHER").filter(|_| i == 2) {
        let environment: Vec<_> = command.get_envs().map(|(name, _)| name.to_owned()).collect();
        command = Command::new(other);
        for name in environment {
            command.env_remove(name);
        }
    }
    command
}

/// Copies a folder with all that is in it.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// Returns what is in a folder's files, by their paths.
pub fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(contents(&path)),
            false => drop(found.insert(path.clone(), fs::read(path).unwrap())),
        }
    }
    found
}

/// A demo model server.
pub struct Upstream {
    pub port: u16,
    _process: Process,
}

impl Upstream {
    pub fn start(version: &str) -> Self {
        let port = free_port();
        let listen = format!("127.0.0.1:{port}");
        let child = aviary()
            .args(["upstream", "--listen", &listen, "--version", version])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let upstream = Self { port, _process: Process(child) };
        wait("an upstream", Duration::from_secs(5), || http(port, "GET", "/healthz", &[], "").ok().map(|_| ()));
        upstream
    }

    pub fn fault(&self, body: &str) {
        let headers = [("content-type", "application/json")];
        let answer = http(self.port, "PUT", "/fault", &headers, body).unwrap();
        assert_eq!(answer.status, 200, "{answer:?}");
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

/// One node's ports and, while it runs, its process.
pub struct Node {
    pub name: &'static str,
    pub data: u16,
    pub api: u16,
    pub control: u16,
    pub process: Option<Process>,
}

/// Three nodes.
pub struct Cluster {
    pub nodes: Vec<Node>,
    pub dir: tempfile::TempDir,
}

/// Tries until it works, or fails the test.
pub fn wait<T>(what: &str, limit: Duration, mut attempt: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = attempt() {
            return found;
        }
        assert!(began.elapsed() < limit, "{what}: not within {limit:?}");
        // Pause between two tries.
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Cluster {
    /// Founds a cluster and starts its three nodes.
    pub fn start() -> Self {
        Self::found().started()
    }

    /// Like [`Cluster::start`], with more lines in each node's file.
    pub fn start_with(more: &str) -> Self {
        Self::found_with(more).started()
    }

    fn started(mut self) -> Self {
        let cluster = &mut self;
        (0..3).for_each(|i| cluster.spawn(i, None));
        (0..3).for_each(|i| cluster.wait_ready(i));
        self
    }

    /// Founds a cluster without starting anything.
    pub fn found() -> Self {
        Self::found_with("")
    }

    /// Like [`Cluster::found`], with more lines in each node's file.
    pub fn found_with(more: &str) -> Self {
        Self::found_by(Path::new(env!("CARGO_BIN_EXE_aviary")), more)
    }

    /// Like [`Cluster::found_with`], by another version's program.
    pub fn found_by(program: &Path, more: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let nodes: Vec<_> = NAMES
            .iter()
            .map(|name| Node { name, data: free_port(), api: free_port(), control: free_port(), process: None })
            .collect();
        let cluster = Self { nodes, dir };
        for i in 0..3 {
            fs::write(cluster.config(i), cluster.config_text(i) + more).unwrap();
        }
        let mut init = Command::new(program);
        init.args(["cluster", "init"]);
        for i in 0..3 {
            init.arg("--config").arg(cluster.config(i));
        }
        let output = init.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        cluster
    }

    pub fn config(&self, i: usize) -> PathBuf {
        self.dir.path().join(format!("{}.toml", NAMES[i]))
    }

    pub fn data_dir(&self, i: usize) -> PathBuf {
        self.dir.path().join(format!("data-{}", NAMES[i]))
    }

    pub fn log(&self, i: usize) -> PathBuf {
        self.dir.path().join(format!("{}.log", NAMES[i]))
    }

    fn config_text(&self, i: usize) -> String {
        let Node { name, data, api, control, .. } = &self.nodes[i];
        let (data_dir, log) = (self.data_dir(i), self.log(i));
        let mut text = format!(
            "[node]\nid = \"{name}\"\ndata_dir = {data_dir:?}\n\n[listen]\ndata = \"127.0.0.1:{data}\"\n\
             api = \"127.0.0.1:{api}\"\ncontrol = \"127.0.0.1:{control}\"\n\n\
             [log]\nfile = {log:?}\n"
        );
        for peer in self.nodes.iter().filter(|peer| peer.name != *name) {
            let Node { name, api, control, .. } = peer;
            let (api, control) = (format!("127.0.0.1:{api}"), format!("127.0.0.1:{control}"));
            write!(text, "\n[peers.{name}]\ncontrol = \"{control}\"\napi = \"{api}\"\n").unwrap();
        }
        text
    }

    /// Starts node `i`; with a failpoint it will abort itself there.
    pub fn spawn(&mut self, i: usize, failpoint: Option<&str>) {
        let mut command = node_binary(i);
        failpoint.map(|name| command.env("AVIARY_FAILPOINT", name));
        self.spawn_command(command, i);
    }

    /// Starts node `i` as another version's program.
    pub fn spawn_program(&mut self, program: &Path, i: usize) {
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).env_remove("AVIARY_FAILPOINT").env_remove("AVIARY_API");
        self.spawn_command(command, i);
    }

    fn spawn_command(&mut self, mut command: Command, i: usize) {
        let path = self.dir.path().join(format!("{}.console", NAMES[i]));
        let console = fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
        command.arg("node").arg("--config").arg(self.config(i));
        let child = command.stdout(console.try_clone().unwrap()).stderr(console).spawn().unwrap();
        self.nodes[i].process = Some(Process(child));
    }

    pub fn kill(&mut self, i: usize) {
        self.nodes[i].process.take().expect("a running node").kill();
    }

    pub fn wait_ready(&self, i: usize) {
        let port = self.nodes[i].data;
        wait(&format!("node {} ready", NAMES[i]), Duration::from_secs(10), || {
            http(port, "GET", "/readyz?quorum", &[], "").ok().filter(|answer| answer.status == 200).map(|_| ())
        });
    }

    /// Writes to node `i`'s API.
    pub fn post(&self, i: usize, path: &str, key: Option<&str>, body: &str) -> Answer {
        let mut headers = vec![("content-type", "application/json")];
        if let Some(key) = key {
            headers.push(("idempotency-key", key));
        }
        http(self.nodes[i].api, "POST", path, &headers, body).unwrap()
    }

    /// Applies a rollout through node `i`, which must commit it.
    pub fn apply(&self, i: usize, yaml: &str) {
        let headers = [("content-type", "application/yaml")];
        let answer = http(self.nodes[i].api, "POST", "/v1/rollouts", &headers, yaml).unwrap();
        assert_eq!(answer.status, 200, "{}", String::from_utf8_lossy(&answer.body));
    }

    pub fn promote(&self, i: usize, key: Option<&str>) -> Answer {
        self.post(i, "/v1/rollouts/svc/promote", key, "{}")
    }

    /// Returns node `i`'s /routing/state.
    pub fn state(&self, i: usize) -> Option<Value> {
        let answer = http(self.nodes[i].data, "GET", "/routing/state", &[], "").ok()?;
        (answer.status == 200).then(|| answer.json())
    }

    /// Returns what the given nodes agree on, once they do.
    pub fn agreed(&self, nodes: &[usize], limit: Duration) -> Value {
        wait("agreement", limit, || {
            let states: Option<Vec<_>> = nodes.iter().map(|i| self.state(*i)).collect();
            let states = states?;
            let key = |s: &Value| ["version", "weights", "status", "slot", "hash", "phase"].map(|k| s[k].clone());
            states.iter().all(|s| key(s) == key(&states[0])).then(|| states[0].clone())
        })
    }

    /// Waits until node `i`'s state satisfies `condition`.
    pub fn until(&self, i: usize, what: &str, limit: Duration, condition: impl Fn(&Value) -> bool) -> Value {
        wait(what, limit, || self.state(i).filter(|state| condition(state)))
    }

    /// Returns the log of decisions about the service, as node `i` tells it.
    pub fn history(&self, i: usize) -> Vec<Value> {
        let answer = http(self.nodes[i].api, "GET", "/v1/rollouts/svc/history", &[], "").unwrap();
        let json = answer.json();
        let list = if json.is_array() { json.clone() } else { json["history"].clone() };
        list.as_array().unwrap_or_else(|| panic!("no history in {json}")).clone()
    }

    /// Fails the test when any node's console or log holds a panic.
    pub fn assert_no_panic(&self) {
        for (i, name) in NAMES.iter().enumerate() {
            for path in [self.log(i), self.dir.path().join(format!("{name}.console"))] {
                let text = fs::read_to_string(&path).unwrap_or_default();
                assert!(!text.contains("panicked"), "{}: {text}", path.display());
            }
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["a", "b", "c", "d", "e"] {
                let text = fs::read_to_string(self.dir.path().join(format!("{name}.console"))).unwrap_or_default();
                let lines: Vec<_> = text.lines().collect();
                let last = lines.len().saturating_sub(40);
                eprintln!("--- node {name}\n{}", lines[last..].join("\n"));
            }
        }
    }
}

/// A rollout of `svc` from v1 to v2 with the given steps (YAML list items) and few samples needed.
pub fn rollout(stable: &str, canary: &str, steps: &str) -> String {
    format!(
        "apiVersion: aviary/v1\nkind: Rollout\nmetadata: {{ name: svc }}\nspec:\n  \
         stable: {{ version: v1, url: \"{stable}\" }}\n  canary: {{ version: v2, url: \"{canary}\" }}\n  \
         steps:\n{steps}\n  bake: {{ duration: 500ms }}\n  analysis:\n    window: 30s\n    minSamples: 20\n    metrics:\n      \
         - {{ name: errors, strategy: THRESHOLD, thresholdRange: {{ max: 5 }}, onFailure: rollback }}\n      \
         - {{ name: latency, strategy: THRESHOLD, statistic: mean, thresholdRange: {{ max: 500 }}, onFailure: pause }}\n"
    )
}

/// Steps that each wait for an operator.
pub const MANUAL: &str =
    "    - setWeight: 20\n    - pause: {}\n    - setWeight: 50\n    - pause: {}\n    - setWeight: 100\n    - pause: {}";

/// Steady traffic to all nodes from threads of its own, until it is dropped or stopped.
pub struct Traffic {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    threads: Vec<std::thread::JoinHandle<Vec<Seen>>>,
}

/// One answer of the traffic.
#[derive(Debug, Clone)]
pub struct Seen {
    pub at: Instant,
    /// 0: the connection failed.
    pub status: u16,
    pub version: String,
}

impl Traffic {
    /// About `rate` requests a second to each node.
    pub fn start(cluster: &Cluster, rate: u64) -> Self {
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let threads = (0..3)
            .map(|node| {
                let (port, stop) = (cluster.nodes[node].data, stop.clone());
                std::thread::spawn(move || {
                    let mut seen = Vec::new();
                    let mut connection = None;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        let mut open = connection.take().or_else(|| Http::connect(port).ok());
                        let answer = open.as_mut().and_then(|http| http.send("POST", "/predict", &[], "{}").ok());
                        let (status, version) = match &answer {
                            Some(answer) => (answer.status, answer.header("x-served-by").unwrap_or("").to_string()),
                            None => (0, String::new()),
                        };
                        seen.push(Seen { at: Instant::now(), status, version });
                        connection = open.filter(|_| answer.is_some());
                        // The rate of this client.
                        std::thread::sleep(Duration::from_micros(1_000_000 / rate));
                    }
                    seen
                })
            })
            .collect();
        Self { stop, threads }
    }

    pub fn stop(mut self) -> Vec<Seen> {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
        self.threads.drain(..).flat_map(|thread| thread.join().unwrap()).collect()
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}
