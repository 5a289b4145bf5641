//! Handing over a new token: it is shown once, to the one place that was asked for.

use std::path::{Path, PathBuf};

use clap::Args;
use zeroize::{Zeroize as _, Zeroizing};

use super::{context::Context, failure::Failure, json::Json, output, token::TokenFile};
use crate::pb;

/// Where a new token goes. By default it is printed with the key's details.
#[derive(Debug, Args)]
pub(super) struct IssueArgs {
    /// Print the token and nothing else
    #[arg(long)]
    token_only: bool,
    /// Write the token to a new file that only its owner can read, instead of printing it
    #[arg(long, value_name = "FILE", conflicts_with = "token_only")]
    write_token: Option<PathBuf>,
}

/// An answer that brings a token.
pub(super) trait Issued: Json {
    fn token(&mut self) -> &mut String;
    fn key(&self) -> Option<&pb::Key>;
}

impl Issued for pb::CreateKeyResponse {
    fn token(&mut self) -> &mut String {
        &mut self.token
    }
    fn key(&self) -> Option<&pb::Key> {
        self.key.as_ref()
    }
}

impl Issued for pb::RotateKeyResponse {
    fn token(&mut self) -> &mut String {
        &mut self.token
    }
    fn key(&self) -> Option<&pb::Key> {
        self.key.as_ref()
    }
}

/// Where the token goes, ready before it exists.
#[derive(Debug)]
pub(super) enum Delivery<'a> {
    Show,
    TokenOnly,
    File(TokenFile, &'a Path),
}

impl<'a> Delivery<'a> {
    /// Makes ready. Must come before the call: a file that cannot be made then costs no key.
    pub(super) fn prepare(args: &'a IssueArgs) -> Result<Delivery<'a>, Failure> {
        Ok(match &args.write_token {
            Some(path) => Delivery::File(TokenFile::create(path)?, path),
            None if args.token_only => Delivery::TokenOnly,
            None => Delivery::Show,
        })
    }

    /// Hands over the token and tells of the key.
    pub(super) fn hand_over<M: Issued>(self, cx: &mut Context<'_>, mut answer: M) -> Result<u8, Failure> {
        let id = answer.key().map(|key| key.id.clone()).unwrap_or_default();
        if answer.token().is_empty() {
            return self.replayed(cx, &answer, &id);
        }
        let done = match self {
            Delivery::Show if cx.json() => cx.deliver_json(&answer),
            Delivery::Show => show(cx, &mut answer),
            Delivery::TokenOnly => cx.console.deliver(&line(answer.token())),
            Delivery::File(file, path) => write(cx, &mut answer, file, path),
        };
        answer.token().zeroize();
        done.map(|()| 0).map_err(|failure| failure.hint(new_token_hint(&id)))
    }

    /// The request had been done before: the token went to whoever asked first.
    fn replayed<M: Issued>(self, cx: &mut Context<'_>, answer: &M, id: &str) -> Result<u8, Failure> {
        let message = format!(
            "key {id} was made by an earlier request with this idempotency key; its token was shown then"
        );
        if !matches!(self, Delivery::Show) {
            return Err(Failure::refused(message).hint(new_token_hint(id)));
        }
        cx.show(answer, |colours| details(answer, colours))?;
        cx.console.note(&format!("{message}.\n"));
        Ok(0)
    }
}

fn new_token_hint(id: &str) -> String {
    format!("the token cannot be shown again; `keyward keys rotate {id} --now` makes a new one")
}

/// Details for people go to stderr, so that stdout holds the token alone.
fn show<M: Issued>(cx: &mut Context<'_>, answer: &mut M) -> Result<(), Failure> {
    cx.console.note(&details(answer, cx.console.err_colours));
    cx.console.note("\nThe token, shown once: keep it now, it is stored nowhere.\n");
    cx.console.deliver(&line(answer.token()))
}

fn write<M: Issued>(
    cx: &mut Context<'_>,
    answer: &mut M,
    file: TokenFile,
    path: &Path,
) -> Result<(), Failure> {
    let written = file.write(answer.token());
    answer.token().zeroize();
    written.map_err(|error| {
        Failure::usage(format!(
            "the key is made, but its token could not be written to {}: {error}",
            path.display()
        ))
    })?;
    cx.show(answer, |colours| details(answer, colours))?;
    cx.console.note(&format!("The token is in {}, readable by its owner alone.\n", path.display()));
    Ok(())
}

fn details<M: Issued>(answer: &M, colours: bool) -> String {
    answer.key().map(|key| output::key(key).show(colours)).unwrap_or_default()
}

fn line(token: &str) -> Zeroizing<String> {
    Zeroizing::new(format!("{token}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cli::console::Printed,
        config::client::{ClientSettings, Output, ServerUrl},
    };

    const TOKEN: &str = "kw_live_secret";

    fn answer(token: &str) -> pb::CreateKeyResponse {
        let key = pb::Key { id: "0197".into(), ..Default::default() };
        pb::CreateKeyResponse { key: Some(key), token: token.into(), revision: 7, replayed: token.is_empty() }
    }

    /// Hands over an answer: what stdout and stderr then hold, and how it ended.
    fn hand_over(args: &IssueArgs, output: Output, token: &str) -> (String, String, Result<u8, String>) {
        let (out, err) = (Printed::default(), Printed::default());
        let mut console = Printed::console(&out, &err);
        let settings = ClientSettings {
            server: ServerUrl::parse("a:1").unwrap(),
            token_file: None,
            ca_file: None,
            client_certificate: None,
            output,
            timeout: None,
            insecure: false,
            trace: None,
        };
        let mut cx = Context::new(settings, &mut console);
        let done = Delivery::prepare(args)
            .and_then(|delivery| delivery.hand_over(&mut cx, answer(token)))
            .map_err(|failure| failure.to_string());
        (out.text(), err.text(), done)
    }

    fn args(token_only: bool, write_token: Option<PathBuf>) -> IssueArgs {
        IssueArgs { token_only, write_token }
    }

    #[test]
    fn for_people_stdout_holds_the_token_alone_and_stderr_the_rest() {
        let (out, err, done) = hand_over(&args(false, None), Output::Table, TOKEN);
        assert_eq!((out.as_str(), done), ("kw_live_secret\n", Ok(0)));
        assert!(err.contains("0197") && err.contains("shown once") && !err.contains(TOKEN), "{err}");
    }

    #[test]
    fn for_scripts_there_is_the_token_and_nothing_else() {
        for output in [Output::Table, Output::Json] {
            let printed = hand_over(&args(true, None), output, TOKEN);
            assert_eq!(printed, ("kw_live_secret\n".to_owned(), String::new(), Ok(0)));
        }
    }

    #[test]
    fn json_holds_the_token_once() {
        let (out, err, _) = hand_over(&args(false, None), Output::Json, TOKEN);
        assert_eq!(out.matches(TOKEN).count(), 1);
        assert_eq!(err, "");
    }

    #[test]
    fn a_token_that_is_written_is_not_printed() {
        for output in [Output::Table, Output::Json] {
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
        let (out, err, done) = hand_over(&args(false, None), Output::Table, "");
        assert_eq!(done, Ok(0));
        assert!(out.contains("0197") && err.contains("earlier request"), "{out}{err}");

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        for args in [args(true, None), args(false, Some(path.clone()))] {
            let (out, _, done) = hand_over(&args, Output::Table, "");
            assert_eq!(out, "");
            assert!(done.unwrap_err().contains("keyward keys rotate 0197"));
        }
        assert!(!path.exists());
    }
}
