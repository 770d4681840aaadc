//! The PROXY protocol's header, versions 1 and 2: a proxy says before the first byte for whom it connects.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

/// First bytes of version 2.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// First bytes of version 1.
const PREFIX: &[u8] = b"PROXY ";
/// Longest line of version 1, with its end.
const LINE_MAX: usize = 107;
/// Longest header of version 2 behind its first 16 bytes: addresses, and extensions that are passed over.
const REST_MAX: usize = 4096;

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyHeader {
    /// The proxy connects for this client.
    For(SocketAddr),
    /// The proxy connects for itself, such as to check the node's health, or does not say for whom.
    Own,
}

/// Why a connection does not begin with a header.
#[derive(Debug, thiserror::Error)]
pub enum HeaderProblem {
    /// The connection ended or failed first.
    #[error("the connection ended within the PROXY header: {0}")]
    Read(#[from] io::Error),
    /// What came is no header.
    #[error("expected a PROXY header, found {0}")]
    Malformed(&'static str),
}

/// Reads a header, and not a byte more.
pub async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> Result<ProxyHeader, HeaderProblem> {
    let mut first = [0; SIGNATURE.len()];
    stream.read_exact(&mut first[..PREFIX.len()]).await?;
    if &first[..PREFIX.len()] == PREFIX {
        let mut line = first[..PREFIX.len()].to_vec();
        while !line.ends_with(b"\r\n") {
            if line.len() == LINE_MAX {
                return Err(HeaderProblem::Malformed("a line without an end"));
            }
            line.push(stream.read_u8().await?);
        }
        return version1(&line).map_err(HeaderProblem::Malformed);
    }
    stream.read_exact(&mut first[PREFIX.len()..]).await?;
    if first != SIGNATURE {
        return Err(HeaderProblem::Malformed("something else"));
    }
    let mut head = [0; 4];
    stream.read_exact(&mut head).await?;
    let length = usize::from(u16::from_be_bytes([head[2], head[3]]));
    if length > REST_MAX {
        return Err(HeaderProblem::Malformed("too long a header"));
    }
    let mut rest = vec![0; length];
    stream.read_exact(&mut rest).await?;
    version2(head[0], head[1], &rest).map_err(HeaderProblem::Malformed)
}

/// Reads a line of version 1, such as `PROXY TCP4 192.0.2.1 198.51.100.1 56324 443`.
fn version1(line: &[u8]) -> Result<ProxyHeader, &'static str> {
    let line = line.strip_suffix(b"\r\n").ok_or("a line without an end")?;
    let text = std::str::from_utf8(line).map_err(|_| "bytes that are no text")?;
    let mut words = text.split(' ').skip(1);
    let family = words.next().ok_or("no protocol")?;
    if family == "UNKNOWN" {
        return Ok(ProxyHeader::Own);
    }
    let [Some(source), Some(destination), Some(port), Some(other), None] = std::array::from_fn(|_| words.next()) else {
        return Err("another number of words");
    };
    let address = |text: &str| -> Result<IpAddr, &'static str> {
        let address = text.parse::<IpAddr>().map_err(|_| "an address that is none")?;
        match family {
            "TCP4" if address.is_ipv4() => Ok(address),
            "TCP6" if address.is_ipv6() => Ok(address),
            "TCP4" | "TCP6" => Err("an address of the other family"),
            _ => Err("an unknown protocol"),
        }
    };
    let number = |text: &str| match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse::<u16>().map_err(|_| "a port that is none"),
        false => Err("a port that is none"),
    };
    address(destination)?;
    number(other)?;
    Ok(ProxyHeader::For(SocketAddr::new(address(source)?, number(port)?)))
}

