//! Who a client is, behind the proxies that the node trusts. Pure, but for reading a PROXY header.
//!
//! An address that a peer merely claims is anybody's: it counts only as far as each one who passed it on is trusted.

use std::net::{IpAddr, SocketAddr};

pub mod header;

/// Returns the client's address: the peer's, or what trusted proxies say that it was.
///
/// `forwarded` are the values of X-Forwarded-For in their order; each proxy appended the address of its own peer. Read from the
/// end, the first address that is not trusted is the client's; what stands before it, that client may have made up. An address
/// that can't be read ends the search.
pub fn client_of<'f>(
    peer: IpAddr,
    forwarded: impl DoubleEndedIterator<Item = &'f [u8]>,
    is_trusted: impl Fn(IpAddr) -> bool,
) -> IpAddr {
    let mut client = peer;
    for value in forwarded.rev() {
        for part in value.rsplit(|byte| *byte == b',') {
            if !is_trusted(client) {
                return client;
            }
            match address_of(part.trim_ascii()) {
                Some(before) => client = before,
                // Empty elements are none (RFC 9110, 5.6.1).
                None if part.trim_ascii().is_empty() => {}
                None => return client,
            }
        }
    }
    client
}

/// Reads an element of X-Forwarded-For: an address, by some proxies with a port, and IPv6 in brackets.
fn address_of(text: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(text).ok()?;
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    let address = bare.parse::<IpAddr>().or_else(|_| text.parse::<SocketAddr>().map(|address| address.ip()));
    address.ok().map(|address| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn inner(address: IpAddr) -> bool {
        matches!(address, IpAddr::V4(four) if four.octets()[0] == 10)
    }

    fn client(peer: &str, values: &[&str]) -> String {
        client_of(ip(peer), values.iter().map(|value| value.as_bytes()), inner).to_string()
    }

    #[test]
    fn a_client_is_the_last_address_that_nobody_trusts() {
        for (peer, values, expected) in [
            ("192.0.2.1", &["203.0.113.9"][..], "192.0.2.1"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["203.0.113.9"], "203.0.113.9"),
            ("10.0.0.1", &["203.0.113.9, 10.0.0.2"], "203.0.113.9"),
            ("10.0.0.1", &["203.0.113.9", "10.0.0.2"], "203.0.113.9"),
            ("10.0.0.1", &["198.51.100.7, 203.0.113.9, 10.0.0.2"], "203.0.113.9"),
            ("10.0.0.1", &["198.51.100.7", "203.0.113.9"], "203.0.113.9"),
            ("10.0.0.1", &["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
            ("10.0.0.1", &["203.0.113.9:5123"], "203.0.113.9"),
            ("10.0.0.1", &["[2001:db8::1]:5123"], "2001:db8::1"),
            ("10.0.0.1", &["[2001:db8::1]"], "2001:db8::1"),
            ("10.0.0.1", &["2001:db8::1"], "2001:db8::1"),
            ("10.0.0.1", &["::ffff:203.0.113.9"], "203.0.113.9"),
            ("10.0.0.1", &["203.0.113.9,, "], "203.0.113.9"),
            ("10.0.0.1", &["unknown"], "10.0.0.1"),
            ("10.0.0.1", &["203.0.113.9, unknown, 10.0.0.2"], "10.0.0.2"),
            ("10.0.0.1", &["203.0.113.9, 10.0.0.999"], "10.0.0.1"),
        ] {
            assert_eq!(client(peer, values), expected, "{peer} with {values:?}");
        }
    }

    proptest! {
        #[test]
        fn a_peer_that_is_not_trusted_can_claim_nothing(text in ".{0,60}", own in any::<[u8; 4]>()) {
            let own = IpAddr::from(own);
            prop_assume!(!inner(own));
            // What a client claims itself, and what the one trusted proxy says of that client.
            let line = format!("{text},{own}");
            prop_assert_eq!(client_of(own, [text.as_bytes()].into_iter(), inner), own);
            prop_assert_eq!(client_of(ip("10.0.0.1"), [line.as_bytes()].into_iter(), inner), own);
            prop_assert_eq!(
                client_of(ip("10.0.0.1"), [text.as_bytes(), own.to_string().as_bytes()].into_iter(), inner), own
            );
        }
    }
}
