//! The published view, compiled for requests: which service, which version, which server.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use http::uri::Authority;
use http::{HeaderMap, Request, Response, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde_json::json;
use tokio::sync::Semaphore;

use crate::domain::ids::{ServiceId, VersionId};
use crate::domain::plan::{Backend, HashOn};
use crate::domain::weights::{Weight, sticky_ticket};
use crate::domain::window::Evidence;
use crate::node::handle::NodeHandle;
use crate::protocol::{Observation, Serving, View};

use super::forward::Lent;
use super::outcome::{Breaker, Counts};
use super::{Body, ProxySettings, problem};

/// One version's servers.
pub struct Pool {
    pub version: VersionId,
    /// Empty: the node answers itself.
    pub servers: Vec<Authority>,
    next: AtomicUsize,
}

impl Pool {
    fn new(backend: &Backend) -> Self {
        let authority = |url: &String| url.strip_prefix("http://").unwrap_or(url).parse().ok();
        let servers = backend.urls.iter().filter_map(authority).collect();
        Self { version: backend.version.clone(), servers, next: AtomicUsize::new(0) }
    }

    /// Returns the servers in the order in which to try them, beginning with another one each time.
    pub fn in_turn(&self) -> impl Iterator<Item = &Authority> {
        let first = if self.servers.len() > 1 { self.next.fetch_add(1, Relaxed) } else { 0 };
        (0..self.servers.len()).map(move |i| &self.servers[(first + i) % self.servers.len()])
    }
}

/// What outlives the views of one routing version.
pub struct Track {
    pub stable: Counts,
    pub canary: Option<Counts>,
    pub breaker: Breaker,
}

/// One service, ready to serve.
pub struct Route {
    pub service: ServiceId,
    pub serving: Serving,
    pub stable: Pool,
    pub canary: Option<Pool>,
    pub track: Arc<Track>,
    salt: u64,
}

/// Which role serves a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pick {
    Stable,
    Canary,
}

impl Route {
    fn new(service: &ServiceId, serving: &Serving, before: Option<&Route>) -> Self {
        let same = before.filter(|before| before.serving.routing_version == serving.routing_version);
        let same = same.filter(|before| before.canary.is_some() == serving.canary.is_some());
        let track = same.map(|before| before.track.clone()).unwrap_or_else(|| {
            let canary = serving.canary.as_ref().map(|(backend, _)| Counts::new(service, &backend.version));
            let stable = Counts::new(service, &serving.stable.version);
            Arc::new(Track { stable, canary, breaker: Breaker::default() })
        });
        Self {
            service: service.clone(),
            serving: serving.clone(),
            stable: Pool::new(&serving.stable),
            canary: serving.canary.as_ref().map(|(backend, _)| Pool::new(backend)),
            track,
            salt: xxhash_rust::xxh3::xxh3_64(service.as_str().as_bytes()),
        }
    }

    /// Returns who serves a request, given the canary's share at this moment.
    fn pick(&self, effective_bp: u16, headers: &HeaderMap) -> Pick {
        if effective_bp == 0 || self.track.breaker.is_tripped() {
            return Pick::Stable;
        }
        match headers.get("x-canary").map(|value| value.as_bytes()) {
            Some(b"always") => return Pick::Canary,
            Some(b"never") => return Pick::Stable,
            _ => {}
        }
        let spec = &self.serving.spec;
        let holds = |(name, value): &(String, String)| headers.get(name).is_some_and(|found| found == value.as_str());
        if spec.matches.iter().any(|m| m.headers.iter().all(holds)) {
            return Pick::Canary;
        }
        let key = spec.hash_on.as_ref().and_then(|HashOn::Header(name)| headers.get(name));
        let ticket = match key {
            Some(key) => sticky_ticket(self.salt, key.as_bytes()),
            None => rand::random_range(0..Weight::WHOLE),
        };
        if ticket < effective_bp { Pick::Canary } else { Pick::Stable }
    }
}