/// Reads version 2 behind its signature: version and command, family and protocol, then what belongs to them.
fn version2(command: u8, family: u8, rest: &[u8]) -> Result<ProxyHeader, &'static str> {
    match command {
        0x20 => return Ok(ProxyHeader::Own),
        0x21 => {}
        _ => return Err("an unknown version or command"),
    }
    let port = |at: usize| rest.get(at..at + 2).map(|bytes| u16::from_be_bytes([bytes[0], bytes[1]]));
    let found = match family {
        0x11 => {
            let source = rest.first_chunk::<4>().map(|bytes| IpAddr::from(Ipv4Addr::from(*bytes)));
            source.zip(port(8)).filter(|_| rest.len() >= 12)
        }
        0x21 => {
            let source = rest.first_chunk::<16>().map(|bytes| IpAddr::from(Ipv6Addr::from(*bytes)));
            source.zip(port(32)).filter(|_| rest.len() >= 36)
        }
        // Unspecified, a datagram, or a socket of one machine: there is no client's address to take.
        _ => return Ok(ProxyHeader::Own),
    };
    let (address, port) = found.ok_or("too short a header")?;
    Ok(ProxyHeader::For(SocketAddr::new(address, port)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(mut bytes: &[u8]) -> (Result<ProxyHeader, String>, usize) {
        let before = bytes.len();
        let reading = read(&mut bytes);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let found = runtime.block_on(reading).map_err(|problem| problem.to_string());
        (found, before - bytes.len())
    }

    fn version2_of(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        [&SIGNATURE[..], &[command, family], &(rest.len() as u16).to_be_bytes(), rest].concat()
    }

    #[test]
    fn both_versions_name_the_client() {
        let four = [&[192, 0, 2, 1, 198, 51, 100, 1][..], &56324_u16.to_be_bytes(), &443_u16.to_be_bytes()].concat();
        let six = [&Ipv6Addr::LOCALHOST.octets()[..], &[0; 16], &7_u16.to_be_bytes(), &443_u16.to_be_bytes()].concat();
        let with_extension = [&four[..], &[4, 0, 1, 0]].concat();
        let client = |text: &str| ProxyHeader::For(text.parse().unwrap());
        for (header, expected) in [
            (b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n".to_vec(), client("192.0.2.1:56324")),
            (b"PROXY TCP6 ::1 2001:db8::1 7 443\r\n".to_vec(), client("[::1]:7")),
            (b"PROXY UNKNOWN\r\n".to_vec(), ProxyHeader::Own),
            (b"PROXY UNKNOWN ::1 ::1 1 2\r\n".to_vec(), ProxyHeader::Own),
            (version2_of(0x21, 0x11, &four), client("192.0.2.1:56324")),
            (version2_of(0x21, 0x11, &with_extension), client("192.0.2.1:56324")),
            (version2_of(0x21, 0x21, &six), client("[::1]:7")),
            (version2_of(0x20, 0, &[]), ProxyHeader::Own),
            (version2_of(0x20, 0x11, &four), ProxyHeader::Own),
            (version2_of(0x21, 0x31, &[0; 216]), ProxyHeader::Own),
        ] {
            let request = b"GET / HTTP/1.1\r\n";
            assert_eq!(parsed(&[&header[..], request].concat()), (Ok(expected), header.len()), "{header:?}");
            for cut in 0..header.len() {
                assert!(parsed(&header[..cut]).0.is_err(), "{cut} bytes of {header:?}");
            }
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        for bad in [
            b"GET / HTTP/1.1\r\n\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 198.51.100.1 56324\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443 1\r\n".to_vec(),
            b"PROXY TCP4 ::1 ::1 1 2\r\n".to_vec(),
            b"PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 x 1 2\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 198.51.100.1 +1 2\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 198.51.100.1 65536 2\r\n".to_vec(),
            b"PROXY UDP4 192.0.2.1 198.51.100.1 1 2\r\n".to_vec(),
            b"PROXY \r\n".to_vec(),
            [b"PROXY TCP4 ".to_vec(), vec![b'1'; 200]].concat(),
            version2_of(0x11, 0x11, &[0; 12]),
            version2_of(0x22, 0x11, &[0; 12]),
            version2_of(0x21, 0x11, &[0; 11]),
            version2_of(0x21, 0x21, &[0; 35]),
            version2_of(0x21, 0x11, &[0; 5000]),
        ] {
            assert!(parsed(&bad).0.is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), version in 0..3) {
            let before: &[u8] = match version {
                0 => &[],
                1 => PREFIX,
                _ => &SIGNATURE,
            };
            let (_, taken) = parsed(&[before, &bytes].concat());
            prop_assert!(taken <= before.len() + bytes.len());
        }

        #[test]
        fn what_a_proxy_writes_is_read_back(source in any::<[u8; 16]>(), four: bool, port: u16) {
            let ip = if four { IpAddr::from(*source.first_chunk::<4>().unwrap()) } else { IpAddr::from(source) };
            let (word, family) = if four { ("TCP4", 0x11) } else { ("TCP6", 0x21) };
            let octets = if four { source[..4].to_vec() } else { source.to_vec() };
            let rest = [&octets[..], &octets, &port.to_be_bytes(), &[1, 187]].concat();
            let expected = Ok(ProxyHeader::For(SocketAddr::new(ip, port)));
            prop_assert_eq!(parsed(format!("PROXY {word} {ip} {ip} {port} 443\r\n").as_bytes()).0, expected.clone());
            prop_assert_eq!(parsed(&version2_of(0x21, family, &rest)).0, expected);
        }
    }
}
