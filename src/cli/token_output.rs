//! Delivers a new token, once, to the destination that the flags choose: the terminal, stdout alone or a new file.

use std::path::{Path, PathBuf};

use clap::Args;
use zeroize::{Zeroize as _, Zeroizing};

use super::{
    context::CommandContext, error::CliError, json_output::ToJson, text_output, token_io::TokenFile,
};
use crate::pb;

/// Flags that choose where a new token goes. By default it is printed with the key's details.
#[derive(Debug, Args)]
pub(super) struct TokenOutputArgs {
    /// Print the token and nothing else
    #[arg(long)]
    token_only: bool,
    /// Write the token to a new file that only its owner can read, instead of printing it
    #[arg(long, value_name = "FILE", conflicts_with = "token_only")]
    write_token: Option<PathBuf>,
}

/// A response that contains a new token.
pub(super) trait IssuedKeyResponse: ToJson {
    fn token_mut(&mut self) -> &mut String;
    fn key(&self) -> Option<&pb::Key>;
}

impl IssuedKeyResponse for pb::CreateKeyResponse {
    fn token_mut(&mut self) -> &mut String {
        &mut self.token
    }
    fn key(&self) -> Option<&pb::Key> {
        self.key.as_ref()
    }
}

impl IssuedKeyResponse for pb::RotateKeyResponse {
    fn token_mut(&mut self) -> &mut String {
        &mut self.token
    }
    fn key(&self) -> Option<&pb::Key> {
        self.key.as_ref()
    }
}

/// Where the token goes, opened before the token exists.
#[derive(Debug)]
pub(super) enum TokenDestination<'a> {
    Show,
    TokenOnly,
    File(TokenFile, &'a Path),
}

