//! A version's servers: which one takes the next request, and which ones are ejected for a while.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::uri::Authority;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::domain::ids::VersionId;
use crate::domain::plan::{Backend, HealthCheck};
use crate::domain::time::Mono;
use crate::listener::keep_alive;

use super::dial::dial;
use super::failure::ConnectFailure;
use super::names::{self, Addresses};

/// Failures in a row after which a server is ejected.
const FAILURES_MAX: u32 = 5;
/// Length of a server's first ejection, in milliseconds; each one in a row is longer by as much.
const EJECTED_MS: u64 = 10_000;
/// Longest ejection, in milliseconds, however often the server fails.
const EJECTED_MS_MAX: u64 = 60_000;
/// Failed probes in a row that make a server unwell; one that succeeds makes it well.
const PROBES_FAILED_MAX: u32 = 3;

/// One server, the same object in every version, step and view that names its URL.
pub struct Server {
    /// Its place among all that were ever named.
    pub id: usize,
    /// Address of the server, `host:port`.
    pub authority: Authority,
    /// True if the server speaks HTTP/2 without TLS (`h2c://`).
    pub http2: bool,
    /// Where it is.
    pub addresses: Addresses,
    /// Requests at it now; counted only where there is a choice.
    open: AtomicU32,
    failures: AtomicU32,
    rounds: AtomicU32,
    /// End of its ejection, in microseconds of the node's clock.
    ejected_until: AtomicU64,
    /// It failed the last probes.
    unwell: AtomicBool,
    probes_failed: AtomicU32,
    /// When it is asked next, in microseconds of the node's clock.
    probe_at: AtomicU64,
}

impl Server {
    /// Opens a TCP connection to the server within `limit`, to whichever of its addresses takes one.
    pub async fn connect(&self, limit: Duration) -> Result<TcpStream, ConnectFailure> {
        let until = Instant::now() + limit;
        let late = |_| ConnectFailure::Late(limit.as_millis() as u64);
        let found = timeout_at(until, self.addresses.in_turn()).await.map_err(late)?;
        let addresses = found.map_err(|error| match ConnectFailure::of(&error) {
            local @ ConnectFailure::Local(_) => local,
            _ => ConnectFailure::Unknown(error.to_string()),
        })?;
        let left = until.saturating_duration_since(Instant::now());
        let stream = dial(addresses, left, |address| self.addresses.failed(address)).await?;
        let ready = stream.set_nodelay(true).and_then(|()| keep_alive(&stream));
        ready.map_err(|error| ConnectFailure::of(&error))?;
        Ok(stream)
    }

    fn may_serve(&self, now: Mono) -> bool {
        self.ejected_until.load(Relaxed) <= now.0 && !self.unwell.load(Relaxed)
    }

    /// Takes the result of a probe; returns true when it changed what is thought of the server.
    pub fn probed(&self, well: bool) -> bool {
        if well {
            self.probes_failed.store(0, Relaxed);
            return self.unwell.swap(false, Relaxed);
        }
        let failed = self.probes_failed.fetch_add(1, Relaxed) + 1;
        failed >= PROBES_FAILED_MAX && !self.unwell.swap(true, Relaxed)
    }
}

/// All servers that were ever named.
#[derive(Default)]
pub struct Servers(Mutex<BTreeMap<String, Arc<Server>>>);

impl Servers {
    /// Returns the server of a URL, the same one each time; none where the URL names no host.
    pub fn named(&self, url: &str) -> Option<Arc<Server>> {
        let mut known = self.0.lock().expect("nothing panics while it holds the servers");
        if let Some(server) = known.get(url) {
            return Some(server.clone());
        }
        let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
        let authority: Authority = rest.parse().ok()?;
        let server = Arc::new(Server {
            id: known.len(),
            addresses: Addresses::new(&with_port(&authority), names::system()),
            authority,
            http2: scheme == "h2c",
            open: AtomicU32::new(0),
            failures: AtomicU32::new(0),
            rounds: AtomicU32::new(0),
            ejected_until: AtomicU64::new(0),
            unwell: AtomicBool::new(false),
            probes_failed: AtomicU32::new(0),
            probe_at: AtomicU64::new(0),
        });
        known.insert(url.into(), server.clone());
        Some(server)
    }
}

/// Returns `host:port`, with the port of `http` where none is named.
fn with_port(authority: &Authority) -> String {
    match authority.port() {
        Some(_) => authority.to_string(),
        None => format!("{authority}:80"),
    }
}

/// Servers of one version, with their open requests and ejections.
pub struct Pool {
    /// Version that the servers serve.
    pub version: VersionId,
    /// Empty: the node answers itself.
    pub servers: Vec<Arc<Server>>,
    /// The header lines that say who served.
    pub mark: Box<[u8]>,
    health_check: Option<HealthCheck>,
    next: AtomicUsize,
}

impl Pool {
    /// Returns the servers of a backend, as of this routing version.
    pub fn new(backend: &Backend, routing_version: u64, servers: &Servers) -> Self {
        let mark = format!("x-served-by: {}\r\nx-routing-version: {routing_version}\r\n", backend.version);
        Self {
            version: backend.version.clone(),
            servers: backend.urls.iter().filter_map(|url| servers.named(url)).collect(),
            mark: mark.into_bytes().into(),
            health_check: backend.health_check.clone(),
            next: AtomicUsize::new(0),
        }
    }

    /// Returns true when all its servers speak HTTP/1.1, and there is one.
    pub fn is_plain(&self) -> bool {
        !self.servers.is_empty() && self.servers.iter().all(|server| !server.http2)
    }

    /// Returns true when the same request may be tried at another server.
    pub fn has_choice(&self) -> bool {
        self.servers.len() > 1
    }

