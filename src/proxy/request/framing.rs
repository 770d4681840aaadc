//! The fields that decide a message's end and the fate of its connection, read once for requests and answers. Pure.

use httparse::Header;

use crate::proxy::body::{BadMessage, refuse};
use crate::proxy::hop;

/// Returns true when a field's name is `known`, which is in small letters.
pub fn is(name: &str, known: &str) -> bool {
    name.len() == known.len() && name.eq_ignore_ascii_case(known)
}

/// What the fields of a head say of the message and its connection.
#[derive(Debug, Default)]
pub struct Framing<'b> {
    /// Content-Length.
    pub length: Option<u64>,
    /// Transfer-Encoding is chunked.
    pub chunked: bool,
    /// Connection says that this is the last message.
    pub close: bool,
    /// Connection says that it is not.
    pub keep_alive: bool,
    /// Connection names fields of the sender's own.
    pub named: bool,
    /// Connection names Upgrade.
    pub upgrade: bool,
    /// Upgrade names WebSocket.
    pub websocket: bool,
    /// Expect is 100-continue.
    pub awaits_continue: bool,
    /// TE names trailers.
    pub takes_trailers: bool,
    /// The first Host.
    pub host: Option<&'b [u8]>,
    /// Number of Host fields.
    pub hosts: u8,
    /// Number of Cookie fields.
    pub cookies: u8,
}

impl<'b> Framing<'b> {
    /// Reads a head's fields. In an answer, lengths that are equal are one length, as other proxies have it.
    ///
    /// # Errors
    /// When the end of the message could be seen at two places.
    pub fn of(fields: &[Header<'b>], is_answer: bool) -> Result<Self, BadMessage> {
        let mut found = Self::default();
        for Header { name, value } in fields {
            match name.len() {
                2 if is(name, "te") => {
                    let named = hop::options(value).filter_map(|coding| coding.split(|byte| *byte == b';').next());
                    found.takes_trailers |=
                        { named }.any(|coding| coding.trim_ascii().eq_ignore_ascii_case(b"trailers"));
                }
                4 if is(name, "host") => {
                    found.host.get_or_insert(value);
                    found.hosts = found.hosts.saturating_add(1);
                }
                6 if is(name, "cookie") => found.cookies = found.cookies.saturating_add(1),
                6 if is(name, "expect") => found.awaits_continue = value.eq_ignore_ascii_case(b"100-continue"),
                7 if is(name, "upgrade") => {
                    found.websocket |= hop::options(value).any(|token| token.eq_ignore_ascii_case(b"websocket"));
                }
                10 if is(name, "connection") => found.take_options(value),
                14 if is(name, "content-length") => found.take_length(value, is_answer)?,
                17 if is(name, "transfer-encoding") => {
                    if found.chunked {
                        return refuse(400, "expected one Transfer-Encoding field");
                    }
                    if !value.eq_ignore_ascii_case(b"chunked") {
                        return refuse(501, "expected chunked as the only transfer coding");
                    }
                    found.chunked = true;
                }
                _ => {}
            }
        }
        if found.chunked && found.length.is_some() {
            return refuse(400, "found Content-Length beside Transfer-Encoding");
        }
        Ok(found)
    }

    fn take_options(&mut self, value: &[u8]) {
        for option in hop::options(value) {
            match option {
                _ if option.eq_ignore_ascii_case(b"close") => self.close = true,
                _ if option.eq_ignore_ascii_case(b"keep-alive") => self.keep_alive = true,
                _ if option.eq_ignore_ascii_case(b"upgrade") => self.upgrade = true,
                _ if option.is_empty() => {}
                _ => self.named = true,
            }
        }
    }

    fn take_length(&mut self, value: &[u8], is_answer: bool) -> Result<(), BadMessage> {
        if self.length.is_some() && !is_answer {
            return refuse(400, "expected one Content-Length field");
        }
        let mut values = value.split(|byte| is_answer && *byte == b',').map(<[u8]>::trim_ascii);
        values.try_for_each(|value| {
            let is_number = !value.is_empty() && value.len() < 19 && value.iter().all(u8::is_ascii_digit);
            if !is_number {
                return refuse(400, "expected digits in Content-Length");
            }
            let length = value.iter().fold(0, |sum, byte| sum * 10 + u64::from(byte - b'0'));
            match self.length.replace(length) {
                Some(before) if before != length => refuse(400, "found two lengths in Content-Length"),
                _ => Ok(()),
            }
        })
    }
}
