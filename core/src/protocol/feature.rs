//! What not every build in a cluster may know. Builds speak two protocol versions, so that nodes can be replaced one by one; what
//! the newer one brought is used once every member speaks it, because the log must mean the same to all of them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The newest protocol version that this build speaks; it speaks the one before too.
pub const PROTOCOL: u16 = 9;

/// Something that a protocol version brought, and that leaves traces in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// The log says which service gets the requests that name none.
    DefaultService,
    /// A rollout's users are salted with its start. A build that doesn't know it reads the log, and gives such a canary no traffic.
    RolloutSalt,
}

impl Feature {
    /// All of them, the oldest first.
    pub const ALL: [Self; 2] = [Self::DefaultService, Self::RolloutSalt];

    /// Returns its name, as people read it.
    pub fn name(self) -> &'static str {
        match self {
            Self::DefaultService => "default-service",
            Self::RolloutSalt => "rollout-salt",
        }
    }

    /// Returns the protocol version that brought it. Who speaks it or a later one knows the feature.
    pub fn protocol(self) -> u16 {
        match self {
            Self::DefaultService | Self::RolloutSalt => 9,
        }
    }

    /// Returns the first release that knows it.
    pub fn release(self) -> &'static str {
        match self {
            Self::DefaultService | Self::RolloutSalt => "0.3.0",
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
