//! The command line: parses the arguments and runs one command.
//!
//! | commands | they use |
//! |---|---|
//! | `serve`, `root-key`, `replicas`, `migrate`, `backup`, `accept-lost-wal`, `audit archive` | the server's modules and the database |
//! | `doctor` | the database, listeners and configuration files; changes nothing |
//! | `rules`, `config` | files, with the server's own code |
//! | `health` | an admin page over HTTP |
//! | all others | a server, through the generated client (`pb`) |
//!
//! Not here: what a command of the server does (`server`), how settings are read (`config`).
//!
//! # Invariants
//! - Client commands use `domain` and `config`, never `store`, `engine` or `grpc`: they can do nothing that another
//!   client cannot.
//! - Every command returns an exit code. Nothing here ends the process, because output that is still pending would be lost.
//! - A token is never an argument, because every process on the machine can read arguments.

mod accounts;
mod api_client;
mod audit;
mod bench;
mod check;
mod completions;
mod config;
mod console;
mod context;
mod descriptors;
mod doctor;
mod error;
mod health;
mod import;
mod json_output;
mod keys;
mod maintenance;
mod members;
mod paging;
mod replicas;
mod roles;
mod root_key;
mod rules;
mod rules_explain;
mod serve;
mod table;
mod text_output;
mod token_io;
mod token_output;
mod value_format;
mod whoami;

use std::{ffi::OsString, process::ExitCode};

use clap::{
    ArgMatches, CommandFactory as _, FromArgMatches as _, Parser, Subcommand,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};

use self::{console::Console, context::CommandContext, error::CliError};
use crate::{
    config::{
        client::{self as settings, ClientArgs, ClientSettings},
        server::{HealthArgs, RootKeyArgs, ServeArgs},
    },
    domain::credential_mask::{looks_like_credential, mask_value},
};

/// Each paragraph is one line: clap wraps it at the terminal's width.
const LONG_HELP: &str = "\
Settings: a flag wins over the environment (KEYWARD_SERVER, KEYWARD_TOKEN_FILE), which wins over \
~/.config/keyward/config.toml (below XDG_CONFIG_HOME if that is set) with the keys server, token_file, ca_file, \
client_certificate, client_key, insecure and output. There is no flag for a token: other processes could read it.

JSON (--output json): the response as one object. Field names are those of the protos (snake_case). Every field is \
present, null if it is absent. Instants are RFC 3339 in UTC, durations text such as 1m30s, enums their proto \
names (KEY_STATE_ACTIVE), 64-bit numbers are numbers, bytes are hexadecimal digits. Lists are fetched page by \
page into one object. Errors are text on stderr.

A command that cannot be undone asks for confirmation on the terminal, even if stdin is a pipe. Without a terminal it \
fails with exit code 2, unless --yes confirms it. Tokens are sent in plaintext to this machine only, \
unless --insecure allows more.

Exit codes: 0 done; 1 the server refused; 2 no answer (bad usage, no connection, timeout, server failure). \
`keyward check`: 0 allowed; 1 denied; 2 could not be answered. `keyward health`: 0 ready; 1 not ready; \
2 no answer. `keyward rules`: 0 a rule decides, or the file is valid; 1 no rule decides; 2 the file cannot be used. \
`keyward config`: 0 done, or the file is accepted; 1 it is refused; 2 it cannot be read. \
`keyward doctor`: 0 nothing fails; 1 something fails; 2 the check could not run.";

