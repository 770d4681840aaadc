//! The core of Aviary: what a rollout is, and how nodes agree on it. Pure: time and randomness are arguments, effects are
//! values. It has no clock, no runtime and no IO, and its manifest names nothing that has.
//!
//! Start at [`protocol::Core::handle`] (how nodes agree) and [`domain::rollout::Service::after`] (what a change does).

pub mod domain;
#[cfg(test)]
mod fixtures;
pub mod protocol;
