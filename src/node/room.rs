//! How much room is left on the disk of a node's data: it warns, and holds promotions, before a write fails and the node stops.

use std::path::PathBuf;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::handle::{Guard, NodeHandle};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);
/// Room that is little on any disk, in bytes: what checkpoints, the journal and their next versions may need at once.
const BYTES_MIN: u64 = 256 * 1024 * 1024;
/// Part of a small disk that is little room, however many bytes it has.
const PART_MIN: u64 = 20;

/// Returns why `free` of `size` bytes are too few; none when they are enough.
fn shortage(free: u64, size: u64) -> Option<String> {
    let least = (size / PART_MIN).min(BYTES_MIN);
    let mib = |bytes: u64| bytes as f64 / (1024.0 * 1024.0);
    (free < least).then(|| {
        format!("the disk is nearly full: {:.1} MiB are left, expected at least {:.1} MiB", mib(free), mib(least))
    })
}

/// Tells the node when the disk under `data_dir` is nearly full, until `shutdown`.
pub async fn watch(data_dir: PathBuf, node: NodeHandle, shutdown: CancellationToken) {
    let mut told = None;
    let mut tick = tokio::time::interval(LOOK);
    while shutdown.run_until_cancelled(tick.tick()).await.is_some() {
        // A disk that can't be asked fails at the next write, which says so.
        let Ok(found) = rustix::fs::statvfs(&data_dir) else { continue };
        let (free, size) = (found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize);
        metrics::gauge!("aviary_disk_free_bytes").set(free as f64);
        let short = shortage(free, size);
        if told != Some(short.is_some()) {
            match &short {
                Some(why) => warn!(data_dir = %data_dir.display(), "promotions hold: {why}"),
                None if told.is_some() => info!(data_dir = %data_dir.display(), "the disk has room again"),
                None => {}
            }
            told = Some(short.is_some());
        }
        node.guarded(Guard::Disk, short);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn little_room_is_a_part_of_a_small_disk_and_a_size_on_a_large_one() {
        let (mib, gib) = (1 << 20, 1 << 30);
        assert_eq!(shortage(mib, 8 * mib), None);
        assert_eq!(shortage(300 * mib, 1000 * gib), None);
        let why = "the disk is nearly full: 255.0 MiB are left, expected at least 256.0 MiB";
        assert_eq!(shortage(255 * mib, 1000 * gib).as_deref(), Some(why));
        assert!(shortage(300_000, 8 * mib).is_some());
    }
}