    /// Returns true when one of its servers is not ejected, or it needs none.
    pub fn has_server(&self, now: Mono) -> bool {
        self.servers.is_empty() || self.servers.iter().any(|server| server.may_serve(now))
    }

    /// Returns the servers that are to be asked now whether they are well.
    pub fn due(&self, now: Mono) -> impl Iterator<Item = (Arc<Server>, HealthCheck)> {
        let check = self.health_check.as_ref().filter(|_| self.has_choice());
        check.into_iter().flat_map(move |check| {
            let due = self.servers.iter().filter(move |server| {
                let at = server.probe_at.load(Relaxed);
                at <= now.0 && server.probe_at.swap(now.after_ms(check.interval_ms).0, Relaxed) == at
            });
            due.map(|server| (server.clone(), check.clone()))
        })
    }

    /// Returns the least loaded server that was not tried, of those that don't fail; of all, when all fail.
    pub fn choose(&self, now: Mono, tried: &[usize]) -> Option<InFlightGuard> {
        if !self.has_choice() {
            let server = self.servers.first().filter(|server| !tried.contains(&server.id))?;
            return Some(InFlightGuard { server: server.clone(), counted: false });
        }
        let first = self.next.fetch_add(1, Relaxed);
        let count = self.servers.len();
        let untried = || (0..count).map(|i| &self.servers[(first + i) % count]).filter(|s| !tried.contains(&s.id));
        let least = |servers: &mut dyn Iterator<Item = &Arc<Server>>| {
            servers.min_by_key(|server| server.open.load(Relaxed)).cloned()
        };
        let server = least(&mut untried().filter(|server| server.may_serve(now))).or_else(|| least(&mut untried()))?;
        server.open.fetch_add(1, Relaxed);
        Some(InFlightGuard { server, counted: true })
    }
}

/// A request at a server.
pub struct InFlightGuard {
    /// Server that handles the request.
    pub server: Arc<Server>,
    counted: bool,
}

impl InFlightGuard {
    /// Says how it ended: with an error of the server's, or not.
    pub fn ended(&self, error: bool, now: Mono) {
        // Of a version's only server, too: it gets requests all the same, but the node says that it can't serve them.
        let server = &self.server;
        if !error {
            if server.failures.load(Relaxed) > 0 {
                server.failures.store(0, Relaxed);
                server.rounds.store(0, Relaxed);
            }
            return;
        }
        if server.failures.fetch_add(1, Relaxed) + 1 >= FAILURES_MAX && server.may_serve(now) {
            let rounds = u64::from(server.rounds.fetch_add(1, Relaxed)) + 1;
            server.ejected_until.store(now.after_ms((EJECTED_MS * rounds).min(EJECTED_MS_MAX)).0, Relaxed);
            // One failure more is enough next time.
            server.failures.store(FAILURES_MAX - 1, Relaxed);
        }
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        if self.counted {
            self.server.open.fetch_sub(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(urls: &[&str]) -> Pool {
        let version = VersionId::new("v1").unwrap();
        Pool::new(&Backend::new(version, urls.iter().map(|url| url.to_string()).collect()), 7, &Servers::default())
    }

    #[test]
    fn the_only_server_of_a_version_is_chosen_though_it_fails_but_does_not_count_as_there() {
        let pool = pool(&["http://a:1"]);
        let fail = |now| (0..5).for_each(|_| pool.choose(now, &[]).unwrap().ended(true, now));
        assert!(pool.has_server(Mono(0)));
        fail(Mono(0));
        assert!(!pool.has_server(Mono(0)) && pool.choose(Mono(0), &[]).is_some());
        pool.choose(Mono(1), &[]).unwrap().ended(false, Mono(1));
        assert!(pool.has_server(Mono::from_millis(10_001)));
        assert!(super::tests::pool(&[]).has_server(Mono(0)), "the node answers itself");
    }

    #[test]
    fn the_least_loaded_server_is_next() {
        let pool = pool(&["http://a:1", "http://b:1", "http://c:1"]);
        let first: Vec<_> = (0..3).map(|_| pool.choose(Mono(0), &[]).unwrap()).collect();
        let mut ids: Vec<_> = first.iter().map(|in_flight| in_flight.server.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2]);
        let free = first[1].server.id;
        let kept = [&first[0], &first[2]].map(|in_flight| in_flight.server.clone());
        for server in &kept {
            server.open.fetch_add(1, Relaxed);
        }
        drop(first);
        assert!((0..9).all(|_| pool.choose(Mono(0), &[]).unwrap().server.id == free));
    }

    #[test]
    fn a_server_that_fails_is_ejected_and_tried_again_later() {
        let pool = pool(&["http://a:1", "http://b:1"]);
        let bad = 0;
        for _ in 0..5 {
            let in_flight = pool.choose(Mono(0), &[1]).unwrap();
            in_flight.ended(true, Mono(0));
        }
        let chosen = |at| pool.choose(Mono::from_millis(at), &[]).unwrap().server.id;
        assert!((0..20).all(|_| chosen(9_999) != bad));
        assert!((0..20).any(|_| chosen(10_001) == bad));
        // It fails again: one failure is enough now, and it waits longer.
        pool.choose(Mono::from_millis(10_001), &[1]).unwrap().ended(true, Mono::from_millis(10_001));
        assert!((0..20).all(|_| chosen(30_000) != bad));
        assert!((0..20).any(|_| chosen(30_002) == bad));
        // All fail: all are tried.
        (0..5).for_each(|_| pool.choose(Mono(0), &[0]).unwrap().ended(true, Mono::from_millis(11_000)));
        assert!(pool.choose(Mono::from_millis(11_001), &[]).is_some());
        assert!(pool.choose(Mono(0), &[0, 1]).is_none());
    }
}
