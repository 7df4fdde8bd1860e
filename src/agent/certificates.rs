//! The cluster's own small certificate authority: makes it, and issues a certificate per node and for the proxy.
//!
//! Each certificate has one DNS name, `<name>.<cluster>.pgtandem`; `name` is a node's name or [`PROXY`]. Nothing is
//! read from the network here, and no certificate is checked: that is `tls`.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
};

/// Name in the proxy's certificate.
pub const PROXY: &str = "proxy";
pub const CA_FILE: &str = "ca.pem";
pub const CA_KEY_FILE: &str = "ca.key";
pub const CERTIFICATE_FILE: &str = "cert.pem";
pub const KEY_FILE: &str = "key.pem";
/// What clients of the proxy see, with PostgreSQL's own names.
pub const CLIENTS_CERTIFICATE_FILE: &str = "server.crt";
pub const CLIENTS_KEY_FILE: &str = "server.key";
/// Longest name of a node or cluster, bytes: together they fit into DNS labels.
pub const NAME_BYTES_MAX: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("a certificate could not be made: {0}")]
    Make(#[from] rcgen::Error),
    #[error("{0:?} can not be a name in a certificate: letters, digits, '_' and '-', at most {NAME_BYTES_MAX}")]
    Name(String),
}

/// The DNS name of a node, or of the proxy, in its certificate.
#[must_use]
pub fn dns_name(name: &str, cluster: &str) -> String {
    format!("{name}.{cluster}.pgtandem")
}

/// Name and cluster from a DNS name in a certificate; None if it is none of ours.
#[must_use]
pub fn parse_dns_name(dns: &str) -> Option<(&str, &str)> {
    let (name, rest) = dns.split_once('.')?;
    let cluster = rest.strip_suffix(".pgtandem")?;
    (is_name(name) && is_name(cluster)).then_some((name, cluster))
}

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-')
}

/// The authority with its key. Whoever has it can make a node of the cluster.
pub struct Authority {
    cluster: String,
    key: KeyPair,
    pem: String,
}

impl Authority {
    /// A new one, in memory only.
    pub fn create(cluster: &str) -> Result<Authority, CertificateError> {
        let key = KeyPair::generate()?;
        let pem = authority_params(cluster)?.self_signed(&key)?.pem();
        Ok(Authority { cluster: cluster.to_owned(), key, pem })
    }

    /// Writes `ca.pem` and `ca.key` (0600).
    pub fn save(&self, folder: &Path) -> Result<(), CertificateError> {
        write_file(&folder.join(CA_FILE), self.pem.as_bytes(), 0o644)?;
        write_file(&folder.join(CA_KEY_FILE), self.key.serialize_pem().as_bytes(), 0o600)
    }

    /// What [`Authority::save`] wrote.
    pub fn load(folder: &Path, cluster: &str) -> Result<Authority, CertificateError> {
        let read = |file: &str| {
            let path = folder.join(file);
            fs::read_to_string(&path).map_err(|source| CertificateError::Io { path, source })
        };
        Ok(Authority { cluster: cluster.to_owned(), key: KeyPair::from_pem(&read(CA_KEY_FILE)?)?, pem: read(CA_FILE)? })
    }

    /// A certificate and key for a node, or for [`PROXY`].
    pub fn issue(&self, name: &str) -> Result<IdentityFiles, CertificateError> {
        if !is_name(name) {
            return Err(CertificateError::Name(name.to_owned()));
        }
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(vec![dns_name(name, &self.cluster)])?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Every agent is a client of the others, too.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::new(authority_params(&self.cluster)?, &self.key);
        let certificate = params.signed_by(&key, &issuer)?;
        Ok(IdentityFiles { ca_pem: self.pem.clone(), certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }

    /// A certificate and key to show to clients of the proxy, for these names and addresses. It is no identity within the
    /// cluster: it has no name of that form and can not be a TLS client's.
    pub fn issue_for_clients(&self, names: &[&str]) -> Result<ClientsFiles, CertificateError> {
        let key = KeyPair::generate()?;
        let names = names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, format!("pgtandem {} proxy", self.cluster));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &Issuer::new(authority_params(&self.cluster)?, &self.key))?;
        Ok(ClientsFiles { certificate_pem: certificate.pem(), key_pem: key.serialize_pem() })
    }
}

/// The same each time, so that the issuer's name and key identifier need not be read out of `ca.pem`.
fn authority_params(cluster: &str) -> Result<CertificateParams, CertificateError> {
    if !is_name(cluster) {
        return Err(CertificateError::Name(cluster.to_owned()));
    }
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, format!("pgtandem {cluster}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// What a node or the proxy keeps in its `state_dir`.
pub struct IdentityFiles {
    pub ca_pem: String,
    pub certificate_pem: String,
    pub key_pem: String,
}

impl IdentityFiles {
    /// Writes `ca.pem`, `cert.pem` and `key.pem` (0600). Owned by the caller's user.
    pub fn save(&self, folder: &Path) -> Result<(), CertificateError> {
        write_file(&folder.join(CA_FILE), self.ca_pem.as_bytes(), 0o644)?;
        write_file(&folder.join(CERTIFICATE_FILE), self.certificate_pem.as_bytes(), 0o644)?;
        write_file(&folder.join(KEY_FILE), self.key_pem.as_bytes(), 0o600)
    }
}

/// What the proxy shows to clients.
pub struct ClientsFiles {
    pub certificate_pem: String,
    pub key_pem: String,
}

impl ClientsFiles {
    /// Writes `server.crt` and `server.key` (0600).
    pub fn save(&self, folder: &Path) -> Result<(), CertificateError> {
        write_file(&folder.join(CLIENTS_CERTIFICATE_FILE), self.certificate_pem.as_bytes(), 0o644)?;
        write_file(&folder.join(CLIENTS_KEY_FILE), self.key_pem.as_bytes(), 0o600)
    }
}

fn write_file(path: &Path, bytes: &[u8], mode: u32) -> Result<(), CertificateError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
        // An existing file keeps its mode otherwise; before the content goes in.
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|source| CertificateError::Io { path: path.to_owned(), source })
}
