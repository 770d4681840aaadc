//! Limits of the connections to `h2c://` servers.

use std::time::Duration;

use crate::proxy::settings::ProxySettings;

/// Bytes of an answer that a server may send before its client takes any.
pub const STREAM_WINDOW_BYTES: u32 = 128 * 1024;
/// Requests at once on a connection, at most. The connection lets in a stream's window for each of them, so that clients that
/// read nothing leave the others' share untouched.
pub const STREAMS_MAX: usize = 200;
/// Bytes of a head up to which it is read, so that it fails alone and by its name; a larger one ends its stream.
pub const HEAD_BYTES_READ_MAX: u32 = 1 << 20;

/// Limits of the connections to `h2c://` servers.
#[derive(Debug, Clone)]
pub struct PoolLimits {
    /// Longest wait for a connection, until the server's SETTINGS came.
    pub connect: Duration,
    /// Longest wait for an answer: a connection on which a request waited so long in vain takes no others.
    pub first_byte: Duration,
    /// Silence of a connection after which it gets a PING; none: it gets none.
    pub ping_interval: Option<Duration>,
    /// Longest wait for the answer to a PING.
    pub ping_timeout: Duration,
    /// How long a connection without requests is kept.
    pub idle: Duration,
    /// Age of a connection from which on it takes no more requests.
    pub life: Duration,
}

impl PoolLimits {
    /// Returns the limits that the data plane's settings name.
    pub fn of(settings: &ProxySettings) -> Self {
        let ms = Duration::from_millis;
        Self {
            connect: settings.connect_timeout(),
            first_byte: ms(settings.first_byte_timeout_ms),
            ping_interval: (settings.upstream_ping_interval_ms > 0).then(|| ms(settings.upstream_ping_interval_ms)),
            ping_timeout: ms(settings.upstream_ping_timeout_ms),
            idle: ms(settings.upstream_keep_alive_ms),
            life: ms(settings.upstream_life_ms),
        }
    }
}
