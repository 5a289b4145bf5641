//! Loads the settings of the client commands: flags override the environment, which overrides the configuration file.
//!
//! They are not in `cli`, because only `config` reads the environment. Connecting and reading the token are done elsewhere.
//! No setting holds a token: other processes can read arguments and environments, but not files.

use std::{
    ffi::{OsStr, OsString},
    fmt, fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Arg, Args, ValueEnum, builder::Resettable};
use serde::Deserialize;

use super::{duration, toml_messages, trace_parent::InheritedTraceContext};
use crate::{domain::credential_mask::mask_value, transport::socket::find_exposed_address};

/// The server address without `--server`, `KEYWARD_SERVER` and a configuration file.
pub(crate) const DEFAULT_SERVER: &str = "http://127.0.0.1:50051";

const DEFAULT_PORT: u16 = 50051;

/// The format of printed responses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum OutputFormat {
    /// For people: tables, with colors on a terminal
    #[default]
    Table,
    /// For programs: the response as one JSON object
    Json,
}

/// The flags that every client command takes.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ClientArgs {
    /// Address of the server: https://HOST:PORT, unix:/PATH, or in plaintext http://HOST:PORT or HOST:PORT [or
    /// KEYWARD_SERVER; default: http://127.0.0.1:50051]
    #[arg(long, value_name = "URL", env = "KEYWARD_SERVER", hide_env = true)]
    pub server: Option<String>,
    /// File that holds the token to call with, `-` for stdin [or KEYWARD_TOKEN_FILE]
    #[arg(long, value_name = "FILE", env = "KEYWARD_TOKEN_FILE", hide_env = true)]
    pub token_file: Option<PathBuf>,
    /// File with the authorities (PEM) that sign the server's certificate, over https [or KEYWARD_CA_FILE; default:
    /// those of the system]
    #[arg(long, value_name = "FILE", env = "KEYWARD_CA_FILE", hide_env = true)]
    pub ca_file: Option<PathBuf>,
    /// File with a certificate (PEM) to show to the server, over https; with --client-key [or
    /// KEYWARD_CLIENT_CERTIFICATE]
    #[arg(long, value_name = "FILE", env = "KEYWARD_CLIENT_CERTIFICATE", hide_env = true)]
    pub client_certificate: Option<PathBuf>,
    /// File with the certificate's private key (PEM) [or KEYWARD_CLIENT_KEY]
    #[arg(long, value_name = "FILE", env = "KEYWARD_CLIENT_KEY", hide_env = true)]
    pub client_key: Option<PathBuf>,
    /// Send tokens in plaintext to other machines too, if something else protects the network
    #[arg(long = "insecure", id = "client_insecure")]
    pub insecure: bool,
    /// How to print the response [default: table]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub output: Option<OutputFormat>,
    /// How long to wait for a response [default: 10s; 90s for changes that wait for every replica]
    #[arg(long, value_name = "DURATION", value_parser = duration::parse_timeout)]
    pub timeout: Option<Duration>,
}

impl ClientArgs {
    /// The clap ids of these flags.
    pub(crate) const ARG_IDS: [&str; 8] = [
        "server",
        "token_file",
        "ca_file",
        "client_certificate",
        "client_key",
        "client_insecure",
        "output",
        "timeout",
    ];

    /// Fills flags that are not set with those of `outer`.
    #[must_use]
    pub(crate) fn or(self, outer: ClientArgs) -> ClientArgs {
        ClientArgs {
            server: self.server.or(outer.server),
            token_file: self.token_file.or(outer.token_file),
            ca_file: self.ca_file.or(outer.ca_file),
            client_certificate: self.client_certificate.or(outer.client_certificate),
            client_key: self.client_key.or(outer.client_key),
            insecure: self.insecure || outer.insecure,
            output: self.output.or(outer.output),
            timeout: self.timeout.or(outer.timeout),
        }
    }
}

/// Adapts a flag of [`ClientArgs`] for a subcommand. The top level reads the environment already; read again here, it would
/// override a flag that precedes the name of the subcommand.
#[must_use]
pub(crate) fn for_subcommand(arg: Arg) -> Arg {
    match arg.get_id().as_str() {
        "server" | "token_file" | "ca_file" | "client_certificate" | "client_key" => {
            arg.global(true).env(Resettable::Reset)
        }
        "client_insecure" | "output" | "timeout" => arg.global(true),
        _ => arg,
    }
}

