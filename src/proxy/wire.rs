//! HTTP/1.1 as bytes: heads are read and rewritten, the ends of bodies are found. Pure.
//!
//! Strict where two readings are possible: a message whose end could be seen at two places is refused, never repaired
//! (RFC 9112, 6.3 and 11.2).

use std::mem::MaybeUninit;

use httparse::{Header, Status};

use super::hop;

/// Bytes of a head, at most.
pub const HEAD_BYTES_MAX: usize = 32 * 1024;
/// Fields of a head, at most.
const FIELDS_MAX: usize = 100;
/// Bytes of a chunk's extension, and of all trailers, at most.
const EXTRAS_MAX: u16 = 8 * 1024;
/// First bytes of a client that speaks HTTP/2.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Room for the fields of a head.
pub struct Room<'b>([MaybeUninit<Header<'b>>; FIELDS_MAX]);

impl Default for Room<'_> {
    fn default() -> Self {
        Self([const { MaybeUninit::uninit() }; FIELDS_MAX])
    }
}

/// Header fields of a head, in the order in which they arrived.
pub type HeaderFields<'h, 'b> = &'h [Header<'b>];

/// Returns the first field of this name, given in small letters.
pub fn field<'b>(fields: HeaderFields<'_, 'b>, name: &str) -> Option<&'b [u8]> {
    let found = fields.iter().find(|field| is(field.name, name));
    found.map(|field| field.value)
}

fn is(name: &str, known: &str) -> bool {
    name.len() == known.len() && name.eq_ignore_ascii_case(known)
}

/// A message that is answered with an error and the end of its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BadMessage {
    /// HTTP status that the proxy answers with.
    pub status: u16,
    /// Reason: what was expected instead.
    pub why: &'static str,
}

const fn refuse<T>(status: u16, why: &'static str) -> Result<T, BadMessage> {
    Err(BadMessage { status, why })
}

/// How much of a body is still to come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyFraming {
    /// So many bytes; none: the body has ended.
    Length(u64),
    /// Chunks, with the position in them.
    Chunked(Chunk),
    /// Everything until the connection ends.
    Open,
}

/// Where in a chunked body the next byte is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chunk {
    /// In a chunk's size, of so many digits.
    Size(u64, u8),
    /// Behind the size, so many bytes in.
    Extension(u64, u16),
    /// At the line feed behind size and extension.
    SizeEnd(u64),
    /// In a chunk's data, with so many bytes left.
    Data(u64),
    /// At the carriage return behind the data.
    DataEnd,
    /// At the line feed behind that.
    DataEnd2,
    /// At the beginning of a trailer line, so many bytes of trailers in.
    Line(u16),
    /// Within a trailer line, so many bytes of trailers in.
    Trailer(u16),
    /// At the line feed of a trailer line, so many bytes of trailers in.
    TrailerEnd(u16),
    /// At the last line feed.
    End,
}

impl BodyFraming {
    /// A message without a body.
    pub const NONE: Self = Self::Length(0);
    /// The beginning of a chunked one.
    pub const CHUNKED: Self = Self::Chunked(Chunk::Size(0, 0));

    /// Returns true when nothing more belongs to it.
    pub fn has_ended(&self) -> bool {
        *self == Self::NONE
    }

    /// Returns how many of the next bytes belong to the body, with its framing, and moves on by them.
    pub fn take(&mut self, bytes: &[u8]) -> Result<usize, BadMessage> {
        match self {
            Self::Open => Ok(bytes.len()),
            Self::Length(left) => {
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                *left -= taken as u64;
                Ok(taken)
            }
            Self::Chunked(_) => self.take_chunks(bytes),
        }
    }

    fn take_chunks(&mut self, bytes: &[u8]) -> Result<usize, BadMessage> {
        let mut at = 0;
        while at < bytes.len() {
            let Self::Chunked(state) = self else { break };
            if let Chunk::Data(left) = state {
                let taken = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len() - at);
                at += taken;
                *left -= taken as u64;
                if *left == 0 {
                    *state = Chunk::DataEnd;
                }
                continue;
            }
            match state.step(bytes[at])? {
                Some(next) => *state = next,
                None => *self = Self::NONE,
            }
            at += 1;
        }
        Ok(at)
    }
}

