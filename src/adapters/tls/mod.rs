//! The control plane's network with mutual TLS 1.3: both sides prove which node of which cluster they are.
//!
//! The cluster has an authority of its own ([`authority`]), and a certificate names its node in a URI,
//! `aviary://CLUSTER/NODE`. rustls checks the chain; this module reads the name, and [`crate::node::link`] holds the
//! frames to it. Files that change are taken up by the next connection.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail, ensure};
use arc_swap::ArcSwap;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tracing::{info, warn};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::clock::BootClock;
use super::net::prepare;
use crate::domain::ids::{ClusterId, NodeId};
use crate::ports::{Clock as _, Connection, Later, Listener, Network};

pub mod authority;

/// The name that every node's certificate is for; who it is in particular says its URI.
const ROLE_NAME: &str = "node.aviary.internal";
/// Between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// From this long before its end on, a certificate is warned about.
const EXPIRY_NOTICE: Duration = Duration::from_secs(30 * 86_400);

/// Where a node's identity is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Path of the authority's certificate (PEM).
    pub authority: PathBuf,
    /// Path of the node's certificate (PEM).
    pub certificate: PathBuf,
    /// Its private key, PEM; nobody but its owner may read it.
    pub key: PathBuf,
}

impl Files {
    /// Returns where `aviary cluster init` puts a node's identity.
    pub fn in_data_dir(data_dir: &Path) -> Self {
        let at = |name| data_dir.join("tls").join(name);
        Self { authority: at("ca.pem"), certificate: at("node.pem"), key: at("node.key") }
    }

    fn changed(&self) -> [Option<SystemTime>; 3] {
        [&self.authority, &self.certificate, &self.key].map(|path| fs::metadata(path).and_then(|m| m.modified()).ok())
    }
}

/// TCP with mutual TLS. Clones share the identity.
#[derive(Clone)]
pub struct TlsNetwork(Arc<Inner>);

struct Inner {
    files: Files,
    node: NodeId,
    cluster: ClusterId,
    current: ArcSwap<Loaded>,
    looked: Mutex<(Instant, [Option<SystemTime>; 3])>,
}

/// An identity, ready to use.
struct Loaded {
    acceptor: TlsAcceptor,
    connector: TlsConnector,
    ends: SystemTime,
}

impl TlsNetwork {
    /// Reads the identity of `node` in `cluster`; an error when the files are somebody else's, can't be read, or are
    /// readable by others.
    pub fn new(files: Files, node: NodeId, cluster: ClusterId) -> anyhow::Result<Self> {
        let changed = files.changed();
        let loaded = load(&files, &node, cluster)?;
        notice_expiry(&files, loaded.ends);
        let looked = Mutex::new((Instant::now(), changed));
        Ok(Self(Arc::new(Inner { files, node, cluster, current: ArcSwap::from_pointee(loaded), looked })))
    }

    /// Reads the files now, whether or not they have changed, for the connections that begin from here on.
    pub fn reload(&self) {
        let mut looked = self.0.looked.lock().expect("nothing panics while it looks");
        *looked = (Instant::now(), self.0.files.changed());
        self.0.take_up();
    }

    /// Returns when the certificate in use ends.
    pub fn expires(&self) -> SystemTime {
        self.0.current().ends
    }
}

impl Inner {
    /// Returns the identity, read again when its files changed; a pair that doesn't fit leaves the old one in use.
    fn current(&self) -> Arc<Loaded> {
        let mut looked = self.looked.lock().expect("nothing panics while it looks");
        if looked.0.elapsed() >= LOOK_EVERY {
            looked.0 = Instant::now();
            let changed = self.files.changed();
            if changed != looked.1 {
                looked.1 = changed;
                self.take_up();
            }
        }
        self.current.load_full()
    }

    fn take_up(&self) {
        match load(&self.files, &self.node, self.cluster) {
            Ok(loaded) => {
                info!(certificate = %self.files.certificate.display(), "certificate taken up");
                notice_expiry(&self.files, loaded.ends);
                self.current.store(Arc::new(loaded));
            }
            Err(error) => warn!("the changed certificate can't be used, the old one stays in use: {error:#}"),
        }
    }

    async fn accept(&self, stream: TcpStream, address: String) -> io::Result<Connection> {
        let loaded = self.current();
        let stream = loaded.acceptor.accept(stream).await?;
        let peer = self.peer_of(stream.get_ref().1.peer_certificates())?;
        Ok(Connection { stream: Box::new(stream), peer: Some(peer), address })
    }

    async fn connect(&self, expected: &NodeId, stream: TcpStream, address: String) -> io::Result<Connection> {
        let loaded = self.current();
        let name = ServerName::try_from(ROLE_NAME).expect("the role is a DNS name");
        let stream = loaded.connector.connect(name, stream).await?;
        let peer = self.peer_of(stream.get_ref().1.peer_certificates())?;
        if peer != *expected {
            return Err(invalid(format!("its certificate names node {peer}, expected node {expected}")));
        }
        Ok(Connection { stream: Box::new(stream), peer: Some(peer), address })
    }

    /// Returns the node that a verified peer is; an error for another cluster's.
    fn peer_of(&self, certificates: Option<&[CertificateDer<'_>]>) -> io::Result<NodeId> {
        let certificate =
            certificates.and_then(<[_]>::first).ok_or_else(|| invalid("it sent no certificate".into()))?;
        let (cluster, node) = identity_of(certificate).map_err(|error| invalid(error.to_string()))?;
        match cluster == self.cluster {
            true => Ok(node),
            false => Err(invalid(format!("its certificate names cluster {cluster}, expected {}", self.cluster))),
        }
    }
}

fn invalid(why: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

impl Network for TlsNetwork {
    fn connect<'a>(&'a self, peer: &'a NodeId, address: &'a str) -> Later<'a, io::Result<Connection>> {
        Box::pin(async move {
            let stream = prepare(TcpStream::connect(address).await?)?;
            self.0.connect(peer, stream, address.into()).await
        })
    }