/// Issues API keys and checks whether a token is valid for a scope, an environment and an account
#[derive(Debug, Parser)]
#[command(name = "keyward", version, after_long_help = LONG_HELP, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: CliCommand,
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Debug, Subcommand)]
enum CliCommand {
    /// Run the server until a signal stops it
    Serve(ServeArgs),
    /// Manage the root key, with direct access to the database
    RootKey {
        #[command(subcommand)]
        command: RootKeyCommand,
    },
    /// Manage the replicas that serve one PostgreSQL database, with direct access to it
    Replicas {
        #[command(subcommand)]
        command: replicas::ReplicasCommand,
    },
    /// Upgrade the database's schema, even while servers of the previous version use it
    Migrate(maintenance::MigrateArgs),
    /// Copy an SQLite database to a new file, even while a server uses it
    Backup(maintenance::BackupArgs),
    /// Accept that an SQLite database lost its -wal file, so that it starts again without the changes in that file
    AcceptLostWal(maintenance::AcceptLostWalArgs),
    /// Create, find, change and revoke keys
    #[command(mut_args = settings::for_subcommand)]
    Keys {
        #[command(subcommand)]
        command: keys::KeysCommand,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Create, find and suspend accounts
    #[command(mut_args = settings::for_subcommand)]
    Accounts {
        #[command(subcommand)]
        command: accounts::AccountsCommand,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Create, change and delete roles: named sets of scopes
    #[command(mut_args = settings::for_subcommand)]
    Roles {
        #[command(subcommand)]
        command: roles::RolesCommand,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Manage which users belong to an account, and with which role
    #[command(mut_args = settings::for_subcommand)]
    Members {
        #[command(subcommand)]
        command: members::MembersCommand,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Check whether a token is valid; exit code 0 allowed, 1 denied, 2 could not be answered
    #[command(mut_args = settings::for_subcommand)]
    Check {
        #[command(flatten)]
        args: check::CheckArgs,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Show the key of the caller's own token
    #[command(mut_args = settings::for_subcommand)]
    Whoami {
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Revoke the caller's own key permanently
    #[command(mut_args = settings::for_subcommand)]
    RevokeSelf {
        #[command(flatten)]
        args: whoami::RevokeSelfArgs,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Read, verify, export and archive the log of every change
    #[command(mut_args = settings::for_subcommand)]
    Audit {
        #[command(subcommand)]
        command: audit::AuditCommand,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Show a server's settings and where they come from, and check a configuration file
    Config(config::ConfigCommandArgs),
    /// Inspect a running deployment and report what to fix
    Doctor(Box<doctor::DoctorArgs>),
    /// Ask a server's admin page whether it answers Checks; exit code 0 ready, 1 not ready, 2 no answer
    Health(HealthArgs),
    /// Measure a server under load
    #[command(mut_args = settings::for_subcommand)]
    Bench {
        #[command(flatten)]
        args: bench::BenchArgs,
        #[command(flatten)]
        client: ClientArgs,
    },
    /// Serve what a load is measured against: `keyward bench --baseline` starts it
    #[command(hide = true)]
    BenchBaseline(bench::BaselineArgs),
    /// Validate a rules file for HTTP requests, and show which of its rules decides one
    Rules(rules::RulesArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
    /// Print the binary descriptor set with which a gateway such as Envoy transcodes JSON into calls
    Descriptors,
}

#[derive(Debug, Subcommand)]
enum RootKeyCommand {
    /// Create a new root key and revoke the previous ones, for example if the root key is lost
    Reset(RootKeyArgs),
}

/// Runs the command that the program's arguments name.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match parse_arguments(&settings::process_args()) {
        Ok(cli) => cli,
        Err(error) => {
            // Help is not an error: it goes to stdout. If nobody reads the stream any more, nothing is left to do.
            let _ = error.print();
            return exit_code(u8::try_from(error.exit_code()).unwrap_or(error::EXIT_UNANSWERED));
        }
    };
    match cli.command {
        CliCommand::Serve(args) => serve::run(args),
        CliCommand::RootKey { command: RootKeyCommand::Reset(args) } => root_key::run(args),
        CliCommand::Replicas { command } => replicas::run(&command),
        CliCommand::Audit { command: audit::AuditCommand::Archive(args), .. } => audit::archive::run(&args),
        CliCommand::Migrate(args) => maintenance::migrate(&args),
        CliCommand::Backup(args) => maintenance::backup(&args),
        CliCommand::AcceptLostWal(args) => maintenance::accept_lost_wal(&args),
        CliCommand::Completions(args) => run_and_report(&mut Console::with_stdio(), |console| {
            completions::run(args, Cli::command(), console)
        }),
        CliCommand::Descriptors => run_and_report(&mut Console::with_stdio(), descriptors::run),
        CliCommand::Config(args) => {
            run_and_report(&mut Console::with_stdio(), |console| config::run(args, cli.client, console))
        }
        CliCommand::Doctor(args) => {
            run_and_report(&mut Console::with_stdio(), |console| doctor::run(*args, cli.client, console))
        }
        CliCommand::Health(args) => {
            run_and_report(&mut Console::with_stdio(), |console| health::run(&args, console))
        }
        CliCommand::Bench { args, client } => run_and_report(&mut Console::with_stdio(), |console| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(bench::run_until_sigterm(args.run(client.or(cli.client), console)))
        }),
        CliCommand::BenchBaseline(args) => run_and_report(&mut Console::with_stdio(), |_| args.run()),
        CliCommand::Rules(args) => {
            run_and_report(&mut Console::with_stdio(), |console| rules::run(args, cli.client, console))
        }
        command => {
            run_and_report(&mut Console::with_stdio(), |console| run_client(command, cli.client, console))
        }
    }
}

fn parse_arguments(arguments: &[OsString]) -> Result<Cli, clap::Error> {
    let mut command = settings::ignore_empty_env_vars(Cli::command());
    if token_io::contains_token(arguments) {
        return Err(command.error(ErrorKind::InvalidValue, TOKEN_ARGUMENT_ERROR));
    }
    let matches = command
        .try_get_matches_from_mut(arguments)
        .map_err(|error| without_credentials(arguments, explain_token_flag(&mut command, error)))?;
    if let Some(flag) = find_misplaced_client_flag(&matches) {
        let message = format!("--{flag} is for client commands, which call a server");
        return Err(command.error(ErrorKind::ArgumentConflict, message));
    }
    Cli::from_arg_matches(&matches)
}

const TOKEN_ARGUMENT_ERROR: &str = "an argument holds a token, and other processes can read arguments. Put the token \
    into a file: --token-file FILE for the caller's own token, --subject-token-file FILE for a token to \
    check (keyward check, keyward keys lookup). If others use this machine too, rotate the key";

/// Masks what looks like a credential in `error`: arguments, and the invalid value, which a variable may have set.
fn without_credentials(arguments: &[OsString], error: clap::Error) -> clap::Error {
    let text = error.render().to_string();
    let mut shown = text.clone();
    let value = match error.get(ContextKind::InvalidValue) {
        Some(ContextValue::String(value)) => Some(value.as_str()),
        _ => None,
    };
    for argument in arguments.iter().filter_map(|argument| argument.to_str()).chain(value) {
        // clap quotes the value without its flag.
        let flag = argument.starts_with('-').then(|| argument.split_once('=')).flatten();
        for quoted in [Some(argument), flag.map(|(_, value)| value)].into_iter().flatten() {
            if looks_like_credential(quoted) {
                shown = shown.replace(quoted, &mask_value(quoted));
            }
        }
    }
    if shown == text {
        return error;
    }
    clap::Error::raw(error.kind(), shown.strip_prefix("error: ").unwrap_or(&shown))
}

/// Replaces the error about an unknown flag `--token` by one that names the flags for token files.
fn explain_token_flag(command: &mut clap::Command, error: clap::Error) -> clap::Error {
    match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(flag))
            if error.kind() == ErrorKind::UnknownArgument && flag.split('=').next() == Some("--token") =>
        {
            let message = "there is no flag for the token itself, because other processes could read it: \
                           put it into a file and name the file with --token-file or KEYWARD_TOKEN_FILE";
            command.error(ErrorKind::UnknownArgument, message)
        }
        _ => error,
    }
}

/// Returns a client flag that was given to a command that would ignore it.
fn find_misplaced_client_flag(matches: &ArgMatches) -> Option<String> {
    let taken: &[&str] = match matches.subcommand_name() {
        Some(
            "serve" | "root-key" | "migrate" | "backup" | "health" | "completions" | "descriptors"
            | "bench-baseline",
        ) => &[],
        // They call no server, and print as client commands do.
        Some("config" | "rules") => &["output"],
        Some("doctor") => &["output", "server"],
        Some("audit") if is_audit_archive(matches) => &[],
        _ => return None,
    };
    ClientArgs::ARG_IDS
        .into_iter()
        .filter(|id| !taken.contains(id))
        .find(|id| is_flag_given(matches, id))
        // `serve` has an --insecure with another meaning, so the client's flag has its own id.
        .map(|id| if id == "client_insecure" { "insecure".to_owned() } else { id.replace('_', "-") })
}

/// Whether a flag is given before the command or anywhere after it.
fn is_flag_given(matches: &ArgMatches, id: &str) -> bool {
    let here =
        matches.try_contains_id(id).is_ok() && matches.value_source(id) == Some(ValueSource::CommandLine);
    here || matches.subcommand().is_some_and(|(_, below)| is_flag_given(below, id))
}

/// `audit archive` opens the database and calls no server.
fn is_audit_archive(matches: &ArgMatches) -> bool {
    let below = matches.subcommand_matches("audit").and_then(ArgMatches::subcommand_name);
    below == Some("archive")
}

fn run_client(command: CliCommand, outer: ClientArgs, console: &mut Console) -> Result<u8, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let context = |client: ClientArgs| {
        ClientSettings::load(client.or(outer)).map(|settings| CommandContext::new(settings, console))
    };
    match command {
        CliCommand::Keys { command, client } => runtime.block_on(command.run(&mut context(client)?)),
        CliCommand::Accounts { command, client } => runtime.block_on(command.run(&mut context(client)?)),
        CliCommand::Roles { command, client } => runtime.block_on(command.run(&mut context(client)?)),
        CliCommand::Members { command, client } => runtime.block_on(command.run(&mut context(client)?)),
        CliCommand::Audit { command, client } => runtime.block_on(command.run(&mut context(client)?)),
        CliCommand::Whoami { client } => runtime.block_on(whoami::whoami(&mut context(client)?)),
        CliCommand::RevokeSelf { args, client } => runtime.block_on(args.run(&mut context(client)?)),
        CliCommand::Check { args, client } => {
            let verdict = context(client).map_err(CliError::from);
            // Exit code 1 means "denied" here, so a failure must not use it.
            verdict.and_then(|mut cx| runtime.block_on(args.run(&mut cx))).map_err(CliError::into_unanswered)
        }
        CliCommand::Serve(_)
        | CliCommand::RootKey { .. }
        | CliCommand::Replicas { .. }
        | CliCommand::Config(_)
        | CliCommand::Doctor(_)
        | CliCommand::Migrate(_)
        | CliCommand::Backup(_)
        | CliCommand::AcceptLostWal(_)
        | CliCommand::Health(_)
        | CliCommand::Rules(_)
        | CliCommand::Bench { .. }
        | CliCommand::BenchBaseline(_)
        | CliCommand::Completions(_)
        | CliCommand::Descriptors => Ok(0),
    }
}

fn run_and_report(
    console: &mut Console,
    work: impl FnOnce(&mut Console) -> Result<u8, CliError>,
) -> ExitCode {
    match work(console) {
        Ok(code) => exit_code(code),
        Err(failure) => {
            console.eprint(&failure.to_string());
            exit_code(failure.exit_code())
        }
    }
}

fn exit_code(code: u8) -> ExitCode {
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Cli, clap::Error> {
        parse_arguments(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    fn servers(line: &str) -> Option<String> {
        let cli = read(line).unwrap();
        match cli.command {
            CliCommand::Keys { client, .. } | CliCommand::Whoami { client } => client.or(cli.client).server,
            _ => None,
        }
    }

    #[test]
    fn the_command_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn connection_flags_stand_before_between_or_after_the_commands() {
        for line in [
            "keyward --server a:1 keys get x",
            "keyward keys --server a:1 get x",
            "keyward keys get x --server a:1",
            "keyward --server b:2 keys get x --server a:1",
            "keyward whoami --server a:1",
            "keyward --server a:1 whoami",
        ] {
            assert_eq!(servers(line).as_deref(), Some("a:1"), "{line}");
        }
    }

    #[test]
    fn connection_flags_are_refused_where_they_would_be_ignored() {
        for line in [
            "keyward --server a:1 serve",
            "keyward --output json completions bash",
            "keyward --timeout 1s health",
            "keyward --server a:1 rules check x",
        ] {
            let error = read(line).unwrap_err();
            assert!(error.to_string().contains("is for client commands"), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn a_token_as_an_argument_is_refused_without_being_repeated() {
        let token = format!("kw_live_{}", "a".repeat(49));
        for line in [
            format!("keyward keys lookup {token}"),
            format!("keyward check {token}"),
            format!("keyward --token {token} whoami"),
            format!("keyward --token={token} whoami"),
            format!("keyward keys create --environment production --scope a:b --name {token}"),
        ] {
            let error = read(&line).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("--token-file FILE") && !text.contains(&token), "{text}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn a_url_with_a_login_among_the_arguments_is_not_repeated() {
        for line in [
            "keyward migrate postgres://u:sesame1234@h/db",
            "keyward health redis://:sesame1234@h",
            "keyward serve --no-such=postgres://u:sesame1234@h/db",
        ] {
            let error = read(line).unwrap_err();
            let text = error.to_string();
            assert!(!text.contains("sesame1234"), "{text}");
            assert_eq!(error.exit_code(), 2);
        }
        let shown = read("keyward migrate postgres://u:s@h").unwrap_err().to_string();
        assert!(shown.contains("postgres://u:***@h"), "{shown}");
    }

    #[test]
    fn no_message_about_an_argument_repeats_a_credential() {
        let random = "q7RkZ2mVb9XcT4nWs8LpQ1zY";
        for line in [
            "keyward {}",
            "keyward keys {}",
            "keyward keys list --no-such={}",
            "keyward keys list {} more",
            "keyward keys create --expires {}",
            "keyward keys create --expires={}",
            "keyward --timeout={} whoami",
            "keyward --output {} whoami",
            "keyward root-key reset --lost={}",
        ] {
            for (value, secret) in [
                (random, random),
                ("u:sesame1234@h", "sesame1234"),
                ("password=sesame1234", "sesame1234"),
                ("rediss://:sesame1234@h:1/2", "sesame1234"),
            ] {
                let error = read(&line.replace("{}", value)).unwrap_err().to_string();
                assert!(!error.contains(secret), "{line} {value}: {error}");
            }
        }
    }

    #[test]
    fn whoever_looks_for_a_token_flag_is_told_of_the_file() {
        for line in
            ["keyward --token abc whoami", "keyward whoami --token=abc", "keyward keys get x --token abc"]
        {
            let text = read(line).unwrap_err().to_string();
            assert!(text.contains("no flag for the token itself") && !text.contains("abc"), "{text}");
        }
    }

    #[test]
    fn the_help_says_what_scripts_rely_on() {
        let help = Cli::command().render_long_help().to_string();
        for promise in
            ["Exit codes: 0 done; 1 the server refused; 2 no answer", "snake_case", "KEYWARD_TOKEN_FILE"]
        {
            assert!(help.contains(promise), "{promise}");
        }
    }
}
