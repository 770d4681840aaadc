use std::io;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};

use super::*;
use crate::domain::ids::{ServiceId, VersionId};
use crate::proxy::request::Protocol;

fn record() -> AccessRecord {
    AccessRecord {
        time_ms: 1_764_453_809_042,
        protocol: Some(Protocol::Http11),
        method: Some("GET".into()),
        path: Some("/predict?a=\"b\"".into()),
        status: 200,
        bytes: 17,
        duration_us: 1_234,
        service: Some(ServiceId::new("fraud").unwrap()),
        version: Some(VersionId::new("v1").unwrap()),
        server: Some("127.0.0.1:9101".into()),
        tries: 2,
        ..AccessRecord::unknown(IpAddr::from([192, 0, 2, 1]))
    }
}

fn line(record: &AccessRecord, format: AccessLogFormat) -> String {
    let mut lines = Vec::new();
    record.put(format, &mut lines);
    String::from_utf8(lines).unwrap()
}

#[test]
fn a_record_is_a_line_of_json() {
    assert_eq!(
        line(&record(), AccessLogFormat::Json),
        "{\"time\":\"2025-11-29T22:03:29.042Z\",\"client\":\"192.0.2.1\",\"protocol\":\"HTTP/1.1\",\"method\":\"GET\",\
         \"path\":\"/predict?a=\\\"b\\\"\",\"status\":200,\"bytes\":17,\"duration_ms\":1.234,\"tries\":2,\"service\":\"fraud\",\
         \"version\":\"v1\",\"server\":\"127.0.0.1:9101\"}\n"
    );
}

#[test]
fn a_record_is_a_line_of_the_combined_format() {
    let record = AccessRecord { agent: Some("curl/8".into()), request_id: Some("r-1".into()), ..record() };
    assert_eq!(
        line(&record, AccessLogFormat::Combined),
        "192.0.2.1 - - [29/Nov/2025:22:03:29 +0000] \"GET /predict?a=\\\"b\\\" HTTP/1.1\" 200 17 \"-\" \"curl/8\" tries=2 \
         duration_ms=1.234 service=fraud version=v1 server=127.0.0.1:9101 request_id=\"r-1\"\n"
    );
    let unread = AccessRecord { status: 400, ..AccessRecord::unknown(IpAddr::from([0; 16])) };
    assert_eq!(
        line(&unread, AccessLogFormat::Combined),
        ":: - - [01/Jan/1970:00:00:00 +0000] \"-\" 400 0 \"-\" \"-\" tries=0 duration_ms=0.000\n"
    );
}

#[test]
fn what_clients_send_stays_within_its_line() {
    // A forged line, an escape sequence, an override of the text's direction, a smiley beyond 16 bits, a quote.
    let foreign = "a\r\n{\"status\":200}\u{1b}[2J\u{202e}\u{1f600}\"\\";
    let record = AccessRecord {
        method: Some(foreign.into()),
        path: Some(foreign.into()),
        request_id: Some(foreign.into()),
        referer: Some(foreign.into()),
        agent: Some(foreign.into()),
        ..record()
    };
    for format in [AccessLogFormat::Json, AccessLogFormat::Combined] {
        let line = line(&record, format);
        let (last, rest) = line.as_bytes().split_last().unwrap();
        assert_eq!(*last, b'\n');
        assert!(rest.iter().all(|byte| (b' '..=b'~').contains(byte)), "{line:?}");
    }
    let json: serde_json::Value = serde_json::from_str(&line(&record, AccessLogFormat::Json)).unwrap();
    assert_eq!((&json["path"], &json["request_id"]), (&foreign.into(), &foreign.into()));
}

/// Writes to the channel, one piece for each call, and waits for the lock first.
struct Slow(Arc<Mutex<()>>, Sender<Vec<u8>>);

impl Write for Slow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _turn = self.0.lock().unwrap();
        self.1.send(bytes.to_vec()).unwrap();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_full_queue_drops_lines_and_counts_them() {
    let (lock, (sent, written)) = (Arc::<Mutex<()>>::default(), channel());
    let log = AccessLog::start(Slow(lock.clone(), sent), AccessLogFormat::Json, Weight::FULL).unwrap();
    let open = log.0.clone().unwrap();
    const MORE: usize = 3 * QUEUE_MAX;
    {
        let _stuck = lock.lock().unwrap();
        // Not one of them waits.
        (0..MORE).for_each(|_| log.put(Box::new(record())));
    }
    log.flush(Duration::from_secs(10)).await;
    let lines: usize = written.try_iter().map(|bytes| bytes.iter().filter(|byte| **byte == b'\n').count()).sum();
    let dropped = open.dropped.load(Relaxed) as usize;
    assert!((QUEUE_MAX..MORE).contains(&lines), "{lines}");
    assert_eq!(lines + dropped, MORE);
}

#[test]
fn a_share_of_the_requests_is_drawn() {
    let log = |percent| {
        let sample = Weight::from_percent(percent).unwrap();
        AccessLog::start(io::sink(), AccessLogFormat::Json, sample).unwrap()
    };
    let drawn = |log: &AccessLog| (0..10_000).filter(|_| log.draws()).count();
    assert_eq!((drawn(&log(100.0)), drawn(&log(0.0)), drawn(&AccessLog::default())), (10_000, 0, 0));
    // Seven standard deviations of this draw.
    assert!((790..=1_210).contains(&drawn(&log(10.0))));
}
