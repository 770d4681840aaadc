//! HTTP/1.x as bytes: heads of requests are read, heads of answers are read and written anew. Pure.
//!
//! Strict where two readings are possible: a message whose end could be seen at two places is refused, never repaired
//! (RFC 9112, 6.3 and 11.2).

use std::mem::MaybeUninit;

use http::StatusCode;
use httparse::{Header, Status};

use super::body::{BadMessage, BodyFraming, refuse};
use super::hop::Removed;
use super::request::{
    CanonicalRequest, FIELDS_MAX, Framing, HEAD_BYTES_MAX, HEAD_TOO_LARGE, HeaderFields, Protocol, Received,
    TOO_MANY_FIELDS, is, put_field, put_length,
};

/// First bytes of a client that speaks HTTP/2.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Bytes of [`PREFACE`] that no HTTP/1.x request begins with.
const PREFACE_KNOWN: usize = 16;

/// Room for the fields of a head.
pub struct Room<'b>([MaybeUninit<Header<'b>>; FIELDS_MAX]);

impl Default for Room<'_> {
    fn default() -> Self {
        Self([const { MaybeUninit::uninit() }; FIELDS_MAX])
    }
}

/// Kind of a client's next bytes.
#[derive(Debug)]
pub enum Opening<'h, 'b> {
    /// The head is not complete yet.
    Partial,
    /// A complete head, and its length in bytes.
    Request(CanonicalRequest<'h, 'b>, usize),
    /// The client speaks HTTP/2.
    Http2,
}

/// Reads the head of a request; `is_first` on a new connection, where HTTP/2 may begin.
pub fn request<'h, 'b>(bytes: &'b [u8], is_first: bool, room: &'h mut Room<'b>) -> Result<Opening<'h, 'b>, BadMessage> {
    if is_first && bytes.starts_with(b"PR") {
        let known = bytes.len().min(PREFACE.len());
        if bytes[..known] == PREFACE[..known] {
            return Ok(if known < PREFACE_KNOWN { Opening::Partial } else { Opening::Http2 });
        }
    }
    let mut parsed = httparse::Request::new(&mut []);
    let length = match parsed.parse_with_uninit_headers(bytes, &mut room.0) {
        Ok(Status::Complete(length)) => length,
        Ok(Status::Partial) if bytes.len() > HEAD_BYTES_MAX => return Err(HEAD_TOO_LARGE),
        Ok(Status::Partial) => return Ok(Opening::Partial),
        Err(httparse::Error::TooManyHeaders) => return Err(TOO_MANY_FIELDS),
        Err(httparse::Error::Version) if names_version(bytes) => {
            return refuse(505, "expected HTTP/1.1, HTTP/1.0 or HTTP/2");
        }
        Err(_) => return refuse(400, "this is no HTTP request"),
    };
    let received = Received {
        protocol: if parsed.version == Some(1) { Protocol::Http11 } else { Protocol::Http10 },
        method: parsed.method.unwrap_or(""),
        target: parsed.path.unwrap_or(""),
        authority: None,
        fields: parsed.headers,
        has_ended: false,
    };
    Ok(Opening::Request(CanonicalRequest::of(received, Some(length))?, length))
}

/// Returns true for a request line that is one but for its version: three words, the last of them a version of HTTP.
fn names_version(bytes: &[u8]) -> bool {
    let line = bytes.split(|byte| *byte == b'\r' || *byte == b'\n').next().unwrap_or(b"");
    let mut words = line.split(|byte| *byte == b' ').skip(2);
    words.next().is_some_and(|version| version.starts_with(b"HTTP/")) && words.next().is_none()
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
    /// Content-Length, where the answer has one.
    content_length: Option<u64>,
    named: bool,
}

/// What a request was, as far as it decides how its answer is read.
#[derive(Debug, Clone, Copy, Default)]
pub struct Asked {
    /// HEAD: no body follows, whatever the fields say.
    pub is_head: bool,
    /// The protocol of the connection may be switched.
    pub wants_websocket: bool,
}

