//! Parses `postgres://` URLs, including the option `schema`, which is Keyward's own.

use std::str::FromStr as _;

use sha2::{Digest as _, Sha256};
use sqlx::{ConnectOptions as _, postgres::PgConnectOptions};

use crate::{
    domain::connection_url::{ConnectionUrl, ConnectionUrlError},
    store::{OpenError, error::url_error},
};

/// The allowed options after the `?`. The driver would ignore others and log them.
const KNOWN_OPTIONS: [&str; 10] =
    ["schema", "host", "port", "user", "password", "dbname", "sslmode", "sslrootcert", "sslcert", "sslkey"];

const SSL_MODES: [&str; 5] = ["disable", "prefer", "require", "verify-ca", "verify-full"];
const URL_EXAMPLE: &str = "postgres://user:password@host:5432/database";

/// Splits a URL. No part may be ambiguous: otherwise a part of a password could be taken for the host.
fn split_url(url: &str) -> Result<ConnectionUrl<'_>, String> {
    let parts = ConnectionUrl::parse(url).map_err(|error| match error {
        ConnectionUrlError::NoScheme => format!("is not a URL: write {URL_EXAMPLE}"),
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

/// Checks that the driver knows the option and accepts the value.
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

/// A server, a database and a schema.
#[derive(Clone)]
pub(super) struct PgTarget {
    pub(super) options: PgConnectOptions,
    pub(super) schema: String,
    /// The name for messages, without user and password.
    pub(super) display_name: String,
}

impl PgTarget {
    /// Parses `postgres://user:password@host:port/database?schema=keyward`, with the options of libpq that are allowed.
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
            // pgbouncer rejects settings that it does not know; this one is not needed.
            .extra_float_digits(None)
            .statement_cache_capacity(0)
            // Statements contain values: hints, metadata and digests must not be logged.
            .disable_statement_logging();
        let server = match options.get_socket() {
            Some(folder) => folder.display().to_string(),
            None => options.get_host().to_owned(),
        };
        let database = options.get_database().unwrap_or(options.get_username());
        let shown = format!("postgres://{server}:{}/{database} (schema {schema})", options.get_port());
        Ok(PgTarget { options, schema, display_name: shown })
    }

    /// The channel of notifications about commits. PostgreSQL limits names to 63 bytes.
    pub(super) fn commit_channel(&self) -> &str {
        &self.schema
    }

    /// The channel of notifications about acknowledged changes.
    pub(super) fn ack_channel(&self) -> String {
        format!("{:.58}_acks", self.schema)
    }

    /// The key of this schema's advisory lock for `purpose`.
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

/// Whether a name needs no quotes, so that it cannot inject SQL.
fn is_plain_identifier(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    (1..=63).contains(&name.len()) && name.bytes().all(plain) && !name.as_bytes()[0].is_ascii_digit()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_is_ours_and_the_rest_is_the_drivers() {
        let target = PgTarget::parse("postgres://u:secret@db:6432/keys?schema=kw_2&sslmode=require").unwrap();
        assert_eq!(target.schema, "kw_2");
        assert_eq!(target.display_name, "postgres://db:6432/keys (schema kw_2)");
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
            let target = PgTarget::parse(&format!("postgres://u@db/keys?schema={schema}")).unwrap();
            let acks = target.ack_channel();
            assert!(acks != target.commit_channel() && acks.ends_with("_acks") && acks.len() <= 63, "{acks}");
        }
    }

    #[test]
    fn locks_differ_by_schema_and_purpose() {
        let target =
            |schema: &str| PgTarget::parse(&format!("postgres://u@db/keys?schema={schema}")).unwrap();
        assert_ne!(target("a").advisory_lock_key("x"), target("b").advisory_lock_key("x"));
        assert_ne!(target("a").advisory_lock_key("x"), target("a").advisory_lock_key("y"));
    }
}
