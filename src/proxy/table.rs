//! The published view, compiled for requests: which service, which version, which server.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};

use arc_swap::ArcSwap;
use percent_encoding::percent_decode_str;

use crate::domain::assignment::TicketHash;
use crate::domain::ids::ServiceId;
use crate::domain::plan::{HashOn, HealthCheck, RolloutSpec};
use crate::domain::side::Side;
use crate::domain::stats::Stats;
use crate::domain::time::Mono;
use crate::domain::weights::Weight;
use crate::domain::window::Evidence;
use crate::entropy;
use crate::node::handle::NodeHandle;
use crate::protocol::{Observation, Serving, View};

use super::access::{Access, SeenRequest};
use super::cookie::{self, CookieRule, NewCookie};
use super::outcome::{ANSWERS, COPIES, CircuitBreaker, FAILURES_MAX, FORCED, OutcomeCounts};
use super::request::{HeaderFields, field};
use super::settings::ProxySettings;
use super::source;
use super::timeouts::TimeLimits;
use super::upstream::{Pool, PoolRules, Server, Servers};

/// State that outlives the views of one routing version.
pub struct Counters {
    pub stable: OutcomeCounts,
    pub canary: Option<OutcomeCounts>,
    /// Of requests that were mirrored to the canary.
    pub copies: Option<OutcomeCounts>,
    /// Of requests whose header chose stable, and of those whose header chose the canary; made when the first one comes.
    pub forced: [OnceLock<OutcomeCounts>; 2],
    pub circuit_breaker: CircuitBreaker,
}

/// One service, ready to serve.
pub struct Route {
    pub service: ServiceId,
    pub serving: Serving,
    pub stable: Pool,
    pub canary: Option<Pool>,
    /// All its servers speak HTTP/1.1.
    pub plain: bool,
    /// Fields that decide who serves, which no Connection option removes: those of `hashOn` and `matches`, and the node's
    /// `canary_header`.
    pub reads: Box<[String]>,
    pub counters: Arc<Counters>,
    /// Requests of the service that are open, by whichever version.
    open: Arc<AtomicUsize>,
    /// Time limits of its requests.
    pub limits: TimeLimits,
    /// The cookie that clients without one are given while there is a canary.
    pub cookie: Option<CookieRule>,
    hash: TicketHash,
}

/// Who serves a request, and whether its header chose that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SideChoice {
    /// Side that serves.
    pub side: Side,
    /// A client's header chose the side: what comes of it is counted apart, and is no evidence.
    pub is_forced: bool,
    /// The canary may serve the request while its share in basis points is above this: the ticket that was drawn for it.
    pub ticket: u16,
}

impl SideChoice {
    fn to(side: Side) -> Self {
        Self { side, is_forced: false, ticket: 0 }
    }

    /// Returns the choice for a copy of a request, which goes to the canary while that serves at all.
    pub fn of_copy() -> Self {
        Self::to(Side::Canary)
    }
}

/// A client, as far as the assignment of its requests depends on it.
#[derive(Debug, Clone, Copy)]
pub struct ClientAddress<'p> {
    /// Its address.
    pub ip: IpAddr,
    /// The address as text.
    pub text: &'p str,
}

