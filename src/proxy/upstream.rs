//! A version's servers: which one takes the next request, and which ones are ejected for a while.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::Duration;

use http::uri::Authority;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

use crate::domain::ids::VersionId;
use crate::domain::plan::{Backend, HealthCheck, RequestLimits};
use crate::domain::time::Mono;
use crate::entropy;
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
/// How often a request that waits for a place looks by itself whether there is one.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

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
    /// Tells those who wait for a place that one request less is there.
    freed: Notify,
    failures: AtomicU32,
    rounds: AtomicU32,
    /// End of its ejection, in microseconds of the node's clock.
    ejected_until: AtomicU64,
    /// End of its last ejection, after which its share of requests grows, in microseconds of the node's clock; 0: it had none.
    slow_from: AtomicU64,
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

    /// Draws whether a server that is back for less than `slow_start_us` takes a request: at first one in ten of its share.
    fn is_drawn(&self, now: Mono, slow_start_us: u64) -> bool {
        let from = self.slow_from.load(Relaxed);
        let back_us = now.0.saturating_sub(from);
        if from == 0 || back_us >= slow_start_us {
            return true;
        }
        entropy::within(0..slow_start_us) < back_us.max(slow_start_us / 10)
    }

    /// Takes a place for a request, of `max`; false when there is none.
    fn takes(&self, max: u32) -> bool {
        if max == u32::MAX {
            self.open.fetch_add(1, Relaxed);
            return true;
        }
        self.open.fetch_update(Relaxed, Relaxed, |open| (open < max).then_some(open + 1)).is_ok()
    }

    /// Takes the result of a probe; returns true when it changed what is thought of the server.
    pub fn probed(&self, well: bool, now: Mono) -> bool {
        if well {
            self.probes_failed.store(0, Relaxed);
            let was_unwell = self.unwell.swap(false, Relaxed);
            if was_unwell {
                self.slow_from.store(now.0, Relaxed);
            }
            return was_unwell;
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
            freed: Notify::new(),
            failures: AtomicU32::new(0),
            rounds: AtomicU32::new(0),
            ejected_until: AtomicU64::new(0),
            slow_from: AtomicU64::new(0),
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
    rules: PoolRules,
    next: AtomicUsize,
    /// Requests that wait for a place.
    waiting: AtomicUsize,
}

/// Rules by which a pool's servers get requests.
#[derive(Debug, Clone, Copy, Default)]
pub struct PoolRules {
    /// Limits of the service.
    pub limits: RequestLimits,
    /// How long a server's share grows after an ejection, in milliseconds; 0: not at all.
    pub slow_start_ms: u64,
}

/// What a pool has for a request.
pub enum Choice {
    /// This server has a place.
    Server(InFlightGuard),
    /// Servers are there, and each has as many requests as it may.
    Full,
    /// Every server was tried.
    NoneLeft,
}

impl Pool {
    /// Returns the servers of a backend, as of this routing version.
    pub fn new(backend: &Backend, routing_version: u64, servers: &Servers, rules: PoolRules) -> Self {
        let mark = format!("x-served-by: {}\r\nx-routing-version: {routing_version}\r\n", backend.version);
        Self {
            version: backend.version.clone(),
            servers: backend.urls.iter().filter_map(|url| servers.named(url)).collect(),
            mark: mark.into_bytes().into(),
            health_check: backend.health_check.clone(),
            rules,
            next: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
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
    pub fn choose(&self, now: Mono, tried: &[usize]) -> Choice {
        // Those who wait come first.
        if self.waiting.load(Relaxed) > 0 { Choice::Full } else { self.take_server(now, tried) }
    }

    fn take_server(&self, now: Mono, tried: &[usize]) -> Choice {
        let max = self.rules.limits.max_requests_per_server.map(|max| u32::try_from(max).unwrap_or(u32::MAX));
        if !self.has_choice() && max.is_none() {
            return match self.servers.first().filter(|server| !tried.contains(&server.id)) {
                Some(server) => {
                    Choice::Server(InFlightGuard { server: server.clone(), counted: false, limited: false })
                }
                None => Choice::NoneLeft,
            };
        }
        let (max, slow_start_us) = (max.unwrap_or(u32::MAX), self.rules.slow_start_ms * 1000);
        let (first, count) = (self.next.fetch_add(1, Relaxed), self.servers.len());
        let untried = || {
            let servers = (0..count).map(|i| &self.servers[first.wrapping_add(i) % count]);
            servers.filter(|server| !tried.contains(&server.id))
        };
        let least = |servers: &mut dyn Iterator<Item = &Arc<Server>>| {
            let free = servers.map(|server| (server.open.load(Relaxed), server)).filter(|(open, _)| *open < max);
            free.min_by_key(|(open, _)| *open).map(|(_, server)| server.clone())
        };
        let well = || untried().filter(|server| server.may_serve(now));
        // Another worker may take the place that was seen.
        for _ in 0..=count {
            // Who was not drawn is better than nobody.
            let found = least(&mut well().filter(|server| server.is_drawn(now, slow_start_us)));
            let found = found.or_else(|| least(&mut well()));
            let found = found.or_else(|| well().next().map_or_else(|| least(&mut untried()), |_| None));
            match found {
                Some(server) if server.takes(max) => {
                    return Choice::Server(InFlightGuard { server, counted: true, limited: max < u32::MAX });
                }
                Some(_) => {}
                None => break,
            }
        }
        if untried().next().is_some() { Choice::Full } else { Choice::NoneLeft }
    }

    /// Waits for a place at a server that was not tried, while few wait and not for long; full, when there is none by then.
    pub async fn queue(&self, now: impl Fn() -> Mono, tried: &[usize]) -> Choice {
        let RequestLimits { max_pending, pending_timeout_ms, .. } = self.rules.limits;
        let waiting = Waiting::begins(&self.waiting);
        if waiting.before as u64 >= max_pending {
            return Choice::Full;
        }
        let until = Instant::now() + Duration::from_millis(pending_timeout_ms);
        loop {
            let mut freed: Vec<_> = self.servers.iter().map(|server| Box::pin(server.freed.notified())).collect();
            // From here on nothing is missed.
            freed.iter_mut().for_each(|freed| {
                freed.as_mut().enable();
            });
            let choice = self.take_server(now(), tried);
            if let Choice::Server(_) = choice {
                // One who waits may have been told of more places than it takes.
                self.servers.iter().for_each(|server| server.freed.notify_one());
            }
            if !matches!(choice, Choice::Full) || Instant::now() >= until {
                return choice;
            }
            let any =
                std::future::poll_fn(|cx| match freed.iter_mut().any(|freed| freed.as_mut().poll(cx).is_ready()) {
                    true => Poll::Ready(()),
                    false => Poll::Pending,
                });
            // Nobody tells of an ejection's end.
            let look_again = until.min(Instant::now() + LOOK_AGAIN);
            let _ = timeout_at(look_again, any).await;
        }
    }
}

/// One of those who wait for a place.
struct Waiting<'p> {
    all: &'p AtomicUsize,
    /// Number of those who waited before.
    before: usize,
}

impl<'p> Waiting<'p> {
    fn begins(all: &'p AtomicUsize) -> Self {
        Self { all, before: all.fetch_add(1, Relaxed) }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(1, Relaxed);
    }
}

/// A request at a server.
pub struct InFlightGuard {
    /// Server that handles the request.
    pub server: Arc<Server>,
    counted: bool,
    /// Others may wait for its place.
    limited: bool,
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
            let until = now.after_ms((EJECTED_MS * rounds).min(EJECTED_MS_MAX)).0;
            server.ejected_until.store(until, Relaxed);
            server.slow_from.store(until, Relaxed);
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
        if self.limited {
            self.server.freed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(urls: &[&str]) -> Pool {
        let version = VersionId::new("v1").unwrap();
        Pool::new(
            &Backend::new(version, urls.iter().map(|url| url.to_string()).collect()),
            7,
            &Servers::default(),
            PoolRules::default(),
        )
    }

    fn chosen(pool: &Pool, now: Mono, tried: &[usize]) -> Option<InFlightGuard> {
        match pool.choose(now, tried) {
            Choice::Server(in_flight) => Some(in_flight),
            Choice::Full => panic!("there is no limit"),
            Choice::NoneLeft => None,
        }
    }

    #[test]
    fn the_only_server_of_a_version_is_chosen_though_it_fails_but_does_not_count_as_there() {
        let pool = pool(&["http://a:1"]);
        let fail = |now| (0..5).for_each(|_| chosen(&pool, now, &[]).unwrap().ended(true, now));
        assert!(pool.has_server(Mono(0)));
        fail(Mono(0));
        assert!(!pool.has_server(Mono(0)) && chosen(&pool, Mono(0), &[]).is_some());
        chosen(&pool, Mono(1), &[]).unwrap().ended(false, Mono(1));
        assert!(pool.has_server(Mono::from_millis(10_001)));
        assert!(super::tests::pool(&[]).has_server(Mono(0)), "the node answers itself");
    }

    #[test]
    fn the_least_loaded_server_is_next() {
        let pool = pool(&["http://a:1", "http://b:1", "http://c:1"]);
        let first: Vec<_> = (0..3).map(|_| chosen(&pool, Mono(0), &[]).unwrap()).collect();
        let mut ids: Vec<_> = first.iter().map(|in_flight| in_flight.server.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [0, 1, 2]);
        let free = first[1].server.id;
        let kept = [&first[0], &first[2]].map(|in_flight| in_flight.server.clone());
        for server in &kept {
            server.open.fetch_add(1, Relaxed);
        }
        drop(first);
        assert!((0..9).all(|_| chosen(&pool, Mono(0), &[]).unwrap().server.id == free));
    }

    #[test]
    fn a_server_that_fails_is_ejected_and_tried_again_later() {
        let pool = pool(&["http://a:1", "http://b:1"]);
        let bad = 0;
        for _ in 0..5 {
            let in_flight = chosen(&pool, Mono(0), &[1]).unwrap();
            in_flight.ended(true, Mono(0));
        }
        let at = |at| chosen(&pool, Mono::from_millis(at), &[]).unwrap().server.id;
        assert!((0..20).all(|_| at(9_999) != bad));
        assert!((0..20).any(|_| at(10_001) == bad));
        // It fails again: one failure is enough now, and it waits longer.
        chosen(&pool, Mono::from_millis(10_001), &[1]).unwrap().ended(true, Mono::from_millis(10_001));
        assert!((0..20).all(|_| at(30_000) != bad));
        assert!((0..20).any(|_| at(30_002) == bad));
        // All fail: all are tried.
        (0..5).for_each(|_| chosen(&pool, Mono(0), &[0]).unwrap().ended(true, Mono::from_millis(11_000)));
        assert!(chosen(&pool, Mono::from_millis(11_001), &[]).is_some());
        assert!(chosen(&pool, Mono(0), &[0, 1]).is_none());
    }

    fn limited(urls: &[&str], limits: RequestLimits, slow_start_ms: u64) -> Arc<Pool> {
        let backend = Backend::new(VersionId::new("v1").unwrap(), urls.iter().map(|url| url.to_string()).collect());
        Arc::new(Pool::new(&backend, 7, &Servers::default(), PoolRules { limits, slow_start_ms }))
    }

    const TWO_EACH: RequestLimits =
        RequestLimits { max_requests: None, max_requests_per_server: Some(2), max_pending: 2, pending_timeout_ms: 200 };

    #[test]
    fn servers_get_no_more_requests_than_they_may() {
        for urls in [&["http://a:1"][..], &["http://a:1", "http://b:1"]] {
            let pool = limited(urls, TWO_EACH, 0);
            let taken: Vec<_> = (0..2 * urls.len()).map(|_| pool.choose(Mono(0), &[])).collect();
            assert!(taken.iter().all(|choice| matches!(choice, Choice::Server(_))));
            assert!(matches!(pool.choose(Mono(0), &[]), Choice::Full));
            let all: Vec<_> = pool.servers.iter().map(|server| server.id).collect();
            assert!(matches!(pool.choose(Mono(0), &all), Choice::NoneLeft));
            drop(taken);
            assert!(matches!(pool.choose(Mono(0), &[]), Choice::Server(_)));
        }
    }

    #[tokio::test]
    async fn those_who_wait_come_in_turn_and_not_for_ever() {
        let pool = limited(&["http://a:1"], RequestLimits { max_requests_per_server: Some(1), ..TWO_EACH }, 0);
        let held = pool.choose(Mono(0), &[]);
        let waits = || {
            let pool = pool.clone();
            tokio::spawn(async move { pool.queue(|| Mono(0), &[]).await })
        };
        let (first, second) = (waits(), waits());
        tokio::task::yield_now().await;
        // No third one may wait, and nobody overtakes.
        assert!(matches!(pool.queue(|| Mono(0), &[]).await, Choice::Full));
        drop(held);
        assert!(matches!(pool.choose(Mono(0), &[]), Choice::Full));
        let first = first.await.unwrap();
        assert!(matches!(first, Choice::Server(_)) && !second.is_finished());
        drop(first);
        let second = second.await.unwrap();
        assert!(matches!(second, Choice::Server(_)));
        let began = Instant::now();
        assert!(matches!(pool.queue(|| Mono(0), &[]).await, Choice::Full));
        let waited = began.elapsed();
        assert!((200..5_000).contains(&waited.as_millis()), "{waited:?}");
    }

    #[test]
    fn a_server_that_is_back_gets_a_growing_share() {
        entropy::seed(7);
        let pool = limited(&["http://a:1", "http://b:1"], RequestLimits::default(), 30_000);
        (0..5).for_each(|_| chosen(&pool, Mono(0), &[1]).unwrap().ended(true, Mono(0)));
        let share =
            |ms| (0..1_000).filter(|_| chosen(&pool, Mono::from_millis(ms), &[]).unwrap().server.id == 0).count();
        // Ejected for 10 s; then 5 % of all requests, a quarter in the middle, a half at the end; each with five standard deviations.
        assert_eq!(share(9_999), 0);
        let [begin, middle, end] = [10_001, 25_000, 40_001].map(share);
        assert!((16..=84).contains(&begin), "{begin}");
        assert!((180..=320).contains(&middle), "{middle}");
        assert!((420..=580).contains(&end), "{end}");
        // Where nobody else is left, it serves at once.
        let alone = (0..50).all(|_| chosen(&pool, Mono::from_millis(10_001), &[1]).unwrap().server.id == 0);
        assert!(alone);
    }
}
