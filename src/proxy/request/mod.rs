//! The canonical request: one validated value, made in one place of whatever came in, and the head that servers get.
//!
//! HTTP/1.0, HTTP/1.1 and HTTP/2 requests become a [`CanonicalRequest`], or are refused for the same reasons. What is forwarded,
//! by either path, is made from it by [`CanonicalRequest::fields_for`]. It borrows from the bytes that were read. Pure.

use std::borrow::Cow;

use httparse::Header;

use super::body::{BadMessage, BodyFraming, Chunk, refuse};
use super::hop;

mod framing;
mod target;

pub use framing::{Framing, is};
use target::{RequestTarget, host};

/// Bytes of a head, at most, whatever brought it.
pub const HEAD_BYTES_MAX: usize = 32 * 1024;
/// Fields of a head, at most.
pub const FIELDS_MAX: usize = 100;
/// Refusal of a head with more bytes.
pub const HEAD_TOO_LARGE: BadMessage = BadMessage { status: 431, why: "expected a head of at most 32 KiB" };
/// Refusal of a head with more fields.
pub const TOO_MANY_FIELDS: BadMessage = BadMessage { status: 431, why: "expected at most 100 header fields" };
/// Methods that an answer with status 405 names (RFC 9110, 15.5.6).
pub const ALLOW: &str = "GET, HEAD, POST, PUT, DELETE, OPTIONS, PATCH";

/// Header fields of a head, in the order in which they arrived.
pub type HeaderFields<'h, 'b> = &'h [Header<'b>];

/// Returns the first field of this name, given in small letters.
pub fn field<'b>(fields: HeaderFields<'_, 'b>, name: &str) -> Option<&'b [u8]> {
    let found = fields.iter().find(|field| is(field.name, name));
    found.map(|field| field.value)
}

/// The protocol by which a request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// An answer ends with the connection, or has a length: no chunks.
    Http10,
    /// Chunks, 100 (Continue), upgrades.
    Http11,
    /// Streams: an authority beside the fields, no connection options, ends that need no framing.
    Http2,
}

/// A request's head as it was read, not checked yet.
#[derive(Debug, Clone, Copy)]
pub struct Received<'h, 'b> {
    /// Protocol of the client's connection.
    pub protocol: Protocol,
    /// Method, as the client sent it.
    pub method: &'b str,
    /// RequestTarget of the request line, or `:path`.
    pub target: &'b str,
    /// `:authority`; HTTP/1.x has none.
    pub authority: Option<&'b str>,
    /// Fields, in the order in which they arrived.
    pub fields: HeaderFields<'h, 'b>,
    /// True if the client said with the head that no body follows, which HTTP/2 can.
    pub has_ended: bool,
}

/// A request that means one thing, to this proxy and to every server.
#[derive(Debug)]
pub struct CanonicalRequest<'h, 'b> {
    /// Protocol of the client's connection.
    pub protocol: Protocol,
    /// Method of the request: never CONNECT.
    pub method: &'b str,
    /// The host that is meant, with its port, if any; empty when the client named none.
    pub authority: &'b str,
    /// Begins with a slash, or is `*`.
    pub path_and_query: Cow<'b, str>,
    /// Fields, in the order in which they arrived; for what reads them, such as routing.
    pub fields: HeaderFields<'h, 'b>,
    /// How the body ends.
    pub body: BodyFraming,
    /// The client wants no further request on this connection.
    pub close: bool,
    /// The client waits for 100 (Continue) before it sends the body.
    pub awaits_continue: bool,
    /// The client takes trailers.
    pub takes_trailers: bool,
    /// The client asks for the WebSocket protocol on this connection. No other upgrade is ever asked for.
    pub wants_websocket: bool,
    /// Content-Length, where the client sent one.
    length: Option<u64>,
    /// Connection names fields of its own.
    named: bool,
    /// Number of Cookie fields.
    cookies: u8,
}

