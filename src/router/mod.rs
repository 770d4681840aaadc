//! The record router: one topic in, two topics out, every record to exactly one version.
//!
//! `serve` is a router as a process: its threads, and what they tell. `engine` is the loop, on [`crate::ports::Broker`]; what it
//! decides by is in `domain`: `split` (who gets a record), `router_state` (start, weights, promotion, abort). `run` is the thread around
//! it, `push` the other way to work. `obstacles` is what
//! prevents a rollout from beginning; `snapshot` is what others see of a router in its topics; `audit` checks the outcome from the
//! topics alone, by `compare`.

pub mod audit;
pub mod compare;
pub mod engine;
pub mod obstacles;
pub mod push;
pub mod run;
pub mod serve;
pub mod snapshot;
