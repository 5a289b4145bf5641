//! Where the store is: what a `postgres://` URL says, and the schema, which Keyward reads from it itself.

use std::str::FromStr as _;

use sha2::{Digest as _, Sha256};
use sqlx::{ConnectOptions as _, postgres::PgConnectOptions};

use crate::{
    domain::connection_url::{ConnectionUrl, ConnectionUrlError},
    store::{OpenError, error::url_error},
};

/// What may stand behind the `?`. The driver would ignore others, and repeat them in the log.
const KNOWN_OPTIONS: [&str; 10] =
    ["schema", "host", "port", "user", "password", "dbname", "sslmode", "sslrootcert", "sslcert", "sslkey"];

const SSL_MODES: [&str; 5] = ["disable", "prefer", "require", "verify-ca", "verify-full"];
const URL_EXAMPLE: &str = "postgres://user:password@host:5432/database";

/// Splits a URL. Nothing in it may be read in two ways, or a part of a password could be taken for the host.
fn split_url(url: &str) -> Result<ConnectionUrl<'_>, String> {
    let parts = ConnectionUrl::parse(url).map_err(|error| match error {
        ConnectionUrlError::NoScheme => format!("is no URL: write {URL_EXAMPLE}"),
        ConnectionUrlError::Ambiguous => format!("{error}, or keep the password in database_password_file"),
    })?;
    match (parts.scheme, parts.fragment) {
        ("postgres" | "postgresql", None) => Ok(parts),
        ("postgres" | "postgresql", Some(_)) => {
            Err("must not contain #: in a password, write %23".to_owned())
        }
        _ => Err(format!("is not understood: write {URL_EXAMPLE}")),
    }
}

/// The option is one that the driver heeds, with a value that it takes.
fn check_option(name: &str, value: &str) -> Result<(), String> {
    if !KNOWN_OPTIONS.contains(&name) {
        return Err(format!(
            "has an unknown option after the ?; the known ones are {}",
            KNOWN_OPTIONS.join(", ")
        ));
    }
    match name {
        "sslmode" if value == "allow" => Err(
            "has sslmode=allow, which means plaintext here: write disable, prefer, require or verify-full"
                .to_owned(),
        ),
        "sslmode" if !SSL_MODES.contains(&value) => {
            Err(format!("has an unknown sslmode: write one of {}", SSL_MODES.join(", ")))
        }
        "port" if value.parse::<u16>().is_err() => {
            Err("has a wrong port: it must be a number from 0 to 65535".to_owned())
        }
        _ => Ok(()),
    }
}

/// A server, a database, a schema.
#[derive(Clone)]
pub(super) struct PgTarget {
    pub(super) options: PgConnectOptions,
    pub(super) schema: String,
    /// For people; without user and password.
    pub(super) display_name: String,
}

impl PgTarget {
    /// Reads `postgres://user:password@host:port/database?schema=keyward`, and whatever else libpq knows.
    pub(super) fn parse(url: &str) -> Result<PgTarget, OpenError> {
        let wrong = |problem: String| url_error(url, problem);
        let parts = split_url(url).map_err(wrong)?;
        for (name, value) in parts.options() {
            check_option(name, value).map_err(wrong)?;
        }
        let (url, schema) = split_schema_option(url);
        let schema = schema.unwrap_or_else(|| "keyward".to_owned());
        if !is_plain_identifier(&schema) {
            let problem =
                "has a wrong schema: it must be 1-63 of a-z, 0-9 and _, and must not start with a digit";
            return Err(wrong(problem.to_owned()));
        }
        let options = PgConnectOptions::from_str(&url)
            .map_err(|_| wrong(format!("is not understood: write {URL_EXAMPLE}")))?
            .application_name("keyward")
            // pgbouncer refuses what it does not know, and we have no use for it.
            .extra_float_digits(None)
            .statement_cache_capacity(0)
            // Values stand in statements: hints, metadata and digests are nothing for a log.
            .disable_statement_logging();
        let server = match options.get_socket() {
            Some(folder) => folder.display().to_string(),
            None => options.get_host().to_owned(),
        };
        let database = options.get_database().unwrap_or(options.get_username());
        let shown = format!("postgres://{server}:{}/{database} (schema {schema})", options.get_port());
        Ok(PgTarget { options, schema, display_name: shown })
    }

