//! Aviary: safe weighted rollouts. The map of the house, in reading order.

pub mod domain;
pub mod protocol;
pub mod config;
pub mod ports;
pub mod node;
pub mod adapters;
pub mod proxy;
pub mod api;
pub mod cli;
