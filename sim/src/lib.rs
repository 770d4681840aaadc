//! Runs the real protocol core in a simulated world and looks for broken invariants.
//!
//! Everything follows from one seed: network, disks, clocks, crashes, operators, traffic. In reading order: `world` is the
//! world, `truth` the omniscient observer, `invariants` what must hold after every step, `subject` the seam to the core,
//! `coverage` what runs must reach, `seeded_bugs` the bugs that must be found, `shrink` what makes a failing run small, `exhaust`
//! every order at small bounds. What is around the core has its worlds in the package `sim-whole`.

pub mod cli;
mod coverage;
pub mod dice;
mod exhaust;
mod invariants;
mod scenarios;
#[cfg(test)]
mod scripts;
mod seeded_bugs;
mod shrink;
mod subject;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod toy;
pub mod trace;
mod truth;
mod world;

pub use invariants::Violation;
pub use world::{first_acceptor, genesis_of};
