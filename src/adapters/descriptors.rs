//! How many files and sockets this process may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::{info, warn};

/// The largest limit that is asked for: systems that allow more have tables that grow with it.
const DESCRIPTORS_MAX: u64 = 1 << 20;
/// Descriptors that are no client connections: listeners, disk, peers, log.
const OWN: u64 = 64;

/// Raises this process's limit of open files as far as the system lets it, and says whether that is enough for so many client
/// connections, each with one to a server.
pub fn raise(connections_max: u64) {
    let before = getrlimit(Resource::Nofile);
    let soft = raised(before);
    if soft > before.current.unwrap_or(u64::MAX) {
        let limit = Rlimit { current: Some(soft), maximum: before.maximum };
        match setrlimit(Resource::Nofile, limit) {
            Ok(()) => info!(from = before.current, to = soft, "limit of open files raised"),
            Err(error) => warn!(from = before.current, to = soft, %error, "the limit of open files can't be raised"),
        }
    }
    let found = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let needed = connections_max.saturating_mul(2).saturating_add(OWN);
    if found < needed {
        warn!(
            found,
            needed, connections_max, "too few open files are allowed for all connections: raise the hard limit"
        );
    }
}

/// Returns the soft limit to ask for.
fn raised(before: Rlimit) -> u64 {
    let hard = before.maximum.unwrap_or(u64::MAX).min(DESCRIPTORS_MAX);
    before.current.unwrap_or(u64::MAX).max(hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_follows_the_hard_one_and_never_falls() {
        let soft = |current, maximum| raised(Rlimit { current, maximum });
        assert_eq!(soft(Some(1024), Some(4096)), 4096);
        assert_eq!(soft(Some(1024), Some(1 << 30)), DESCRIPTORS_MAX);
        assert_eq!(soft(Some(1024), None), DESCRIPTORS_MAX);
        assert_eq!(soft(Some(1 << 22), Some(1 << 30)), 1 << 22);
        assert_eq!(soft(None, None), u64::MAX);
    }
}
