//! Identifies callers by client certificate: the name in the certificate, and the scopes that the configuration grants
//! to it. TLS parses and verifies the certificates themselves.

use std::fmt;

use super::{
    name::{AccountId, KeyId, NameError},
    scope::ScopeSet,
};

/// The longest name, in bytes.
const MAX_SAN_LEN: usize = 512;

/// One subject alternative name of a certificate (RFC 5280, section 4.2.1.6). Common names prove nothing here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CertificateName {
    /// A URI, such as `spiffe://example.org/envoy`; compared byte by byte.
    Uri(Box<str>),
    /// A DNS name, such as `envoy.internal`; kept in lower case, and never a pattern.
    Dns(Box<str>),
    /// An e-mail address, such as `ops@example.org`; compared byte by byte.
    Email(Box<str>),
}

fn is_visible_ascii(text: &str) -> bool {
    (1..=MAX_SAN_LEN).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn is_dns_name(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    (1..=253).contains(&text.len()) && text.split('.').all(label)
}

impl CertificateName {
    /// Reads a URI.
    ///
    /// # Errors
    /// If the text is no URI, or longer than 512 bytes.
    pub fn parse_uri(text: &str) -> Result<CertificateName, NameError> {
        const RULE: NameError =
            NameError("must be a URI such as spiffe://example.org/envoy, at most 512 bytes");
        let scheme = text.split_once(':').map(|(scheme, _)| scheme);
        let scheme = scheme.filter(|scheme| scheme.starts_with(|first: char| first.is_ascii_alphabetic()));
        if scheme.is_some() && is_visible_ascii(text) {
            Ok(CertificateName::Uri(text.into()))
        } else {
            Err(RULE)
        }
    }

    /// Reads a DNS name; upper case becomes lower.
    ///
    /// # Errors
    /// If the text is no DNS name, or a wildcard.
    pub fn parse_dns(text: &str) -> Result<CertificateName, NameError> {
        const RULE: NameError = NameError("must be one DNS name such as envoy.internal, without *");
        if is_dns_name(text) { Ok(CertificateName::Dns(text.to_ascii_lowercase().into())) } else { Err(RULE) }
    }

    /// Reads an e-mail address.
    ///
    /// # Errors
    /// If the text is no e-mail address.
    pub fn parse_email(text: &str) -> Result<CertificateName, NameError> {
        const RULE: NameError = NameError("must be an e-mail address such as ops@example.org");
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-./=?^_`{|}~".contains(&byte);
        match text.split_once('@') {
            Some((local, host))
                if !local.is_empty()
                    && local.bytes().all(good)
                    && is_dns_name(host)
                    && is_visible_ascii(text) =>
            {
                Ok(CertificateName::Email(text.into()))
            }
            _ => Err(RULE),
        }
    }
}

/// The name alone: no two kinds of names look the same.
impl fmt::Display for CertificateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (CertificateName::Uri(text) | CertificateName::Dns(text) | CertificateName::Email(text)) = self;
        f.write_str(text)
    }
}

/// The grant of the configuration to the holders of a certificate. It ends when the configuration removes it, and has
/// no effect while its account is suspended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateIdentity {
    san: CertificateName,
    account: AccountId,
    scopes: ScopeSet,
    actor_name: Box<str>,
}

impl CertificateIdentity {
    /// Grants these scopes in `account` to callers whose certificate has the name `san`.
    #[must_use]
    pub fn new(san: CertificateName, account: AccountId, scopes: ScopeSet) -> CertificateIdentity {
        let name = format!("cert:{san}").into();
        CertificateIdentity { san, account, scopes, actor_name: name }
    }

    /// The name in the certificate.
    #[must_use]
    pub fn san(&self) -> &CertificateName {
        &self.san
    }

    /// The account that it acts in.
    #[must_use]
    pub fn account(&self) -> &AccountId {
        &self.account
    }

    /// The scopes that the caller is granted.
    #[must_use]
    pub fn scopes(&self) -> &ScopeSet {
        &self.scopes
    }

    /// What the log calls it, such as `cert:spiffe://example.org/envoy`.
    #[must_use]
    pub fn actor_name(&self) -> &str {
        &self.actor_name
    }

    /// Sixteen bytes in place of a key's id, under which its idempotency keys are kept: the same in every process and
    /// release, and no key's id.
    #[must_use]
    pub fn idempotency_caller_id(&self) -> KeyId {
        KeyId::from_purpose("keyward-identity-1", &[self.account.as_str(), &self.actor_name])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(san: CertificateName, account: &str) -> CertificateIdentity {
        CertificateIdentity::new(san, AccountId::parse(account).unwrap(), ScopeSet::default())
    }

    #[test]
    fn names_are_what_their_kind_allows() {
        for good in ["spiffe://example.org/envoy", "urn:uuid:1"] {
            assert!(CertificateName::parse_uri(good).is_ok(), "{good}");
        }
        for bad in ["", "envoy", "://x", "spiffe://a b", "spiffe://é"] {
            assert!(CertificateName::parse_uri(bad).is_err(), "{bad}");
        }
        assert_eq!(
            CertificateName::parse_dns("Envoy.Internal"),
            CertificateName::parse_dns("envoy.internal")
        );
        for bad in ["", "*.internal", "a..b", "a@b", "a:1", &"a".repeat(64)] {
            assert!(CertificateName::parse_dns(bad).is_err(), "{bad}");
        }
        assert!(CertificateName::parse_email("ops+keys@example.org").is_ok());
        for bad in ["", "ops", "@example.org", "ops@", "o:ps@example.org", "a@b@c"] {
            assert!(CertificateName::parse_email(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_identitys_id_is_its_own_and_no_keys() {
        let id = |name: &str, account| {
            identity(CertificateName::parse_dns(name).unwrap(), account).idempotency_caller_id()
        };
        assert_eq!(id("a", "acme"), id("a", "acme"));
        assert_ne!(id("a", "acme"), id("b", "acme"));
        assert_ne!(id("a", "acme"), id("a", "other"));
        assert_eq!(id("a", "acme").as_bytes()[6] >> 4, 8, "keys have version 7");
    }
}