impl<'a> TokenDestination<'a> {
    /// Opens the destination. Must run before the call, so that a file that cannot be created wastes no key.
    pub(super) fn prepare(args: &'a TokenOutputArgs) -> Result<TokenDestination<'a>, CliError> {
        Ok(match &args.write_token {
            Some(path) => TokenDestination::File(TokenFile::create(path)?, path),
            None if args.token_only => TokenDestination::TokenOnly,
            None => TokenDestination::Show,
        })
    }

    /// Delivers the token and prints the key's details.
    pub(super) fn deliver<M: IssuedKeyResponse>(
        self,
        cx: &mut CommandContext<'_>,
        mut response: M,
    ) -> Result<u8, CliError> {
        let id = response.key().map(|key| key.id.clone()).unwrap_or_default();
        if response.token_mut().is_empty() {
            return self.report_replay(cx, &response, &id);
        }
        let done = match self {
            TokenDestination::Show if cx.is_json_output() => cx.print_required_json(&response),
            TokenDestination::Show => print_token(cx, &mut response),
            TokenDestination::TokenOnly => cx.console.print_required(&token_line(response.token_mut())),
            TokenDestination::File(file, path) => write_token_file(cx, &mut response, file, path),
        };
        response.token_mut().zeroize();
        done.map(|()| 0).map_err(|failure| failure.with_hint(new_token_hint(&id)))
    }

    /// Reports a replayed request: the first response had the token.
    fn report_replay<M: IssuedKeyResponse>(
        self,
        cx: &mut CommandContext<'_>,
        response: &M,
        id: &str,
    ) -> Result<u8, CliError> {
        let message = format!(
            "key {id} was created by an earlier request with this idempotency key, which showed its token"
        );
        if !matches!(self, TokenDestination::Show) {
            return Err(CliError::refused(message).with_hint(new_token_hint(id)));
        }
        cx.print_response(response, |colors| render_key_details(response, colors))?;
        cx.console.eprint(&format!("{message}.\n"));
        Ok(0)
    }
}

fn new_token_hint(id: &str) -> String {
    format!("the token cannot be shown again; `keyward keys rotate {id} --now` issues a new one")
}

/// Prints the key's details to stderr, so that stdout has the token alone.
fn print_token<M: IssuedKeyResponse>(cx: &mut CommandContext<'_>, response: &mut M) -> Result<(), CliError> {
    cx.console.eprint(&render_key_details(response, cx.console.stderr_colors));
    cx.console.eprint("\nThe token is shown only once and stored nowhere. Save it now:\n");
    cx.console.print_required(&token_line(response.token_mut()))
}

fn write_token_file<M: IssuedKeyResponse>(
    cx: &mut CommandContext<'_>,
    response: &mut M,
    file: TokenFile,
    path: &Path,
) -> Result<(), CliError> {
    let written = file.write(response.token_mut());
    response.token_mut().zeroize();
    written.map_err(|error| {
        CliError::new(format!(
            "the key was created, but its token could not be written to {}: {error}",
            path.display()
        ))
    })?;
    cx.print_response(response, |colors| render_key_details(response, colors))?;
    cx.console.eprint(&format!("The token is in {}, which only its owner can read.\n", path.display()));
    Ok(())
}

fn render_key_details<M: IssuedKeyResponse>(response: &M, colors: bool) -> String {
    response.key().map(|key| text_output::describe_key(key).render(colors)).unwrap_or_default()
}

fn token_line(token: &str) -> Zeroizing<String> {
    Zeroizing::new(format!("{token}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::console::CapturedOutput,
        config::client::{ClientSettings, OutputFormat, ServerUrl},
    };

    const TOKEN: &str = "kw_live_secret";

    fn response(token: &str) -> pb::CreateKeyResponse {
        let key = pb::Key { id: "0197".into(), ..Default::default() };
        pb::CreateKeyResponse { key: Some(key), token: token.into(), revision: 7, replayed: token.is_empty() }
    }

    /// Hands over an answer: what stdout and stderr then hold, and how it ended.
    fn hand_over(
        args: &TokenOutputArgs,
        output: OutputFormat,
        token: &str,
    ) -> (String, String, Result<u8, String>) {
        let (out, err) = (CapturedOutput::default(), CapturedOutput::default());
        let mut console = CapturedOutput::capture_console(&out, &err);
        let settings = ClientSettings {
            server: ServerUrl::parse("a:1").unwrap(),
            token_file: None,
            ca_file: None,
            client_certificate: None,
            output,
            timeout: None,
            insecure: false,
            trace_parent: None,
        };
        let mut cx = CommandContext::new(settings, &mut console);
        let done = TokenDestination::prepare(args)
            .and_then(|destination| destination.deliver(&mut cx, response(token)))
            .map_err(|failure| failure.to_string());
        (out.text(), err.text(), done)
    }

    fn args(token_only: bool, write_token: Option<PathBuf>) -> TokenOutputArgs {
        TokenOutputArgs { token_only, write_token }
    }

    #[test]
    fn for_people_stdout_holds_the_token_alone_and_stderr_the_rest() {
        let (out, err, done) = hand_over(&args(false, None), OutputFormat::Table, TOKEN);
        assert_eq!((out.as_str(), done), ("kw_live_secret\n", Ok(0)));
        assert!(err.contains("0197") && err.contains("shown only once") && !err.contains(TOKEN), "{err}");
    }

    #[test]
    fn for_scripts_there_is_the_token_and_nothing_else() {
        for output in [OutputFormat::Table, OutputFormat::Json] {
            let printed = hand_over(&args(true, None), output, TOKEN);
            assert_eq!(printed, ("kw_live_secret\n".to_owned(), String::new(), Ok(0)));
        }
    }

    #[test]
    fn json_holds_the_token_once() {
        let (out, err, _) = hand_over(&args(false, None), OutputFormat::Json, TOKEN);
        assert_eq!(out.matches(TOKEN).count(), 1);
        assert_eq!(err, "");
    }

    #[test]
    fn a_token_that_is_written_is_not_printed() {
        for output in [OutputFormat::Table, OutputFormat::Json] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("token");
            let (out, err, done) = hand_over(&args(false, Some(path.clone())), output, TOKEN);
            assert_eq!(done, Ok(0));
            assert_eq!(std::fs::read_to_string(&path).unwrap(), "kw_live_secret\n");
            assert!(out.contains("0197") && !out.contains(TOKEN) && !err.contains(TOKEN), "{out}{err}");
        }
    }

    #[test]
    fn a_repeated_request_has_no_token_and_says_how_to_get_one() {
        let (out, err, done) = hand_over(&args(false, None), OutputFormat::Table, "");
        assert_eq!(done, Ok(0));
        assert!(out.contains("0197") && err.contains("earlier request"), "{out}{err}");

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        for args in [args(true, None), args(false, Some(path.clone()))] {
            let (out, _, done) = hand_over(&args, OutputFormat::Table, "");
            assert_eq!(out, "");
            assert!(done.unwrap_err().contains("keyward keys rotate 0197"));
        }
        assert!(!path.exists());
    }
}
