//! Which fields concern one connection only (RFC 9110, 7.6.1): the same on both paths and in both directions. Pure.
//!
//! A Connection option removes a field of the sender's own. It never removes what frames the message, Host, or a field
//! that the proxy reads or writes: such an option is ignored. Otherwise a sender could have the proxy act upon a field,
//! such as the length of a body, that the next recipient never sees, and the two would disagree about the message.

use httparse::Header;

/// Fields that no Connection option removes, in small letters and in order.
///
/// These are the ones that frame a message, that [`super`] reads, and that it writes. A change that makes the proxy read or
/// write another field adds it here; fields that a rollout or the node's file names are not here, but in `Route::reads`.
pub const RELIED_ON: [&str; 29] = [
    "allow",
    "content-length",
    "content-type",
    "cookie",
    "date",
    "expect",
    "forwarded",
    "grpc-message",
    "grpc-status",
    "grpc-timeout",
    "host",
    "retry-after",
    "set-cookie",
    "te",
    "trailer",
    "transfer-encoding",
    "user-agent",
    "via",
    "x-aviary-mirrored",
    "x-aviary-service",
    "x-aviary-source",
    "x-canary",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-request-id",
    "x-routing-version",
    "x-served-by",
    "x-upstream-served-by",
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
        14 => is("http2-settings"),
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

/// Which of a message's fields are not passed on.
pub struct Removed<'m, 'h, 'b> {
    /// The message's fields.
    pub fields: &'h [Header<'b>],
    /// True if a Connection field has options of the sender's own.
    pub named: bool,
    /// Fields that the service's rollout reads.
    pub configured: &'m [String],
}

impl Removed<'_, '_, '_> {
    /// Returns true for a field that concerns one connection only.
    pub fn has(&self, name: &str) -> bool {
        is_hop_by_hop(name) || (self.named && self.is_named(name))
    }

    /// Returns true when a Connection option names this field, and may.
    fn is_named(&self, name: &str) -> bool {
        let connections = self.fields.iter().filter(|field| field.name.eq_ignore_ascii_case("connection"));
        let mut options = connections.flat_map(|field| options(field.value));
        options.any(|option| option.eq_ignore_ascii_case(name.as_bytes())) && !is_relied_on(name, self.configured)
    }
}