impl Chunk {
    /// Returns the state after one byte that is not data; none at the body's end.
    fn step(self, byte: u8) -> Result<Option<Self>, BadMessage> {
        const BAD: BadMessage = BadMessage { status: 400, why: "a chunk is not as RFC 9112 has it" };
        Ok(Some(match (self, byte) {
            (Self::Size(size, digits), _) if byte.is_ascii_hexdigit() && digits < 15 => {
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                Self::Size(size << 4 | u64::from(digit), digits + 1)
            }
            (Self::Size(size, 1..), b';' | b' ' | b'\t') => Self::Extension(size, 1),
            (Self::Size(size, 1..) | Self::Extension(size, _), b'\r') => Self::SizeEnd(size),
            (Self::Extension(size, length), _) if length < EXTRAS_MAX && is_text(byte) => {
                Self::Extension(size, length + 1)
            }
            (Self::SizeEnd(0), b'\n') => Self::Line(0),
            (Self::SizeEnd(size), b'\n') => Self::Data(size),
            (Self::DataEnd, b'\r') => Self::DataEnd2,
            (Self::DataEnd2, b'\n') => Self::Size(0, 0),
            (Self::Line(_), b'\r') => Self::End,
            (Self::Line(length) | Self::Trailer(length), _) if length < EXTRAS_MAX && is_text(byte) => {
                Self::Trailer(length + 1)
            }
            (Self::Trailer(length), b'\r') => Self::TrailerEnd(length),
            (Self::TrailerEnd(length), b'\n') => Self::Line(length),
            (Self::End, b'\n') => return Ok(None),
            _ => return Err(BAD),
        }))
    }
}

fn is_text(byte: u8) -> bool {
    byte == b'\t' || (byte >= b' ' && byte != 0x7f)
}

/// The head of a request.
#[derive(Debug)]
pub struct RequestHead<'h, 'b> {
    /// Method of the request, as the client sent it.
    pub method: &'b str,
    /// Target of the request: path and query.
    pub target: &'b str,
    /// Header fields, in the order in which they arrived.
    pub fields: HeaderFields<'h, 'b>,
    /// Length of the head, in bytes.
    pub length: usize,
    /// How the body after it ends.
    pub body: BodyFraming,
    /// The client wants no further request on this connection.
    pub close: bool,
    /// Connection names fields of its own.
    named: bool,
}

/// Kind of a client's first bytes.
#[derive(Debug)]
pub enum Opening<'h, 'b> {
    /// The head is not complete yet.
    Partial,
    /// A complete head that the fast path can handle.
    Plain(RequestHead<'h, 'b>),
    /// Something that needs more than a relay: HTTP/2, HTTP/1.0, an upgrade, another form of target.
    Other,
}

/// Reads the head of a request.
pub fn request<'h, 'b>(bytes: &'b [u8], room: &'h mut Room<'b>) -> Result<Opening<'h, 'b>, BadMessage> {
    if bytes.starts_with(b"PR") {
        let known = bytes.len().min(PREFACE.len());
        if bytes[..known] == PREFACE[..known] {
            return Ok(if known < 16 { Opening::Partial } else { Opening::Other });
        }
    }
    let mut parsed = httparse::Request::new(&mut []);
    let length = match parsed.parse_with_uninit_headers(bytes, &mut room.0) {
        Ok(Status::Complete(length)) => length,
        Ok(Status::Partial) => return Ok(Opening::Partial),
        Err(httparse::Error::TooManyHeaders) => return refuse(431, "expected at most 100 header fields"),
        Err(httparse::Error::Version) => return refuse(505, "expected HTTP/1.1, HTTP/1.0 or HTTP/2"),
        Err(_) => return refuse(400, "this is no HTTP request"),
    };
    let (method, target) = (parsed.method.unwrap_or(""), parsed.path.unwrap_or(""));
    let fields: &'h [Header<'b>] = parsed.headers;
    let framing = Framing::of(fields)?;
    if framing.hosts > 1 || (framing.hosts == 0 && parsed.version == Some(1)) {
        return refuse(400, "expected one Host field");
    }
    if framing.chunked && parsed.version != Some(1) {
        return refuse(400, "found Transfer-Encoding in HTTP/1.0");
    }
    if method == "CONNECT" {
        return refuse(405, "this is no forward proxy: CONNECT is not for it");
    }
    if parsed.version != Some(1) || framing.upgrade || !target.starts_with('/') {
        return Ok(Opening::Other);
    }
    let body = match framing.chunked {
        true => BodyFraming::CHUNKED,
        false => BodyFraming::Length(framing.length.unwrap_or(0)),
    };
    Ok(Opening::Plain(RequestHead { method, target, fields, length, body, close: framing.close, named: framing.named }))
}

