//! Callers that a client certificate proves: the name in the certificate, and what the configuration grants to whoever
//! holds it. Not here: certificates themselves, and whether an authority has signed them.

use std::fmt;

use super::{
    name::{AccountId, KeyId, NameError},
    scope::ScopeSet,
};

/// The longest name, in bytes.
const MAX_LEN: usize = 512;

/// One subject alternative name of a certificate (RFC 5280, section 4.2.1.6). Common names prove nothing here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum San {
    /// A URI, such as `spiffe://example.org/envoy`; compared byte by byte.
    Uri(Box<str>),
    /// A DNS name, such as `envoy.internal`; kept in lower case, and never a pattern.
    Dns(Box<str>),
    /// An e-mail address, such as `ops@example.org`; compared byte by byte.
    Email(Box<str>),
}

fn visible(text: &str) -> bool {
    (1..=MAX_LEN).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn is_dns(text: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    (1..=253).contains(&text.len()) && text.split('.').all(label)
}

impl San {
    /// Reads a URI.
    ///
    /// # Errors
    /// When it is none, or longer than 512 bytes.
    pub fn uri(text: &str) -> Result<San, NameError> {
        const RULE: NameError =
            NameError("must be a URI such as spiffe://example.org/envoy, at most 512 bytes");
        let scheme = text.split_once(':').map(|(scheme, _)| scheme);
        let scheme = scheme.filter(|scheme| scheme.starts_with(|first: char| first.is_ascii_alphabetic()));
        if scheme.is_some() && visible(text) { Ok(San::Uri(text.into())) } else { Err(RULE) }
    }

    /// Reads a DNS name; upper case becomes lower.
    ///
    /// # Errors
    /// When it is none, or a pattern.
    pub fn dns(text: &str) -> Result<San, NameError> {
        const RULE: NameError = NameError("must be one DNS name such as envoy.internal, without *");
        if is_dns(text) { Ok(San::Dns(text.to_ascii_lowercase().into())) } else { Err(RULE) }
    }

    /// Reads an e-mail address.
    ///
    /// # Errors
    /// When it is none.
    pub fn email(text: &str) -> Result<San, NameError> {
        const RULE: NameError = NameError("must be an e-mail address such as ops@example.org");
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-./=?^_`{|}~".contains(&byte);
        match text.split_once('@') {
            Some((local, host))
                if !local.is_empty() && local.bytes().all(good) && is_dns(host) && visible(text) =>
            {
                Ok(San::Email(text.into()))
            }
            _ => Err(RULE),
        }
    }
}

/// The name alone: no two kinds of names look the same.
impl fmt::Display for San {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (San::Uri(text) | San::Dns(text) | San::Email(text)) = self;
        f.write_str(text)
    }
}

/// What the configuration grants to whoever holds a certificate with a name. It ends when the configuration says so,
/// and while its account is suspended it is worth nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    san: San,
    account: AccountId,
    scopes: ScopeSet,
    name: Box<str>,
}

impl Identity {
    /// Whoever shows `san` acts in `account` with these scopes.
    #[must_use]
    pub fn new(san: San, account: AccountId, scopes: ScopeSet) -> Identity {
        let name = format!("cert:{san}").into();
        Identity { san, account, scopes, name }
    }

    /// The name in the certificate.
    #[must_use]
    pub fn san(&self) -> &San {
        &self.san
    }

    /// The account that it acts in.
    #[must_use]
    pub fn account(&self) -> &AccountId {
        &self.account
    }

    /// What it is granted.
    #[must_use]
    pub fn scopes(&self) -> &ScopeSet {
        &self.scopes
    }

    /// What the log calls it, such as `cert:spiffe://example.org/envoy`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Sixteen bytes in place of a key's id, under which its idempotency keys are kept: the same in every process and
    /// release, and no key's id.
    #[must_use]
    pub fn id(&self) -> KeyId {
        KeyId::derived("keyward-identity-1", &[self.account.as_str(), &self.name])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(san: San, account: &str) -> Identity {
        Identity::new(san, AccountId::parse(account).unwrap(), ScopeSet::default())
    }

    #[test]
    fn names_are_what_their_kind_allows() {
        for good in ["spiffe://example.org/envoy", "urn:uuid:1"] {
            assert!(San::uri(good).is_ok(), "{good}");
        }
        for bad in ["", "envoy", "://x", "spiffe://a b", "spiffe://é"] {
            assert!(San::uri(bad).is_err(), "{bad}");
        }
        assert_eq!(San::dns("Envoy.Internal"), San::dns("envoy.internal"));
        for bad in ["", "*.internal", "a..b", "a@b", "a:1", &"a".repeat(64)] {
            assert!(San::dns(bad).is_err(), "{bad}");
        }
        assert!(San::email("ops+keys@example.org").is_ok());
        for bad in ["", "ops", "@example.org", "ops@", "o:ps@example.org", "a@b@c"] {
            assert!(San::email(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_identitys_id_is_its_own_and_no_keys() {
        let id = |name: &str, account| identity(San::dns(name).unwrap(), account).id();
        assert_eq!(id("a", "acme"), id("a", "acme"));
        assert_ne!(id("a", "acme"), id("b", "acme"));
        assert_ne!(id("a", "acme"), id("a", "other"));
        assert_eq!(id("a", "acme").as_bytes()[6] >> 4, 8, "keys have version 7");
    }
}
