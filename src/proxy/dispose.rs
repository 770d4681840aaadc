//! Where a request goes: the one decision that both paths act upon.

use std::sync::Arc;

use crate::domain::time::Mono;

use super::answer::{OwnAnswer, PageRequest, overloaded, problem};
use super::cookie::NewCookie;
use super::request::CanonicalRequest;
use super::table::{ClientAddress, RequestPermit, Route, SideChoice};
use super::timeouts::TimeLimits;
use super::worker::Worker;

/// What becomes of a request.
pub enum Disposition {
    /// The node shows one of its status pages.
    Page(PageRequest),
    /// The node says why the request goes nowhere.
    Refuse(Box<OwnAnswer>),
    /// A service gets it.
    Route(Routed),
}

/// A request that has a route, and its place among those that are open.
pub struct Routed {
    /// Service that the request is for.
    pub route: Arc<Route>,
    /// Side that serves, and why.
    pub to: SideChoice,
    /// The cookie that the client gets with its answer.
    pub cookie: Option<Box<NewCookie>>,
    /// How long it may take.
    pub limits: TimeLimits,
    /// When the request was read.
    pub began: Mono,
    /// Held until the request's end.
    pub permit: RequestPermit,
}

impl Disposition {
    /// Decides where a client's request goes at this moment.
    pub fn of(worker: &Worker, request: &CanonicalRequest, client: ClientAddress) -> Self {
        let (router, settings) = (&worker.router, worker.settings());
        if settings.status_paths
            && let Some(page) = PageRequest::of(request)
        {
            return Self::Page(page);
        }
        let table = worker.table();
        let route = match table.route_of(settings, request.path(), request.fields) {
            Ok(route) => route,
            Err(missing) => return Self::Refuse(Box::new(problem(missing.status, &missing.why))),
        };
        let permit = match router.place(route) {
            Ok(permit) => permit,
            Err(overflow) => return Self::Refuse(Box::new(overloaded(&overflow.to_string()))),
        };
        let began = router.now();
        let cookie = route.cookie.as_ref().and_then(|rule| rule.for_client(request.fields));
        let to = router.choose_side(route, request.fields, client, cookie.as_deref(), began);
        let limits = route.limits.for_request(request.fields);
        Self::Route(Routed { route: route.clone(), to, cookie, limits, began, permit })
    }
}
