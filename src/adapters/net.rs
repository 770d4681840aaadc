//! The control plane's network: TCP, in plain text.
//!
//! Every program that reaches the port can speak: [`Connection::peer`] stays empty, and [`crate::node::link`] has only HELLO's word
//! for which node is there. [`super::tls`] fills that field in.

use std::io;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};

use crate::domain::ids::NodeId;
use crate::ports::{Connection, Later, Listener, Network};

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
            let listener = super::listen::listen("control", address).await?;
            Ok(Box::new(PlainListener(listener)) as Box<dyn Listener>)
        })
    }
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
    Ok(Connection { stream: Box::new(prepare(stream)?), peer: None, address })
}

/// Sets what every control connection needs.
pub(super) fn prepare(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    SockRef::from(&stream).set_tcp_user_timeout(Some(UNACKNOWLEDGED_MAX))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

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
}
