//! The cluster's own certificate authority: made once, kept off the nodes, it says who is which node.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::OffsetDateTime;

use super::{ROLE_NAME, identity_uri};
use crate::domain::ids::{ClusterId, NodeId};

/// How long the authority's own certificate is good for.
const AUTHORITY_VALID: Duration = Duration::from_secs(20 * 365 * 86_400);
/// Clocks of nodes may be behind by this much.
const CLOCK_SLACK: time::Duration = time::Duration::hours(1);

/// An authority with its key.
pub struct Authority {
    cluster: ClusterId,
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

/// Certificate, key and authority of a node, as PEM.
pub struct Issued {
    /// Certificate of the authority, PEM.
    pub authority: String,
    /// Certificate of the node, PEM.
    pub certificate: String,
    /// Private key of the node, PEM.
    pub key: String,
}

impl Authority {
    /// Makes the authority of a new cluster and writes it to `dir`, which must not hold one; its key readable by its
    /// owner alone.
    pub fn create(dir: &Path, cluster: ClusterId) -> anyhow::Result<Self> {
        let (certificate_file, key_file, cluster_file) = files(dir);
        for file in [&certificate_file, &key_file, &cluster_file] {
            anyhow::ensure!(!file.exists(), "{} exists, expected no authority there yet", file.display());
        }
        fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = named(&format!("aviary cluster {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        (params.not_before, params.not_after) = validity(AUTHORITY_VALID);
        let certificate = params.self_signed(&key)?.pem();
        write_new(&key_file, &key.serialize_pem(), 0o600)?;
        write_new(&certificate_file, &certificate, 0o644)?;
        write_new(&cluster_file, &format!("{cluster}\n"), 0o644)?;
        Ok(Self { cluster, certificate, issuer: Issuer::new(params, key) })
    }

    /// Reads the authority that `create` wrote to this directory.
    pub fn load(dir: &Path) -> anyhow::Result<Self> {
        let (certificate_file, key_file, cluster_file) = files(dir);
        let read = |file: &PathBuf| fs::read_to_string(file).with_context(|| file.display().to_string());
        super::check_private(&key_file)?;
        let (certificate, cluster) = (read(&certificate_file)?, read(&cluster_file)?);
        let cluster = cluster.trim().parse().with_context(|| cluster_file.display().to_string())?;
        let key = KeyPair::from_pem(&read(&key_file)?).with_context(|| key_file.display().to_string())?;
        let issuer =
            Issuer::from_ca_cert_pem(&certificate, key).with_context(|| certificate_file.display().to_string());
        Ok(Self { cluster, issuer: issuer?, certificate })
    }

    /// Returns the cluster it speaks for.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Makes a node's identity, good from now on for `valid`.
    pub fn issue(&self, node: &NodeId, valid: Duration) -> anyhow::Result<Issued> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![ROLE_NAME.to_string()])?;
        params.subject_alt_names.push(SanType::URI(identity_uri(self.cluster, node).try_into()?));
        params.distinguished_name = named(&format!("aviary node {node}"));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        (params.not_before, params.not_after) = validity(valid);
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued { authority: self.certificate.clone(), certificate, key: key.serialize_pem() })
    }
}

impl Issued {
    /// Puts the identity in place, each file whole; a node that runs takes it up by itself.
    pub fn install(&self, files: &super::Files) -> anyhow::Result<()> {
        for (path, text, mode) in [
            (&files.key, &self.key, 0o600),
            (&files.authority, &self.authority, 0o644),
            (&files.certificate, &self.certificate, 0o644),
        ] {
            if let Some(dir) = path.parent() {
                fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
            }
            let draft = path.with_extension("new");
            match fs::remove_file(&draft) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| draft.display().to_string());
                }
                _ => {}
            }
            write_new(&draft, text, mode)?;
            fs::rename(&draft, path).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

fn files(dir: &Path) -> (PathBuf, PathBuf, PathBuf) {
    (dir.join("ca.pem"), dir.join("ca.key"), dir.join("cluster"))
}

fn named(name: &str) -> DistinguishedName {
    let mut found = DistinguishedName::new();
    found.push(DnType::CommonName, name);
    found
}

fn validity(valid: Duration) -> (OffsetDateTime, OffsetDateTime) {
    let now = OffsetDateTime::now_utc();
    (now - CLOCK_SLACK, now + valid)
}

fn write_new(path: &Path, text: &str, mode: u32) -> anyhow::Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()));
    written.with_context(|| path.display().to_string())
}
