//! Parses connection URLs strictly, and redacts their secrets for display.
//!
//! A password that is not percent-encoded may contain `#`, `/`, `?` or `@`, and a lenient parser then takes a part of
//! it for the host. A URL whose password could end at two places is therefore an error, and nothing of it is shown.

use std::fmt::Write as _;

/// The text in place of a secret.
pub const SECRET_MASK: &str = "***";

/// The schemes that are repeated in messages; any other text may be a piece of a password.
const KNOWN_SCHEMES: [&str; 19] = [
    "postgres",
    "postgresql",
    "sqlite",
    "redis",
    "rediss",
    "redis+unix",
    "valkey",
    "valkeys",
    "valkey+unix",
    "unix",
    "http",
    "https",
    "mysql",
    "mariadb",
    "mongodb",
    "mongodb+srv",
    "sqlserver",
    "jdbc",
    "file",
];

/// The options whose values are never secret.
const NON_SECRET_OPTIONS: [&str; 13] = [
    "schema",
    "host",
    "port",
    "user",
    "dbname",
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "application_name",
    "connect_timeout",
    "db",
    "protocol",
];

/// The options whose names are shown without their values.
const SECRET_OPTIONS: [&str; 4] = ["password", "pass", "sslpassword", "passwd"];

/// The parts of a URL as they are written, percent-encoding included.
#[derive(Clone, Copy)]
pub struct ConnectionUrl<'u> {
    /// The scheme: the part before `://`.
    pub scheme: &'u str,
    /// The user, if there is an `@`; may be empty.
    pub user: Option<&'u str>,
    /// The password; may be empty.
    pub password: Option<&'u str>,
    /// The host with its port; may be empty.
    pub host: &'u str,
    /// The path, from its `/` on.
    pub path: &'u str,
    /// What is between `?` and `#`.
    pub query: Option<&'u str>,
    /// What follows the first `#`.
    pub fragment: Option<&'u str>,
}

/// Why a URL was not split. Holds nothing of the URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionUrlError {
    /// The text does not start with `scheme://`.
    #[error("is no URL: it must start with a scheme such as postgres://")]
    NoScheme,
    /// It can be read in more than one way.
    #[error(
        "can be read in more than one way: a character of the user or the password has a meaning in URLs. \
         Percent-encode it (# is %23, / is %2F, ? is %3F, @ is %40, : is %3A, a blank is %20)"
    )]
    Ambiguous,
}