/// The command line of this process.
#[must_use]
pub(crate) fn process_args() -> Vec<OsString> {
    std::env::args_os().collect()
}

/// The directory for temporary files.
#[must_use]
pub(crate) fn temp_dir() -> PathBuf {
    std::env::temp_dir()
}

/// Whether the environment disables colors (<https://no-color.org>).
#[must_use]
pub(crate) fn are_colors_disabled() -> bool {
    env_var_os("NO_COLOR").is_some() || env_var_os("TERM").is_some_and(|term| term == "dumb")
}

/// The settings of a client command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClientSettings {
    /// The address to connect to.
    pub server: ServerUrl,
    /// The file of the caller's token; `-` is stdin.
    pub token_file: Option<PathBuf>,
    /// A PEM file with the trusted authorities of the server's certificate; None = those of the system.
    pub ca_file: Option<PathBuf>,
    /// The PEM files of the client certificate and its key.
    pub client_certificate: Option<(PathBuf, PathBuf)>,
    /// Whether tokens may be sent in plaintext to another machine.
    pub insecure: bool,
    /// The format of printed responses.
    pub output: OutputFormat,
    /// The time limit of a call; None = the default of the command.
    pub timeout: Option<Duration>,
    /// The trace that calls belong to, if any.
    pub trace_parent: Option<InheritedTraceContext>,
}

impl ClientSettings {
    /// Completes the flags, which include the environment, with the configuration file.
    ///
    /// # Errors
    /// If the file cannot be read, or a setting is invalid.
    pub(crate) fn load(args: ClientArgs) -> Result<ClientSettings, ClientSettingsError> {
        let file = match config_file_path(env_var_os) {
            Some(path) => RawClientSettings::load(&path, env_var_os("HOME"))?,
            None => RawClientSettings::default(),
        };
        Ok(ClientSettings {
            trace_parent: InheritedTraceContext::from_env(env_var_os),
            ..ClientSettings::merge(args, file)?
        })
    }

    fn merge(args: ClientArgs, file: RawClientSettings) -> Result<ClientSettings, ClientSettingsError> {
        let server = match (args.server, file.server) {
            (Some(given), _) => ServerUrl::parse(&given).map_err(|error| {
                let by_variable = env_var("KEYWARD_SERVER").as_deref() == Some(&given);
                error.with_setting_name(if by_variable { "KEYWARD_SERVER" } else { "--server" })
            })?,
            (None, Some(given)) => {
                ServerUrl::parse(&given).map_err(|error| error.with_setting_name("server"))?
            }
            (None, None) => ServerUrl::parse(DEFAULT_SERVER)?,
        };
        let given = |path: Option<PathBuf>| path.filter(|path| !path.as_os_str().is_empty());
        let ca_file = given(args.ca_file.or(file.ca_file));
        let certificate = given(args.client_certificate.or(file.client_certificate));
        let client_certificate = match (certificate, given(args.client_key.or(file.client_key))) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => {
                return Err(ClientSettingsError(
                    "a client certificate needs its key, and a key its certificate".to_owned(),
                ));
            }
        };
        if client_certificate.is_some() && !server.is_tls() {
            let problem = "a client certificate needs TLS: the server's address must start with https://";
            return Err(ClientSettingsError(problem.to_owned()));
        }
        Ok(ClientSettings {
            server,
            token_file: given(args.token_file.or(file.token_file)),
            ca_file,
            client_certificate,
            insecure: args.insecure || file.insecure.unwrap_or(false),
            output: args.output.or(file.output).unwrap_or_default(),
            timeout: args.timeout,
            trace_parent: None,
        })
    }
}

/// A problem of the client settings, with the value and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct ClientSettingsError(String);

impl ClientSettingsError {
    /// Prefixes the message with the name of the setting, flag or variable.
    fn with_setting_name(self, setting: &str) -> ClientSettingsError {
        ClientSettingsError(format!("{setting}: {}", self.0))
    }
}

/// The address of a server: `https://…`, `http://…` or `unix:/…`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerUrl(String);

