//! TLS towards clients: certificate and key of `proxy.tls_certificate` and `proxy.tls_key`, as PostgreSQL takes them.
//!
//! The files are looked at again at each handshake and read again when they have changed, so a renewed certificate needs no
//! restart. If the new ones can not be used, the old ones stay.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;
use std::{fs, io};

use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::config::ProxyConfig;

/// The protocol's name in ALPN, `PG_ALPN_PROTOCOL` in PostgreSQL's `libpq/pqcomm.h`.
pub const ALPN: &[u8] = b"postgresql";
/// A certificate that ends sooner is warned about.
const WARN_SECONDS: i64 = 14 * 24 * 3600;

#[derive(Debug, thiserror::Error)]
pub enum ClientTlsError {
    #[error("{what} {path} can not be read: {source}")]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("proxy.tls_certificate {path} holds no certificate in PEM form{why}")]
    NoCertificate { path: PathBuf, why: String },
    #[error(
        "proxy.tls_key {path} holds no private key in PEM form that can be read without a password ({why}); for a key with a \
         password type: openssl pkey -in {path} -out NEW_FILE"
    )]
    NoKey { path: PathBuf, why: String },
    #[error("proxy.tls_key {path} can be read by others than its owner (mode {mode:o}); type: chmod 600 {path}")]
    KeyMode { path: PathBuf, mode: u32 },
    #[error("the certificate {certificate} and the key {key} do not go together: {source}")]
    Pair { certificate: PathBuf, key: PathBuf, source: rustls::Error },
}

/// What shows that a file is another one than before.
type Stamp = (Option<SystemTime>, u64, u64);

struct Loaded {
    stamps: (Stamp, Stamp),
    acceptor: TlsAcceptor,
}

/// What the proxy shows to clients that ask for TLS.
pub struct ClientTls {
    certificate: PathBuf,
    key: PathBuf,
    loaded: Mutex<Loaded>,
}

impl std::fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClientTls").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

impl ClientTls {
    /// Reads the files that the configuration names; `None` if it names none.
    ///
    /// # Errors
    /// If they can not be used: the message says which, why and what to type.
    pub fn load(config: &ProxyConfig) -> Result<Option<Self>, ClientTlsError> {
        let (Some(certificate), Some(key)) = (&config.tls_certificate, &config.tls_key) else { return Ok(None) };
        let (certificate, key) = (certificate.clone(), key.clone());
        let loaded = Loaded { stamps: stamps(&certificate, &key), acceptor: acceptor(&certificate, &key)? };
        Ok(Some(Self { certificate, key, loaded: Mutex::new(loaded) }))
    }

    /// For the next handshake.
    pub fn acceptor(&self) -> TlsAcceptor {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let stamps = stamps(&self.certificate, &self.key);
        if stamps != loaded.stamps {
            match acceptor(&self.certificate, &self.key) {
                Ok(acceptor) => {
                    tracing::info!(certificate = %self.certificate.display(), "the clients' certificate was read again");
                    loaded.acceptor = acceptor;
                }
                // Certificate and key are often replaced one after the other: the next change is tried again.
                Err(error) => tracing::error!(%error, "the clients' certificate has changed; the old one stays in use"),
            }
            loaded.stamps = stamps;
        }
        loaded.acceptor.clone()
    }
}

fn stamps(certificate: &Path, key: &Path) -> (Stamp, Stamp) {
    let stamp = |path: &Path| fs::metadata(path).map_or((None, 0, 0), |m| (m.modified().ok(), m.len(), m.ino()));
    (stamp(certificate), stamp(key))
}

fn acceptor(certificate: &Path, key: &Path) -> Result<TlsAcceptor, ClientTlsError> {
    let chain = certificates(certificate)?;
    warn_of_end(certificate, chain.first());
    let private = private_key(key)?;
    let pair = |source| ClientTlsError::Pair { certificate: certificate.to_owned(), key: key.to_owned(), source };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(pair)?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(pair)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Arc::new(config).into())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ClientTlsError> {
    let none = |why| ClientTlsError::NoCertificate { path: path.to_owned(), why };
    let bytes = read("proxy.tls_certificate", path)?;
    let found = CertificateDer::pem_slice_iter(&bytes).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| none(format!(": {error}")))?;
    if found.is_empty() { Err(none(String::new())) } else { Ok(found) }
}