impl<'h, 'b> CanonicalRequest<'h, 'b> {
    /// Checks what came; `head_bytes` is its length where it had one on the wire.
    ///
    /// # Errors
    /// When the request can be read in two ways, is longer than any may be, or asks for what this proxy never does.
    pub fn of(received: Received<'h, 'b>, head_bytes: Option<usize>) -> Result<Self, BadMessage> {
        let Received { protocol, method, target, authority, fields, has_ended } = received;
        if head_bytes.unwrap_or_else(|| size_of_head(&received)) > HEAD_BYTES_MAX {
            return Err(HEAD_TOO_LARGE);
        }
        if fields.len() > FIELDS_MAX {
            return Err(TOO_MANY_FIELDS);
        }
        let framing = Framing::of(fields, false)?;
        if method == "CONNECT" {
            return refuse(405, "this is no forward proxy: CONNECT is not for it");
        }
        let target = RequestTarget::of(method, target)?;
        let named = authority_of(protocol, authority, &framing)?;
        if framing.chunked && protocol != Protocol::Http11 {
            return refuse(400, "found Transfer-Encoding outside HTTP/1.1");
        }
        let body = match (framing.chunked, framing.length, protocol) {
            (true, ..) => BodyFraming::CHUNKED,
            (false, Some(length), _) => BodyFraming::Length(length),
            (false, None, Protocol::Http2) if !has_ended => BodyFraming::CHUNKED,
            (false, None, _) => BodyFraming::NONE,
        };
        if has_ended && !body.has_ended() {
            return refuse(400, "found a Content-Length without a body");
        }
        let is_http11 = protocol == Protocol::Http11;
        let wants_websocket = framing.upgrade && framing.websocket && is_http11 && method == "GET" && body.has_ended();
        Ok(Self {
            protocol,
            method,
            authority: target.authority.unwrap_or(named),
            path_and_query: target.path_and_query,
            fields,
            body,
            close: framing.close || (protocol == Protocol::Http10 && !framing.keep_alive),
            awaits_continue: framing.awaits_continue && protocol != Protocol::Http10 && !body.has_ended(),
            takes_trailers: framing.takes_trailers && protocol != Protocol::Http10,
            wants_websocket,
            length: framing.length,
            named: framing.named,
            cookies: framing.cookies,
        })
    }

    /// Returns the path without the query.
    pub fn path(&self) -> &str {
        self.path_and_query.split_once('?').map_or(&*self.path_and_query, |(path, _)| path)
    }

    /// Returns true when doing it twice is doing it once (RFC 9110, 9.2.2).
    pub fn is_idempotent(&self) -> bool {
        is_idempotent(self.method)
    }

    /// Returns Content-Length, where the client sent one.
    pub fn length(&self) -> Option<u64> {
        self.length
    }

    /// Puts every field that a server gets, each once, in the order in which they are sent; the value comes in parts. Framing,
    /// Host, Expect, TE and Upgrade are not among them: each path writes those by what its protocol has for them.
    pub fn fields_for(&self, gateway: &Gateway, mut put: impl FnMut(&str, &[&[u8]])) {
        let removed = hop::Removed { fields: self.fields, named: self.named, configured: gateway.configured };
        let (mut has_host, mut has_proto, mut has_forwarded) = (false, false, false);
        let mut through: Option<Vec<u8>> = None;
        let mut cookies: Option<Vec<u8>> = None;
        for Header { name, value } in self.fields {
            match name.len() {
                9.. if !gateway.is_trusted && is_forwarded(name) => {
                    has_forwarded |= is(name, "forwarded");
                    continue;
                }
                4 if is(name, "host") => continue,
                6 if is(name, "expect") => continue,
                6 if self.cookies > 1 && is(name, "cookie") => {
                    join(cookies.get_or_insert_default(), b"; ", value);
                    continue;
                }
                9 if is(name, "forwarded") => has_forwarded = true,
                14 if is(name, "content-length") => continue,
                15 if is(name, "x-forwarded-for") => {
                    join(through.get_or_insert_default(), b", ", value);
                    continue;
                }
                16 if is(name, "x-forwarded-host") => has_host = true,
                17 if is(name, "x-forwarded-proto") => has_proto = true,
                _ => {}
            }
            if !removed.has(name) {
                put(name, &[value]);
            }
        }
        if let Some(cookies) = cookies {
            put("cookie", &[&cookies]);
        }
        if !has_host && !self.authority.is_empty() {
            put("x-forwarded-host", &[self.authority.as_bytes()]);
        }
        if !has_proto {
            put("x-forwarded-proto", &[b"http"]);
        }
        let peer = gateway.peer.as_bytes();
        match through {
            Some(before) if !before.is_empty() => put("x-forwarded-for", &[&before, b", ", peer]),
            _ => put("x-forwarded-for", &[peer]),
        }
        if has_forwarded {
            match gateway.peer.contains(':') {
                true => put("forwarded", &[b"for=\"[", peer, b"]\";proto=http"]),
                false => put("forwarded", &[b"for=", peer, b";proto=http"]),
            }
        }
        put("via", &[b"1.1 aviary"]);
    }