    fn listen<'a>(&'a self, address: &'a str) -> Later<'a, io::Result<Box<dyn Listener>>> {
        Box::pin(async move {
            let listener = super::listen::listen("control", address).await?;
            Ok(Box::new(TlsListener { listener, inner: self.0.clone() }) as Box<dyn Listener>)
        })
    }
}

struct TlsListener {
    listener: TcpListener,
    inner: Arc<Inner>,
}

impl Listener for TlsListener {
    fn accept(&mut self) -> Later<'_, io::Result<Later<'static, io::Result<Connection>>>> {
        Box::pin(async move {
            let (stream, address) = self.listener.accept().await?;
            let inner = self.inner.clone();
            let handshake = async move { inner.accept(prepare(stream)?, address.to_string()).await };
            Ok(Box::pin(handshake) as Later<'static, io::Result<Connection>>)
        })
    }

    fn address(&self) -> io::Result<String> {
        Ok(self.listener.local_addr()?.to_string())
    }
}

fn identity_uri(cluster: ClusterId, node: &NodeId) -> String {
    format!("aviary://{cluster}/{node}")
}

/// Returns the cluster and the node that a certificate names.
fn identity_of(certificate: &[u8]) -> anyhow::Result<(ClusterId, NodeId)> {
    let (_, parsed) = X509Certificate::from_der(certificate)?;
    let names = parsed.subject_alternative_name()?.context("the certificate names nobody")?;
    let uris = names.value.general_names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix("aviary://")?.split_once('/'),
        _ => None,
    });
    let found: Vec<_> = uris.collect();
    let [(cluster, node)] = found[..] else {
        bail!("the certificate has {} names of the form aviary://CLUSTER/NODE, expected one", found.len());
    };
    Ok((cluster.parse()?, NodeId::new(node)?))
}

fn load(files: &Files, node: &NodeId, cluster: ClusterId) -> anyhow::Result<Loaded> {
    let read = |path: &Path| -> anyhow::Result<Vec<CertificateDer<'static>>> {
        let certificates = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        let certificates = certificates.with_context(|| missing_hint(path))?;
        ensure!(!certificates.is_empty(), "{}: contains no certificate, expected PEM", path.display());
        Ok(certificates)
    };
    let (authorities, chain) = (read(&files.authority)?, read(&files.certificate)?);
    check_private(&files.key)?;
    let key = PrivateKeyDer::from_pem_file(&files.key).with_context(|| files.key.display().to_string())?;
    let path = files.certificate.display();
    let (found_cluster, found) = identity_of(&chain[0]).with_context(|| path.to_string())?;
    ensure!(found_cluster == cluster, "{path}: names cluster {found_cluster}, expected {cluster}");
    ensure!(found == *node, "{path}: names node {found}, expected {node}");
    let ends = X509Certificate::from_der(&chain[0])?.1.validity().not_after.timestamp();
    let ends = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(ends).unwrap_or(0));
    ensure!(
        ends > wall(),
        "{path}: expired {}, expected a certificate that is valid now",
        humantime::format_rfc3339_seconds(ends)
    );

    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority).with_context(|| files.authority.display().to_string())?;
    }
    let roots = Arc::new(roots);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let only = &[&rustls::version::TLS13];
    let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
    // What no peer would accept is better said here, by name.
    let since = wall().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    clients
        .verify_client_cert(&chain[0], &chain[1..], UnixTime::since_unix_epoch(since))
        .with_context(|| format!("{path} is not valid under {}", files.authority.display()))?;
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(only)?
        .with_client_cert_verifier(clients)
        .with_single_cert(chain.clone(), key.clone_key())
        .with_context(|| format!("{path} and {}", files.key.display()))?;
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(only)?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)?;
    let (acceptor, connector) = (TlsAcceptor::from(Arc::new(server)), TlsConnector::from(Arc::new(client)));
    Ok(Loaded { acceptor, connector, ends })
}

fn missing_hint(path: &Path) -> String {
    let hint = match path.exists() {
        true => "is no certificate in PEM",
        false => "is missing: `aviary cluster init` makes it, `aviary cluster issue` makes it again",
    };
    format!("{} {hint}", path.display())
}

/// Returns the time by this machine's clock.
fn wall() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(BootClock.now().wall.0)
}

/// Refuses a secret's file that others than its owner may read.
pub fn check_private(path: &Path) -> anyhow::Result<()> {
    let metadata = fs::metadata(path).with_context(|| path.display().to_string())?;
    let (mode, owner, me) = (metadata.mode() & 0o777, metadata.uid(), rustix::process::geteuid().as_raw());
    let shown = path.display();
    ensure!(
        mode & 0o077 == 0,
        "{shown}: has mode {mode:04o}, expected 0600: others may read the secret in it; run chmod 600 {shown}"
    );
    ensure!(owner == me || me == 0, "{shown}: belongs to user {owner}, expected {me}, the user who runs this");
    Ok(())
}

fn notice_expiry(files: &Files, ends: SystemTime) {
    let left = ends.duration_since(wall()).unwrap_or_default();
    if left < EXPIRY_NOTICE {
        let (path, days) = (files.certificate.display(), left.as_secs() / 86_400);
        warn!(
            "{path} ends in {days} days: `aviary cluster issue` makes a new one, which is taken up without a restart"
        );
    }
}

#[cfg(test)]
mod tests;