/// PostgreSQL's rule (`check_ssl_key_file_permissions` in `be-secure-common.c`): nobody but the owner, or
/// a group that may read if the owner is root.
fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, ClientTlsError> {
    let metadata = fs::metadata(path).map_err(|source| unreadable("proxy.tls_key", path, source))?;
    let forbidden = if metadata.uid() == 0 { 0o027 } else { 0o077 };
    if metadata.mode() & forbidden != 0 {
        return Err(ClientTlsError::KeyMode { path: path.to_owned(), mode: metadata.mode() & 0o777 });
    }
    PrivateKeyDer::from_pem_slice(&read("proxy.tls_key", path)?)
        .map_err(|error| ClientTlsError::NoKey { path: path.to_owned(), why: error.to_string() })
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, ClientTlsError> {
    fs::read(path).map_err(|source| unreadable(what, path, source))
}

fn unreadable(what: &'static str, path: &Path, source: io::Error) -> ClientTlsError {
    ClientTlsError::Io { what, path: path.to_owned(), source }
}

/// Clients that verify would refuse it from one moment to the next.
fn warn_of_end(path: &Path, certificate: Option<&CertificateDer<'_>>) {
    let Some((_, certificate)) = certificate.and_then(|der| X509Certificate::from_der(der).ok()) else { return };
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let left = certificate.validity().not_after.timestamp() - i64::try_from(now).unwrap_or(i64::MAX);
    if left < WARN_SECONDS {
        let until = certificate.validity().not_after.to_string();
        tracing::warn!(certificate = %path.display(), until, "the clients' certificate ends soon, or has ended");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::agent::certificates::Authority;
    use crate::config::Config;

    fn proxy(folder: &Path) -> ProxyConfig {
        let mut proxy = Config::parse(crate::config::tests::GOOD, Path::new("x.toml")).unwrap().proxy;
        proxy.tls_certificate = Some(folder.join("server.crt"));
        proxy.tls_key = Some(folder.join("server.key"));
        proxy
    }

    #[test]
    fn files_that_can_not_be_used_say_what_to_type() {
        let folder = tempfile::tempdir().unwrap();
        let proxy = proxy(folder.path());
        let message = || ClientTls::load(&proxy).expect_err("must be refused").to_string();
        assert!(message().contains("proxy.tls_certificate"), "{}", message());
        let authority = Authority::create("shop").unwrap();
        authority.issue_for_clients(&["localhost"]).unwrap().save(folder.path()).unwrap();
        assert!(ClientTls::load(&proxy).unwrap().is_some());
        let key = folder.path().join("server.key");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(message().ends_with(&format!("type: chmod 600 {}", key.display())), "{}", message());
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&key, "not a key").unwrap();
        assert!(message().contains("no private key"), "{}", message());
        // The key of another certificate.
        let other = tempfile::tempdir().unwrap();
        authority.issue_for_clients(&["localhost"]).unwrap().save(other.path()).unwrap();
        fs::copy(other.path().join("server.key"), &key).unwrap();
        assert!(message().contains("do not go together"), "{}", message());
    }

    #[test]
    fn a_renewed_certificate_is_read_and_a_broken_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create("shop").unwrap();
        authority.issue_for_clients(&["localhost"]).unwrap().save(folder.path()).unwrap();
        let tls = ClientTls::load(&proxy(folder.path())).unwrap().expect("configured");
        let first = tls.acceptor();
        assert!(Arc::ptr_eq(first.config(), tls.acceptor().config()));
        fs::write(folder.path().join("server.crt"), "half a file").unwrap();
        assert!(Arc::ptr_eq(first.config(), tls.acceptor().config()));
        authority.issue_for_clients(&["localhost", "example.org"]).unwrap().save(folder.path()).unwrap();
        assert!(!Arc::ptr_eq(first.config(), tls.acceptor().config()));
    }
}
