//! Networks of peers, as `[data]` names them.

use std::net::IpAddr;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::Deserialize;

/// A network in CIDR notation, such as `10.0.0.0/8`, or a single address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
#[schemars(with = "String")]
pub struct PeerNetwork {
    address: IpAddr,
    /// Number of leading bits that an address must share.
    prefix: u8,
}

/// Text that is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("found {0:?}, expected a network such as 10.0.0.0/8, or an address")]
pub struct BadNetwork(String);

impl PeerNetwork {
    /// Returns true for an address of this network. An IPv4 address inside IPv6 (`::ffff:…`) is the IPv4 address.
    pub fn contains(&self, peer: IpAddr) -> bool {
        let shares = |own: u128, other: u128, width: u32| {
            let rest = width - u32::from(self.prefix);
            rest == width || own >> rest == other >> rest
        };
        match (self.address, peer.to_canonical()) {
            (IpAddr::V4(own), IpAddr::V4(other)) => shares(own.to_bits().into(), other.to_bits().into(), 32),
            (IpAddr::V6(own), IpAddr::V6(other)) => shares(own.to_bits(), other.to_bits(), 128),
            _ => false,
        }
    }
}

impl FromStr for PeerNetwork {
    type Err = BadNetwork;

    fn from_str(text: &str) -> Result<Self, BadNetwork> {
        let bad = || BadNetwork(text.to_string());
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix.parse::<u8>().map_err(|_| bad())?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.unwrap_or(width);
        if prefix > width { Err(bad()) } else { Ok(Self { address, prefix }) }
    }
}

impl TryFrom<String> for PeerNetwork {
    type Error = BadNetwork;

    fn try_from(text: String) -> Result<Self, BadNetwork> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_contains_its_addresses() {
        for (network, inside, outside) in [
            ("10.0.0.0/8", "10.200.3.4", "11.0.0.1"),
            ("192.0.2.7", "192.0.2.7", "192.0.2.8"),
            ("192.0.2.128/25", "192.0.2.200", "192.0.2.100"),
            ("2001:db8::/32", "2001:db8:9::1", "2001:db9::1"),
            ("0.0.0.0/0", "203.0.113.9", "::1"),
            ("::/0", "2001:db8::1", "10.0.0.1"),
            ("10.0.0.0/8", "::ffff:10.0.0.1", "::ffff:11.0.0.1"),
        ] {
            let parsed: PeerNetwork = network.parse().unwrap();
            assert!(parsed.contains(inside.parse().unwrap()), "{inside} in {network}");
            assert!(!parsed.contains(outside.parse().unwrap()), "{outside} in {network}");
        }
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "x", "::/129", "10.0.0.0/-1", "10.0.0.0/"] {
            assert!(bad.parse::<PeerNetwork>().is_err(), "{bad}");
        }
    }
}
