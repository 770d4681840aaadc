//! The log: what is decided (`record`), what it adds up to (`ledger`), the sum as bytes (`checkpoint`), and the one way from
//! values to bytes (`codec`). Nothing here knows of messages, ballots under way or time.

pub mod checkpoint;
pub mod codec;
pub mod ledger;
pub mod record;
