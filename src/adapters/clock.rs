//! The machine's clocks: one for leases, which suspends don't stop, and the time of day.

use rustix::time::{ClockId, clock_gettime};

use crate::domain::time::{Mono, Now, Wall};
use crate::ports::Clock;

/// The real clocks: `CLOCK_BOOTTIME`, which counts suspend, and the system's time of day.
#[derive(Debug, Clone, Copy, Default)]
pub struct BootClock;

impl Clock for BootClock {
    fn now(&self) -> Now {
        Now { mono: boot_time(), wall: time_of_day() }
    }
}

/// A century: what began before the machine did has a time, too.
const BEFORE_BOOT_SECONDS: u64 = 100 * 365 * 24 * 3600;

fn boot_time() -> Mono {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).expect("the time since boot is not negative");
    let micros = u64::try_from(time.tv_nsec).expect("a clock's nanoseconds are not negative") / 1000;
    Mono((BEFORE_BOOT_SECONDS + seconds) * 1_000_000 + micros)
}

#[expect(clippy::disallowed_methods, reason = "this is the adapter behind `ports::Clock`")]
fn time_of_day() -> Wall {
    let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Wall(u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_clock_never_goes_back_and_counts_microseconds() {
        let (first, pause) = (BootClock.now(), std::time::Duration::from_millis(5));
        std::thread::park_timeout(pause);
        let second = BootClock.now();
        assert!(second.mono >= first.mono);
        assert!(second.mono.0 - first.mono.0 < 60_000_000, "{first:?} {second:?}");
        assert!(second.wall > Wall(1_700_000_000_000));
    }

    #[test]
    fn what_began_before_the_machine_was_started_is_as_long_ago_as_it_is() {
        let (now, year_ms) = (BootClock.now().mono, 365 * 24 * 3600 * 1000);
        assert_eq!(now.millis_since(now.before_ms(year_ms)), year_ms);
    }
}
