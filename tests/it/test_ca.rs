//! Certificates for tests: an authority that signs what it is asked to, as files and for clients.

use std::{path::Path, sync::Arc};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use tokio_rustls::rustls::{
    ClientConfig, RootCertStore,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    version::{TLS12, TLS13},
};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};

/// Signs certificates.
pub(crate) struct TestCa {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key, in PEM.
#[derive(Clone)]
pub(crate) struct PemCertificate {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl TestCa {
    pub(crate) fn new(name: &str) -> TestCa {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        TestCa { pem, issuer: Issuer::new(params, key) }
    }

    fn sign(&self, params: &CertificateParams) -> PemCertificate {
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap().pem();
        PemCertificate { certificate, key: key.serialize_pem() }
    }

    /// For a server on this machine, valid until the first of January of `year`.
    pub(crate) fn issue_server_certificate(&self, year: i32) -> PemCertificate {
        let names = ["localhost", "127.0.0.1", "keyward.internal"];
        let mut params = CertificateParams::new(names.map(str::to_owned)).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        self.sign(&params)
    }

    /// For a client by a URI.
    pub(crate) fn issue_client_certificate(&self, uri: &str) -> PemCertificate {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        self.sign(&params)
    }

    /// What a client needs to believe it.
    pub(crate) fn trusting_client_config(&self) -> ClientTlsConfig {
        ClientTlsConfig::new().ca_certificate(Certificate::from_pem(&self.pem)).domain_name("localhost")
    }

    /// The same for rustls itself, with one version of TLS.
    pub(crate) fn trusting_rustls_config(&self, tls12: bool) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap()).unwrap();
        let version = if tls12 { &TLS12 } else { &TLS13 };
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        Arc::new(config)
    }
}

impl PemCertificate {
    /// Puts both where a server reads them, each whole at once.
    pub(crate) fn write_files(&self, certificate: &Path, key: &Path) {
        replace_file(certificate, &self.certificate);
        replace_file(key, &self.key);
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity::from_pem(&self.certificate, &self.key)
    }

    /// The certificate as it is sent.
    pub(crate) fn der(&self) -> CertificateDer<'static> {
        assert!(PrivateKeyDer::from_pem_slice(self.key.as_bytes()).is_ok());
        CertificateDer::from_pem_slice(self.certificate.as_bytes()).unwrap()
    }
}

/// Writes a file that readers see whole or not at all.
pub(crate) fn replace_file(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}