/// Reads the head of an answer; none while it is not all there.
pub fn answer<'h, 'b>(
    bytes: &'b [u8],
    asked: Asked,
    room: &'h mut Room<'b>,
) -> Result<Option<ResponseHead<'h, 'b>>, BadMessage> {
    const TOO_LARGE: BadMessage = BadMessage { status: 502, why: "its answer's head is larger than 32 KiB" };
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    let length = match config.parse_response_with_uninit_headers(&mut parsed, bytes, &mut room.0) {
        Ok(Status::Complete(length)) if length > HEAD_BYTES_MAX => return Err(TOO_LARGE),
        Ok(Status::Complete(length)) => length,
        Ok(Status::Partial) if bytes.len() > HEAD_BYTES_MAX => return Err(TOO_LARGE),
        Ok(Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return refuse(502, "its answer has more than 100 header fields"),
        Err(_) => return refuse(502, "what came is no HTTP answer"),
    };
    let (status, reason) = (parsed.code.unwrap_or(0), parsed.reason.unwrap_or(""));
    let head = ResponseHead { reason, length, ..ResponseHead::of(status, parsed.headers, asked)? };
    let stays_open = head.stays_open && parsed.version == Some(1);
    Ok(Some(ResponseHead { stays_open, ..head }))
}

impl<'h, 'b> ResponseHead<'h, 'b> {
    /// Checks the head of an answer, whatever protocol brought it.
    pub fn of(status: u16, fields: HeaderFields<'h, 'b>, asked: Asked) -> Result<Self, BadMessage> {
        let framing = Framing::of(fields, true).map_err(|refusal| BadMessage { status: 502, ..refusal })?;
        if status < 100 || (status == 101 && !(asked.wants_websocket && framing.websocket)) {
            return refuse(502, "found a switch of protocols that nobody asked for");
        }
        let body = match (framing.chunked, framing.length) {
            _ if asked.is_head || matches!(status, 100..=199 | 204 | 304) => BodyFraming::NONE,
            (true, _) => BodyFraming::CHUNKED,
            (false, Some(length)) => BodyFraming::Length(length),
            (false, None) => BodyFraming::Open,
        };
        let stays_open = !framing.close && body != BodyFraming::Open && status != 101;
        let (content_length, named) = (framing.length, framing.named);
        Ok(Self { status, reason: "", fields, length: 0, body, stays_open, content_length, named })
    }

    /// Returns every field as it came.
    pub fn all_fields(&self) -> HeaderFields<'h, 'b> {
        self.fields
    }

    /// Returns the same head with this reason phrase.
    pub fn with_reason(self, reason: &'b str) -> Self {
        Self { reason, ..self }
    }
}

/// Returns true for an interim answer that is passed on unasked. 100 (Continue) is the proxy's to send, when a server wants the body,
/// and a switch of protocols is no hint.
pub fn is_hint(status: StatusCode) -> bool {
    (102..=199).contains(&status.as_u16())
}

/// How the body of an answer reaches an HTTP/1.x client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// Framed as it came.
    AsItCame,
    /// In chunks, without the last one if it was cut short: an answer whose end is its connection's would look whole.
    Chunked,
    /// The data alone, until the connection ends: for HTTP/1.0.
    UntilClose,
}

impl Delivery {
    /// Returns how an answer's body reaches a client of this protocol.
    pub fn of(body: BodyFraming, protocol: Protocol) -> Self {
        match (body, protocol) {
            (BodyFraming::Length(_), _) => Self::AsItCame,
            (_, Protocol::Http10) => Self::UntilClose,
            (BodyFraming::Chunked(_), _) => Self::AsItCame,
            (BodyFraming::Open, _) => Self::Chunked,
        }
    }
}

/// What this node adds to an answer, and how it is sent.
#[derive(Debug, Clone, Copy)]
pub struct ResponseFields<'m> {
    /// Whole lines that say who served.
    pub lines: &'m [u8],
    /// The time, as Date has it, for answers without one.
    pub date: &'m [u8],
    /// Nothing more is taken from this client.
    pub close: bool,
    /// Protocol of the client.
    pub protocol: Protocol,
}

impl ResponseHead<'_, '_> {
    /// Returns true for what comes before the answer itself.
    pub fn is_interim(&self) -> bool {
        self.status < 200 && self.status != 101
    }

    /// Writes the head that the client gets; an interim one is not marked.
    pub fn write(&self, mark: ResponseFields<'_>, out: &mut Vec<u8>) {
        put_status_line(self.status, self.reason, mark.protocol, out);
        let mut dated = false;
        self.fields(|name, value| {
            dated |= is(name, "date");
            put_field(out, name, &[value]);
        });
        self.put_framing(mark.protocol, out);
        if self.status == 101 {
            out.extend_from_slice(b"connection: upgrade\r\nupgrade: websocket\r\n");
        }
        if !self.is_interim() {
            put_marks(&mark, dated, out);
        }
        out.extend_from_slice(b"\r\n");
    }

    /// Puts every field that a client gets, beside framing and what this node adds. What the server says of itself in
    /// X-Served-By is told under another name.
    pub fn fields(&self, mut put: impl FnMut(&str, &[u8])) {
        let removed = Removed { fields: self.fields, named: self.named, configured: &[] };
        for Header { name, value } in self.fields {
            match name.len() {
                11 if is(name, "x-served-by") => put("x-upstream-served-by", value),
                14 if is(name, "content-length") => {}
                17 if is(name, "x-routing-version") => {}
                _ if removed.has(name) => {}
                _ => put(name, value),
            }
        }
    }

    /// Returns Content-Length, where the client is told one.
    pub fn content_length(&self) -> Option<u64> {
        self.content_length.filter(|_| !matches!(self.status, 100..=199 | 204))
    }

    fn put_framing(&self, protocol: Protocol, out: &mut Vec<u8>) {
        if let Some(length) = self.content_length() {
            put_length(out, length);
        } else if self.body == BodyFraming::CHUNKED && protocol != Protocol::Http10
            || Delivery::of(self.body, protocol) == Delivery::Chunked
        {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
        }
    }
}

/// Writes the first line of an answer, in the client's version of HTTP/1.
pub fn put_status_line(status: u16, reason: &str, protocol: Protocol, out: &mut Vec<u8>) {
    let version: &[u8] = if protocol == Protocol::Http10 { b"HTTP/1.0 " } else { b"HTTP/1.1 " };
    out.extend_from_slice(version);
    out.extend([status / 100, status / 10 % 10, status % 10].map(|digit| b'0' + digit as u8));
    out.push(b' ');
    out.extend_from_slice(reason.as_bytes());
    out.extend_from_slice(b"\r\n");
}

/// Writes who served, the date unless there is one, and what becomes of the connection.
pub fn put_marks(mark: &ResponseFields, dated: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(mark.lines);
    if !dated {
        put_field(out, "date", &[mark.date]);
    }
    if mark.close {
        out.extend_from_slice(b"connection: close\r\n");
    } else if mark.protocol == Protocol::Http10 {
        out.extend_from_slice(b"connection: keep-alive\r\n");
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