    /// Returns the host that servers are told: the client's, or the service's name where an HTTP/1.0 client named none.
    pub fn host<'s>(&'s self, gateway: &'s Gateway) -> &'s str {
        if self.authority.is_empty() { gateway.service } else { self.authority }
    }

    /// Writes the head that an HTTP/1.1 server gets.
    pub fn write(&self, gateway: &Gateway, out: &mut Vec<u8>) {
        for part in [self.method, " ", &*self.path_and_query, " HTTP/1.1\r\nhost: ", self.host(gateway), "\r\n"] {
            out.extend_from_slice(part.as_bytes());
        }
        self.fields_for(gateway, |name, parts| put_field(out, name, parts));
        if let Some(length) = self.length {
            put_length(out, length);
        } else if self.body == BodyFraming::Chunked(Chunk::Size(0, 0)) {
            out.extend_from_slice(b"transfer-encoding: chunked\r\n");
        }
        if self.awaits_continue {
            out.extend_from_slice(b"expect: 100-continue\r\n");
        }
        if self.wants_websocket {
            out.extend_from_slice(b"connection: upgrade\r\nupgrade: websocket\r\n");
        }
        out.extend_from_slice(b"\r\n");
    }
}

/// Returns true for the fields by which proxies say for whom they ask.
fn is_forwarded(name: &str) -> bool {
    const PREFIX: &str = "x-forwarded-";
    let begins = name.as_bytes().get(..PREFIX.len());
    begins.is_some_and(|begins| begins.eq_ignore_ascii_case(PREFIX.as_bytes())) || is(name, "forwarded")
}

/// Returns true for a method of which a second execution changes nothing more (RFC 9110, 9.2.2).
pub fn is_idempotent(method: &str) -> bool {
    matches!(method, "GET" | "HEAD" | "OPTIONS" | "PUT" | "DELETE" | "TRACE")
}

/// What a server is told beside what the client sent.
#[derive(Debug, Clone, Copy)]
pub struct Gateway<'g> {
    /// Address of the client, without a port.
    pub peer: &'g str,
    /// Name of the service.
    pub service: &'g str,
    /// Fields that the service's rollout or the node's file reads: no Connection option removes them.
    pub configured: &'g [String],
    /// What the peer says of those before it is passed on: X-Forwarded-* and Forwarded. Otherwise this proxy's own words replace it.
    pub is_trusted: bool,
}

/// Writes a field of an HTTP/1.1 head.
pub fn put_field(out: &mut Vec<u8>, name: &str, parts: &[&[u8]]) {
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b": ");
    parts.iter().for_each(|part| out.extend_from_slice(part));
    out.extend_from_slice(b"\r\n");
}

/// Writes a Content-Length field.
pub fn put_length(out: &mut Vec<u8>, length: u64) {
    let (mut digits, mut at, mut left) = ([0; 20], 20, length);
    loop {
        at -= 1;
        digits[at] = b'0' + (left % 10) as u8;
        left /= 10;
        if left == 0 {
            break;
        }
    }
    put_field(out, "content-length", &[&digits[at..]]);
}

fn join(all: &mut Vec<u8>, between: &[u8], next: &[u8]) {
    if next.is_empty() {
        return;
    }
    if !all.is_empty() {
        all.extend_from_slice(between);
    }
    all.extend_from_slice(next);
}

/// Returns the host that the message names beside its target: exactly one, except that HTTP/1.0 may name none.
fn authority_of<'b>(
    protocol: Protocol,
    authority: Option<&'b str>,
    framing: &Framing<'b>,
) -> Result<&'b str, BadMessage> {
    const ONE: BadMessage = BadMessage { status: 400, why: "expected one Host field" };
    let named = match (framing.hosts, framing.host) {
        (0, _) => None,
        (1, Some(value)) => Some(host(value)?),
        _ => return Err(ONE),
    };
    match (authority, named, protocol) {
        (Some(authority), named, _) => {
            let authority = host(authority.as_bytes())?;
            match named {
                Some(named) if !named.eq_ignore_ascii_case(authority) => {
                    refuse(400, "found another host in Host than in :authority")
                }
                _ => Ok(authority),
            }
        }
        (None, Some(named), _) => Ok(named),
        (None, None, Protocol::Http10) => Ok(""),
        (None, None, _) => Err(ONE),
    }
}

/// Returns the bytes that a head takes in HTTP/1.1.
fn size_of_head(received: &Received) -> usize {
    let line = received.method.len() + received.target.len() + received.authority.map_or(0, str::len);
    let fields = received.fields.iter().map(|field| field.name.len() + field.value.len() + ": \r\n".len());
    line + fields.sum::<usize>()
}

#[cfg(test)]
mod tests;
