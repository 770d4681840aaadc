//! The published view, compiled for requests: which service, which version, which server.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use http::HeaderMap;

use crate::domain::ids::ServiceId;
use crate::domain::plan::{HashOn, HealthCheck, RolloutSpec};
use crate::domain::side::Side;
use crate::domain::stats::Stats;
use crate::domain::time::Mono;
use crate::domain::weights::{Weight, sticky_ticket};
use crate::domain::window::Evidence;
use crate::entropy;
use crate::node::handle::NodeHandle;
use crate::protocol::{Observation, Serving, View};

use super::outcome::{ANSWERS, COPIES, CircuitBreaker, FAILURES_MAX, OutcomeCounts};
use super::settings::ProxySettings;
use super::upstream::{Pool, Server, Servers};
use super::wire;

/// State that outlives the views of one routing version.
pub struct Counters {
    pub stable: OutcomeCounts,
    pub canary: Option<OutcomeCounts>,
    /// Of requests that were mirrored to the canary.
    pub copies: Option<OutcomeCounts>,
    pub circuit_breaker: CircuitBreaker,
}

/// One service, ready to serve.
pub struct Route {
    pub service: ServiceId,
    pub serving: Serving,
    pub stable: Pool,
    pub canary: Option<Pool>,
    /// All its servers can be reached by a plain relay.
    pub plain: bool,
    /// Fields that its rollout decides by, which no Connection option removes: those of `hashOn` and `matches`.
    pub reads: Box<[String]>,
    pub counters: Arc<Counters>,
    salt: u64,
}

/// A request's fields, however they were read.
pub trait Fields {
    /// Returns the first value of a field, named in small letters.
    fn value(&self, name: &str) -> Option<&[u8]>;

    /// Returns the value of the cookie `name`; none without it.
    fn cookie(&self, name: &str) -> Option<&[u8]>;
}

/// Returns the value of the cookie `name` in a Cookie field (RFC 6265, 4.2.1).
fn cookie_in<'f>(field: &'f [u8], name: &str) -> Option<&'f [u8]> {
    let mut pairs = field.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
    pairs.find_map(|pair| pair.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
}

impl Fields for HeaderMap {
    fn value(&self, name: &str) -> Option<&[u8]> {
        self.get(name).map(|value| value.as_bytes())
    }

    fn cookie(&self, name: &str) -> Option<&[u8]> {
        // HTTP/2 may send each cookie in a field of its own.
        self.get_all(http::header::COOKIE).iter().find_map(|value| cookie_in(value.as_bytes(), name))
    }
}

impl Fields for wire::HeaderFields<'_, '_> {
    fn value(&self, name: &str) -> Option<&[u8]> {
        wire::field(self, name)
    }

    fn cookie(&self, name: &str) -> Option<&[u8]> {
        self.iter()
            .filter(|field| field.name.eq_ignore_ascii_case("cookie"))
            .find_map(|field| cookie_in(field.value, name))
    }
}

impl Route {
    fn new(service: &ServiceId, serving: &Serving, before: Option<&Route>, shared: &RouteParts) -> Self {
        let same = before.filter(|before| before.serving.routing_version == serving.routing_version);
        let same = same.filter(|before| before.canary.is_some() == serving.canary.is_some());
        let shards = shared.shards;
        let counters = same.map(|before| before.counters.clone()).unwrap_or_else(|| {
            let canary = serving.canary.as_ref().map(|(backend, _)| &backend.version);
            let mirrored = canary.filter(|_| serving.spec.mirror > Weight::ZERO);
            Arc::new(Counters {
                stable: OutcomeCounts::new(service, &serving.stable.version, shards, ANSWERS),
                canary: canary.map(|version| OutcomeCounts::new(service, version, shards, ANSWERS)),
                copies: mirrored.map(|version| OutcomeCounts::new(service, version, shards, COPIES)),
                circuit_breaker: CircuitBreaker::default(),
            })
        });
        let pool = |backend| Pool::new(backend, serving.routing_version, &shared.servers);
        let (stable, canary) = (pool(&serving.stable), serving.canary.as_ref().map(|(backend, _)| pool(backend)));
        let plain = |pool: &Pool| !pool.servers.is_empty() && pool.servers.iter().all(|server| !server.http2);
        Self {
            service: service.clone(),
            serving: serving.clone(),
            plain: plain(&stable) && canary.as_ref().is_none_or(plain),
            reads: reads(&serving.spec),
            stable,
            canary,
            counters,
            salt: xxhash_rust::xxh3::xxh3_64(service.as_str().as_bytes()),
        }
    }

