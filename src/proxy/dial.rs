//! Connecting to one of several addresses: the next one is tried as well when one takes long (Happy Eyeballs, RFC 8305).

use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::failure::ConnectFailure;

/// How long an address is tried alone (RFC 8305, 8).
const ALONE_MAX: Duration = Duration::from_millis(250);

/// Opens a connection to the first of these addresses that takes one, within `limit`; `bad` is told of those that refused,
/// or were slower than one that was tried later.
pub async fn dial(
    addresses: Vec<SocketAddr>,
    limit: Duration,
    mut bad: impl FnMut(SocketAddr),
) -> Result<TcpStream, ConnectFailure> {
    let late = ConnectFailure::Late(limit.as_millis() as u64);
    let until = Instant::now() + limit;
    // All get a try, however many they are.
    let alone = ALONE_MAX.min(limit / (addresses.len() as u32 + 1));
    let (mut untried, mut tried) = (addresses.into_iter(), Vec::new());
    let mut attempts = JoinSet::new();
    let mut failure: Option<ConnectFailure> = None;
    loop {
        if let Some(address) = untried.next() {
            tried.push(address);
            attempts.spawn(async move { (address, TcpStream::connect(address).await) });
        } else if attempts.is_empty() {
            return Err(failure.unwrap_or(ConnectFailure::Unknown("the name has no address".into())));
        }
        let patience = if untried.len() > 0 { (Instant::now() + alone).min(until) } else { until };
        match timeout_at(patience, attempts.join_next()).await {
            Ok(Some(Ok((address, Ok(stream))))) => {
                tried.iter().filter(|other| **other != address).copied().for_each(&mut bad);
                return Ok(stream);
            }
            Ok(Some(Ok((address, Err(error))))) => {
                tried.retain(|other| *other != address);
                bad(address);
                let found = ConnectFailure::of(&error);
                failure = Some(match failure {
                    Some(before) => before.most_telling(found),
                    None => found,
                });
            }
            Ok(Some(Err(_)) | None) => {}
            Err(_) if Instant::now() >= until => {
                tried.into_iter().for_each(bad);
                return Err(match failure {
                    Some(failure) => failure.most_telling(late),
                    None => late,
                });
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use tokio::net::{TcpListener, TcpSocket};

    /// Returns an address that answers no SYN: its queue is full of these connections, which nobody accepts.
    async fn blackhole() -> (SocketAddr, TcpListener, Vec<tokio::task::JoinHandle<()>>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let filler = |_| {
            tokio::spawn(async move {
                let _held = TcpStream::connect(address).await;
                std::future::pending::<()>().await;
            })
        };
        let fillers = (0..8).map(filler).collect();
        while tokio::time::timeout(Duration::from_millis(100), TcpStream::connect(address)).await.is_ok() {}
        (address, listener, fillers)
    }

    async fn refused() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap()
    }

    #[tokio::test]
    async fn an_address_that_drops_syns_costs_a_quarter_of_a_second() {
        let (silent, _listener, _fillers) = blackhole().await;
        let good = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = good.local_addr().unwrap();
        let gone = refused().await;
        for addresses in [vec![silent, address], vec![silent, gone, address], vec![gone, silent, address]] {
            let (began, bad) = (Instant::now(), RefCell::new(Vec::new()));
            let made = dial(addresses.clone(), Duration::from_secs(3), |address| bad.borrow_mut().push(address)).await;
            assert_eq!(made.unwrap().peer_addr().unwrap(), address);
            assert!(began.elapsed() < Duration::from_secs(1), "{:?} with {addresses:?}", began.elapsed());
            let mut found = bad.into_inner();
            found.sort_unstable();
            let mut expected: Vec<_> = addresses.into_iter().filter(|other| *other != address).collect();
            expected.sort_unstable();
            assert_eq!(found, expected);
        }
    }

    #[tokio::test]
    async fn a_limit_leaves_every_address_a_try() {
        let (silent, _listener, _fillers) = blackhole().await;
        let good = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = good.local_addr().unwrap();
        let addresses = vec![silent, silent, silent, silent, address];
        let made = dial(addresses, Duration::from_millis(600), |_| ()).await;
        assert_eq!(made.unwrap().peer_addr().unwrap(), address);
    }

    #[tokio::test]
    async fn what_failed_is_said_of_all_addresses() {
        let (silent, _listener, _fillers) = blackhole().await;
        let gone = refused().await;
        let limit = Duration::from_millis(300);
        let failure = |addresses| async { dial(addresses, limit, |_| ()).await.unwrap_err() };
        assert!(matches!(failure(vec![silent]).await, ConnectFailure::Late(300)));
        assert!(matches!(failure(vec![gone]).await, ConnectFailure::Refused(_)));
        assert!(matches!(failure(vec![silent, gone]).await, ConnectFailure::Refused(_)));
        assert!(matches!(failure(vec![]).await, ConnectFailure::Unknown(_)));
    }
}
