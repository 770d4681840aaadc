//! What a router tells: gauges, and the page of its state.

use axum::Router;
use axum::routing::get;
use http::header;
use metrics::gauge;
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::domain::router_state::RouterPhase;
use crate::domain::side::Side;
use crate::router::engine::Report;

/// Returns the pages `/livez`, `/status` and `/metrics`.
pub fn pages(report: watch::Receiver<Option<Report>>, metrics: PrometheusHandle) -> Router {
    let scrape = async move || {
        metrics.run_upkeep();
        ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render())
    };
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/status", get(async move || axum::Json(show(report.borrow().as_ref()))))
        .route("/metrics", get(scrape))
}

/// Sets the gauges that `/metrics` shows, from a report.
pub fn measure(report: &Report) {
    for side in Side::BOTH {
        gauge!("aviary_router_records", "version" => side.word()).set(report.given(side) as f64);
    }
    let weight = report.splits.iter().map(|split| split.weight().0).max().unwrap_or_default();
    gauge!("aviary_router_weight").set(weight.fraction());
    gauge!("aviary_router_canary_lag").set(report.lag as f64);
    let changing = report.splits.iter().filter(|split| split.former().is_some()).count();
    gauge!("aviary_router_partitions_changing").set(changing as f64);
}

fn show(report: Option<&Report>) -> Value {
    let Some(report) = report else { return json!({ "phase": "opening" }) };
    json!({
        "phase": report.phase.as_ref().map_or("not started", RouterPhase::words),
        "stable": report.given(Side::Stable), "canary": report.given(Side::Canary), "canary_lag": report.lag, "next": report.next,
        "weights": report.splits.iter().map(|split| split.weight().0.fraction()).collect::<Vec<_>>(),
    })
}