    /// Returns the servers of a role.
    pub fn pool(&self, pick: Side) -> &Pool {
        match (pick, &self.canary) {
            (Side::Canary, Some(canary)) => canary,
            _ => &self.stable,
        }
    }

    /// Returns who serves a request, given the canary's share at this moment.
    fn pick(&self, effective_bp: u16, fields: &impl Fields, peer: &str) -> Side {
        if effective_bp == 0 || self.counters.circuit_breaker.is_tripped() {
            return Side::Stable;
        }
        match fields.value("x-canary") {
            Some(b"always") => return Side::Canary,
            Some(b"never") => return Side::Stable,
            _ => {}
        }
        let spec = &self.serving.spec;
        let holds = |(name, value): &(String, String)| fields.value(name) == Some(value.as_bytes());
        if spec.matches.iter().any(|m| m.headers.iter().all(holds)) {
            return Side::Canary;
        }
        let key = spec.hash_on.as_ref().and_then(|hash_on| match hash_on {
            HashOn::Header(name) => fields.value(name),
            HashOn::Cookie(name) => fields.cookie(name),
            HashOn::ClientAddress => Some(peer.as_bytes()),
        });
        let ticket = match key {
            Some(key) => sticky_ticket(self.salt, key),
            None => entropy::within(0..Weight::WHOLE),
        };
        if ticket < effective_bp { Side::Canary } else { Side::Stable }
    }
}

/// Returns the names of the fields that a rollout decides by; cookies are among those of [`super::hop::RELIED_ON`].
fn reads(spec: &RolloutSpec) -> Box<[String]> {
    let matched = spec.matches.iter().flat_map(|m| &m.headers).map(|(name, _)| name);
    let hashed = spec.hash_on.iter().filter_map(|hash_on| match hash_on {
        HashOn::Header(name) => Some(name),
        HashOn::Cookie(_) | HashOn::ClientAddress => None,
    });
    hashed.chain(matched).cloned().collect()
}

/// All services, as of one view.
pub struct Table {
    view: Arc<View>,
    routes: BTreeMap<ServiceId, Arc<Route>>,
}

/// Parts that routes are made from.
struct RouteParts {
    servers: Servers,
    /// Number of workers, each with its own counters.
    shards: usize,
}

/// What all workers of the data plane share: the table in force, and the counters.
pub struct RoutingTable {
    pub node: NodeHandle,
    pub settings: ProxySettings,
    open: AtomicUsize,
    table: ArcSwap<Table>,
    compiling: Mutex<()>,
    shared: RouteParts,
}

/// A request's place among those that are open.
pub struct RequestPermit(Arc<RoutingTable>);

impl Drop for RequestPermit {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
    }
}

/// Why a request has no route.
pub struct NoRoute {
    /// 404, or 503 where nothing is known at all.
    pub status: u16,
    /// Text of the answer to the client.
    pub why: String,
}

impl RoutingTable {
    pub fn new(node: NodeHandle, settings: ProxySettings, shards: usize) -> Self {
        let shared = RouteParts { servers: Servers::default(), shards };
        let view = node.published.view();
        let routes = compile(&view, &BTreeMap::new(), &shared);
        let table = ArcSwap::from_pointee(Table { routes, view });
        Self { node, settings, open: AtomicUsize::new(0), table, compiling: Mutex::new(()), shared }
    }

