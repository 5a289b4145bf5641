//! Terminates TLS with rustls and reloads certificates when their files change. An open connection keeps its
//! configuration. An invalid file changes nothing and is logged.
//!
//! Sessions are not resumed: connections are long-lived, and a session would outlive the trust in its client's
//! certificate.

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

/// Whether clients must present a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientAuth {
    /// A certificate is verified if the client presents one.
    Optional,
    /// The handshake fails without a certificate.
    Required,
}

/// The oldest accepted version of TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MinTlsVersion {
    /// TLS 1.2 or newer.
    V12,
    /// TLS 1.3 only.
    V13,
}

/// The files and options of a listener's TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The certificate chain in PEM, the server's certificate first.
    pub certificate: PathBuf,
    /// The private key in PEM.
    pub key: PathBuf,
    /// The authorities for client certificates in PEM, and whether a certificate is required. None = none is requested.
    pub client_ca: Option<(PathBuf, ClientAuth)>,
    /// The oldest accepted version of TLS.
    pub min_version: MinTlsVersion,
}

/// Why TLS cannot be configured, with the file.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{path} cannot be read: {source}")]
    Unreadable {
        /// The path of the file.
        path: String,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The contents of a file are invalid.
    #[error("{path} {problem}")]
    Invalid {
        /// The path of the file.
        path: String,
        /// The problem, as the end of a sentence that begins with the path.
        problem: String,
    },
}

/// The contents of the files.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct TlsMaterial {
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
    /// If a file cannot be read.
    pub(crate) fn read(&self) -> Result<TlsMaterial, TlsError> {
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

/// Checks that the files are readable and fit together.
///
/// # Errors
/// If they cannot be used; the error names the file and the cause.
pub(crate) fn check_files(files: &TlsFiles) -> Result<(), TlsError> {
    files.build_acceptor(&files.read()?, b"h2").map(drop)
}

/// Checks that a file contains certificates of authorities in PEM.
///
/// # Errors
/// If it does not; the error names the cause.
pub(crate) fn check_authorities(path: &std::path::Path, pem: &[u8]) -> Result<(), TlsError> {
    let mut roots = RootCertStore::empty();
    TlsFiles::parse_certificates(path, pem)?
        .into_iter()
        .try_for_each(|authority| roots.add(authority).map_err(|error| TlsFiles::invalid_file(path, error)))
}

struct LoadedTls {
    acceptor: TlsAcceptor,
    expires_at: i64,
}

/// The current TLS configuration of one listener.
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
    /// Reads the files at start. `protocol` is the ALPN name of the protocol.
    ///
    /// # Errors
    /// If a file cannot be read, or the files do not fit together.
    pub(crate) fn load(
        files: TlsFiles,
        protocol: &'static [u8],
    ) -> Result<(Arc<ListenerTls>, TlsMaterial), TlsError> {
        let material = files.read()?;
        let now = ArcSwap::from_pointee(files.build_acceptor(&material, protocol)?);
        Ok((Arc::new(ListenerTls { files, alpn_protocol: protocol, current: now }), material))
    }

    /// The files that the configuration is read from.
    #[must_use]
    pub(crate) fn files(&self) -> &TlsFiles {
        &self.files
    }

    /// Reloads the files. Open connections keep their configuration.
    ///
    /// # Errors
    /// If they cannot be used; the old configuration stays in force.
    pub(crate) fn reload(&self, material: &TlsMaterial) -> Result<(), TlsError> {
        self.current.store(Arc::new(self.files.build_acceptor(material, self.alpn_protocol)?));
        Ok(())
    }

    /// When the certificate expires, in seconds since 1970.
    #[must_use]
    pub(crate) fn certificate_expiry(&self) -> i64 {
        self.current.load().expires_at
    }

    /// Performs the TLS handshake with a client.
    ///
    /// # Errors
    /// If the handshake fails; the client has received an alert.
    pub(crate) async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let acceptor = self.current.load().acceptor.clone();
        acceptor.accept(stream).await
    }
}

/// The client's verified certificate, if it presented one.
#[must_use]
pub(crate) fn client_certificate(stream: &TlsStream<TcpStream>) -> Option<CertificateInfo> {
    let der = stream.get_ref().1.peer_certificates()?.first()?;
    match CertificateInfo::from_der(der) {
        Ok(certificate) => Some(certificate),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "client certificate ignored: it cannot be parsed");
            None
        }
    }
}
