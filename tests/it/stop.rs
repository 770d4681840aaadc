//! How `aviary proxy` ends, and how another process takes its place: real processes and signals.

use std::net::SocketAddr;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::cluster::harness::{aviary, free_port};
use crate::proxy::{OK, SOON, answering, head, upstream};

const MS: Duration = Duration::from_millis(1);

/// A running `aviary proxy`, killed at the test's end.
struct Running {
    child: Child,
    address: SocketAddr,
}

impl Running {
    /// Starts one on this port in front of `server`, and waits until it serves.
    async fn start(port: u16, server: SocketAddr, flags: &[&str]) -> Self {
        let address: SocketAddr = format!("127.0.0.1:{port}").parse().unwrap();
        let url = format!("http://{server}");
        let mut command = aviary();
        command.args(["proxy", "--listen", &address.to_string(), "--stable", &url, "--canary", &url, "--weight", "5"]);
        let child = command.args(flags).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut running = Self { child, address };
        let mut said = running.child.stderr.take().unwrap();
        let ready = tokio::task::spawn_blocking(move || {
            use std::io::BufRead as _;
            let mut lines = std::io::BufReader::new(&mut said).lines();
            let found = lines.by_ref().any(|line| line.unwrap().contains("the rest to stable"));
            // Read to the end: a pipe that is full would stop the process.
            std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
            found
        });
        assert!(timeout(SOON, ready).await.expect("a start in time").unwrap(), "it ended at its start");
        running
    }

    fn terminate(&self) {
        let killed = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(killed.success());
    }

    /// Waits for the process's end.
    async fn ended(&mut self) -> ExitStatus {
        let ended = async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return status;
                }
                // Nothing tells of another process's end.
                sleep(10 * MS).await;
            }
        };
        timeout(SOON, ended).await.expect("an end in time")
    }

    async fn get(&self, path: &str) -> std::io::Result<String> {
        get(self.address, path).await
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a GET on a connection of its own, and returns the answer.
async fn get(address: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    timeout(SOON, stream.read_to_end(&mut answer)).await??;
    Ok(String::from_utf8(answer).unwrap())
}

#[tokio::test]
async fn another_process_takes_the_port_over_and_no_request_fails() {
    let (server, port) = (answering(OK).await, free_port());
    for workers in ["1", "3"] {
        let flags = ["--share-port", "--workers", workers];
        let mut old = Running::start(port, server, &flags).await;
        let address = old.address;
        let asking: Vec<_> = (0..4)
            .map(|_| {
                tokio::spawn(async move {
                    let (began, mut answers) = (Instant::now(), 0);
                    while began.elapsed() < 1_500 * MS {
                        let answer =
                            get(address, "/predict").await.unwrap_or_else(|error| panic!("{answers}: {error}"));
                        assert!(answer.starts_with("HTTP/1.1 200"), "{answer:?} after {answers}");
                        answers += 1;
                    }
                    answers
                })
            })
            .collect();
        sleep(200 * MS).await;
        let new = Running::start(port, server, &flags).await;
        old.terminate();
        assert!(old.ended().await.success());
        for asking in asking {
            assert!(asking.await.unwrap() > 20);
        }
        assert!(new.get("/predict").await.unwrap().starts_with("HTTP/1.1 200"));
    }
}

#[tokio::test]
async fn a_client_that_just_connected_still_gets_its_answer() {
    let mut proxy = Running::start(free_port(), answering(OK).await, &[]).await;
    let mut stream = TcpStream::connect(proxy.address).await.unwrap();
    assert!(proxy.get("/predict").await.is_ok(), "later connections are accepted by now");
    proxy.terminate();
    // The client's request is on its way when the proxy begins to stop.
    sleep(150 * MS).await;
    stream.write_all(b"GET /predict HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    timeout(SOON, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.to_lowercase().contains("connection: close"), "{answer}");
    assert!(proxy.ended().await.success());
}

#[tokio::test]
async fn a_port_that_is_not_shared_is_taken() {
    let (server, port) = (answering(OK).await, free_port());
    // Of several workers each has a listener of its own at the port, so that the system would let in who asks to share it.
    let _first = Running::start(port, server, &["--workers", "1"]).await;
    for flags in [&["--share-port"][..], &[]] {
        let mut command = aviary();
        let (listen, url) = (format!("127.0.0.1:{port}"), format!("http://{server}"));
        command.args(["proxy", "--listen", &listen, "--stable", &url, "--canary", &url, "--weight", "5"]);
        let output = command.args(flags).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains(&listen), "{said}");
    }
}

#[tokio::test]
async fn readiness_ends_before_the_port_does() {
    let server = answering(OK).await;
    let mut proxy = Running::start(free_port(), server, &["--drain-ms", "800"]).await;
    assert!(proxy.get("/readyz").await.unwrap().starts_with("HTTP/1.1 200"));
    let began = Instant::now();
    proxy.terminate();
    sleep(200 * MS).await;
    let ready = proxy.get("/readyz").await.unwrap();
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("about to stop"), "{ready}");
    assert!(proxy.get("/livez").await.unwrap().starts_with("HTTP/1.1 200"));
    assert!(proxy.get("/predict").await.unwrap().starts_with("HTTP/1.1 200"));
    assert!(proxy.ended().await.success());
    assert!((700 * MS..3_000 * MS).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert!(proxy.get("/predict").await.is_err());
}

#[tokio::test]
async fn a_second_signal_ends_the_drain() {
    let server = answering(OK).await;
    let mut proxy = Running::start(free_port(), server, &["--drain-ms", "60000"]).await;
    proxy.terminate();
    sleep(300 * MS).await;
    assert!(proxy.get("/predict").await.unwrap().starts_with("HTTP/1.1 200"));
    proxy.terminate();
    assert!(proxy.ended().await.success());
}

#[tokio::test]
async fn the_access_log_moves_on_at_sighup_and_is_whole_at_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let (path, old) = (dir.path().join("logs/access.log"), dir.path().join("logs/access.log.1"));
    let flags = ["--access-log", path.to_str().unwrap(), "--access-log-format", "combined"];
    let mut proxy = Running::start(free_port(), answering(OK).await, &flags).await;
    assert!(proxy.get("/first").await.unwrap().starts_with("HTTP/1.1 200"));
    let lines = |path: &std::path::Path| {
        std::fs::read_to_string(path).unwrap_or_default().lines().map(String::from).collect::<Vec<_>>()
    };
    let until = async |path: &std::path::Path, count: usize| {
        let found = timeout(SOON, async {
            while lines(path).len() < count {
                // Nothing tells of another process's writes.
                sleep(10 * MS).await;
            }
        });
        found.await.unwrap_or_else(|_| panic!("{:?}, expected {count} lines", lines(path)));
    };
    until(&path, 1).await;
    std::fs::rename(&path, &old).unwrap();
    let signalled = Command::new("kill").args(["-HUP", &proxy.child.id().to_string()]).status().unwrap();
    assert!(signalled.success());
    let opened = timeout(SOON, async {
        while !path.exists() {
            // Nothing tells of another process's files.
            sleep(10 * MS).await;
        }
    });
    opened.await.expect("a new file");
    for _ in 0..50 {
        assert!(proxy.get("/later").await.unwrap().starts_with("HTTP/1.1 200"));
    }
    proxy.terminate();
    assert!(proxy.ended().await.success());
    let (first, later) = (lines(&old), lines(&path));
    assert_eq!((first.len(), later.len()), (1, 50), "{first:?} {later:?}");
    assert!(
        first[0].starts_with("127.0.0.1 - - [") && first[0].contains("\"GET /first HTTP/1.1\" 200 2 "),
        "{first:?}"
    );
}