impl<'u> ConnectionUrl<'u> {
    /// Splits a URL into its parts.
    ///
    /// # Errors
    /// If the text is no URL, or its password could end at two places.
    pub fn parse(url: &'u str) -> Result<ConnectionUrl<'u>, ConnectionUrlError> {
        let (scheme, rest) = url.split_once("://").ok_or(ConnectionUrlError::NoScheme)?;
        let is_scheme = |letter: char| letter.is_ascii_alphanumeric() || "+-.".contains(letter);
        if scheme.is_empty() || !scheme.chars().all(is_scheme) {
            return Err(ConnectionUrlError::NoScheme);
        }
        let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
        let (login, host) = match authority.rsplit_once('@') {
            Some((login, host)) => (Some(login), host),
            None => (None, authority),
        };
        // A host is looked up by other machines, so nothing else may pass for one.
        if tail.contains('@')
            || rest.contains(|c: char| c.is_control() || c.is_whitespace())
            || !is_host_and_port(host)
        {
            return Err(ConnectionUrlError::Ambiguous);
        }
        let (user, password) = match login.map(|login| login.split_once(':').ok_or(login)) {
            Some(Ok((user, password))) => (Some(user), Some(password)),
            Some(Err(user)) => (Some(user), None),
            None => (None, None),
        };
        let (tail, fragment) = split_optional(tail, '#');
        let (path, query) = split_optional(tail, '?');
        Ok(ConnectionUrl { scheme, user, password, host, path, query, fragment })
    }

    /// The options behind the `?`: name and value as they are written.
    pub fn options(&self) -> impl Iterator<Item = (&'u str, &'u str)> {
        let options = self.query.unwrap_or_default().split('&').filter(|option| !option.is_empty());
        options.map(|option| option.split_once('=').unwrap_or((option, "")))
    }
}

fn split_optional(text: &str, at: char) -> (&str, Option<&str>) {
    text.split_once(at).map_or((text, None), |(before, after)| (before, Some(after)))
}

/// A name, an address or a percent-encoded socket path, each with or without a port; or nothing.
fn is_host_and_port(text: &str) -> bool {
    let (name, port) = match text.strip_prefix('[').and_then(|text| text.split_once(']')) {
        Some((address, rest)) if address.parse::<std::net::Ipv6Addr>().is_ok() => {
            match rest.strip_prefix(':') {
                Some(port) => ("", port),
                None if rest.is_empty() => ("", ""),
                None => return false,
            }
        }
        Some(_) => return false,
        None => text.split_once(':').unwrap_or((text, "")),
    };
    let in_name = |letter: char| letter.is_ascii_alphanumeric() || "-._%".contains(letter);
    name.chars().all(in_name) && (port.is_empty() || port.parse::<u16>().is_ok())
}

/// Formats a URL with `***` for each possible secret. Of a text that is no URL, only a known scheme is shown.
#[must_use]
pub fn mask_url(url: &str) -> String {
    let scheme = KNOWN_SCHEMES.iter().find(|scheme| {
        let (start, rest) = url.split_at_checked(scheme.len()).unwrap_or_default();
        start.eq_ignore_ascii_case(scheme) && rest.starts_with(':')
    });
    match (scheme, ConnectionUrl::parse(url)) {
        // A file has no login.
        (Some(&"sqlite"), _)
            if url[7..].starts_with("//") && !url.starts_with("sqlite:///") && url.contains('@') =>
        {
            format!("sqlite:{SECRET_MASK}")
        }
        (Some(&"sqlite"), _) => match url.split_once('?') {
            Some((file, _)) => format!("{file}?{SECRET_MASK}"),
            None => url.to_owned(),
        },
        (Some(scheme), Ok(parts)) => format_masked(scheme, &parts),
        (Some(scheme), Err(_)) => format!("{scheme}:{SECRET_MASK}"),
        (None, _) => SECRET_MASK.to_owned(),
    }
}

/// Whether [`mask_url`] hides something of it.
#[must_use]
pub fn has_secret(url: &str) -> bool {
    mask_url(url) != url
}

fn format_masked(scheme: &str, parts: &ConnectionUrl<'_>) -> String {
    let mut shown = format!("{scheme}://");
    // Writing to a String does not fail.
    match (parts.user, parts.password) {
        // What is meant for a password is often written so.
        (Some(_), None) if scheme.contains("redis") || scheme.contains("valkey") => {
            let _ = write!(shown, "{SECRET_MASK}@");
        }
        (Some(user), None) => drop(write!(shown, "{user}@")),
        (Some(user), Some(_)) => drop(write!(shown, "{user}:{SECRET_MASK}@")),
        (None, _) => {}
    }
    shown += parts.host;
    shown += parts.path;
    if parts.query.is_some() {
        let options: Vec<_> = parts.options().map(|(name, value)| mask_option(name, value)).collect();
        let _ = write!(shown, "?{}", options.join("&"));
    }
    match parts.fragment {
        Some("insecure") => shown += "#insecure",
        Some(_) => drop(write!(shown, "#{SECRET_MASK}")),
        None => {}
    }
    shown
}

/// Redacts an option. The names of open options must match exactly; those of secret ones match decoded and without
/// case.
fn mask_option(name: &str, value: &str) -> String {
    let decoded = percent_encoding::percent_decode_str(name).decode_utf8_lossy().to_ascii_lowercase();
    if NON_SECRET_OPTIONS.contains(&name) {
        format!("{name}={value}")
    } else if SECRET_OPTIONS.contains(&&*decoded) {
        format!("{name}={SECRET_MASK}")
    } else {
        SECRET_MASK.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_secret_is_masked_wherever_it_is_and_however_its_option_is_spelt() {
        for (url, shown) in [
            ("postgres://u:sesame@h:5432/keys", "postgres://u:***@h:5432/keys"),
            ("POSTGRES://u:sesame@h/keys", "postgres://u:***@h/keys"),
            ("postgres://u:se@sa:me@h/keys", "postgres://u:***@h/keys"),
            ("redis://:sesame@h:6379/1", "redis://:***@h:6379/1"),
            ("rediss://:sesame@h:6379/1#insecure", "rediss://:***@h:6379/1#insecure"),
            ("unix:///run/redis.sock?pass=sesame", "unix:///run/redis.sock?pass=***"),
            ("postgres://u@h/k?schema=a&password=sesame", "postgres://u@h/k?schema=a&password=***"),
            (
                "postgres://h/k?sslpassword=sesame&sslmode=require",
                "postgres://h/k?sslpassword=***&sslmode=require",
            ),
            ("postgres://h/k?PASSWORD=sesame", "postgres://h/k?PASSWORD=***"),
            ("postgres://h/k?p%61ssword=sesame", "postgres://h/k?p%61ssword=***"),
            ("postgres://h/k?api_token=sesame", "postgres://h/k?***"),
            ("postgres://h/k?sesame", "postgres://h/k?***"),
            ("postgres://h/k?password=x#sesame", "postgres://h/k?password=***#***"),
            // More than one way to read them.
            ("postgres://u:p@ss#sesame@h/db", "postgres:***"),
            ("postgres://u:ses/am?e@h/keys", "postgres:***"),
            ("postgres://u:sesame/keys", "postgres:***"),
            ("postgres:u:sesame@h/k", "postgres:***"),
            ("sesame://h", "***"),
            ("sesame", "***"),
            ("redis://sesame@h", "redis://***@h"),
            ("sqlite://u:sesame@h", "sqlite:***"),
            ("sqlite:keyward.db?key=sesame", "sqlite:keyward.db?***"),
        ] {
            assert_eq!(mask_url(url), shown, "{url}");
            assert!(has_secret(url), "{url}");
        }
    }

    #[test]
    fn what_holds_no_secret_is_shown_whole() {
        for url in [
            "postgres://u@h:5432/keys?schema=a",
            "postgres://[::1]:5432/keys",
            "postgres://%2Frun%2Fpg/keys",
            "postgres:///keys?host=/run/pg&user=u",
            "sqlite:keyward.db",
            "sqlite:///var/lib/keyward.db",
            "redis://127.0.0.1:6379",
        ] {
            assert_eq!(mask_url(url), url);
            assert!(!has_secret(url));
        }
    }

    #[test]
    fn a_password_that_may_end_at_two_places_is_refused() {
        for url in [
            "postgres://u:p@ss#word@host/db",
            "postgres://u:p@ss/word@host/db",
            "postgres://u:p@ss?word@host/db",
            "postgres://u:pass word@host/db",
            "postgres://u:pass\tword@host/db",
            "postgres://u:password/db",
            "redis://:p#w@host",
            "postgres://h,i/db",
            "postgres://[sesame]/db",
        ] {
            assert_eq!(ConnectionUrl::parse(url).err(), Some(ConnectionUrlError::Ambiguous), "{url}");
        }
    }

    /// Whether four or more characters of a password in a row are in a text.
    fn leaks(text: &str, password: &str) -> bool {
        let letters: Vec<char> = password.chars().collect();
        letters.windows(4).any(|part| text.contains(&part.iter().collect::<String>()))
    }

    // Upper case only, so that none of Keyward's words is a part of a password.
    const PASSWORD: &str = "[A-Z#/?@:%&=+ \\[\\]\\\\.;,'\"<>-]{4,24}";

    proptest! {
        #[test]
        fn nothing_of_a_password_is_shown(password in PASSWORD, host in "[a-z]{1,8}") {
            let encoded = percent_encoding::utf8_percent_encode(&password, percent_encoding::NON_ALPHANUMERIC);
            for url in [
                format!("postgres://u:{password}@{host}/db"),
                format!("postgres://{password}@{host}/db?password={password}"),
                format!("postgres://u@{host}/db?password={password}"),
                format!("postgres://u@{host}/db?PassWord={password}"),
                format!("redis://:{password}@{host}"),
                format!("unix:///run/r.sock?pass={password}"),
                format!("postgres:u:{password}@{host}"),
                format!("u:{password}@{host}"),
                format!("postgres://u:{encoded}@{host}/db?sslpassword={encoded}"),
            ] {
                // The user name is shown; a password in its place ends before the first ':'.
                let is_user = url.starts_with(&format!("postgres://{password}@"));
                // These words are the same for every URL, and may hold a password such as ", ? " by chance.
                let fixed = [ConnectionUrlError::NoScheme.to_string(), ConnectionUrlError::Ambiguous.to_string()];
                let error = ConnectionUrl::parse(&url).err().map(|error| error.to_string());
                let error = error.filter(|error| !fixed.contains(error)).unwrap_or_default();
                prop_assert!(is_user || !leaks(&mask_url(&url), &password), "{} {}", url, mask_url(&url));
                prop_assert!(is_user || !leaks(&mask_url(&url), &encoded.to_string()) || password == encoded.to_string());
                prop_assert!(!leaks(&error, &password));
            }
        }

        /// The host follows the only `@`, as a naive reader would assume.
        #[test]
        fn the_host_is_what_follows_the_login(user in "[a-z%0-9]{0,6}", password in "[a-zA-Z0-9%:!$*-]{0,9}",
                                              host in "[a-z0-9.-]{0,9}", path in "(/[a-z]{0,5})?") {
            let url = format!("postgres://{user}:{password}@{host}{path}");
            let parts = ConnectionUrl::parse(&url).unwrap();
            prop_assert_eq!((parts.user, parts.password), (Some(&*user), Some(&*password)));
            prop_assert_eq!((parts.host, parts.path), (&*host, &*path));
        }

        #[test]
        fn no_text_makes_it_panic(text in any::<String>()) {
            let _ = (mask_url(&text), ConnectionUrl::parse(&text).is_ok());
        }
    }
}
