//! With a real Kafka and a real Redis. Each test here names what it needs, and is ignored without: scripts/services.sh.
#![expect(clippy::disallowed_methods, reason = "these tests wait for real processes, on the real clock")]

mod kafka;

/// Returns a name that no other run has used.
fn unique(name: &str) -> String {
    format!("{name}-{:x}", rand::random::<u64>())
}

/// Returns a variable that names a service.
fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: eval \"$(scripts/services.sh env)\""))
}
