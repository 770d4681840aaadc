//! Two ends of a connection, and strangers who want to be one.

use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::authority::Authority;
use super::*;

const CLUSTER: ClusterId = ClusterId([7; 16]);
const DAY: Duration = Duration::from_secs(86_400);

fn node(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn authority(dir: &TempDir, cluster: ClusterId) -> Authority {
    Authority::create(&dir.path().join("ca"), cluster).unwrap()
}

/// Installs an identity in a directory of its own.
fn issued(dir: &TempDir, authority: &Authority, name: &str) -> Files {
    let files = Files::in_data_dir(&dir.path().join(name));
    authority.issue(&node(name), DAY).unwrap().install(&files).unwrap();
    files
}

fn network(dir: &TempDir, authority: &Authority, name: &str) -> TlsNetwork {
    TlsNetwork::new(issued(dir, authority, name), node(name), authority.cluster()).unwrap()
}

/// Lets `server` accept whatever `client` does; returns both ends.
async fn meet(
    server: &TlsNetwork,
    client: impl AsyncFnOnce(String) -> io::Result<Connection>,
) -> [io::Result<Connection>; 2] {
    let mut listener = server.listen("127.0.0.1:0").await.unwrap();
    let address = listener.address().unwrap();
    let accepting = async move { listener.accept().await.unwrap().await };
    let accepted = tokio::time::timeout(Duration::from_secs(5), accepting);
    let (accepted, connected) = tokio::join!(accepted, client(address));
    [accepted.unwrap(), connected]
}

fn complaint(end: io::Result<Connection>) -> String {
    match end {
        Ok(connection) => panic!("connected with {:?}", connection.peer),
        Err(error) => error.to_string(),
    }
}

/// Waits for an end to notice that the other one refused it: in TLS 1.3 a client is done before its server is.
async fn is_refused(mut end: Connection) -> bool {
    !matches!(end.stream.read(&mut [0; 1]).await, Ok(1..))
}

#[tokio::test]
async fn both_sides_know_who_is_there() {
    let dir = TempDir::new().unwrap();
    let authority = authority(&dir, CLUSTER);
    let (a, b) = (network(&dir, &authority, "a"), network(&dir, &authority, "b"));
    let (peer, to) = (node("b"), b.clone());
    let [accepted, connected] = meet(&b, async |address| a.connect(&peer, &address).await).await;
    let (mut accepted, mut connected) = (accepted.unwrap(), connected.unwrap());
    assert_eq!((accepted.peer, connected.peer), (Some(node("a")), Some(node("b"))));
    connected.stream.write_all(b"ping").await.unwrap();
    connected.stream.flush().await.unwrap();
    let mut bytes = [0; 4];
    accepted.stream.read_exact(&mut bytes).await.unwrap();
    assert_eq!(&bytes, b"ping");
    assert!(to.expires() > wall() + DAY / 2);
}

#[tokio::test]
async fn a_node_in_another_ones_place_is_refused() {
    let dir = TempDir::new().unwrap();
    let authority = authority(&dir, CLUSTER);
    let (a, b) = (network(&dir, &authority, "a"), network(&dir, &authority, "b"));
    let peer = node("c");
    let [_, connected] = meet(&b, async |address| a.connect(&peer, &address).await).await;
    assert_eq!(complaint(connected), "its certificate names node b, expected node c");
}

#[tokio::test]
async fn strangers_are_refused() {
    let (dir, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let authority = authority(&dir, CLUSTER);
    let b = network(&dir, &authority, "b");
    // Another authority's certificate, for the same node and cluster.
    let stranger = network(&other, &self::authority(&other, CLUSTER), "a");
    let peer = node("b");
    let [accepted, connected] = meet(&b, async |address| stranger.connect(&peer, &address).await).await;
    let (server, client) = (complaint(accepted), complaint(connected));
    assert_eq!((&*server, &*client), ("received fatal alert: DecryptError", "invalid peer certificate: BadSignature"));
    // Nobody's certificate.
    let [accepted, _] = meet(&b, async |address| {
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_file(dir.path().join("ca/ca.pem")).unwrap();
        roots.add(ca).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = config.with_root_certificates(roots).with_no_client_auth();
        let stream = TcpStream::connect(&address).await?;
        let stream =
            TlsConnector::from(Arc::new(config)).connect(ServerName::try_from(ROLE_NAME).unwrap(), stream).await?;
        let end = Connection { stream: Box::new(stream), peer: None, address };
        assert!(is_refused(end).await);
        Err(io::Error::other("refused"))
    })
    .await;
    assert!(complaint(accepted).contains("no certificate"), "without a certificate");
    // Plain text.
    let [accepted, _] = meet(&b, async |address| {
        let mut stream = TcpStream::connect(&address).await?;
        stream.write_all(b"AVRY plain text that is no handshake at all").await?;
        Err(io::Error::other("refused"))
    })
    .await;
    complaint(accepted);
}

#[tokio::test]
async fn another_clusters_node_is_refused_even_by_the_same_authority() {
    let dir = TempDir::new().unwrap();
    let authority = authority(&dir, CLUSTER);
    let b = network(&dir, &authority, "b");
    // The authority's owner made a second cluster with the same key.
    fs::write(dir.path().join("ca/cluster"), format!("{}\n", ClusterId([8; 16]))).unwrap();
    let second = Authority::load(&dir.path().join("ca")).unwrap();
    let other = TempDir::new().unwrap();
    let a = network(&other, &second, "a");
    let peer = node("b");
    let [accepted, connected] = meet(&b, async |address| a.connect(&peer, &address).await).await;
    assert!(complaint(accepted).starts_with("its certificate names cluster 0808"));
    assert!(complaint(connected).starts_with("its certificate names cluster 0707"));
}

#[tokio::test]
async fn a_new_certificate_is_taken_up_and_a_bad_one_is_not() {
    let dir = TempDir::new().unwrap();
    let authority = authority(&dir, CLUSTER);
    let files = issued(&dir, &authority, "a");
    let network = TlsNetwork::new(files.clone(), node("a"), CLUSTER).unwrap();
    let first = network.expires();
    authority.issue(&node("a"), 9 * DAY).unwrap().install(&files).unwrap();
    let forget_the_look = || network.0.looked.lock().unwrap().0 -= LOOK_EVERY;
    forget_the_look();
    let second = network.0.current().ends;
    assert!(second > first + 7 * DAY);
    fs::write(&files.certificate, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    forget_the_look();
    assert_eq!(network.0.current().ends, second);
}

#[test]
fn files_that_are_not_this_nodes_are_refused_with_the_reason() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = TempDir::new().unwrap();
    let authority = authority(&dir, CLUSTER);
    let files = issued(&dir, &authority, "a");
    let why = |name: &str, cluster| match TlsNetwork::new(files.clone(), node(name), cluster) {
        Ok(_) => panic!("taken"),
        Err(error) => format!("{error:#}"),
    };
    assert!(why("b", CLUSTER).ends_with("node.pem: names node a, expected b"));
    assert!(why("a", ClusterId([8; 16])).contains("names cluster 0707"));
    fs::set_permissions(&files.key, fs::Permissions::from_mode(0o640)).unwrap();
    let open = why("a", CLUSTER);
    assert!(open.contains("has mode 0640, expected 0600") && open.contains("run chmod 600"), "{open}");
    let other = TempDir::new().unwrap();
    let stranger = self::authority(&other, CLUSTER);
    let own = fs::read(&files.authority).unwrap();
    fs::copy(other.path().join("ca/ca.pem"), &files.authority).unwrap();
    fs::set_permissions(&files.key, fs::Permissions::from_mode(0o600)).unwrap();
    assert!(why("a", stranger.cluster()).contains("node.pem is not valid under "));
    fs::write(&files.authority, own).unwrap();
    fs::remove_file(&files.certificate).unwrap();
    assert!(why("a", CLUSTER).contains("node.pem is missing: `aviary cluster init` makes it"));
    let ended = Authority::load(&dir.path().join("ca")).unwrap();
    ended.issue(&node("a"), Duration::ZERO).unwrap().install(&files).unwrap();
    assert!(why("a", CLUSTER).contains("expired "));
    // The authority's own key is as private.
    fs::set_permissions(dir.path().join("ca/ca.key"), fs::Permissions::from_mode(0o644)).unwrap();
    let Err(error) = Authority::load(&dir.path().join("ca")) else { panic!("loaded") };
    assert!(error.to_string().contains("has mode 0644"), "{error}");
}
