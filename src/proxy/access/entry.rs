//! What is noted of a request on its way.

use std::cell::{Cell, RefCell};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use bytes::Bytes;
use http::Response;

use crate::domain::ids::{ServiceId, VersionId};
use crate::ports::Clock;
use crate::proxy::request::{HeaderFields, Protocol, field};

use super::line::AccessRecord;
use super::queue::AccessLog;

/// A request's entry, which all who carry the request share; none where the request is not logged.
pub type Access = Option<Rc<AccessEntry>>;

/// Bytes of a text that a line holds, at most.
const TEXT_BYTES_MAX: usize = 8 * 1024;

/// What the client sent, as far as a line tells it.
#[derive(Debug, Clone, Copy)]
pub struct SeenRequest<'h, 'b> {
    /// Protocol of the client's connection.
    pub protocol: Protocol,
    /// Method of the request.
    pub method: &'b str,
    /// Path and query.
    pub target: &'b str,
    /// Fields of the request.
    pub fields: HeaderFields<'h, 'b>,
}

/// A request that will be a line, once nobody carries it any more.
pub struct AccessEntry {
    log: AccessLog,
    clock: Arc<dyn Clock>,
    began_us: u64,
    status: Cell<u16>,
    bytes: Cell<u64>,
    record: RefCell<Box<AccessRecord>>,
}

impl AccessLog {
    /// Begins the entry of a request of the client at `client`, which sent what was `seen`; none where that is no request, such as
    /// one that is malformed. Returns nothing where the request is not logged.
    pub fn begin(&self, clock: &Arc<dyn Clock>, client: IpAddr, seen: Option<SeenRequest>) -> Access {
        if !self.draws() {
            return None;
        }
        let now = clock.now();
        let text = |text: &[u8]| String::from_utf8_lossy(&text[..text.len().min(TEXT_BYTES_MAX)]).into_owned();
        let of = |name| seen.and_then(|seen| field(seen.fields, name)).map(text);
        let record = AccessRecord {
            time_ms: now.wall.0,
            client,
            protocol: seen.map(|seen| seen.protocol),
            method: seen.map(|seen| text(seen.method.as_bytes())),
            path: seen.map(|seen| text(seen.target.as_bytes())),
            request_id: of("x-request-id"),
            referer: of("referer"),
            agent: of("user-agent"),
            ..AccessRecord::unknown(client)
        };
        Some(Rc::new(AccessEntry {
            log: self.clone(),
            clock: clock.clone(),
            began_us: now.mono.0,
            status: Cell::new(LEFT),
            bytes: Cell::new(0),
            record: RefCell::new(Box::new(record)),
        }))
    }
}

/// Status of a request whose client left before there was an answer, as nginx has it.
const LEFT: u16 = 499;

impl AccessEntry {
    /// Notes that a server, `host:port`, is tried; none: the node answers in the place of servers.
    pub fn tried(&self, service: &ServiceId, version: &VersionId, server: Option<&str>) {
        let mut record = self.record.borrow_mut();
        record.tries += u32::from(server.is_some());
        record.service = Some(service.clone());
        record.version = Some(version.clone());
        record.server = server.map(String::from);
    }

    /// Notes the status that the client gets.
    pub fn answered(&self, status: u16) {
        self.status.set(status);
    }

    /// Notes an answer of the node's own.
    pub fn answered_itself(&self, answer: &Response<Bytes>) {
        self.answered(answer.status().as_u16());
        self.sent(answer.body().len() as u64);
    }

    /// Notes bytes of the answer's body that were passed on.
    pub fn sent(&self, bytes: u64) {
        self.bytes.set(self.bytes.get() + bytes);
    }
}

impl Drop for AccessEntry {
    fn drop(&mut self) {
        let mut record = self.record.replace(Box::new(AccessRecord::unknown(IpAddr::from([0; 4]))));
        record.status = self.status.get();
        record.bytes = self.bytes.get();
        record.duration_us = self.clock.now().mono.0.saturating_sub(self.began_us);
        self.log.put(record);
    }
}
