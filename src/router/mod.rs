//! The record router: one topic in, two topics out, every record to exactly one version.
//!
//! `engine` is the loop, on [`crate::ports::Broker`]; what it decides by is in `domain`: `split` (who gets a record), `course`
//! (start, weights, promotion, abort). `run` is the thread around it. `audit` checks the outcome
//! from the topics alone.

pub mod audit;
pub mod engine;
pub mod push;
pub mod run;