impl ServerUrl {
    /// Parses `https://HOST[:PORT]`, `unix:/PATH`, `http://HOST[:PORT]` or `HOST[:PORT]`; the last two mean plaintext.
    ///
    /// # Errors
    /// A message with the accepted forms.
    pub(crate) fn parse(text: &str) -> Result<ServerUrl, ClientSettingsError> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            if !path.starts_with('/') || path.len() < 2 {
                let shown = mask_value(text);
                return Err(ClientSettingsError(format!(
                    "{shown:?} is no server's address: use unix:/PATH with an absolute path"
                )));
            }
            return Ok(ServerUrl(format!("unix:{path}")));
        }
        let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
        let scheme_used = match scheme.to_ascii_lowercase().as_str() {
            "" | "http" => "http",
            "https" => "https",
            _ => {
                let problem = "the server's address does not start with https://, unix:/ or http://";
                return Err(ClientSettingsError(format!("{problem}: {ADDRESS_FORMATS}")));
            }
        };
        // The text around an @ may be a password.
        let shown =
            if text.contains('@') { "what is given".to_owned() } else { format!("{:?}", mask_value(text)) };
        let invalid = || ClientSettingsError(format!("{shown} is no server's address: {ADDRESS_FORMATS}"));
        let authority: http::uri::Authority =
            rest.strip_suffix('/').unwrap_or(rest).parse().map_err(|_| invalid())?;
        // A password in the address would end up in logs and error messages.
        if authority.as_str().contains('@') || authority.host().is_empty() {
            return Err(invalid());
        }
        let has_port = authority.as_str().len() > authority.host().len();
        if has_port && authority.port_u16().is_none() {
            return Err(invalid());
        }
        let port = if scheme.is_empty() && !has_port { format!(":{DEFAULT_PORT}") } else { String::new() };
        Ok(ServerUrl(format!("{scheme_used}://{authority}{port}")))
    }

    /// Whether the address is reached over TLS.
    #[must_use]
    pub(crate) fn is_tls(&self) -> bool {
        self.0.starts_with("https:")
    }

    /// The address beyond this machine that would receive plaintext; None = TLS, a socket file, or only this machine.
    ///
    /// # Errors
    /// If the host name does not resolve.
    pub(crate) fn exposed_address(&self) -> io::Result<Option<SocketAddr>> {
        let Some(authority) = self.0.strip_prefix("http://") else { return Ok(None) };
        // The default port of the transport.
        let has_port =
            authority.parse().is_ok_and(|authority: http::uri::Authority| authority.port().is_some());
        let port = if has_port { "" } else { ":80" };
        find_exposed_address(&format!("{authority}{port}"))
    }

    /// The address with its scheme, such as `http://localhost:50051`.
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const ADDRESS_FORMATS: &str = "use https://HOST:PORT, unix:/PATH, http://HOST:PORT or HOST:PORT, such as 127.0.0.1:50051, \
                      without a path or user";

#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawClientSettings {
    server: Option<String>,
    token_file: Option<PathBuf>,
    ca_file: Option<PathBuf>,
    client_certificate: Option<PathBuf>,
    client_key: Option<PathBuf>,
    insecure: Option<bool>,
    output: Option<OutputFormat>,
}

impl RawClientSettings {
    fn load(path: &Path, home: Option<OsString>) -> Result<RawClientSettings, ClientSettingsError> {
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(RawClientSettings::default());
            }
            Err(error) => {
                return Err(ClientSettingsError(format!("cannot read {}: {error}", path.display())));
            }
        };
        RawClientSettings::parse(&text, path, home.as_deref())
    }

    fn parse(
        text: &str,
        path: &Path,
        home: Option<&OsStr>,
    ) -> Result<RawClientSettings, ClientSettingsError> {
        let mut file: RawClientSettings = toml::from_str(text).map_err(|error| {
            // The error's own text quotes the line, which may hold a secret.
            let line = error.span().map_or(1, |span| {
                1 + text.as_bytes()[..span.start.min(text.len())].iter().filter(|b| **b == b'\n').count()
            });
            ClientSettingsError(format!(
                "{}, line {line}: {} (the file never holds a token)",
                path.display(),
                toml_messages::rephrase_serde_error(error.message())
            ))
        })?;
        for named in
            [&mut file.token_file, &mut file.ca_file, &mut file.client_certificate, &mut file.client_key]
        {
            *named = named.take().map(|named| resolve_path(named, path, home));
        }
        Ok(file)
    }
}

