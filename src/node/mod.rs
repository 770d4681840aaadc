//! The shell around the protocol core: one loop that takes one input, calls the core, persists, then sends.

pub mod failpoint;
pub mod frame;
pub mod greeting;
pub mod handle;
mod layout;
pub mod link;
pub mod log;
pub mod room;
pub mod run;
pub mod scrub;