    /// Takes a place for one more request, while there are any.
    pub fn place(self: &Arc<Self>) -> Option<RequestPermit> {
        let place = RequestPermit(self.clone());
        (self.open.fetch_add(1, Relaxed) < self.settings.requests_max).then_some(place)
    }

    /// Returns the table of the view in force. The first worker that sees another view compiles it; the others wait for
    /// that, so that none routes with a view that is no longer in force.
    pub fn table(&self) -> Arc<Table> {
        let view = self.node.published.view();
        let table = self.table.load();
        if Arc::ptr_eq(&table.view, &view) {
            return table.clone();
        }
        let _turn = self.compiling.lock().expect("compiling doesn't panic");
        let view = self.node.published.view();
        let before = self.table.load_full();
        if Arc::ptr_eq(&before.view, &view) {
            return before;
        }
        let table = Arc::new(Table { routes: compile(&view, &before.routes, &self.shared), view });
        self.table.store(table.clone());
        table
    }

    /// Returns the time on the node's clock.
    pub fn now(&self) -> Mono {
        self.node.published.clock().now().mono
    }

    /// Returns who serves the request of a client at `peer` (an IP address) at this moment.
    pub fn pick(&self, route: &Route, fields: &impl Fields, peer: &str, now: Mono) -> Side {
        route.pick(self.node.published.effective_bp_at(&route.serving, now), fields, peer)
    }

    /// Returns true when the canary gets a copy of a request that stable serves.
    pub fn is_mirrored(&self, route: &Route, now: Mono) -> bool {
        let share = route.serving.spec.mirror.bp();
        share > 0
            && route.canary.is_some()
            && self.node.published.effective_bp_at(&route.serving, now) > 0
            && !route.counters.circuit_breaker.is_tripped()
            && entropy::within(0..Weight::WHOLE) < share
    }

    /// Counts the answer to a copy: what nobody waits for is no evidence, and shows in metrics of its own.
    pub fn count_copy(&self, shard: usize, route: &Route, status: u16, began: Mono, error: bool) {
        if let Some(copies) = &route.counters.copies {
            copies.add(shard, status, self.now().0.saturating_sub(began.0), error);
        }
    }

    /// Counts an answer that came to a client, or should have; tells the node when it was one failure of the canary too
    /// many.
    pub fn count(&self, shard: usize, route: &Route, pick: Side, status: u16, began: Mono, error: bool) {
        let latency_us = self.now().0.saturating_sub(began.0);
        let error = error || route.serving.spec.error_classes.has(status);
        let counters = &route.counters;
        let (Side::Canary, Some(canary)) = (pick, &counters.canary) else {
            counters.stable.add(shard, status, latency_us, error);
            return counters.circuit_breaker.stable(error);
        };
        canary.add(shard, status, latency_us, error);
        if counters.circuit_breaker.canary(error) {
            let reason = format!("the last {FAILURES_MAX} canary answers failed while stable's did not");
            let (node, service, version) = (self.node.clone(), route.service.clone(), route.serving.routing_version);
            tokio::spawn(async move { node.circuit_breaker_tripped(service, version, reason).await });
        }
    }

    /// Returns what was counted since the last call.
    pub fn drain(&self) -> Vec<Observation> {
        let table = self.table();
        let copies = table.routes.values().filter_map(|route| route.counters.copies.as_ref());
        copies.for_each(|copies| drop(copies.take()));
        // What a node answers in the place of a server shows in metrics; of the version it says nothing.
        let seen = |pool: &Pool, counts: &OutcomeCounts| {
            let taken = counts.take();
            if pool.servers.is_empty() { Stats::default() } else { taken }
        };
        let observed = table.routes.values().map(|route| Observation {
            service: route.service.clone(),
            routing_version: route.serving.routing_version,
            evidence: Evidence {
                stable: seen(&route.stable, &route.counters.stable),
                canary: route
                    .canary
                    .as_ref()
                    .zip(route.counters.canary.as_ref())
                    .map(|(pool, counts)| seen(pool, counts))
                    .unwrap_or_default(),
            },
        });
        observed.filter(|observation| observation.evidence != Evidence::default()).collect()
    }
}

