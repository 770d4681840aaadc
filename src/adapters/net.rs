//! The control plane's network: TCP, in plain text.
//!
//! Whoever reaches the port can speak: [`Connection::peer`] stays empty, and [`crate::node::link`] has only HELLO's word
//! for who is there. A transport with mutual TLS wraps these same sockets and fills that field in.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpSocket, TcpStream, lookup_host};

use crate::domain::ids::NodeId;
use crate::ports::{Connection, Later, Listener, Network};

/// Connections that may wait to be accepted.
const BACKLOG: u32 = 1024;

/// How long sent bytes may stay without the peer's acknowledgement before the connection counts as broken. Without it
/// the system goes on for minutes at growing intervals, and a healed network would wait for the next one.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(2);

/// TCP without encryption or authentication: for loopback and for networks that do both themselves.
#[derive(Debug, Clone, Copy, Default)]
pub struct PlainNetwork;

impl Network for PlainNetwork {
    fn connect<'a>(&'a self, _peer: &'a NodeId, address: &'a str) -> Later<'a, io::Result<Connection>> {
        Box::pin(async move { connection(TcpStream::connect(address).await?, address.into()) })
    }

    fn listen<'a>(&'a self, address: &'a str) -> Later<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(async move {
            let listener = bind(address).await.map_err(|error| explained(address, error))?;
            Ok(Box::new(PlainListener(listener)) as Box<dyn Listener>)
        })
    }
}

async fn bind(address: &str) -> io::Result<TcpListener> {
    let address = lookup_host(address).await?.next().ok_or(io::ErrorKind::AddrNotAvailable)?;
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A restarted node must not wait for its old connections to be forgotten.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

fn explained(address: &str, error: io::Error) -> io::Error {
    let what = match error.kind() {
        io::ErrorKind::AddrInUse => "is taken",
        _ => "can't be bound",
    };
    io::Error::new(error.kind(), format!("control port {address} {what}: {error}"))
}

struct PlainListener(TcpListener);

impl Listener for PlainListener {
    fn accept(&mut self) -> Later<'_, io::Result<Later<'static, io::Result<Connection>>>> {
        Box::pin(async move {
            let (stream, address) = self.0.accept().await?;
            let handshake = async move { connection(stream, address.to_string()) };
            Ok(Box::pin(handshake) as Later<'static, io::Result<Connection>>)
        })
    }

    fn address(&self) -> io::Result<String> {
        Ok(self.0.local_addr()?.to_string())
    }
}

fn connection(stream: TcpStream, address: String) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    SockRef::from(&stream).set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
    Ok(Connection { stream: Box::new(stream), peer: None, address })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_taken_port_says_which_one() {
        let first = PlainNetwork.listen("127.0.0.1:0").await.unwrap();
        let address = first.address().unwrap();
        let error = PlainNetwork.listen(&address).await.err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().starts_with(&format!("control port {address} is taken: ")), "{error}");
    }

    #[tokio::test]
    async fn an_address_that_is_none_says_so() {
        let error = PlainNetwork.listen("127.0.0.1:port").await.err().unwrap().to_string();
        assert!(error.starts_with("control port 127.0.0.1:port can't be bound: "), "{error}");
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_nobody_is_authenticated() {
        let mut listener = PlainNetwork.listen("127.0.0.1:0").await.unwrap();
        let address = listener.address().unwrap();
        let peer = NodeId::new("b").unwrap();
        let mut out = PlainNetwork.connect(&peer, &address).await.unwrap();
        let mut back = listener.accept().await.unwrap().await.unwrap();
        assert_eq!((&out.peer, &back.peer), (&None, &None));
        assert_eq!(out.address, address);
        let mut bytes = [0; 4];
        out.stream.write_all(b"ping").await.unwrap();
        back.stream.read_exact(&mut bytes).await.unwrap();
        back.stream.write_all(b"pong").await.unwrap();
        out.stream.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"pong");
    }

    #[tokio::test]
    async fn a_port_is_free_again_while_its_old_connections_linger() {
        let mut listener = PlainNetwork.listen("127.0.0.1:0").await.unwrap();
        let address = listener.address().unwrap();
        let mut out = PlainNetwork.connect(&NodeId::new("b").unwrap(), &address).await.unwrap();
        let back = listener.accept().await.unwrap().await.unwrap();
        drop((listener, back));
        // The side that closed first is the one whose address lingers.
        assert_eq!(out.stream.read(&mut [0; 1]).await.unwrap(), 0);
        drop(out);
        PlainNetwork.listen(&address).await.unwrap();
    }
}
