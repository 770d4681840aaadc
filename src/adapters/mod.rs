//! The real world behind [`crate::ports`]: clocks, disks, sockets.

pub mod clock;
pub mod descriptors;
pub mod disk;
pub mod hooks;
#[cfg(feature = "kafka")]
pub mod kafka;
pub mod listen;
pub mod memory;
pub mod net;
pub mod post;
pub mod redis;
pub mod tls;

#[cfg(test)]
pub(crate) mod conformance;