impl Table {
    /// Returns the servers of all versions.
    pub fn servers(&self) -> impl Iterator<Item = &Arc<Server>> {
        let pools = self.routes.values().flat_map(|route| std::iter::once(&route.stable).chain(&route.canary));
        pools.flat_map(|pool| &pool.servers)
    }

    /// Returns the servers that are to be asked now whether they are well.
    pub fn due(&self, now: Mono) -> Vec<(Arc<Server>, HealthCheck)> {
        let pools = self.routes.values().flat_map(|route| std::iter::once(&route.stable).chain(&route.canary));
        pools.flat_map(|pool| pool.due(now)).collect()
    }

    /// Returns the service that a request means and what serves it.
    pub fn route_of(&self, settings: &ProxySettings, path: &str, fields: &impl Fields) -> Result<&Arc<Route>, NoRoute> {
        let named = model_of(path);
        let named = named.or_else(|| std::str::from_utf8(fields.value("x-aviary-service")?).ok());
        let found = match (named, &settings.default_service) {
            (Some(name), _) => self.routes.get(name),
            (None, Some(id)) => self.routes.get(id),
            (None, None) => self.routes.values().next(),
        };
        found.ok_or_else(|| {
            let known: Vec<_> = self.routes.keys().map(ServiceId::as_str).collect();
            let known = known.join(", ");
            match (known.is_empty(), named) {
                (true, _) => NoRoute { status: 503, why: "no service is known here: apply a rollout first".into() },
                (false, Some(name)) => {
                    NoRoute { status: 404, why: format!("service {name:?} is unknown, expected one of {known}") }
                }
                (false, None) => {
                    NoRoute { status: 404, why: format!("the default service is unknown, expected one of {known}") }
                }
            }
        })
    }
}

fn compile(
    view: &View,
    before: &BTreeMap<ServiceId, Arc<Route>>,
    shared: &RouteParts,
) -> BTreeMap<ServiceId, Arc<Route>> {
    let routes = view.services.iter().map(|(id, service)| {
        let before = before.get(id);
        let route = match before {
            Some(before) if before.serving == service.serving => before.clone(),
            _ => Arc::new(Route::new(id, &service.serving, before.map(|route| &**route), shared)),
        };
        (id.clone(), route)
    });
    routes.collect()
}

/// Returns the model named by a KServe V1 or Open Inference V2 path.
fn model_of(path: &str) -> Option<&str> {
    if let Some(rest) = path.strip_prefix("/v1/models/") {
        return rest.split([':', '/']).next();
    }
    path.strip_prefix("/v2/models/").and_then(|rest| rest.split('/').next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_are_found_by_their_whole_name() {
        let field = b"a=1; sid=me=you;  xsid=other; empty=";
        assert_eq!(cookie_in(field, "sid"), Some(&b"me=you"[..]));
        assert_eq!(cookie_in(field, "xsid"), Some(&b"other"[..]));
        assert_eq!((cookie_in(field, "si"), cookie_in(field, "empty")), (None, Some(&b""[..])));
    }

    #[test]
    fn inference_paths_name_the_model() {
        assert_eq!(model_of("/v1/models/fraud:predict"), Some("fraud"));
        assert_eq!(model_of("/v2/models/fraud/infer"), Some("fraud"));
        assert_eq!(model_of("/v2/models/fraud/versions/1/infer"), Some("fraud"));
        assert_eq!(model_of("/predict"), None);
    }
}
