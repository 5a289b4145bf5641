//! Server TLS by rustls: certificates from files, read again when they change. A connection keeps what it was made
//! with; a file that is wrong changes nothing, and is told in the log.
//!
//! Sessions are not resumed: connections live long, and a session would outlive the trust in its client's certificate.

use std::{io, path::PathBuf, sync::Arc};

use arc_swap::ArcSwap;
use rustls::{
    RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::{NoServerSessionStorage, WebPkiClientVerifier, danger::ClientCertVerifier},
    version::{TLS12, TLS13},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use zeroize::Zeroizing;

use super::certificate::CertificateInfo;

/// Whether clients must show a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// They may.
    Optional,
    /// They must, or there is no connection.
    Required,
}

/// The oldest version that is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MinTlsVersion {
    /// TLS 1.2.
    V12,
    /// TLS 1.3.
    V13,
}

/// What TLS is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The chain in PEM, the server's own certificate first.
    pub certificate: PathBuf,
    /// Its key in PEM.
    pub key: PathBuf,
    /// The authorities in PEM whose client certificates are believed, and whether one must be shown. None = no client
    /// certificate is asked for.
    pub client_ca: Option<(PathBuf, ClientAuth)>,
    /// The oldest version that is spoken.
    pub min_version: MinTlsVersion,
}

/// Why TLS cannot be served: which file, and what is wrong.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{path} cannot be read: {source}")]
    Unreadable {
        /// The file.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path} {problem}")]
    Invalid {
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// The files' bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct TlsMaterial {
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Option<Vec<u8>>,
}

impl std::fmt::Debug for TlsMaterial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsMaterial")
    }
}

impl TlsFiles {
    /// Reads the files.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn read(&self) -> Result<TlsMaterial, TlsError> {
        let read = |path: &PathBuf| {
            let path_shown = || path.display().to_string();
            std::fs::read(path).map_err(|source| TlsError::Unreadable { path: path_shown(), source })
        };
        Ok(TlsMaterial {
            certificate: read(&self.certificate)?,
            key: Zeroizing::new(read(&self.key)?),
            client_ca: self.client_ca.as_ref().map(|(path, _)| read(path)).transpose()?,
        })
    }

    fn invalid_file(path: &std::path::Path, problem: impl std::fmt::Display) -> TlsError {
        TlsError::Invalid { path: path.display().to_string(), problem: problem.to_string() }
    }

    /// The certificates of a file, at least one.
    fn parse_certificates(
        path: &std::path::Path,
        pem: &[u8],
    ) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        let chain = read.map_err(|error| TlsFiles::invalid_file(path, format!("is no PEM: {error}")))?;
        if chain.is_empty() {
            return Err(TlsFiles::invalid_file(
                path,
                "holds no certificate in PEM (-----BEGIN CERTIFICATE-----)",
            ));
        }
        Ok(chain)
    }

    fn build_client_verifier(
        &self,
        material: &TlsMaterial,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let (Some((path, auth)), Some(pem)) = (&self.client_ca, &material.client_ca) else {
            return Ok(WebPkiClientVerifier::no_client_auth());
        };
        let mut roots = RootCertStore::empty();
        for authority in TlsFiles::parse_certificates(path, pem)? {
            roots.add(authority).map_err(|error| TlsFiles::invalid_file(path, error))?;
        }
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
        let builder = match auth {
            ClientAuth::Optional => builder.allow_unauthenticated(),
            ClientAuth::Required => builder,
        };
        builder.build().map_err(|error| TlsFiles::invalid_file(path, error))
    }

    fn build_acceptor(&self, material: &TlsMaterial, protocol: &[u8]) -> Result<LoadedTls, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let versions = match self.min_version {
            MinTlsVersion::V12 => &[&TLS13, &TLS12][..],
            MinTlsVersion::V13 => &[&TLS13],
        };
        let chain = TlsFiles::parse_certificates(&self.certificate, &material.certificate)?;
        let own = CertificateInfo::from_der(&chain[0])
            .map_err(|error| TlsFiles::invalid_file(&self.certificate, error))?;
        let key = PrivateKeyDer::from_pem_slice(&material.key).map_err(|error| {
            TlsFiles::invalid_file(&self.key, format!("holds no private key in PEM: {error}"))
        })?;
        let verifier = self.build_client_verifier(material, &provider)?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(|error| TlsFiles::invalid_file(&self.certificate, error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| {
                TlsFiles::invalid_file(&self.key, format!("does not fit the certificate: {error}"))
            })?;
        config.alpn_protocols = vec![protocol.to_owned()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(LoadedTls { acceptor: TlsAcceptor::from(Arc::new(config)), expires_at: own.expires_at })
    }
}

/// Whether files can be read and fit together.
///
/// # Errors
/// When they cannot be served with; the error says which file, and why.
pub fn check_files(files: &TlsFiles) -> Result<(), TlsError> {
    files.build_acceptor(&files.read()?, b"h2").map(drop)
}

/// Whether a file's bytes are certificates of authorities, in PEM.
///
/// # Errors
/// When they are not; the error says why.
pub fn check_authorities(path: &std::path::Path, pem: &[u8]) -> Result<(), TlsError> {
    let mut roots = RootCertStore::empty();
    TlsFiles::parse_certificates(path, pem)?
        .into_iter()
        .try_for_each(|authority| roots.add(authority).map_err(|error| TlsFiles::invalid_file(path, error)))
}

struct LoadedTls {
    acceptor: TlsAcceptor,
    expires_at: i64,
}

/// The TLS of one listener.
pub struct ListenerTls {
    files: TlsFiles,
    alpn_protocol: &'static [u8],
    current: ArcSwap<LoadedTls>,
}

impl std::fmt::Debug for ListenerTls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ListenerTls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl ListenerTls {
    /// Reads the files for the first time. `protocol` is what is spoken, as ALPN names it.
    ///
    /// # Errors
    /// When a file cannot be read, or they do not fit together.
    pub fn load(
        files: TlsFiles,
        protocol: &'static [u8],
    ) -> Result<(Arc<ListenerTls>, TlsMaterial), TlsError> {
        let material = files.read()?;
        let now = ArcSwap::from_pointee(files.build_acceptor(&material, protocol)?);
        Ok((Arc::new(ListenerTls { files, alpn_protocol: protocol, current: now }), material))
    }

    /// What the files are.
    #[must_use]
    pub fn files(&self) -> &TlsFiles {
        &self.files
    }

    /// Takes the files as they are now. Connections that are open keep what they were made with.
    ///
    /// # Errors
    /// When they cannot be used; then the ones before stay in force.
    pub fn reload(&self, material: &TlsMaterial) -> Result<(), TlsError> {
        self.current.store(Arc::new(self.files.build_acceptor(material, self.alpn_protocol)?));
        Ok(())
    }

    /// Until when the certificate is valid, in seconds since 1970.
    #[must_use]
    pub fn certificate_expiry(&self) -> i64 {
        self.current.load().expires_at
    }

    /// Agrees on TLS with a client.
    ///
    /// # Errors
    /// When that fails; the client was told why.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let acceptor = self.current.load().acceptor.clone();
        acceptor.accept(stream).await
    }
}

/// The client's certificate, if it showed one that is believed.
#[must_use]
pub fn client_certificate(stream: &TlsStream<TcpStream>) -> Option<CertificateInfo> {
    let der = stream.get_ref().1.peer_certificates()?.first()?;
    match CertificateInfo::from_der(der) {
        Ok(certificate) => Some(certificate),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "a client's certificate proves no identity");
            None
        }
    }
}