/// Starts a server that switches to WebSocket and then sends back what it gets.
async fn echo() -> SocketAddr {
    upstream(|mut stream| async move {
        if head(&mut stream).await.is_empty() {
            return;
        }
        let switched = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
        stream.write_all(switched.as_bytes()).await.unwrap();
        let (mut from, mut to) = stream.split();
        let _ = tokio::io::copy(&mut from, &mut to).await;
    })
    .await
}

/// Opens a WebSocket's connection; what follows is an echo.
async fn websocket(address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = "GET /chat HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
        sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let answer = timeout(SOON, head(&mut stream)).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 101"), "{answer}");
    stream
}

/// Sends a byte and waits for it to come back.
async fn echoes(stream: &mut TcpStream) -> bool {
    let mut byte = [0];
    stream.write_all(b"x").await.is_ok() && matches!(timeout(SOON, stream.read(&mut byte)).await, Ok(Ok(1)))
}

#[tokio::test]
async fn upgraded_connections_get_the_grace() {
    let server = echo().await;
    let mut proxy = Running::start(free_port(), server, &["--grace-ms", "1200"]).await;
    let mut stream = websocket(proxy.address).await;
    assert!(echoes(&mut stream).await);
    let began = Instant::now();
    proxy.terminate();
    sleep(500 * MS).await;
    assert!(echoes(&mut stream).await, "cut off before the grace was over");
    assert!(proxy.ended().await.success());
    assert!((1_000 * MS..4_000 * MS).contains(&began.elapsed()), "{:?}", began.elapsed());
    assert!(!echoes(&mut stream).await);
    // One that ends by itself is not waited for any longer.
    let mut proxy = Running::start(free_port(), server, &["--grace-ms", "60000"]).await;
    let mut stream = websocket(proxy.address).await;
    proxy.terminate();
    sleep(300 * MS).await;
    assert!(echoes(&mut stream).await);
    drop(stream);
    assert!(proxy.ended().await.success());
}

#[tokio::test]
async fn a_tunnel_that_is_silent_is_closed() {
    let server = echo().await;
    let proxy = Running::start(free_port(), server, &["--tunnel-idle-ms", "500"]).await;
    let mut stream = websocket(proxy.address).await;
    for _ in 0..4 {
        sleep(250 * MS).await;
        assert!(echoes(&mut stream).await, "closed although it was used");
    }
    let began = Instant::now();
    assert_eq!(timeout(SOON, stream.read(&mut [0; 1])).await.expect("an end").unwrap_or(0), 0);
    assert!((400 * MS..3_000 * MS).contains(&began.elapsed()), "{:?}", began.elapsed());
    let proxy = Running::start(free_port(), server, &["--tunnel-idle-ms", "0"]).await;
    let mut stream = websocket(proxy.address).await;
    sleep(1_000 * MS).await;
    assert!(echoes(&mut stream).await, "closed although there is no limit");
}