    /// The channel on which commits are told. The server allows 63 bytes of a name.
    pub(super) fn commit_channel(&self) -> &str {
        &self.schema
    }

    /// The channel on which replicas tell that they have acknowledged changes.
    pub(super) fn ack_channel(&self) -> String {
        format!("{:.58}_acks", self.schema)
    }

    /// The advisory lock of this schema for `purpose`.
    pub(super) fn advisory_lock_key(&self, purpose: &str) -> i64 {
        let digest = Sha256::digest(format!("keyward {purpose} {}", self.schema));
        let mut key = [0; 8];
        key.copy_from_slice(&digest[..8]);
        i64::from_be_bytes(key)
    }
}

fn split_schema_option(url: &str) -> (String, Option<String>) {
    let Some((base, options)) = url.split_once('?') else { return (url.to_owned(), None) };
    let (ours, theirs): (Vec<_>, Vec<_>) =
        options.split('&').partition(|option| option.starts_with("schema="));
    let schema = ours.last().and_then(|option| option.strip_prefix("schema=")).map(str::to_owned);
    let url = if theirs.is_empty() { base.to_owned() } else { format!("{base}?{}", theirs.join("&")) };
    (url, schema)
}

/// A name that needs no quotes, so that no statement can be made from it.
fn is_plain_identifier(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    (1..=63).contains(&name.len()) && name.bytes().all(plain) && !name.as_bytes()[0].is_ascii_digit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_is_ours_and_the_rest_is_the_drivers() {
        let place = PgTarget::parse("postgres://u:secret@db:6432/keys?schema=kw_2&sslmode=require").unwrap();
        assert_eq!(place.schema, "kw_2");
        assert_eq!(place.display_name, "postgres://db:6432/keys (schema kw_2)");
        assert_eq!(PgTarget::parse("postgresql://u@db/keys").unwrap().schema, "keyward");
    }

    #[test]
    fn a_schema_that_could_be_a_statement_is_refused() {
        for schema in ["", "a b", "a;b", "a\"b", "Keys", "1a", "é", &"a".repeat(64)] {
            let error = PgTarget::parse(&format!("postgres://u@db/keys?schema={schema}"));
            assert!(matches!(error, Err(OpenError::Url { .. })), "{schema}");
        }
    }

    #[test]
    fn a_password_is_not_repeated() {
        for url in [
            "postgres://u:secret@db:port/keys",
            "postgres://u:secret@db/keys?schema=-",
            "postgres://u@db/keys?sslpassword=secret",
            "postgres://u@db/keys?%73chema=secret",
            "postgres://u@db/keys?sslmode=allow",
            "postgres://u:p@ss#secret@db/keys",
            "postgres://u:p@secret/word@db/keys",
            "postgres://u@db/keys?password=p#secret",
            "postgres:u:secret@db/keys",
        ] {
            let Err(error) = PgTarget::parse(url) else { panic!("{url} was understood") };
            assert!(!format!("{error:?} {error}").contains("secret"));
        }
    }

    #[test]
    fn channels_are_two_and_have_names_that_the_server_takes() {
        for schema in ["a".to_owned(), "a".repeat(63)] {
            let place = PgTarget::parse(&format!("postgres://u@db/keys?schema={schema}")).unwrap();
            let acks = place.ack_channel();
            assert!(acks != place.commit_channel() && acks.ends_with("_acks") && acks.len() <= 63, "{acks}");
        }
    }

    #[test]
    fn locks_differ_by_schema_and_purpose() {
        let place = |schema: &str| PgTarget::parse(&format!("postgres://u@db/keys?schema={schema}")).unwrap();
        assert_ne!(place("a").advisory_lock_key("x"), place("b").advisory_lock_key("x"));
        assert_ne!(place("a").advisory_lock_key("x"), place("a").advisory_lock_key("y"));
    }
}
