//! Which fields concern one connection only (RFC 9110, 7.6.1): the same on both ways and in both directions. Pure.
//!
//! A Connection option removes a field of the sender's own. It never removes what frames the message, Host, or a field
//! that the proxy reads or writes: such an option is ignored. Otherwise a sender could have the proxy act upon a field,
//! such as the length of a body, that the next recipient never sees, and the two would disagree about the message.

/// Fields that no Connection option removes, in small letters and in order.
///
/// These are the ones that frame a message, that [`super`] reads, and that it writes. A change that makes the proxy read or
/// write another field adds it here; fields that a rollout names are not here, but in `Route::reads`.
pub const RELIED_ON: [&str; 22] = [
    "content-length",
    "content-type",
    "cookie",
    "date",
    "expect",
    "forwarded",
    "grpc-message",
    "grpc-status",
    "host",
    "retry-after",
    "te",
    "trailer",
    "transfer-encoding",
    "via",
    "x-aviary-mirrored",
    "x-aviary-service",
    "x-canary",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-routing-version",
    "x-served-by",
];

/// Returns true when a Connection option must not remove this field; `configured` are the fields that the service's
/// rollout reads. Names are compared without regard to case.
pub fn is_relied_on(name: &str, configured: &[String]) -> bool {
    let same = |known: &str| name.eq_ignore_ascii_case(known);
    RELIED_ON.into_iter().any(same) || configured.iter().any(|known| same(known))
}

/// Returns true for fields that are removed whether a Connection option names them or not.
pub fn is_hop_by_hop(name: &str) -> bool {
    let is = |known: &str| name.eq_ignore_ascii_case(known);
    match name.len() {
        2 => is("te"),
        7 => is("upgrade"),
        10 => is("connection") || is("keep-alive"),
        16 => is("proxy-connection"),
        17 => is("transfer-encoding"),
        18 => is("proxy-authenticate"),
        19 => is("proxy-authorization"),
        _ => false,
    }
}

/// Returns the options of a Connection field's value, without blanks; empty ones included.
pub fn options(value: &[u8]) -> impl Iterator<Item = &[u8]> {
    value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii)
}
