//! Reads the alternative names and the expiry of a certificate. TLS has verified it before.

use x509_cert::{
    Certificate as X509,
    der::Decode as _,
    ext::pkix::{SubjectAltName, name::GeneralName},
};

use crate::domain::certificate_identity::CertificateName;

/// The names and the expiry of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateInfo {
    /// The subject alternative names: URIs, DNS names and e-mail addresses, without wildcards.
    pub(crate) names: Vec<CertificateName>,
    /// When the certificate expires, in seconds since 1970.
    pub(crate) expires_at: i64,
}

/// A certificate that is not valid DER.
#[derive(Debug, thiserror::Error)]
#[error("the certificate cannot be read: {0}")]
pub(crate) struct CertificateError(x509_cert::der::Error);

impl CertificateInfo {
    /// Parses a certificate in DER.
    ///
    /// # Errors
    /// If the bytes are no certificate.
    pub(crate) fn from_der(der: &[u8]) -> Result<CertificateInfo, CertificateError> {
        let certificate = X509::from_der(der).map_err(CertificateError)?;
        let body = certificate.tbs_certificate();
        let names = body.get_extension::<SubjectAltName>().map_err(CertificateError)?;
        let names = names.map(|(_, SubjectAltName(names))| names).unwrap_or_default();
        let ends = body.validity().not_after.to_unix_duration().as_secs();
        Ok(CertificateInfo {
            names: names.iter().filter_map(read_san).collect(),
            expires_at: i64::try_from(ends).unwrap_or(i64::MAX),
        })
    }
}

fn read_san(name: &GeneralName) -> Option<CertificateName> {
    match name {
        GeneralName::UniformResourceIdentifier(text) => CertificateName::parse_uri(text.as_str()).ok(),
        GeneralName::DnsName(text) => CertificateName::parse_dns(text.as_str()).ok(),
        GeneralName::Rfc822Name(text) => CertificateName::parse_email(text.as_str()).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_end_are_read_and_patterns_and_addresses_are_not() {
        let mut params = rcgen::CertificateParams::new(vec![
            "Envoy.Internal".to_owned(),
            "*.internal".to_owned(),
            "127.0.0.1".to_owned(),
        ])
        .unwrap();
        params.subject_alt_names.extend([
            rcgen::SanType::URI("spiffe://example.org/envoy".try_into().unwrap()),
            rcgen::SanType::Rfc822Name("ops@example.org".try_into().unwrap()),
        ]);
        params.not_after = rcgen::date_time_ymd(2030, 1, 2);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        let read = CertificateInfo::from_der(certificate.der()).unwrap();
        let expected = [
            CertificateName::parse_dns("envoy.internal"),
            CertificateName::parse_uri("spiffe://example.org/envoy"),
            CertificateName::parse_email("ops@example.org"),
        ];
        assert_eq!(read.names, expected.map(Result::unwrap));
        assert_eq!(read.expires_at, 1_893_542_400, "2030-01-02T00:00:00Z");
        assert!(CertificateInfo::from_der(b"nothing").is_err());
    }
}