impl Route {
    fn new(service: &ServiceId, serving: &Serving, before: Option<&Route>, shared: &RouteParts) -> Self {
        // Requests outlive a routing version.
        let before_open = before.map(|before| before.open.clone());
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
                forced: Default::default(),
                circuit_breaker: CircuitBreaker::default(),
            })
        });
        let spec = &serving.spec;
        let rules = PoolRules { limits: spec.limits, slow_start_ms: spec.slow_start_ms };
        let pool = |backend| Pool::new(backend, serving.routing_version, &shared.servers, rules);
        let (stable, canary) = (pool(&serving.stable), serving.canary.as_ref().map(|(backend, _)| pool(backend)));
        Self {
            service: service.clone(),
            serving: serving.clone(),
            plain: stable.is_plain() && canary.as_ref().is_none_or(Pool::is_plain),
            reads: reads(&serving.spec, &shared.settings.canary_header),
            stable,
            canary,
            counters,
            open: before_open.unwrap_or_default(),
            limits: TimeLimits::of(&shared.settings, serving.spec.timeouts),
            cookie: serving.canary.as_ref().and_then(|_| CookieRule::of(&serving.spec)),
            hash: TicketHash::of(service, serving.spec.assignment()),
        }
    }

    /// Returns the servers of a role.
    pub fn pool(&self, pick: Side) -> &Pool {
        match (pick, &self.canary) {
            (Side::Canary, Some(canary)) => canary,
            _ => &self.stable,
        }
    }

    /// Returns who serves a request, given the canary's share at this moment and the side that a header asks for.
    fn choose_side(
        &self,
        effective_bp: u16,
        fields: HeaderFields,
        peer: &str,
        new_cookie: Option<&NewCookie>,
        asked: Option<SideChoice>,
    ) -> SideChoice {
        if effective_bp == 0 || self.counters.circuit_breaker.is_tripped() {
            return SideChoice::to(Side::Stable);
        }
        if let Some(asked) = asked {
            return asked;
        }
        let spec = &self.serving.spec;
        let holds = |(name, value): &(String, String)| field(fields, name) == Some(value.as_bytes());
        if spec.matches.iter().any(|m| m.headers.iter().all(holds)) {
            return SideChoice::to(Side::Canary);
        }
        let key = spec.hash_on.as_ref().and_then(|hash_on| match hash_on {
            HashOn::Header(name) => field(fields, name),
            HashOn::Cookie(name) => new_cookie.map(|new| new.value.as_bytes()).or_else(|| cookie::find(fields, name)),
            HashOn::ClientAddress => Some(peer.as_bytes()),
        });
        // An empty key is nobody's: all who send one would move together.
        let ticket = match key.filter(|key| !key.is_empty()) {
            Some(key) => self.hash.ticket(key),
            None => entropy::within(0..Weight::WHOLE),
        };
        SideChoice { ticket, ..SideChoice::to(if ticket < effective_bp { Side::Canary } else { Side::Stable }) }
    }
}

/// Returns the names of the fields that decide who serves; cookies are among those of [`super::hop::RELIED_ON`].
fn reads(spec: &RolloutSpec, canary_header: &str) -> Box<[String]> {
    let matched = spec.matches.iter().flat_map(|m| &m.headers).map(|(name, _)| name.as_str());
    let hashed = spec.hash_on.iter().filter_map(|hash_on| match hash_on {
        HashOn::Header(name) => Some(name.as_str()),
        HashOn::Cookie(_) | HashOn::ClientAddress => None,
    });
    let asked = (!canary_header.is_empty()).then_some(canary_header);
    hashed.chain(matched).chain(asked).map(String::from).collect()
}

/// All services, as of one view.
pub struct Table {
    view: Arc<View>,
    routes: Arc<BTreeMap<ServiceId, Arc<Route>>>,
}

/// Parts that routes are made from.
struct RouteParts {
    servers: Servers,
    /// Number of workers, each with its own counters.
    shards: usize,
    settings: ProxySettings,
}

/// What all workers of the data plane share: the table in force, and the counters.
pub struct RoutingTable {
    pub node: NodeHandle,
    pub settings: ProxySettings,
    open: AtomicUsize,
    /// There is more than one service, so that none may take the place of all others.
    several: AtomicBool,
    table: ArcSwap<Table>,
    compiling: Mutex<()>,
    shared: RouteParts,
}

/// A request's place among those that are open, of all services and of its own.
pub struct RequestPermit {
    table: Arc<RoutingTable>,
    of_service: Arc<AtomicUsize>,
}

impl Drop for RequestPermit {
    fn drop(&mut self) {
        self.table.open.fetch_sub(1, Relaxed);
        self.of_service.fetch_sub(1, Relaxed);
    }
}

