//! Kafka's own protocol, as far as a test needs what no client of it offers: names of headers that aren't text, and quotas.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

/// A header's name and value, as bytes.
pub type Header<'a> = (&'a [u8], Option<&'a [u8]>);

/// Sends a request to the broker and returns the body of its answer, whose first bytes are the request's number.
fn ask(bootstrap: &str, api: i16, version: i16, body: &[u8]) -> Vec<u8> {
    let mut request = Vec::new();
    request.extend(api.to_be_bytes());
    request.extend(version.to_be_bytes());
    request.extend(7i32.to_be_bytes());
    text(&mut request, "test");
    request.extend(body);
    let mut stream = TcpStream::connect(bootstrap).unwrap();
    stream.write_all(&(request.len() as i32).to_be_bytes()).unwrap();
    stream.write_all(&request).unwrap();
    let mut length = [0; 4];
    stream.read_exact(&mut length).unwrap();
    let mut answer = vec![0; i32::from_be_bytes(length) as usize];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..4], 7i32.to_be_bytes());
    answer.split_off(4)
}

fn text(to: &mut Vec<u8>, text: &str) {
    to.extend((text.len() as i16).to_be_bytes());
    to.extend(text.as_bytes());
}

fn number(to: &mut Vec<u8>, number: i64) {
    let mut left = ((number << 1) ^ (number >> 63)) as u64;
    while left >= 0x80 {
        to.push(left as u8 | 0x80);
        left >>= 7;
    }
    to.push(left as u8);
}

fn bytes(to: &mut Vec<u8>, bytes: Option<&[u8]>) {
    number(to, bytes.map_or(-1, |bytes| bytes.len() as i64));
    to.extend(bytes.unwrap_or_default());
}

/// Appends a record to partition 0 of a topic, with headers as they are.
pub fn produce(bootstrap: &str, topic: &str, value: &[u8], headers: &[Header<'_>]) {
    let mut record = vec![0];
    number(&mut record, 0);
    number(&mut record, 0);
    bytes(&mut record, None);
    bytes(&mut record, Some(value));
    number(&mut record, headers.len() as i64);
    for (name, value) in headers {
        bytes(&mut record, Some(name));
        bytes(&mut record, *value);
    }
    let mut batch = Vec::new();
    batch.extend(0i16.to_be_bytes());
    batch.extend(0i32.to_be_bytes());
    let now_ms = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as i64;
    batch.extend(now_ms.to_be_bytes());
    batch.extend(now_ms.to_be_bytes());
    batch.extend((-1i64).to_be_bytes());
    batch.extend((-1i16).to_be_bytes());
    batch.extend((-1i32).to_be_bytes());
    batch.extend(1i32.to_be_bytes());
    number(&mut batch, record.len() as i64);
    batch.extend(record);
    let mut whole = Vec::new();
    whole.extend(0i64.to_be_bytes());
    whole.extend((batch.len() as i32 + 9).to_be_bytes());
    whole.extend((-1i32).to_be_bytes());
    whole.push(2);
    whole.extend(crc32c::crc32c(&batch).to_be_bytes());
    whole.extend(batch);
    let mut body = Vec::new();
    body.extend((-1i16).to_be_bytes());
    body.extend((-1i16).to_be_bytes());
    body.extend(10_000i32.to_be_bytes());
    body.extend(1i32.to_be_bytes());
    text(&mut body, topic);
    body.extend(1i32.to_be_bytes());
    body.extend(0i32.to_be_bytes());
    body.extend((whole.len() as i32).to_be_bytes());
    body.extend(whole);
    let answer = ask(bootstrap, 0, 7, &body);
    // One topic, its name, one partition, its number: then the error.
    let at = 4 + 2 + topic.len() + 4 + 4;
    assert_eq!(answer[at..at + 2], [0, 0], "the broker refused the record");
}

/// Returns the first bytes of partition 0 of a topic, as the broker keeps them.
pub fn fetch(bootstrap: &str, topic: &str) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend((-1i32).to_be_bytes());
    body.extend(1_000i32.to_be_bytes());
    body.extend(1i32.to_be_bytes());
    body.extend(10_000_000i32.to_be_bytes());
    body.push(1);
    body.extend(1i32.to_be_bytes());
    text(&mut body, topic);
    body.extend(1i32.to_be_bytes());
    body.extend(0i32.to_be_bytes());
    body.extend(0i64.to_be_bytes());
    body.extend(10_000_000i32.to_be_bytes());
    ask(bootstrap, 1, 4, &body)
}

/// Bounds how many bytes a second a client may produce.
pub fn quota(bootstrap: &str, client_id: &str, bytes: f64) {
    let mut body = Vec::new();
    body.extend(1i32.to_be_bytes());
    body.extend(1i32.to_be_bytes());
    text(&mut body, "client-id");
    text(&mut body, client_id);
    body.extend(1i32.to_be_bytes());
    text(&mut body, "producer_byte_rate");
    body.extend(bytes.to_be_bytes());
    body.extend([0, 0]);
    let answer = ask(bootstrap, 49, 0, &body);
    // How long it waited, one entry: then the error.
    assert_eq!(answer[8..10], [0, 0], "the broker refused the quota");
}
