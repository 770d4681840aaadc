//! Why a server brought no answer, as far as the way to it can tell. Pure.
//!
//! The types say what happened; what follows from it is the policy's decision. A failure of this machine's own says nothing
//! about a server, and a request that a server surely did not process may be sent again, whatever its method.

use std::io;

use http::uri::Authority;
use rustix::io::Errno;

use super::policy::FailureKind;

/// Errors of the system that say that this machine lacks what a connection needs: descriptors, memory, buffers, local
/// ports, an interface that is up.
const LOCAL: [Errno; 9] = [
    Errno::MFILE,
    Errno::NFILE,
    Errno::NOBUFS,
    Errno::NOMEM,
    Errno::ADDRNOTAVAIL,
    Errno::ADDRINUSE,
    Errno::AGAIN,
    Errno::NETDOWN,
    // More sockets than one user may have the system watch.
    Errno::NOSPC,
];

/// Returns true for an error that opening a connection gives when this machine, not the server, stands in the way.
pub fn is_local(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| LOCAL.iter().any(|known| known.raw_os_error() == code))
}

/// What a client is told whose request may go to the canary no more.
pub const WITHDRAWN: &str = "the canary lost its share of the traffic meanwhile";

/// Why no connection to a server was made: nothing was sent.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectFailure {
    /// This machine lacks something that every connection needs: never evidence against a server.
    #[error("this machine can't connect: {0}")]
    Local(String),
    /// The server refused or reset the connection, or no network leads to it.
    #[error("{0}")]
    Refused(String),
    /// The server's name has no address.
    #[error("{0}")]
    Unknown(String),
    /// No connection within the limit, in milliseconds.
    #[error("no connection within {0} ms")]
    Late(u64),
}

impl ConnectFailure {
    /// Returns the failure that an error of the system, met while connecting, stands for.
    pub fn of(error: &io::Error) -> Self {
        if is_local(error) { Self::Local(error.to_string()) } else { Self::Refused(error.to_string()) }
    }

    /// Returns true for a failure of this machine's own.
    pub fn is_local(&self) -> bool {
        matches!(self, Self::Local(_))
    }

    /// Returns the failure that stands for several, one for each address of a server: what an address says of the server
    /// goes before what this machine lacks, since a machine without IPv6, say, lacks an address for one of them only.
    pub fn most_telling(self, other: Self) -> Self {
        match (&self, &other) {
            (Self::Local(_), _) => other,
            (Self::Late(_), Self::Refused(_)) => other,
            _ => self,
        }
    }
}

/// Why a request that was sent, or was to be sent, on an HTTP/2 connection brought no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StreamFailure {
    /// There is no connection: nothing was sent.
    #[error(transparent)]
    Connect(#[from] ConnectFailure),
    /// The server surely did not process the request (RFC 9113, 8.7): any method may be sent again.
    #[error("{0}")]
    NotProcessed(String),
    /// A connection that had served before ended before anything of the answer came: what is idempotent may be sent again.
    #[error("{0}")]
    Stale(String),
    /// The connection or the stream ended before the answer did; the server may have processed the request.
    #[error("{0}")]
    Broken(String),
    /// The answer's head has more bytes than the limit, in KiB. Only this request failed.
    #[error("its answer's head is larger than {0} KiB")]
    HeadTooLarge(usize),
    /// The request may not go to this server any more: nothing was sent.
    #[error("{WITHDRAWN}")]
    Withdrawn,
    /// The client's part broke off: the request's body could not be read.
    #[error("the request's body broke off: {0}")]
    Body(String),
}

/// Why a request brought no answer.
pub struct SendFailure {
    /// Kind of the failure, by which it is decided what follows.
    pub kind: FailureKind,
    /// Reason in words.
    pub why: String,
}

impl SendFailure {
    /// Returns that no connection could be made.
    pub fn connect(server: &Authority, failure: &ConnectFailure) -> Self {
        match failure.is_local() {
            true => Self { kind: FailureKind::Local, why: failure.to_string() },
            false => Self { kind: FailureKind::Unreachable, why: format!("{}: {failure}", server) },
        }
    }

    /// Returns why a stream of HTTP/2 brought no answer.
    pub fn stream(server: &Authority, failure: &StreamFailure) -> Self {
        let kind = match failure {
            StreamFailure::Connect(failure) => return Self::connect(server, failure),
            StreamFailure::NotProcessed(_) => FailureKind::Unprocessed,
            StreamFailure::Stale(_) => FailureKind::Stale,
            StreamFailure::Broken(_) | StreamFailure::HeadTooLarge(_) => FailureKind::Broken,
            StreamFailure::Withdrawn => FailureKind::Withdrawn,
            StreamFailure::Body(_) => FailureKind::Client,
        };
        Self { kind, why: failure.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(errno: Errno) -> ConnectFailure {
        ConnectFailure::of(&io::Error::from_raw_os_error(errno.raw_os_error()))
    }

    #[test]
    fn what_this_machine_lacks_is_its_own_failure() {
        for errno in LOCAL {
            assert!(of(errno).is_local(), "{errno:?}");
        }
        for errno in [
            Errno::CONNREFUSED,
            Errno::CONNRESET,
            Errno::HOSTUNREACH,
            Errno::NETUNREACH,
            Errno::TIMEDOUT,
            Errno::AFNOSUPPORT,
            Errno::PERM,
        ] {
            assert!(!of(errno).is_local(), "{errno:?}");
        }
        assert!(!ConnectFailure::of(&io::Error::other("made up")).is_local());
    }

    #[test]
    fn what_an_address_says_of_the_server_goes_first() {
        let failures = || [of(Errno::MFILE), of(Errno::CONNREFUSED), ConnectFailure::Late(5)];
        for one in failures() {
            for other in failures().into_iter().filter(|other| other.is_local()) {
                let local = one.is_local() && other.is_local();
                assert_eq!(one.clone().most_telling(other.clone()).is_local(), local, "{one} and {other}");
                assert_eq!(other.clone().most_telling(one.clone()).is_local(), local, "{other} and {one}");
            }
        }
    }
}
