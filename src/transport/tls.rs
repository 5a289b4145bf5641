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

use super::certificate::Certificate;

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
pub enum MinVersion {
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
    pub clients: Option<(PathBuf, ClientAuth)>,
    /// The oldest version that is spoken.
    pub min_version: MinVersion,
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
    Wrong {
        /// The file.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// The files' bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct Material {
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
    client_ca: Option<Vec<u8>>,
}

impl std::fmt::Debug for Material {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Material")
    }
}

impl TlsFiles {
    /// Reads the files.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn read(&self) -> Result<Material, TlsError> {
        let read = |path: &PathBuf| {
            let path_shown = || path.display().to_string();
            std::fs::read(path).map_err(|source| TlsError::Unreadable { path: path_shown(), source })
        };
        Ok(Material {
            certificate: read(&self.certificate)?,
            key: Zeroizing::new(read(&self.key)?),
            client_ca: self.clients.as_ref().map(|(path, _)| read(path)).transpose()?,
        })
    }

    fn wrong(path: &std::path::Path, problem: impl std::fmt::Display) -> TlsError {
        TlsError::Wrong { path: path.display().to_string(), problem: problem.to_string() }
    }

    /// The certificates of a file, at least one.
    fn chain(path: &std::path::Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
        let chain = read.map_err(|error| TlsFiles::wrong(path, format!("is no PEM: {error}")))?;
        if chain.is_empty() {
            return Err(TlsFiles::wrong(path, "holds no certificate in PEM (-----BEGIN CERTIFICATE-----)"));
        }
        Ok(chain)
    }

    fn verifier(
        &self,
        material: &Material,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
        let (Some((path, auth)), Some(pem)) = (&self.clients, &material.client_ca) else {
            return Ok(WebPkiClientVerifier::no_client_auth());
        };
        let mut roots = RootCertStore::empty();
        for authority in TlsFiles::chain(path, pem)? {
            roots.add(authority).map_err(|error| TlsFiles::wrong(path, error))?;
        }
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
        let builder = match auth {
            ClientAuth::Optional => builder.allow_unauthenticated(),
            ClientAuth::Required => builder,
        };
        builder.build().map_err(|error| TlsFiles::wrong(path, error))
    }

    fn load(&self, material: &Material, protocol: &[u8]) -> Result<Loaded, TlsError> {
        let provider = Arc::new(ring::default_provider());
        let versions = match self.min_version {
            MinVersion::V12 => &[&TLS13, &TLS12][..],
            MinVersion::V13 => &[&TLS13],
        };
        let chain = TlsFiles::chain(&self.certificate, &material.certificate)?;
        let own = Certificate::read(&chain[0]).map_err(|error| TlsFiles::wrong(&self.certificate, error))?;
        let key = PrivateKeyDer::from_pem_slice(&material.key)
            .map_err(|error| TlsFiles::wrong(&self.key, format!("holds no private key in PEM: {error}")))?;
        let verifier = self.verifier(material, &provider)?;
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(|error| TlsFiles::wrong(&self.certificate, error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|error| TlsFiles::wrong(&self.key, format!("does not fit the certificate: {error}")))?;
        config.alpn_protocols = vec![protocol.to_owned()];
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Loaded { acceptor: TlsAcceptor::from(Arc::new(config)), expires: own.ends })
    }
}

/// Whether files can be read and fit together.
///
/// # Errors
/// When they cannot be served with; the error says which file, and why.
pub fn check(files: &TlsFiles) -> Result<(), TlsError> {
    files.load(&files.read()?, b"h2").map(drop)
}

/// Whether a file's bytes are certificates of authorities, in PEM.
///
/// # Errors
/// When they are not; the error says why.
pub fn check_authorities(path: &std::path::Path, pem: &[u8]) -> Result<(), TlsError> {
    let mut roots = RootCertStore::empty();
    TlsFiles::chain(path, pem)?
        .into_iter()
        .try_for_each(|authority| roots.add(authority).map_err(|error| TlsFiles::wrong(path, error)))
}

struct Loaded {
    acceptor: TlsAcceptor,
    expires: i64,
}

/// The TLS of one listener.
pub struct Tls {
    files: TlsFiles,
    protocol: &'static [u8],
    now: ArcSwap<Loaded>,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

impl Tls {
    /// Reads the files for the first time. `protocol` is what is spoken, as ALPN names it.
    ///
    /// # Errors
    /// When a file cannot be read, or they do not fit together.
    pub fn open(files: TlsFiles, protocol: &'static [u8]) -> Result<(Arc<Tls>, Material), TlsError> {
        let material = files.read()?;
        let now = ArcSwap::from_pointee(files.load(&material, protocol)?);
        Ok((Arc::new(Tls { files, protocol, now }), material))
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
    pub fn renew(&self, material: &Material) -> Result<(), TlsError> {
        self.now.store(Arc::new(self.files.load(material, self.protocol)?));
        Ok(())
    }

    /// Until when the certificate is valid, in seconds since 1970.
    #[must_use]
    pub fn expires(&self) -> i64 {
        self.now.load().expires
    }

    /// Agrees on TLS with a client.
    ///
    /// # Errors
    /// When that fails; the client was told why.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        let acceptor = self.now.load().acceptor.clone();
        acceptor.accept(stream).await
    }
}

/// The client's certificate, if it showed one that is believed.
#[must_use]
pub fn shown(stream: &TlsStream<TcpStream>) -> Option<Certificate> {
    let der = stream.get_ref().1.peer_certificates()?.first()?;
    match Certificate::read(der) {
        Ok(certificate) => Some(certificate),
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "a client's certificate proves no identity");
            None
        }
    }
}
