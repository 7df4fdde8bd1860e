//! Who this process is towards other hosts, and what it demands of them: TLS 1.3, both sides with certificates of the
//! cluster's own authority.
//!
//! The client checks that the server is the node it wants by its DNS name; the server reads the caller's name out of
//! the certificate, and the daemon compares it with HELLO.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::certificates::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, dns_name, parse_dns_name};

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} can not be read as PEM: {why}")]
    Pem { path: PathBuf, why: String },
    #[error("{path} can be read by others than its owner (mode {mode:o}); type: chmod 600 {path}")]
    KeyMode { path: PathBuf, mode: u32 },
    #[error("the certificate {path} does not fit its key or authority: {source}")]
    Config { path: PathBuf, source: rustls::Error },
    #[error("the certificate {path} has no name of the form NAME.CLUSTER.pgtandem")]
    NoName { path: PathBuf },
}

/// Certificate, key and authority of a node or of the proxy. Cheap to clone.
#[derive(Clone)]
pub struct Identity {
    name: Arc<str>,
    cluster: Arc<str>,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Identity {
    /// Loads `ca.pem`, `cert.pem` and `key.pem` (which must be private) from a `state_dir`.
    pub fn load(folder: &Path) -> Result<Identity, TlsError> {
        let certificate_path = folder.join(CERTIFICATE_FILE);
        let chain = certificates(&certificate_path)?;
        let (name, cluster) =
            chain.first().and_then(peer_name).ok_or_else(|| TlsError::NoName { path: certificate_path.clone() })?;
        let key = private_key(&folder.join(KEY_FILE))?;
        let refuse = |source| TlsError::Config { path: certificate_path.clone(), source };
        let mut roots = RootCertStore::empty();
        for root in certificates(&folder.join(CA_FILE))? {
            roots.add(root).map_err(refuse)?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let versions = [&rustls::version::TLS13];
        let client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&versions)
            .map_err(refuse)?
            .with_root_certificates(roots.clone())
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(refuse)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(|error| refuse(rustls::Error::General(error.to_string())))?;
        let server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&versions)
            .map_err(refuse)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(refuse)?;
        Ok(Identity { name: name.into(), cluster: cluster.into(), client: Arc::new(client), server: Arc::new(server) })
    }

    /// The node's name, or `proxy`, as the certificate says.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    #[must_use]
    pub fn connector(&self) -> tokio_rustls::TlsConnector {
        self.client.clone().into()
    }

    #[must_use]
    pub fn acceptor(&self) -> tokio_rustls::TlsAcceptor {
        self.server.clone().into()
    }

    /// The name that the certificate of `node` in our cluster must have; None if it can be no name.
    #[must_use]
    pub fn server_name(&self, node: &str) -> Option<ServerName<'static>> {
        ServerName::try_from(dns_name(node, &self.cluster)).ok()
    }
}

/// Name and cluster out of a certificate: its only DNS name.
#[must_use]
pub fn peer_name(certificate: &CertificateDer<'_>) -> Option<(String, String)> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let names = certificate.subject_alternative_name().ok()??;
    match names.value.general_names.as_slice() {
        [GeneralName::DNSName(dns)] => parse_dns_name(dns).map(|(name, cluster)| (name.to_owned(), cluster.to_owned())),
        _ => None,
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let pem = |why: String| TlsError::Pem { path: path.to_owned(), why };
    let bytes = read(path)?;
    let found = CertificateDer::pem_slice_iter(&bytes)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| pem(error.to_string()))?;
    if found.is_empty() {
        return Err(pem("no certificate in it".to_owned()));
    }
    Ok(found)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    use std::os::unix::fs::PermissionsExt;
    let mode =
        fs::metadata(path).map_err(|source| TlsError::Io { path: path.to_owned(), source })?.permissions().mode();
    if mode & 0o077 != 0 {
        return Err(TlsError::KeyMode { path: path.to_owned(), mode: mode & 0o777 });
    }
    PrivateKeyDer::from_pem_slice(&read(path)?)
        .map_err(|error| TlsError::Pem { path: path.to_owned(), why: error.to_string() })
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Io { path: path.to_owned(), source })
}
