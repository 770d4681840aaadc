//! A line of the access log. All texts that clients sent are escaped, so that a line is one line of visible ASCII.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use schemars::JsonSchema;
use serde::Deserialize;
use time::OffsetDateTime;

use crate::domain::ids::{ServiceId, VersionId};
use crate::proxy::request::Protocol;

/// How lines are written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccessLogFormat {
    /// An object of JSON.
    #[default]
    Json,
    /// The combined format of Apache and nginx, with what it lacks behind it as `name=value`.
    Combined,
}

impl std::str::FromStr for AccessLogFormat {
    type Err = UnknownAccessFormat;

    fn from_str(text: &str) -> Result<Self, UnknownAccessFormat> {
        match text {
            "json" => Ok(Self::Json),
            "combined" => Ok(Self::Combined),
            _ => Err(UnknownAccessFormat(text.into())),
        }
    }
}

/// A text that names no format.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("found {0:?}, expected json or combined")]
pub struct UnknownAccessFormat(String);

/// A request that is over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessRecord {
    /// Time of day at which the request was read, in milliseconds since 1970.
    pub time_ms: u64,
    /// Address of the client.
    pub client: IpAddr,
    /// Protocol of the client's connection; none: what came was no request.
    pub protocol: Option<Protocol>,
    /// Method of the request.
    pub method: Option<String>,
    /// Path and query.
    pub path: Option<String>,
    /// Status that the client got.
    pub status: u16,
    /// Bytes of the answer's body.
    pub bytes: u64,
    /// From the request's first byte to the answer's last, in microseconds.
    pub duration_us: u64,
    /// Service that the request was for.
    pub service: Option<ServiceId>,
    /// Version that was tried last.
    pub version: Option<VersionId>,
    /// Server that was tried last, `host:port`.
    pub server: Option<String>,
    /// Servers that were tried, or tried again.
    pub tries: u32,
    /// X-Request-Id, as the client sent it.
    pub request_id: Option<String>,
    /// Referer, as the client sent it.
    pub referer: Option<String>,
    /// User-Agent, as the client sent it.
    pub agent: Option<String>,
}

impl AccessRecord {
    /// Returns a record of which nothing is known but the client.
    pub fn unknown(client: IpAddr) -> Self {
        Self {
            time_ms: 0,
            client,
            protocol: None,
            method: None,
            path: None,
            status: 0,
            bytes: 0,
            duration_us: 0,
            service: None,
            version: None,
            server: None,
            tries: 0,
            request_id: None,
            referer: None,
            agent: None,
        }
    }

    /// Appends the record as a line.
    pub fn put(&self, format: AccessLogFormat, lines: &mut Vec<u8>) {
        let line = match format {
            AccessLogFormat::Json => self.json(),
            AccessLogFormat::Combined => self.combined(),
        };
        lines.extend_from_slice(line.as_bytes());
        lines.push(b'\n');
    }

    fn json(&self) -> String {
        let time = humantime::format_rfc3339_millis(SystemTime::UNIX_EPOCH + Duration::from_millis(self.time_ms));
        let mut line = format!("{{\"time\":\"{time}\",\"client\":\"{}\"", self.client);
        let text = |line: &mut String, name: &str, value: Option<&str>| {
            let Some(value) = value else { return };
            *line += &format!(",\"{name}\":\"");
            put_json(value, line);
            line.push('"');
        };
        text(&mut line, "protocol", self.protocol.map(name_of));
        text(&mut line, "method", self.method.as_deref());
        text(&mut line, "path", self.path.as_deref());
        let (status, bytes, duration) = (self.status, self.bytes, millis(self.duration_us));
        line += &format!(",\"status\":{status},\"bytes\":{bytes},\"duration_ms\":{duration},\"tries\":{}", self.tries);
        text(&mut line, "service", self.service.as_ref().map(ServiceId::as_str));
        text(&mut line, "version", self.version.as_ref().map(VersionId::as_str));
        text(&mut line, "server", self.server.as_deref());
        text(&mut line, "request_id", self.request_id.as_deref());
        line.push('}');
        line
    }

    fn combined(&self) -> String {
        let quoted = |value: Option<&str>| {
            let mut text = String::from("\"");
            put_quoted(value.unwrap_or("-"), &mut text);
            text.push('"');
            text
        };
        let request = match (&self.method, &self.path, self.protocol) {
            (Some(method), Some(path), Some(protocol)) => Some(format!("{method} {path} {}", name_of(protocol))),
            _ => None,
        };
        let mut line = format!(
            "{} - - [{}] {} {} {} {} {} tries={} duration_ms={}",
            self.client,
            clock_time(self.time_ms),
            quoted(request.as_deref()),
            self.status,
            self.bytes,
            quoted(self.referer.as_deref()),
            quoted(self.agent.as_deref()),
            self.tries,
            millis(self.duration_us),
        );
        let more = [
            ("service", self.service.as_ref().map(ServiceId::as_str)),
            ("version", self.version.as_ref().map(VersionId::as_str)),
            ("server", self.server.as_deref()),
        ];
        more.into_iter().filter_map(|(name, value)| Some((name, value?))).for_each(|(name, value)| {
            line += &format!(" {name}={value}");
        });
        if let Some(id) = self.request_id.as_deref() {
            line += &format!(" request_id={}", quoted(Some(id)));
        }
        line
    }
}

fn name_of(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Http10 => "HTTP/1.0",
        Protocol::Http11 => "HTTP/1.1",
        Protocol::Http2 => "HTTP/2.0",
    }
}

/// Returns microseconds as milliseconds with three decimals.
fn millis(us: u64) -> String {
    format!("{}.{:03}", us / 1000, us % 1000)
}

/// Returns a time as the combined format has it: `29/Nov/2026:22:03:29 +0000`.
fn clock_time(ms: u64) -> String {
    let at = OffsetDateTime::from_unix_timestamp((ms / 1000) as i64).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let month = &at.month().to_string()[..3];
    format!("{:02}/{month}/{}:{:02}:{:02}:{:02} +0000", at.day(), at.year(), at.hour(), at.minute(), at.second())
}

/// Appends a text as it stands within a string of JSON.
fn put_json(text: &str, out: &mut String) {
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            ' '..='~' => out.push(c),
            _ => c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| {
                // Writing into a String doesn't fail.
                let _ = write!(out, "\\u{unit:04x}");
            }),
        }
    }
}

/// Appends a text as nginx and Apache escape it between quotes: what is not visible ASCII as `\xHH`.
fn put_quoted(text: &str, out: &mut String) {
    let mut bytes = Vec::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => bytes.extend_from_slice(&[b'\\', byte]),
            b' '..=b'~' => bytes.push(byte),
            // Writing into a Vec doesn't fail.
            _ => drop(write!(bytes, "\\x{byte:02X}")),
        }
    }
    *out += &String::from_utf8_lossy(&bytes);
}