/// All services, as of one view.
struct Table {
    view: Arc<View>,
    routes: BTreeMap<ServiceId, Arc<Route>>,
}

/// The data plane's state.
pub struct Router {
    pub node: NodeHandle,
    pub settings: ProxySettings,
    pub client: Client<HttpConnector, Lent>,
    pub places: Semaphore,
    table: ArcSwap<Table>,
    compiling: Mutex<()>,
}

impl Router {
    pub fn new(node: NodeHandle, settings: ProxySettings) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(Duration::from_millis(settings.connect_timeout_ms)));
        let client = Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(connector);
        let view = node.published.view();
        let table = ArcSwap::from_pointee(Table { routes: compile(&view, &BTreeMap::new()), view });
        let places = Semaphore::new(settings.requests_max);
        Self { node, settings, client, places, table, compiling: Mutex::new(()) }
    }

    /// Returns the table of the view in force. Whoever first sees another view compiles it; the others wait for that,
    /// so that nobody serves by a view that is no longer in force.
    fn table(&self) -> Arc<Table> {
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
        let table = Arc::new(Table { routes: compile(&view, &before.routes), view });
        self.table.store(table.clone());
        table
    }

    /// Returns the service that a request means and what serves it.
    pub fn route_of<B>(&self, request: &Request<B>) -> Result<Arc<Route>, Box<Response<Body>>> {
        let table = self.table();
        let named = model_of(request.uri().path());
        let named = named.or_else(|| request.headers().get("x-aviary-service")?.to_str().ok());
        let found = match (named, &self.settings.default_service) {
            (Some(name), _) => ServiceId::new(name).ok().and_then(|id| table.routes.get(&id)),
            (None, Some(id)) => table.routes.get(id),
            (None, None) => table.routes.values().next(),
        };
        found.cloned().ok_or_else(|| {
            let known: Vec<_> = table.routes.keys().map(ServiceId::as_str).collect();
            Box::new(match (known.is_empty(), named) {
                (true, _) => problem(
                    StatusCode::SERVICE_UNAVAILABLE,
                    json!({"error": "no service is known here: apply a rollout first"}),
                ),
                (false, Some(name)) => problem(
                    StatusCode::NOT_FOUND,
                    json!({"error": format!("service {name:?} is unknown"), "known": known}),
                ),
                (false, None) => {
                    problem(StatusCode::NOT_FOUND, json!({"error": "the default service is unknown", "known": known}))
                }
            })
        })
    }

    /// Returns who serves a request at this moment.
    pub fn pick(&self, route: &Route, headers: &HeaderMap) -> Pick {
        route.pick(self.node.published.effective_bp(&route.serving), headers)
    }

    /// Returns what was counted since the last call.
    pub fn drain(&self) -> Vec<Observation> {
        let table = self.table();
        let observed = table.routes.values().map(|route| Observation {
            service: route.service.clone(),
            routing_version: route.serving.routing_version,
            evidence: Evidence {
                stable: route.track.stable.take(),
                canary: route.track.canary.as_ref().map(Counts::take).unwrap_or_default(),
            },
        });
        observed.filter(|observation| observation.evidence != Evidence::default()).collect()
    }
}

fn compile(view: &View, before: &BTreeMap<ServiceId, Arc<Route>>) -> BTreeMap<ServiceId, Arc<Route>> {
    let routes = view.services.iter().map(|(id, service)| {
        let before = before.get(id);
        let route = match before {
            Some(before) if before.serving == service.serving => before.clone(),
            _ => Arc::new(Route::new(id, &service.serving, before.map(|route| &**route))),
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
    fn inference_paths_name_the_model() {
        assert_eq!(model_of("/v1/models/fraud:predict"), Some("fraud"));
        assert_eq!(model_of("/v2/models/fraud/infer"), Some("fraud"));
        assert_eq!(model_of("/v2/models/fraud/versions/1/infer"), Some("fraud"));
        assert_eq!(model_of("/predict"), None);
    }
}
