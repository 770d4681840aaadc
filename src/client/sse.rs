//! Server-sent events: bytes in, events out. It holds no connection; `client` does.

/// One event of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SseEvent {
    /// The last `id:` seen; a stream resumes after it.
    pub id: Option<String>,
    /// Its data lines, joined by line feeds.
    pub data: String,
}

/// Longest event that is kept; what follows is dropped, as a server that sends it isn't ours.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// Takes the stream apart, however its bytes arrive.
#[derive(Debug, Default)]
pub struct SseParser {
    line: Vec<u8>,
    data: Vec<String>,
    id: Option<String>,
    size: usize,
}

impl SseParser {
    /// Returns the last id that the stream gave, with an event or alone; none before the first.
    pub fn last_id(&self) -> Option<&str> {
        self.id.as_deref()
    }

    /// Returns the events that `bytes` complete.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<SseEvent> {
        let mut events = Vec::new();
        for byte in bytes {
            match byte {
                b'\n' => events.extend(self.end_line()),
                _ if self.size >= EVENT_BYTES_MAX => {}
                _ => {
                    self.line.push(*byte);
                    self.size += 1;
                }
            }
        }
        events
    }

    fn end_line(&mut self) -> Option<SseEvent> {
        let bytes = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(&bytes);
        let text = text.strip_suffix('\r').unwrap_or(&text);
        if text.is_empty() {
            return self.end_event();
        }
        let (field, value) = text.split_once(':').unwrap_or((text, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "data" => self.data.push(value.into()),
            "id" => self.id = Some(value.into()),
            _ => {} // comments keep the connection alive; event names repeat what the data says
        }
        None
    }

    fn end_event(&mut self) -> Option<SseEvent> {
        self.size = 0;
        let data = std::mem::take(&mut self.data);
        (!data.is_empty()).then(|| SseEvent { id: self.id.clone(), data: data.join("\n") })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &str =
        ": hello\n\nid: 7\nevent: routing\ndata: {\"a\":\ndata: 1}\n\nid:8\r\ndata: {}\r\n\r\ndata: last\n\n";

    fn expected() -> Vec<SseEvent> {
        let event = |id: &str, data: &str| SseEvent { id: Some(id.into()), data: data.into() };
        vec![event("7", "{\"a\":\n1}"), event("8", "{}"), event("8", "last")]
    }

    #[test]
    fn events_are_the_same_however_the_bytes_are_cut() {
        for size in 1..STREAM.len() {
            let mut parser = SseParser::default();
            let found: Vec<_> = STREAM.as_bytes().chunks(size).flat_map(|part| parser.feed(part)).collect();
            assert_eq!(found, expected(), "cut into {size}");
        }
    }

    #[test]
    fn an_id_without_data_is_no_event_and_is_remembered() {
        let mut parser = SseParser::default();
        assert_eq!(parser.last_id(), None);
        assert_eq!(parser.feed(b"id: 9\n\ndata: x\n\n"), [SseEvent { id: Some("9".into()), data: "x".into() }]);
        assert_eq!(parser.last_id(), Some("9"));
    }

    #[test]
    fn an_unfinished_event_is_not_told() {
        assert_eq!(SseParser::default().feed(b"data: half\n"), []);
    }

    #[test]
    fn an_endless_line_is_bounded() {
        let mut parser = SseParser::default();
        for _ in 0..20 {
            parser.feed(&vec![b'x'; EVENT_BYTES_MAX / 8]);
        }
        assert_eq!(parser.line.len(), EVENT_BYTES_MAX);
    }
}
