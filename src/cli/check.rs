//! `keyward check`: checks whether a token is valid. The exit code is the verdict, for scripts.

use std::path::{Path, PathBuf};

use clap::Args;

use super::{
    context::CommandContext,
    error::{CliError, EXIT_REFUSED},
    text_output, token_io,
};
use crate::pb;

const CHECK_HELP: &str = "\
Exit codes: 0 allowed; 1 denied; 2 could not be answered (any error, bad usage included).

The token to check comes from a file or stdin, never from an argument. It is not the \
caller's own token (--token-file), which needs the scope keyward:check.

Example: keyward check --environment production --scope monitors:read --subject-token-file ./token";

/// Flags that name the source of the token to check.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct SubjectTokenArgs {
    /// File that holds the token to check, `-` for stdin
    #[arg(long, value_name = "FILE")]
    subject_token_file: Option<PathBuf>,
    /// Read the token to check from stdin
    #[arg(long)]
    subject_stdin: bool,
}

impl SubjectTokenArgs {
    pub(super) fn read_token(&self, cx: &mut CommandContext<'_>) -> Result<token_io::PlainToken, CliError> {
        let path = self.subject_token_file.as_deref().unwrap_or(Path::new("-"));
        if token_io::is_stdin(path) && cx.is_stdin_used_for_token() {
            return Err(CliError::new(
                "stdin can hold one token, and the caller's own token comes from there",
            )
            .with_hint("name a file in --token-file or --subject-token-file"));
        }
        cx.warn_if_readable_by_others(path);
        token_io::read_token(path)
    }
}

#[derive(Debug, Args)]
#[command(after_help = CHECK_HELP)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    subject_token: SubjectTokenArgs,
    /// The environment in which the token is used
    #[arg(long, short, value_name = "NAME")]
    environment: String,
    /// Concrete scope such as monitors:read; every one is required (repeat, or separate by commas)
    #[arg(long = "scope", short, value_name = "SCOPE", value_delimiter = ',')]
    #[arg(required_unless_present = "authenticate_only")]
    scopes: Vec<String>,
    /// Check only whether the token is valid, not its scopes
    #[arg(long)]
    authenticate_only: bool,
    /// The account that is accessed; required for user keys
    #[arg(long, value_name = "ID")]
    account: Option<String>,
    /// The customer that is accessed
    #[arg(long, value_name = "ID")]
    customer: Option<String>,
    /// The IP address of the end client
    #[arg(long, value_name = "IP")]
    client_ip: Option<String>,
    /// Units to consume of rate limits and quota [default: 1]
    #[arg(long, value_name = "N")]
    cost: Option<u64>,
    /// Decide without consuming rate limits or quota
    #[arg(long)]
    dry_run: bool,
    /// Answer only from a state at least as new as this revision
    #[arg(long, value_name = "REVISION")]
    min_revision: Option<u64>,
}

impl CheckArgs {
    /// Sends the Check and returns the verdict's exit code.
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        let subject = self.subject_token.read_token(cx)?;
        let session = cx.connect()?;
        let request = self.into_request(&subject);
        let response =
            session.call_authz(request, async |mut client, request| client.check(request).await).await?;
        cx.print_response(&response, |colors| text_output::describe_check(&response).render(colors))?;
        Ok(if response.allowed { 0 } else { EXIT_REFUSED })
    }

    fn into_request(self, subject: &token_io::PlainToken) -> pb::CheckRequest {
        pb::CheckRequest {
            token: subject.reveal().to_owned(),
            environment: self.environment,
            scopes: self.scopes,
            authenticate_only: self.authenticate_only,
            account: self.account,
            customer: self.customer,
            client_ip: self.client_ip,
            cost: self.cost,
            dry_run: self.dry_run,
            min_revision: self.min_revision,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        args: CheckArgs,
    }

    fn read(line: &str) -> Result<CheckArgs, clap::Error> {
        Only::try_parse_from(format!("check {line}").split_whitespace()).map(|only| only.args)
    }

    fn request(line: &str) -> pb::CheckRequest {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "kw_subject\n").unwrap();
        read(line).unwrap().into_request(&token_io::read_token(&path).unwrap())
    }

    #[test]
    fn flags_become_the_request() {
        let check = request(
            "--environment production --scope a:b,c:d --scope e:f --account acme --customer c1 \
             --client-ip ::1 --cost 3 --dry-run --min-revision 9 --subject-stdin",
        );
        assert_eq!(check.token, "kw_subject");
        assert_eq!(check.scopes, ["a:b", "c:d", "e:f"]);
        assert_eq!((check.cost, check.min_revision, check.dry_run), (Some(3), Some(9), true));
        assert_eq!((check.account.as_deref(), check.client_ip.as_deref()), (Some("acme"), Some("::1")));
    }

    #[test]
    fn what_is_not_said_is_not_sent() {
        let check = request("--environment production --authenticate-only --subject-stdin");
        assert!(check.scopes.is_empty() && check.authenticate_only);
        assert_eq!((check.account, check.customer, check.client_ip, check.cost), (None, None, None, None));
    }

    #[test]
    fn bad_usage_exits_with_2() {
        for line in [
            "--environment production --scope a:b",
            "--environment production --subject-stdin",
            "--scope a:b --subject-stdin",
            "--environment production --scope a:b --subject-stdin --subject-token-file x",
            "--environment production --scope a:b --subject-stdin --cost -1",
        ] {
            assert_eq!(read(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }
}
