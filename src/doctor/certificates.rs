//! Checks the validity periods of the certificates that the settings name and that servers present.
//!
//! Whether clients trust them is not checked. The connection that presents one carries only a health check.

use std::{path::Path, sync::Arc, time::Duration};

use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};
use x509_cert::{Certificate, der::Decode as _};

use crate::{
    clock::Clock,
    config::{file::ConfigFile, schema},
    domain::time::Timestamp,
};

use super::report::{CHECK_TIMEOUT, DoctorReport};

const TOPIC: &str = "tls";
const DAY: Duration = Duration::from_secs(86_400);
/// The remaining validity below which a certificate should be renewed.
const EXPIRY_WARNING_PERIOD: Duration = Duration::from_secs(21 * 86_400);

/// Checks every certificate file that the settings name.
pub(super) fn check_certificate_files(
    config_file: Option<&ConfigFile>,
    clock: &dyn Clock,
    findings: &mut DoctorReport,
) {
    let named = config_file.map(certificate_files).unwrap_or_default();
    if named.is_empty() {
        findings.skip(TOPIC, "certificate files: the configuration names none");
    }
    for (key, path) in named {
        let shown = format!("{key} ({path})");
        let read =
            CertificateDer::pem_file_iter(Path::new(&path)).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        match read {
            Ok(chain) if !chain.is_empty() => check_certificate_chain(&shown, &chain, clock, findings),
            Ok(_) => findings.fail(
                TOPIC,
                format!("{shown} holds no certificate"),
                "it must hold PEM blocks, the server's own certificate first",
            ),
            Err(error) => findings.fail(
                TOPIC,
                format!("{shown} cannot be read: {error}"),
                "name a PEM file that the server may read",
            ),
        }
    }
}

/// The certificate files that the settings name: the key and the path of each.
fn certificate_files(config_file: &ConfigFile) -> Vec<(String, String)> {
    let holds = |path: &str| {
        let name = path.rsplit('.').next().unwrap_or_default();
        matches!(name, "certificate" | "client_ca" | "ca" | "ca_file" | "certificate_file")
    };
    let keys = schema::all_keys().filter(|key| holds(&key.path));
    keys.flat_map(|key| config_file.strings(&key.path).into_iter().map(|path| (key.path.clone(), path)))
        .collect()
}

/// Checks a chain, the owner's certificate first; `owner` is its file or server.
pub(super) fn check_certificate_chain(
    owner: &str,
    chain: &[CertificateDer<'_>],
    clock: &dyn Clock,
    findings: &mut DoctorReport,
) {
    let ends: Option<Vec<_>> = chain.iter().map(|certificate| validity_period(certificate)).collect();
    match ends.and_then(|ends| ends.into_iter().reduce(|one, other| (one.0.max(other.0), one.1.min(other.1))))
    {
        Some((from, until)) => check_validity_period(owner, from, until, clock.now(), findings),
        None => findings.fail(TOPIC, format!("{owner}: its certificate cannot be parsed"), "replace it"),
    }
}

fn check_validity_period(
    owner: &str,
    from: Timestamp,
    until: Timestamp,
    now: Timestamp,
    findings: &mut DoctorReport,
) {
    let days = until.saturating_duration_since(now).as_secs() / DAY.as_secs();
    if until <= now {
        let days = now.saturating_duration_since(until).as_secs() / DAY.as_secs();
        findings.fail(
            TOPIC,
            format!("{owner} has expired, {days} days ago"),
            "replace it; servers reload their files",
        );
    } else if from > now {
        findings.fail(
            TOPIC,
            format!("{owner} is not valid yet"),
            "check the clocks, and the certificate's issuer",
        );
    } else if until.saturating_duration_since(now) < EXPIRY_WARNING_PERIOD {
        findings.warn(
            TOPIC,
            format!("{owner} expires in {days} days"),
            "renew it; servers reload their files",
        );
    } else {
        findings.pass(TOPIC, format!("{owner} is valid for {days} more days"));
    }
}

/// The beginning and the end of a certificate's validity.
fn validity_period(der: &CertificateDer<'_>) -> Option<(Timestamp, Timestamp)> {
    let certificate = Certificate::from_der(der).ok()?;
    let validity = certificate.tbs_certificate().validity();
    let at = |time: Duration| Timestamp::from_micros(0).saturating_add(time);
    Some((at(validity.not_before.to_unix_duration()), at(validity.not_after.to_unix_duration())))
}

/// Performs a TLS handshake; returns the connection and the certificates that the server presented.
pub(super) async fn tls_handshake(
    connecting: impl Future<Output = Result<TcpStream, String>>,
    host: &str,
) -> Result<(TlsStream<TcpStream>, Vec<CertificateDer<'static>>), String> {
    let stream = connecting.await?;
    let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
    let provider = Arc::new(ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AcceptAnyCertificate(provider)))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let handshake = TlsConnector::from(Arc::new(config)).connect(name, stream);
    let stream = tokio::time::timeout(CHECK_TIMEOUT, handshake)
        .await
        .map_err(|_| "no TLS handshake in time".to_owned())?;
    let stream = stream.map_err(|error| format!("TLS: {error}"))?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
    Ok((stream, chain))
}

/// Accepts any certificate, because it is inspected and not trusted. Signatures are still verified.
#[derive(Debug)]
struct AcceptAnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AcceptAnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Severity;

    #[test]
    fn a_certificate_is_judged_by_the_days_it_has_left() {
        let at = |days: u64| Timestamp::from_micros(0).saturating_add(DAY * u32::try_from(days).unwrap());
        for (from, until, level) in [
            (0, 200, Severity::Ok),
            (0, 120, Severity::Warning),
            (0, 100, Severity::Failure),
            (0, 90, Severity::Failure),
            (101, 300, Severity::Failure),
        ] {
            let mut findings = DoctorReport::default();
            check_validity_period("a.pem", at(from), at(until), at(100), &mut findings);
            assert_eq!(findings.iter().next().unwrap().severity, level, "{from} {until}");
        }
    }
}
