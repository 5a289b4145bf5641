//! `keyward serve`: runs a server until a signal stops it.

use std::{
    io::{IsTerminal as _, Write as _},
    process::ExitCode,
    sync::Arc,
};

use tokio::signal::unix::{SignalKind, signal};

use super::{console::Console, error::CliError, table::escape_terminal_lines};
use crate::{
    clock::{SystemClock, SystemEntropy},
    config::server::{ENVOY_LISTENER, MAIN_LISTENER, ServeArgs, ServerSettings},
    domain::{credential_mask::mask_message, token::Token},
    server::{Server, database_startup},
    telemetry,
};

pub(super) fn run(args: ServeArgs) -> ExitCode {
    to_exit_code(load_and_serve(&args))
}

fn load_and_serve(args: &ServeArgs) -> anyhow::Result<()> {
    let mut settings = ServerSettings::load_for_serving(args)?;
    settings.may_print_root_key = std::io::stdout().is_terminal();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let exporter =
            telemetry::init(&settings.log_filter, settings.log_format, settings.telemetry.otlp.as_ref())?;
        let result = serve_until_signal(settings).await;
        exporter.stop().await;
        result
    });
    // The server's own shutdown already waited; whatever still runs is abandoned.
    runtime.shutdown_background();
    result
}

/// Reports the error of a command that opens the database itself on stderr, and returns its exit code.
pub(super) fn to_exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if let Some(failure) = error.downcast_ref::<CliError>() {
                Console::with_stdio().eprint(&failure.to_string());
                return ExitCode::from(failure.exit_code());
            }
            // A closed stderr leaves no place to report the failure.
            let _ = writeln!(
                std::io::stderr(),
                "keyward: {}",
                escape_terminal_lines(&mask_message(&format_error_chain(&error)))
            );
            ExitCode::FAILURE
        }
    }
}

/// Joins an error and its causes. A cause is left out if the error's message already contains it.
fn format_error_chain(error: &anyhow::Error) -> String {
    error.chain().skip(1).fold(error.to_string(), |text, cause| {
        let cause = cause.to_string();
        if text.contains(&cause) { text } else { format!("{text}: {cause}") }
    })
}

async fn serve_until_signal(settings: ServerSettings) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        waited = database_startup::wait_for_database(&settings) => waited?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    }
    let mut server = Server::start(settings, Arc::new(SystemClock), Arc::new(SystemEntropy)).await?;
    print_addresses(&mut server)?;
    tracing::info!(grpc = %server.address, admin = %server.admin_address, "serving");
    let failed = loop {
        tokio::select! {
            _ = terminate.recv() => break false,
            _ = interrupt.recv() => break false,
            () = server.wait_for_failure() => break true,
            Some(()) = hangup.recv() => server.reload_files(),
        }
    };
    tracing::info!("stopping");
    tokio::select! {
        () = server.stop() => {}
        _ = terminate.recv() => tracing::warn!("a second signal: stopping at once"),
        _ = interrupt.recv() => tracing::warn!("a second signal: stopping at once"),
    }
    if failed { Err(anyhow::anyhow!("the server stopped after a failure; see its log")) } else { Ok(()) }
}

/// Prints the listen addresses and, on the first start only, the root key.
fn print_addresses(server: &mut Server) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    if let Some(token) = server.root_token.take() {
        write_root_key(&mut out, &token)?;
        write_first_steps(&mut out, &server.address.to_string())?;
    }
    if let Some(address) = server.envoy_address {
        writeln!(out, "keyward serves Envoy on {address}")?;
    }
    if let Some(address) = server.forward_auth_address {
        writeln!(out, "keyward serves nginx, Traefik and Envoy on http://{address}/auth/…")?;
    }
    for (name, address, tls) in &server.listeners {
        if ![MAIN_LISTENER, ENVOY_LISTENER].contains(&name.as_str()) {
            let tls = if *tls { " with TLS" } else { "" };
            writeln!(out, "keyward serves {name} on {address}{tls}")?;
        }
    }
    writeln!(
        out,
        "keyward serves gRPC on {}, admin pages on http://{}",
        server.address, server.admin_address
    )?;
    out.flush()
}

/// Writes a root key as a variable assignment for the shell.
pub(super) fn write_root_key(out: &mut impl std::io::Write, token: &Token) -> std::io::Result<()> {
    writeln!(out, "The root key. It is shown only once and stored nowhere: keep it safe.\n")?;
    writeln!(out, "  ROOT_KEY='{}'\n", token.reveal())
}

fn write_first_steps(out: &mut impl std::io::Write, address: &str) -> std::io::Result<()> {
    writeln!(
        out,
        r#"Paste that line into a shell. These commands then create an account and a key, and check the key:

  grpcurl -plaintext -H "authorization: Bearer $ROOT_KEY" -d '{{"id": "acme", "name": "Acme Inc"}}' \
    {address} keyward.v1.AccountService/Create

  TOKEN=$(grpcurl -plaintext -H "authorization: Bearer $ROOT_KEY" \
    -d '{{"account": "acme", "environment": "production", "name": "first", "scopes": ["monitors:read"]}}' \
    {address} keyward.v1.KeyService/Create | sed -n 's/.*"token": "\(.*\)".*/\1/p')

  grpcurl -plaintext -H "authorization: Bearer $ROOT_KEY" \
    -d '{{"token": "'$TOKEN'", "environment": "production", "scopes": ["monitors:read"]}}' \
    {address} keyward.v1.AuthzService/Check

  grpcurl -plaintext {address} describe keyward.v1.KeyService
"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::rules::RulesFileError;

    #[test]
    fn each_cause_of_an_error_is_told_once() {
        let source = std::io::Error::other("gone");
        let error = anyhow::Error::from(RulesFileError::Unreadable { path: "r.toml".to_owned(), source });
        assert_eq!(format_error_chain(&error), "the rules file r.toml cannot be read: gone");
        assert_eq!(format_error_chain(&anyhow::anyhow!("inner").context("outer")), "outer: inner");
    }
}
