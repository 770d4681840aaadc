//! What a run did, as anybody could see it: each byte between nodes, each question and answer, each fault, with its time.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use sim::trace::Trace;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use turmoil::net::TcpStream;

/// The trace that all parts of a run write to.
#[derive(Clone)]
pub struct SharedTrace(Arc<Mutex<Trace>>);

impl SharedTrace {
    /// Returns an empty trace; `print`: show each line at once.
    pub fn new(print: bool) -> Self {
        Self(Arc::new(Mutex::new(Trace::new(false, print))))
    }

    /// Adds what `who` did at this virtual moment; `words` is only called when somebody looks.
    pub fn add(&self, who: &str, kind: &str, bytes: &[u8], words: impl FnOnce() -> String) {
        let at_us = turmoil::sim_elapsed().unwrap_or_default().as_micros() as u64;
        self.add_at(at_us, who, kind, bytes, words);
    }

    /// Adds what was done from outside of all hosts, at `at_us` virtual microseconds.
    pub fn add_at(&self, at_us: u64, who: &str, kind: &str, bytes: &[u8], words: impl FnOnce() -> String) {
        let mut trace = self.0.lock().expect("nobody panics with it");
        trace.fold(at_us);
        [who.as_bytes(), kind.as_bytes(), bytes].iter().for_each(|part| {
            trace.fold(part.len() as u64);
            trace.fold_bytes(part);
        });
        let so_far = trace.hash();
        trace.line(at_us, who, kind, || format!("{so_far:016x} {}", words()));
    }

    /// Returns the hash of everything so far.
    pub fn hash(&self) -> u64 {
        self.0.lock().expect("nobody panics with it").hash()
    }
}

/// A connection whose written bytes are in the trace.
pub struct Traced {
    stream: TcpStream,
    trace: SharedTrace,
    from: &'static str,
}

impl Traced {
    /// Wraps the end of a connection that is the host `from`'s.
    pub fn new(stream: TcpStream, trace: SharedTrace, from: &'static str) -> Self {
        Self { stream, trace, from }
    }
}

impl AsyncRead for Traced {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, into)
    }
}

impl AsyncWrite for Traced {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if let Poll::Ready(Ok(count)) = &written {
            self.trace.add(self.from, "sends", &bytes[..*count], || format!("{count} bytes"));
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