/// Why there is no place for a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Overflow {
    /// The node has as many requests as it may.
    #[error("too many requests at once")]
    Node,
    /// The service has as many requests at this node as it may.
    #[error("too many requests of service {0} at once")]
    Service(ServiceId),
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
        let shared = RouteParts { servers: Servers::default(), shards, settings: settings.clone() };
        let view = node.published.view();
        let routes = Arc::new(compile(&view, &BTreeMap::new(), &shared));
        let several = AtomicBool::new(view.services.len() > 1);
        let table = ArcSwap::from_pointee(Table { routes, view });
        Self { node, settings, open: AtomicUsize::new(0), several, table, compiling: Mutex::new(()), shared }
    }

    /// Takes a place for one more request of a service, while there are any.
    pub fn place(self: &Arc<Self>, route: &Route) -> Result<RequestPermit, Overflow> {
        let permit = RequestPermit { table: self.clone(), of_service: route.open.clone() };
        let open = (self.open.fetch_add(1, Relaxed), route.open.fetch_add(1, Relaxed));
        let max = self.settings.requests_max;
        let max_of_service = match route.serving.spec.limits.max_requests {
            Some(max) => usize::try_from(max).unwrap_or(usize::MAX),
            None if self.several.load(Relaxed) => (max - max / 4).max(1),
            None => usize::MAX,
        };
        match open {
            (_, open) if open >= max_of_service => {
                self.overflows(route, "service");
                Err(Overflow::Service(route.service.clone()))
            }
            (open, _) if open >= max => {
                self.overflows(route, "node");
                Err(Overflow::Node)
            }
            _ => Ok(permit),
        }
    }

    /// Counts a request for which there was no place; `limit` says where.
    pub fn overflows(&self, route: &Route, limit: &'static str) {
        let service = route.service.to_string();
        metrics::counter!("aviary_requests_overflow_total", "service" => service, "limit" => limit).increment(1);
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
        let routes = match Arc::ptr_eq(&before.view.services, &view.services) {
            true => before.routes.clone(),
            false => Arc::new(compile(&view, &before.routes, &self.shared)),
        };
        self.several.store(routes.len() > 1, Relaxed);
        let table = Arc::new(Table { routes, view });
        self.table.store(table.clone());
        table
    }

    /// Returns true when some server that this node would send a request to is not ejected, or nothing is routed yet.
    pub fn has_servers(&self) -> bool {
        let (table, now) = (self.table(), self.now());
        let mut routes = table.routes.values();
        let serves = |route: &Arc<Route>| {
            let bp = self.node.published.effective_bp_at(&route.serving, now);
            let canary = route.canary.as_ref().is_some_and(|pool| bp > 0 && pool.has_server(now));
            canary || bp < Weight::FULL.bp() && route.stable.has_server(now)
        };
        table.routes.is_empty() || routes.any(serves)
    }

    /// Returns the time on the node's clock.
    pub fn now(&self) -> Mono {
        self.node.published.clock().now().mono
    }

    /// Returns who serves the request of a client at this moment, which is given this cookie.
    pub fn choose_side(
        &self,
        route: &Route,
        fields: HeaderFields,
        peer: ClientAddress,
        new_cookie: Option<&NewCookie>,
        now: Mono,
    ) -> SideChoice {
        let effective_bp = self.node.published.effective_bp_at(&route.serving, now);
        let asked_for = self.asked_for(fields, peer.ip);
        match self.client_of(fields, peer.ip) {
            Some(client) => route.choose_side(effective_bp, fields, &client.to_string(), new_cookie, asked_for),
            None => route.choose_side(effective_bp, fields, peer.text, new_cookie, asked_for),
        }
    }

    /// Returns the share in basis points at which the version that was a route's canary is served at this moment, whatever view
    /// the route is of: all of it once the version is stable.
    pub fn canary_share(&self, route: &Route) -> u16 {
        let (table, Some(canary)) = (self.table(), &route.canary) else { return Weight::FULL.bp() };
        let Some(route) = table.routes.get(&route.service) else { return 0 };
        let serving = &route.serving;
        if serving.stable.version == canary.version {
            return Weight::FULL.bp();
        }
        let is_canary = serving.canary.as_ref().is_some_and(|(backend, _)| backend.version == canary.version);
        match is_canary && !route.counters.circuit_breaker.is_tripped() {
            true => self.node.published.effective_bp_at(serving, self.now()),
            false => 0,
        }
    }

    /// Begins the access log's entry of a request; none where it is not logged.
    pub fn begin_entry(&self, peer: IpAddr, seen: Option<SeenRequest>) -> Access {
        if !self.settings.access.is_on() {
            return None;
        }
        let client = seen.and_then(|seen| self.client_of(seen.fields, peer)).unwrap_or(peer);
        self.settings.access.begin(self.node.published.clock(), client, seen)
    }

    /// Returns the client for whom a trusted proxy sent a request; none where the peer is the client.
    fn client_of(&self, fields: HeaderFields, peer: IpAddr) -> Option<IpAddr> {
        let trusted = &self.settings.trusted;
        if trusted.is_empty() {
            return None;
        }
        let forwarded = fields.iter().filter(|field| field.name.eq_ignore_ascii_case("x-forwarded-for"));
        let is_trusted = |address| trusted.iter().any(|network| network.contains(address));
        let client = source::client_of(peer, forwarded.map(|field| field.value), is_trusted);
        (client != peer).then_some(client)
    }

    /// Returns the side that a request's header asks for, if its client may choose. A record router in a network that the node's
    /// file names has drawn by the weight already: what comes of its records is evidence.
    fn asked_for(&self, fields: HeaderFields, peer: IpAddr) -> Option<SideChoice> {
        let ProxySettings { canary_header, canary_header_peers: networks, .. } = &self.settings;
        let side = match field(fields, canary_header)? {
            b"always" => Side::Canary,
            b"never" => Side::Stable,
            _ => return None,
        };
        let is_trusted = networks.iter().any(|network| network.contains(peer));
        let is_drawn = is_trusted && field(fields, "x-aviary-source").is_some();
        (networks.is_empty() || is_trusted).then_some(SideChoice { side, is_forced: !is_drawn, ticket: 0 })
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
    pub fn count(&self, shard: usize, route: &Route, to: SideChoice, status: u16, began: Mono, error: bool) {
        let latency_us = self.now().0.saturating_sub(began.0);
        let error = error || route.serving.spec.error_classes.has(status);
        let counters = &route.counters;
        if to.is_forced {
            return self.count_forced(shard, route, to.side, status, latency_us, error);
        }
        let (Side::Canary, Some(canary)) = (to.side, &counters.canary) else {
            counters.stable.add(shard, status, latency_us, error);
            return counters.circuit_breaker.stable(error);
        };
        canary.add(shard, status, latency_us, error);
        if counters.circuit_breaker.canary(error, status) {
            let how = counters.circuit_breaker.last_failures();
            let reason = format!("the last {FAILURES_MAX} canary answers failed ({how}) while stable's did not");
            let (node, service, version) = (self.node.clone(), route.service.clone(), route.serving.routing_version);
            tokio::spawn(async move { node.circuit_breaker_tripped(service, version, reason).await });
        }
    }

    /// Counts the answer to a request whose header chose the side: anybody may send it, so it is no evidence.
    fn count_forced(&self, shard: usize, route: &Route, side: Side, status: u16, latency_us: u64, error: bool) {
        let counts = route.counters.forced[usize::from(side == Side::Canary)]
            .get_or_init(|| OutcomeCounts::new(&route.service, &route.pool(side).version, self.shared.shards, FORCED));
        counts.add(shard, status, latency_us, error);
    }

    /// Returns what was counted since the last call.
    pub fn drain(&self) -> Vec<Observation> {
        let table = self.table();
        let apart = table.routes.values().map(|route| &route.counters);
        let apart =
            apart.flat_map(|counters| counters.copies.iter().chain(counters.forced.iter().filter_map(|f| f.get())));
        apart.for_each(|counts| drop(counts.take()));
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

    /// Returns the service that a request means and what serves it. A model's name that is no service is one of the default
    /// service's own: servers of several models, and those of one service alone, are asked by it.
    pub fn route_of(&self, settings: &ProxySettings, path: &str, fields: HeaderFields) -> Result<&Arc<Route>, NoRoute> {
        if let Some(route) = model_of(path).and_then(|name| self.routes.get(&*name)) {
            return Ok(route);
        }
        let named = field(fields, "x-aviary-service").and_then(|name| std::str::from_utf8(name).ok());
        let found = match (named, &settings.default_service) {
            (Some(name), _) => self.routes.get(name),
            (None, Some(id)) => self.routes.get(id),
            (None, None) => self.view.default_service.as_ref().and_then(|id| self.routes.get(id)),
        };
        found.ok_or_else(|| match named {
            _ if self.routes.is_empty() => {
                NoRoute { status: 503, why: "no service is known here: apply a rollout first".into() }
            }
            Some(name) => NoRoute { status: 404, why: format!("service {name:?} is unknown") },
            None => NoRoute { status: 404, why: "the default service is unknown".into() },
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

/// Returns the model named by a KServe V1 or Open Inference V2 path, whose segments may be percent-encoded (RFC 3986, 6.2.2.2).
fn model_of(path: &str) -> Option<Cow<'_, str>> {
    let mut segments =
        path.strip_prefix('/')?.split('/').map(|segment| percent_decode_str(segment).decode_utf8_lossy());
    let (api, models, name) = (segments.next()?, segments.next()?, segments.next()?);
    match (&*api, &*models) {
        ("v1", "models") => Some(match name.split_once(':') {
            Some((model, _)) => Cow::Owned(model.to_string()),
            None => name,
        }),
        ("v2", "models") => Some(name),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inference_paths_name_the_model() {
        let model = |path| model_of(path).map(Cow::into_owned);
        for path in [
            "/v1/models/fraud-model:predict",
            "/v1/models/fraud%2Dmodel:predict",
            "/v1/models/fraud-model%3Apredict",
            "/v%31/mod%65ls/fraud-model",
            "/v2/models/fraud-model/infer",
            "/v2/models/%66raud-model/versions/1/infer",
        ] {
            assert_eq!(model(path), Some("fraud-model".to_string()), "{path}");
        }
        assert_eq!((model("/predict"), model("/v1/models"), model("v1/models/x")), (None, None, None));
        assert_eq!(model("/v2/models/a%2Fb/infer"), Some("a/b".to_string()));
    }
}
