//! Opening a port, with a word on what stands in the way.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, TcpStream, lookup_host};
use tokio::time::{Instant, sleep};
use tracing::warn;

use crate::listener::keep_alive;

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;
/// Longest wait for another connection to give the port back: a closed one keeps it for a minute.
const BORROWED_MAX: Duration = Duration::from_secs(65);
/// Pause between two tries meanwhile.
const TRY_AGAIN: Duration = Duration::from_millis(250);

/// Listens on `address`, `host:port`, which errors call the `name` port.
///
/// A port that some other program listens on is an error at once. One that is only the local end of some connection
/// (ports above 32767 are lent out so, unless `net.ipv4.ip_local_reserved_ports` names them) is waited for: else a node
/// that restarts could stay away because of one of its own closed connections.
pub async fn listen(name: &str, address: &str) -> io::Result<TcpListener> {
    let explained =
        |what: &str, error: io::Error| io::Error::new(error.kind(), format!("{name} port {address} {what}: {error}"));
    let resolved = async { lookup_host(address).await?.next().ok_or(io::ErrorKind::AddrNotAvailable.into()) };
    let found = resolved.await.map_err(|error| explained("can't be opened", error))?;
    let until = Instant::now() + BORROWED_MAX;
    let mut said = false;
    loop {
        match open(found, false) {
            Ok(listener) => return Ok(listener),
            Err(error) if error.kind() != io::ErrorKind::AddrInUse => return Err(explained("can't be opened", error)),
            Err(error) if TcpStream::connect(found).await.is_ok() => {
                return Err(explained("is taken: another process listens there", error));
            }
            Err(error) if Instant::now() >= until => return Err(explained("is taken by another connection", error)),
            Err(_) => {
                if !std::mem::replace(&mut said, true) {
                    let seconds = BORROWED_MAX.as_secs();
                    warn!(
                        "{name} port {address} is the local end of another connection, waiting up to {seconds} s for it; \
                         net.ipv4.ip_local_reserved_ports keeps a port from being lent"
                    );
                }
                sleep(TRY_AGAIN).await;
            }
        }
    }
}

/// Listens on `address` as [`listen`] does, with as many listeners, among which the system spreads the connections.
///
/// A `shared` port may have the listeners of another process too, if that shares it as well: a process that is to replace
/// another listens before that one stops.
pub async fn listen_many(
    name: &str,
    address: &str,
    count: usize,
    shared: bool,
) -> io::Result<Vec<std::net::TcpListener>> {
    if shared {
        let explained = |error: io::Error| io::Error::new(error.kind(), format!("{name} port {address}: {error}"));
        let found = lookup_host(address).await.map_err(explained)?.next();
        let found = found.ok_or_else(|| explained(io::ErrorKind::AddrNotAvailable.into()))?;
        let first = open(found, true).map_err(explained)?;
        let found = first.local_addr()?;
        let others = (1..count).map(|_| open(found, true)?.into_std());
        return std::iter::once(first.into_std()).chain(others).collect();
    }
    // Alone at first: a port that others share would be shared silently, with another program too.
    let alone = listen(name, address).await?;
    if count < 2 {
        return Ok(vec![alone.into_std()?]);
    }
    let address = alone.local_addr()?;
    drop(alone);
    (0..count).map(|_| open(address, true)?.into_std()).collect()
}

fn open(address: SocketAddr, shared: bool) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A restarted node must not wait for its old connections to be forgotten.
    socket.set_reuseaddr(true)?;
    socket.set_reuseport(shared)?;
    // What is accepted inherits it.
    keep_alive(&socket)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn a_taken_port_says_which_one() {
        let first = listen("api", "127.0.0.1:0").await.unwrap();
        let address = first.local_addr().unwrap().to_string();
        let error = listen("api", &address).await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        let expected = format!("api port {address} is taken: another process listens there: ");
        assert!(error.to_string().starts_with(&expected), "{error}");
    }

    #[tokio::test]
    async fn a_port_is_shared_by_those_who_all_say_so() {
        let first = listen_many("data", "127.0.0.1:0", 2, true).await.unwrap();
        let address = first[0].local_addr().unwrap().to_string();
        let second = listen_many("data", &address, 2, true).await.unwrap();
        assert_eq!(second.len(), 2);
        let error = listen_many("data", &address, 2, false).await.err().unwrap();
        assert!(error.to_string().contains("another process listens there"), "{error}");
        drop((first, second));
        let alone = listen_many("data", &address, 1, false).await.unwrap();
        let error = listen_many("data", &address, 1, true).await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{error}");
        drop(alone);
    }

    #[tokio::test]
    async fn an_address_that_is_none_says_so() {
        let error = listen("api", "127.0.0.1:port").await.err().unwrap().to_string();
        assert!(error.starts_with("api port 127.0.0.1:port can't be opened: "), "{error}");
    }

    #[tokio::test]
    async fn a_port_that_a_connection_borrows_is_waited_for() {
        let server = listen("api", "127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(server.local_addr().unwrap()).await.unwrap();
        let address = client.local_addr().unwrap().to_string();
        let waiting = tokio::spawn(async move { listen("api", &address).await });
        sleep(Duration::from_millis(400)).await;
        assert!(!waiting.is_finished());
        // The side that closes last keeps nothing.
        drop(server.accept().await.unwrap());
        let mut client = client;
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
        drop(client);
        waiting.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_port_is_free_again_while_its_old_connections_linger() {
        let listener = listen("api", "127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let mut out = TcpStream::connect(&address).await.unwrap();
        drop((listener.accept().await.unwrap(), listener));
        // The side that closed first is the one whose address lingers.
        assert_eq!(out.read(&mut [0; 1]).await.unwrap(), 0);
        drop(out);
        listen("api", &address).await.unwrap();
    }
}