/// Resolves a path of the configuration file: `~/` is the home folder; a relative path starts at the folder of the file.
fn resolve_path(token: PathBuf, file: &Path, home: Option<&OsStr>) -> PathBuf {
    if token.as_os_str() == "-" {
        return token;
    }
    if let (Ok(rest), Some(home)) = (token.strip_prefix("~"), home) {
        return Path::new(home).join(rest);
    }
    file.parent().map_or_else(|| token.clone(), |folder| folder.join(&token))
}

/// `$XDG_CONFIG_HOME/keyward/config.toml`, by default below `~/.config`.
fn config_file_path(variable: impl Fn(&'static str) -> Option<OsString>) -> Option<PathBuf> {
    let base = match variable("XDG_CONFIG_HOME").map(PathBuf::from) {
        // The XDG specification ignores relative paths.
        Some(base) if base.is_absolute() => base,
        _ => PathBuf::from(variable("HOME")?).join(".config"),
    };
    Some(base.join("keyward").join("config.toml"))
}

/// Reads an environment variable; an empty one counts as unset.
#[expect(clippy::disallowed_methods, reason = "config reads the environment, and nothing else does")]
fn env_var_os(name: &'static str) -> Option<OsString> {
    std::env::var_os(name).filter(|value| !value.is_empty())
}

/// Reads an environment variable as text; an empty one counts as unset.
#[expect(clippy::disallowed_methods, reason = "config reads the environment, and nothing else does")]
pub(super) fn env_var(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Makes the flags of a command and its subcommands treat an empty environment variable as unset.
#[must_use]
pub(crate) fn ignore_empty_env_vars(command: clap::Command) -> clap::Command {
    command
        .mut_args(|arg| if has_empty_env_var(&arg) { arg.env(Resettable::Reset) } else { arg })
        .mut_subcommands(ignore_empty_env_vars)
}

#[expect(clippy::disallowed_methods, reason = "config reads the environment, and nothing else does")]
fn has_empty_env_var(arg: &Arg) -> bool {
    arg.get_env().and_then(std::env::var_os).is_some_and(|value| value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Result<String, String> {
        ServerUrl::parse(text).map(|url| url.to_string()).map_err(|error| error.to_string())
    }

    fn parse(text: &str) -> Result<RawClientSettings, String> {
        RawClientSettings::parse(text, Path::new("/etc/kw/config.toml"), Some(OsStr::new("/home/ada")))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn an_address_needs_no_scheme() {
        for (text, expected) in [
            ("http://127.0.0.1:50051", "http://127.0.0.1:50051"),
            ("http://keyward.internal/", "http://keyward.internal"),
            ("keyward:6000", "http://keyward:6000"),
            ("localhost", "http://localhost:50051"),
            ("[::1]", "http://[::1]:50051"),
            ("[::1]:7000", "http://[::1]:7000"),
            ("https://keyward:443", "https://keyward:443"),
            ("HTTPS://keyward", "https://keyward"),
            ("unix:/run/keyward.sock", "unix:/run/keyward.sock"),
            ("unix:///run/keyward.sock", "unix:/run/keyward.sock"),
        ] {
            assert_eq!(url(text).as_deref(), Ok(expected), "{text:?}");
        }
    }

    #[test]
    fn plaintext_to_other_machines_is_allowed_by_a_flag_or_the_file_and_else_not() {
        let combine = |insecure: bool, text: &str| {
            let args = ClientArgs { insecure, ..ClientArgs::default() };
            ClientSettings::merge(args, parse(text).unwrap()).unwrap().insecure
        };
        assert_eq!(
            (combine(true, ""), combine(false, "insecure = true"), combine(false, "")),
            (true, true, false)
        );
    }

    #[test]
    fn a_client_certificate_goes_with_its_key_and_over_tls_alone() {
        let combine = |server: &str, certificate: Option<&str>, key: Option<&str>| {
            let args = ClientArgs {
                server: Some(server.into()),
                client_certificate: certificate.map(Into::into),
                client_key: key.map(Into::into),
                ..ClientArgs::default()
            };
            ClientSettings::merge(args, RawClientSettings::default())
                .map(|settings| settings.client_certificate)
        };
        assert_eq!(combine("https://a:1", Some("c"), Some("k")), Ok(Some(("c".into(), "k".into()))));
        assert!(combine("https://a:1", Some("c"), None).is_err());
        assert!(combine("https://a:1", None, Some("k")).is_err());
        assert!(combine("http://a:1", Some("c"), Some("k")).is_err());
        assert!(combine("unix:/a", Some("c"), Some("k")).is_err());
    }

    #[test]
    fn what_is_no_address_is_refused_and_no_password_repeated() {
        for text in [
            "",
            "http://",
            "unix:here",
            "grpc://a:1",
            "a:b",
            "a:70000",
            "http://a/b",
            "a b",
            "http://ada:pw@a:1",
        ] {
            let error = url(text).unwrap_err();
            assert!(
                error.contains("no server's address") || error.contains(ADDRESS_FORMATS),
                "{text:?}: {error}"
            );
            assert!(!error.contains("pw"), "{error}");
        }
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let file = || parse("server = 'file:1'\noutput = 'json'\ntoken_file = '/t'").unwrap();
        let silent = ClientSettings::merge(ClientArgs::default(), file()).unwrap();
        assert_eq!(silent.server.as_str(), "http://file:1");
        assert_eq!((silent.output, silent.token_file), (OutputFormat::Json, Some("/t".into())));

        let flags = ClientArgs {
            server: Some("flag:2".into()),
            token_file: Some("-".into()),
            output: Some(OutputFormat::Table),
            ..ClientArgs::default()
        };
        let said = ClientSettings::merge(flags, file()).unwrap();
        assert_eq!(said.server.as_str(), "http://flag:2");
        assert_eq!((said.output, said.token_file), (OutputFormat::Table, Some("-".into())));

        let nothing = ClientSettings::merge(ClientArgs::default(), RawClientSettings::default()).unwrap();
        assert_eq!(nothing.server.as_str(), DEFAULT_SERVER);
        assert_eq!((nothing.output, nothing.token_file), (OutputFormat::Table, None));
    }

    #[test]
    fn an_unknown_key_is_refused_by_name_and_line_without_its_value() {
        let error = parse("server = 'a:1'\ntoken = 'kw_secret'").unwrap_err();
        assert!(error.contains("/etc/kw/config.toml, line 2"), "{error}");
        assert!(error.contains("`token`") && error.contains("`server`, `token_file`, `ca_file`"), "{error}");
        assert!(!error.contains("kw_secret"), "{error}");
        assert!(parse("output = 'xml'").unwrap_err().contains("line 1"));
        assert!(parse("server = ").is_err());
    }

    #[test]
    fn the_files_paths_start_at_home_or_beside_the_file() {
        for (text, expected) in [
            ("~/.keyward/token", "/home/ada/.keyward/token"),
            ("token", "/etc/kw/token"),
            ("/run/token", "/run/token"),
            ("-", "-"),
        ] {
            let file = parse(&format!("token_file = '{text}'")).unwrap();
            assert_eq!(file.token_file, Some(PathBuf::from(expected)), "{text:?}");
        }
    }

    #[test]
    fn a_missing_file_is_an_empty_one() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(
            RawClientSettings::load(&folder.path().join("config.toml"), None),
            Ok(RawClientSettings::default())
        );
        assert!(RawClientSettings::load(folder.path(), None).is_err(), "a folder is no file");
    }

    #[test]
    fn the_file_is_where_xdg_says() {
        let from = |xdg: Option<&str>, home: Option<&str>| {
            config_file_path(|name| if name == "HOME" { home } else { xdg }.map(OsString::from))
        };
        let at = |path: &str| Some(PathBuf::from(path));
        assert_eq!(from(Some("/x"), Some("/h")), at("/x/keyward/config.toml"));
        assert_eq!(from(Some("relative"), Some("/h")), at("/h/.config/keyward/config.toml"));
        assert_eq!(from(None, Some("/h")), at("/h/.config/keyward/config.toml"));
        assert_eq!(from(None, None), None);
    }
}
