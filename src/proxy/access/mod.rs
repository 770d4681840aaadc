//! The access log: a line for each request of a client, or for a share of them.
//!
//! A request carries an [`Access`] only where the log is on and the request was drawn. When the entry goes, its record is put
//! into a bounded queue, without waiting; a thread of its own writes the lines. What finds the queue full is counted, not written.

mod entry;
mod line;
mod queue;

pub use entry::{Access, SeenRequest};
pub use line::AccessLogFormat;
pub use queue::AccessLog;