/// Fields that decide a message's end and the fate of its connection.
#[derive(Default)]
struct Framing {
    length: Option<u64>,
    chunked: bool,
    close: bool,
    named: bool,
    upgrade: bool,
    hosts: u8,
}

impl Framing {
    fn of(fields: HeaderFields<'_, '_>) -> Result<Self, BadMessage> {
        let mut found = Self::default();
        for Header { name, value } in fields {
            match name.len() {
                4 if is(name, "host") => found.hosts = found.hosts.saturating_add(1),
                7 if is(name, "upgrade") => found.upgrade = true,
                10 if is(name, "connection") => {
                    for option in hop::options(value) {
                        match option {
                            _ if option.eq_ignore_ascii_case(b"close") => found.close = true,
                            _ if option.eq_ignore_ascii_case(b"keep-alive") || option.is_empty() => {}
                            _ => found.named = true,
                        }
                    }
                }
                14 if is(name, "content-length") => {
                    if found.length.is_some() {
                        return refuse(400, "expected one Content-Length field");
                    }
                    let digits = !value.is_empty() && value.len() < 19 && value.iter().all(u8::is_ascii_digit);
                    if !digits {
                        return refuse(400, "expected digits in Content-Length");
                    }
                    found.length = Some(value.iter().fold(0, |sum, byte| sum * 10 + u64::from(byte - b'0')));
                }
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
}

/// Decides which of a message's fields are passed on.
struct Passage<'m, 'h, 'b> {
    fields: HeaderFields<'h, 'b>,
    /// A Connection field has options of its own.
    named: bool,
    /// Fields that the service's rollout reads.
    configured: &'m [String],
}

impl Passage<'_, '_, '_> {
    /// Writes a field unless it concerns one connection only.
    fn put(&self, name: &str, value: &[u8], out: &mut Vec<u8>) {
        let stays = hop::is_hop_by_hop(name) || (self.named && self.is_removed(name));
        if !stays {
            put(out, name.as_bytes(), value);
        }
    }

    /// Returns true when a Connection option names this field, and may.
    fn is_removed(&self, name: &str) -> bool {
        let connections = self.fields.iter().filter(|field| is(field.name, "connection"));
        let mut options = connections.flat_map(|field| hop::options(field.value));
        options.any(|option| option.eq_ignore_ascii_case(name.as_bytes())) && !hop::is_relied_on(name, self.configured)
    }
}

fn put(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

fn put_framing(body: BodyFraming, out: &mut Vec<u8>) {
    if matches!(body, BodyFraming::Chunked(_)) {
        out.extend_from_slice(b"transfer-encoding: chunked\r\n");
    }
}

impl RequestHead<'_, '_> {
    /// Writes the head that an upstream gets, on behalf of the client at `peer` (an IP address); `configured` are the
    /// fields that the service's rollout reads.
    pub fn write(&self, peer: &str, configured: &[String], out: &mut Vec<u8>) {
        let passage = Passage { fields: self.fields, named: self.named, configured };
        for part in [self.method, " ", self.target, " HTTP/1.1\r\n"] {
            out.extend_from_slice(part.as_bytes());
        }
        let (mut host, mut has_host, mut has_proto, mut has_forwarded) = (&b""[..], false, false, false);
        let mut through: Option<Vec<u8>> = None;
        for Header { name, value } in self.fields {
            match name.len() {
                4 if is(name, "host") => host = value,
                9 if is(name, "forwarded") => has_forwarded = true,
                15 if is(name, "x-forwarded-for") => {
                    let before = through.get_or_insert_default();
                    before.extend_from_slice(value);
                    before.extend_from_slice(b", ");
                    continue;
                }
                16 if is(name, "x-forwarded-host") => has_host = true,
                17 if is(name, "x-forwarded-proto") => has_proto = true,
                _ => {}
            }
            passage.put(name, value, out);
        }
        put_framing(self.body, out);
        if !has_host {
            put(out, b"x-forwarded-host", host);
        }
        if !has_proto {
            out.extend_from_slice(b"x-forwarded-proto: http\r\n");
        }
        out.extend_from_slice(b"x-forwarded-for: ");
        if let Some(before) = through {
            out.extend_from_slice(&before);
        }
        out.extend_from_slice(peer.as_bytes());
        if has_forwarded {
            let quoted = if peer.contains(':') { format!("\"[{peer}]\"") } else { peer.to_string() };
            out.extend_from_slice(format!("\r\nforwarded: for={quoted};proto=http").as_bytes());
        }
        out.extend_from_slice(b"\r\nvia: 1.1 aviary\r\n\r\n");
    }

    /// Returns true when doing it twice is doing it once (RFC 9110, 9.2.2).
    pub fn is_idempotent(&self) -> bool {
        matches!(self.method, "GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "TRACE")
    }
}

/// The head of an answer.
#[derive(Debug)]
pub struct ResponseHead<'h, 'b> {
    /// HTTP status of the response.
    pub status: u16,
    reason: &'b str,
    fields: HeaderFields<'h, 'b>,
    /// Length of the head, in bytes.
    pub length: usize,
    /// How the body after it ends.
    pub body: BodyFraming,
    /// The upstream takes another request on this connection.
    pub stays_open: bool,
    named: bool,
}

/// Reads the head of an answer, which a request of this kind (HEAD or not) led to; none while it is not all there.
pub fn answer<'h, 'b>(
    bytes: &'b [u8],
    to_head: bool,
    room: &'h mut Room<'b>,
) -> Result<Option<ResponseHead<'h, 'b>>, BadMessage> {
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    let length = match config.parse_response_with_uninit_headers(&mut parsed, bytes, &mut room.0) {
        Ok(Status::Complete(length)) => length,
        Ok(Status::Partial) => return Ok(None),
        Err(_) => return refuse(502, "what came is no HTTP answer"),
    };
    let fields: &'h [Header<'b>] = parsed.headers;
    let framing = Framing::of(fields).map_err(|refusal| BadMessage { status: 502, ..refusal })?;
    let status = parsed.code.unwrap_or(0);
    if status < 100 || status == 101 {
        return refuse(502, "found a switch of protocols that nobody asked for");
    }
    let body = match (framing.chunked, framing.length) {
        _ if to_head || matches!(status, 100..=199 | 204 | 304) => BodyFraming::NONE,
        (true, _) => BodyFraming::CHUNKED,
        (false, Some(length)) => BodyFraming::Length(length),
        (false, None) => BodyFraming::Open,
    };
    let stays_open = parsed.version == Some(1) && !framing.close && body != BodyFraming::Open;
    let reason = parsed.reason.unwrap_or("");
    Ok(Some(ResponseHead { status, reason, fields, length, body, stays_open, named: framing.named }))
}

/// Header fields that this node adds to an answer.
#[derive(Debug, Clone, Copy)]
pub struct ResponseFields<'m> {
    /// Whole lines that say who served.
    pub lines: &'m [u8],
    /// The time, as Date has it, for answers without one.
    pub date: &'m [u8],
    /// Nothing more is taken from this client.
    pub close: bool,
}

impl ResponseHead<'_, '_> {
    /// Returns true for what comes before the answer itself.
    pub fn is_interim(&self) -> bool {
        self.status < 200
    }

    /// Writes the head that the client gets; an interim one is not marked.
    pub fn write(&self, mark: ResponseFields<'_>, out: &mut Vec<u8>) {
        out.extend_from_slice(b"HTTP/1.1 ");
        out.extend([self.status / 100, self.status / 10 % 10, self.status % 10].map(|digit| b'0' + digit as u8));
        out.push(b' ');
        out.extend_from_slice(self.reason.as_bytes());
        out.extend_from_slice(b"\r\n");
        let passage = Passage { fields: self.fields, named: self.named, configured: &[] };
        let mut dated = false;
        for Header { name, value } in self.fields {
            match name.len() {
                4 if is(name, "date") => dated = true,
                11 if is(name, "x-served-by") => continue,
                17 if is(name, "x-routing-version") => continue,
                _ => {}
            }
            passage.put(name, value, out);
        }
        put_framing(self.body, out);
        if !self.is_interim() {
            out.extend_from_slice(mark.lines);
            if !dated {
                put(out, b"date", mark.date);
            }
            if mark.close {
                out.extend_from_slice(b"connection: close\r\n");
            }
        }
        out.extend_from_slice(b"\r\n");
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
