//! Services and servers don't starve each other: limits of requests, the queue before a server, and what clients are told beyond
//! them. By every way in, and to servers of HTTP/1.1 and HTTP/2.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use aviary::domain::ids::ServiceId;
use aviary::domain::plan::RequestLimits;
use aviary::proxy::settings::ProxySettings;
use bytes::Bytes;
use http_body_util::Full;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::operators::{WAYS, Way, get};
use crate::proxy::{OK, SOON, World, answering, head, hold_lease, settings, upstream, view_of, world, world_with};

/// Time in which the node is told of what was counted.
const TOLD: Duration = Duration::from_millis(300);

/// A server whose answers wait until they are let go.
#[derive(Clone)]
struct Gate {
    url: String,
    arrived: Arc<AtomicUsize>,
    let_go: Arc<Semaphore>,
}

impl Gate {
    async fn http1() -> Self {
        let (arrived, let_go) = (Arc::<AtomicUsize>::default(), Arc::new(Semaphore::new(0)));
        let gate = (arrived.clone(), let_go.clone());
        let address = upstream(move |mut stream| {
            let (arrived, let_go) = gate.clone();
            async move {
                while !head(&mut stream).await.is_empty() {
                    arrived.fetch_add(1, Ordering::SeqCst);
                    let_go.acquire().await.unwrap().forget();
                    if stream.write_all(OK.as_bytes()).await.is_err() {
                        return;
                    }
                }
            }
        });
        Self { url: format!("http://{}", address.await), arrived, let_go }
    }

    async fn http2() -> Self {
        let (arrived, let_go) = (Arc::<AtomicUsize>::default(), Arc::new(Semaphore::new(0)));
        let gate = (arrived.clone(), let_go.clone());
        let address = upstream(move |stream| {
            let gate = gate.clone();
            async move {
                let service = hyper::service::service_fn(|_: http::Request<hyper::body::Incoming>| {
                    let (arrived, let_go) = gate.clone();
                    async move {
                        arrived.fetch_add(1, Ordering::SeqCst);
                        let_go.acquire().await.unwrap().forget();
                        Ok::<_, std::convert::Infallible>(http::Response::new(Full::new(Bytes::from("ok"))))
                    }
                });
                let builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection(TokioIo::new(stream), service).await;
            }
        });
        Self { url: format!("h2c://{}", address.await), arrived, let_go }
    }

    /// Waits until this many requests came.
    async fn reached(&self, count: usize) {
        let reached = timeout(SOON, async {
            while self.arrived.load(Ordering::SeqCst) < count {
                tokio::task::yield_now().await;
            }
        });
        let arrived = || self.arrived.load(Ordering::SeqCst);
        reached.await.unwrap_or_else(|_| panic!("{} requests came, expected {count}", arrived()));
        assert_eq!(arrived(), count);
    }
}

async fn gates() -> [Gate; 2] {
    [Gate::http1().await, Gate::http2().await]
}

/// Sends a GET beside the test.
fn ask(world: &Arc<World>, way: Way, fields: &'static [(&'static str, &'static str)]) -> JoinHandle<(u16, String)> {
    hold_lease(&world.node);
    let world = world.clone();
    tokio::spawn(async move { get(&world, way, "/predict", fields).await })
}

async fn answered(asked: JoinHandle<(u16, String)>) -> (u16, String) {
    timeout(SOON, asked).await.expect("an answer in time").unwrap()
}

const ONE_EACH: RequestLimits =
    RequestLimits { max_requests: None, max_requests_per_server: Some(1), max_pending: 0, pending_timeout_ms: 1_000 };

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_is_no_failure_of_its_version() {
    for gate in gates().await {
        for way in WAYS {
            // The canary alone, so that stable can't take what it has no place for: it is full, too.
            let url = gate.url.clone();
            let mut world = world(view_of(None, None, 10_000, |spec| {
                (spec.stable.urls, spec.canary.urls, spec.limits) = (vec![url.clone()], vec![url], ONE_EACH);
            }))
            .await;
            let before = gate.arrived.load(Ordering::SeqCst);
            let shared = Arc::new(world);
            let first = ask(&shared, way, &[]);
            gate.reached(before + 1).await;
            for _ in 0..6 {
                let (status, body) = answered(ask(&shared, way, &[])).await;
                let why = "too many requests at once at the servers of v1";
                assert!(status == 503 && body.contains(why), "{status} {body} by {way:?} to {}", gate.url);
            }
            if way == Way::Http11 {
                let told = shared.get("/predict", "").await;
                assert!(told.contains("retry-after: 1") && !told.contains("x-served-by"), "{told}");
            }
            gate.let_go.add_permits(1);
            assert_eq!(answered(first).await, (200, "ok".into()));
            // And it has a place again.
            gate.let_go.add_permits(1);
            assert_eq!(answered(ask(&shared, way, &[])).await.0, 200, "by {way:?} to {}", gate.url);
            world = Arc::into_inner(shared).unwrap();
            assert_eq!(world.told_within(TOLD).await, (2, 0, 0), "by {way:?} to {}", gate.url);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stable_takes_what_the_canary_has_no_place_for() {
    let stable = answering(OK).await;
    for gate in [Gate::http1().await] {
        for way in WAYS {
            let url = gate.url.clone();
            let world = world(view_of(Some(stable), None, 10_000, |spec| {
                (spec.canary.urls, spec.limits) = (vec![url], ONE_EACH);
            }));
            let (world, before) = (Arc::new(world.await), gate.arrived.load(Ordering::SeqCst));
            let first = ask(&world, way, &[]);
            gate.reached(before + 1).await;
            assert_eq!(answered(ask(&world, way, &[])).await, (200, "ok".into()), "by {way:?}");
            gate.reached(before + 1).await;
            gate.let_go.add_permits(1);
            assert_eq!(answered(first).await.0, 200);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_wait_for_a_place() {
    let limits = RequestLimits { max_pending: 2, pending_timeout_ms: 300, ..ONE_EACH };
    for gate in gates().await {
        for way in WAYS {
            let url = gate.url.clone();
            let world = world(view_of(None, None, 0, |spec| {
                (spec.stable.urls, spec.canary.urls, spec.limits) = (vec![url.clone()], vec![url], limits);
            }));
            let (world, before) = (Arc::new(world.await), gate.arrived.load(Ordering::SeqCst));
            let first = ask(&world, way, &[]);
            gate.reached(before + 1).await;
            let second = ask(&world, way, &[]);
            // Less than it may wait.
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(!second.is_finished());
            gate.let_go.add_permits(2);
            assert_eq!((answered(first).await.0, answered(second).await.0), (200, 200), "by {way:?} to {}", gate.url);
            gate.reached(before + 2).await;
            // One holds the place, two wait in vain, and for a fourth there is no place to wait.
            let held = ask(&world, way, &[]);
            gate.reached(before + 3).await;
            let waiting = [ask(&world, way, &[]), ask(&world, way, &[])];
            // They wait by then.
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert_eq!(answered(ask(&world, way, &[])).await.0, 503);
            assert!(waiting.iter().all(|waiting| !waiting.is_finished()), "by {way:?} to {}", gate.url);
            for waiting in waiting {
                assert_eq!(answered(waiting).await.0, 503, "by {way:?} to {}", gate.url);
            }
            gate.let_go.add_permits(1);
            assert_eq!(answered(held).await.0, 200);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_has_its_own_limit() {
    let limits = RequestLimits { max_requests: Some(1), ..RequestLimits::default() };
    for gate in gates().await {
        for way in WAYS {
            let url = gate.url.clone();
            let world = world(view_of(None, None, 0, |spec| {
                (spec.stable.urls, spec.canary.urls, spec.limits) = (vec![url.clone()], vec![url], limits);
            }));
            let (world, before) = (Arc::new(world.await), gate.arrived.load(Ordering::SeqCst));
            let first = ask(&world, way, &[]);
            gate.reached(before + 1).await;
            let (status, body) = answered(ask(&world, way, &[])).await;
            assert!(status == 503 && body.contains("too many requests of service fraud at once"), "{status} {body}");
            gate.let_go.add_permits(1);
            assert_eq!(answered(first).await.0, 200);
        }
    }
}

/// Starts a proxy of two services: `fraud` at `slow`, and `shop` at `quick`.
async fn two_services(slow: String, quick: SocketAddr, requests_max: usize) -> World {
    let mut view = view_of(None, None, 0, |spec| spec.stable.urls = vec![slow]);
    let mut shop = (**view.services.values().next().unwrap()).clone();
    shop.serving.stable.urls = vec![format!("http://{quick}")];
    Arc::make_mut(&mut view.services).insert(ServiceId::new("shop").unwrap(), Arc::new(shop));
    world_with(view, ProxySettings { requests_max, ..settings() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_service_leaves_places_for_the_others() {
    const SHOP: &[(&str, &str)] = &[("x-aviary-service", "shop")];
    for gate in gates().await {
        let world = Arc::new(two_services(gate.url.clone(), answering(OK).await, 8).await);
        for way in WAYS {
            let before = gate.arrived.load(Ordering::SeqCst);
            let stuck: Vec<_> = (0..6).map(|_| ask(&world, way, &[])).collect();
            gate.reached(before + 6).await;
            // Three quarters of all places, and no more.
            let (status, body) = answered(ask(&world, way, &[])).await;
            assert!(status == 503 && body.contains("of service fraud"), "{status} {body}");
            for _ in 0..4 {
                assert_eq!(
                    answered(ask(&world, way, SHOP)).await,
                    (200, "ok".into()),
                    "by {way:?} beside {}",
                    gate.url
                );
            }
            gate.let_go.add_permits(6);
            for stuck in stuck {
                assert_eq!(answered(stuck).await.0, 200);
            }
        }
    }
}
