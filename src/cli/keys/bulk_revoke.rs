//! `keyward keys bulk-revoke`: revokes all keys that match a filter. It repeats the call until the server has no more.

use std::fmt;

use clap::Args;
use comfy_table::Color;

use super::args::RevokeReasonArg;
use crate::{
    cli::{
        api_client::{ApiClient, DefaultTimeout},
        context::CommandContext,
        error::{CliError, EXIT_REFUSED},
        table::{ListTable, plain_cell, shown_value},
        text_output,
        value_format::PastInstantArg,
    },
    clock::{Clock, SystemClock},
    pb,
};

const BULK_REVOKE_HELP: &str = "\
Keys that are already revoked are not changed. The command shows how many keys match and asks for confirmation on the \
terminal, even if stdin is a pipe; without a terminal it needs --yes. \
Exit code 1: some keys could not be revoked; the table has the reasons.

Example: keyward keys bulk-revoke --account acme --environment staging --created-before 90d --dry-run";

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct KeyOwnerArgs {
    /// Service keys of this account
    #[arg(long, value_name = "ID")]
    account: Option<String>,
    /// User keys of this user
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// Keys of every account but the operator's
    #[arg(long)]
    all_accounts: bool,
}

impl fmt::Display for KeyOwnerArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.account, &self.user) {
            (Some(account), _) => write!(f, "account {}", shown_value(account)),
            (None, Some(user)) => write!(f, "user {}", shown_value(user)),
            (None, None) => f.write_str("every account but the operator's"),
        }
    }
}

#[derive(Debug, Args)]
#[command(after_help = BULK_REVOKE_HELP)]
pub(in crate::cli) struct BulkRevokeArgs {
    #[command(flatten)]
    owner: KeyOwnerArgs,
    /// Only keys of this environment
    #[arg(long, short, value_name = "NAME")]
    environment: Option<String>,
    /// Only keys created before then: a duration ago (90d) or an instant (RFC 3339)
    #[arg(long, value_name = "WHEN", value_parser = PastInstantArg::parse)]
    created_before: Option<PastInstantArg>,
    /// Only keys whose name starts with this text
    #[arg(long, value_name = "TEXT")]
    name_prefix: Option<String>,
    /// Why the keys are revoked, for the audit log
    #[arg(long, value_enum, value_name = "REASON")]
    reason: Option<RevokeReasonArg>,
    /// Text for the audit log
    #[arg(long, value_name = "TEXT")]
    comment: Option<String>,
    /// List the keys that would be revoked, without revoking them
    #[arg(long)]
    dry_run: bool,
    /// Do not ask for confirmation
    #[arg(long, short)]
    yes: bool,
}

impl BulkRevokeArgs {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        if !self.dry_run {
            // Fails before anything is sent if there is no terminal to ask on.
            cx.console.needs_confirmation(self.yes)?;
        }
        let session = cx.connect()?;
        let request = self.build_request(&SystemClock);
        if self.dry_run {
            let response = call_bulk_revoke(&session, request).await?;
            cx.print_response(&response, |colors| render_results(&response.keys, true, colors))?;
            cx.console.eprint(&format!("{} would be revoked; none was.\n", format_found_count(&response)));
            return Ok(0);
        }
        if cx.console.needs_confirmation(self.yes)? {
            let matching =
                call_bulk_revoke(&session, pb::BulkRevokeKeysRequest { dry_run: true, ..request.clone() })
                    .await?;
            if matching.keys.is_empty() {
                cx.print_response(&matching, |_| "No keys.\n".to_owned())?;
                return Ok(0);
            }
            cx.console.confirm(
                &format!("Permanently revoke {} of {}?", format_found_count(&matching), self.owner),
                false,
            )?;
        }
        let (all, failure) =
            revoke_all_batches(async || call_bulk_revoke(&session, request.clone()).await).await;
        print_report(cx, &all)?;
        failure.map_or(Ok(exit_code(&all)), Err)
    }

    fn build_request(&self, clock: &dyn Clock) -> pb::BulkRevokeKeysRequest {
        pb::BulkRevokeKeysRequest {
            account: self.owner.account.clone().unwrap_or_default(),
            user: self.owner.user.clone().unwrap_or_default(),
            all_accounts: self.owner.all_accounts,
            environment: self.environment.clone().unwrap_or_default(),
            created_before: self.created_before.map(|past| past.resolve(clock)),
            name_prefix: self.name_prefix.clone().unwrap_or_default(),
            dry_run: self.dry_run,
            reason: self.reason.map_or(pb::RevokeReason::Unspecified, Into::into).into(),
            comment: self.comment.clone().unwrap_or_default(),
        }
    }
}

async fn call_bulk_revoke(
    session: &ApiClient,
    request: pb::BulkRevokeKeysRequest,
) -> Result<pb::BulkRevokeKeysResponse, CliError> {
    session
        .call_keys(DefaultTimeout::Propagation, request, async |mut client, request| {
            client.bulk_revoke(request).await
        })
        .await
}

/// Calls the server until no keys are left, and merges the responses. The result includes what was done before a failure.
async fn revoke_all_batches(
    mut call: impl AsyncFnMut() -> Result<pb::BulkRevokeKeysResponse, CliError>,
) -> (pb::BulkRevokeKeysResponse, Option<CliError>) {
    let mut all = pb::BulkRevokeKeysResponse::default();
    loop {
        let response = match call().await {
            Ok(response) => response,
            Err(failure) => return (all, Some(failure)),
        };
        // The next call repeats keys that failed, so only their last result counts.
        all.keys.retain(|key| key.revoked);
        let progress = response.keys.iter().any(|key| key.revoked);
        all.keys.extend(response.keys);
        all.revision = all.revision.max(response.revision);
        all.propagation = response.propagation;
        all.more = response.more;
        if !all.more {
            return (all, None);
        }
        if !progress {
            let failure = CliError::refused("more keys match, but none of these could be revoked");
            return (
                all,
                Some(failure.with_hint("resolve the errors in the table, then repeat the command")),
            );
        }
    }
}

fn print_report(cx: &mut CommandContext<'_>, all: &pb::BulkRevokeKeysResponse) -> Result<(), CliError> {
    cx.print_response(all, |colors| {
        let table = render_results(&all.keys, false, colors);
        if all.keys.iter().any(|key| key.revoked) {
            return table + "\n" + &text_output::format_propagation(all.revision, all.propagation.as_ref());
        }
        table
    })?;
    let revoked = all.keys.iter().filter(|key| key.revoked).count();
    cx.console.eprint(&format!(
        "{}, {} failed.\n",
        format_key_count(revoked, " revoked"),
        all.keys.len() - revoked
    ));
    Ok(())
}

fn exit_code(all: &pb::BulkRevokeKeysResponse) -> u8 {
    if all.keys.iter().all(|key| key.revoked) { 0 } else { EXIT_REFUSED }
}

/// Formats the number of keys that a dry run found.
fn format_found_count(response: &pb::BulkRevokeKeysResponse) -> String {
    let more = if response.more { "more than " } else { "" };
    format!("{more}{}", format_key_count(response.keys.len(), ""))
}

fn format_key_count(count: usize, suffix: &str) -> String {
    format!("{count} {}{suffix}", if count == 1 { "key" } else { "keys" })
}

fn render_results(results: &[pb::BulkRevokeResult], dry_run: bool, colors: bool) -> String {
    let mut rows = ListTable::new(&["ID", "NAME", "OWNER", "ENVIRONMENT", "HINT", "RESULT"], colors);
    for result in results {
        let nothing = pb::Key::default();
        let key = result.key.as_ref().unwrap_or(&nothing);
        rows.add_row([
            plain_cell(&key.id),
            plain_cell(&key.name),
            plain_cell(text_output::format_key_owner(key)),
            plain_cell(&key.environment),
            plain_cell(&key.hint),
            match (result.revoked, dry_run) {
                (true, true) => plain_cell("would be revoked"),
                (true, false) => ("revoked".to_owned(), Some(Color::Green)),
                (false, _) => (format!("failed: {}", result.error), Some(Color::Red)),
            },
        ]);
    }
    rows.render("No keys.")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{clock::ManualClock, domain::time::Timestamp};

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        args: BulkRevokeArgs,
    }

    fn read(line: &str) -> Result<BulkRevokeArgs, clap::Error> {
        Only::try_parse_from(format!("bulk-revoke {line}").split_whitespace()).map(|only| only.args)
    }

    fn result(id: &str, error: &str) -> pb::BulkRevokeResult {
        let key = Some(pb::Key { id: id.into(), ..Default::default() });
        pb::BulkRevokeResult { key, revoked: error.is_empty(), error: error.into() }
    }

    /// Plays a server that gives these answers; the ids and errors that come out, and how it ended.
    async fn played(answers: Vec<(Vec<pb::BulkRevokeResult>, bool)>) -> (Vec<(String, String)>, u8) {
        let mut answers = answers.into_iter();
        let (all, failure) = revoke_all_batches(async || {
            let (keys, more) = answers.next().ok_or_else(|| CliError::new("gone"))?;
            Ok(pb::BulkRevokeKeysResponse { keys, more, ..Default::default() })
        })
        .await;
        let code = failure.map_or(exit_code(&all), |failure| failure.exit_code());
        let keys = all.keys.into_iter().map(|result| (result.key.unwrap_or_default().id, result.error));
        (keys.collect(), code)
    }

    fn expected_results(keys: &[(&str, &str)]) -> Vec<(String, String)> {
        keys.iter().map(|(id, error)| ((*id).to_owned(), (*error).to_owned())).collect()
    }

    #[test]
    fn whose_keys_must_be_said_and_only_once() {
        for bad in ["", "--account a --user u", "--account a --all-accounts", "--environment dev"] {
            assert_eq!(read(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn the_question_names_whose_keys_are_revoked() {
        for (line, named) in [
            ("--account acme", "account acme"),
            ("--user ada", "user ada"),
            ("--all-accounts", "every account but the operator's"),
        ] {
            assert_eq!(read(line).unwrap().owner.to_string(), named);
        }
    }

    #[test]
    fn flags_become_the_request() {
        let line = "--user ada -e dev --created-before 1d --name-prefix ci --reason owner-left --dry-run";
        let request =
            read(line).unwrap().build_request(&ManualClock::new(Timestamp::from_micros(100_000_000_000)));
        assert_eq!((request.user.as_str(), request.environment.as_str()), ("ada", "dev"));
        assert_eq!(request.created_before.map(|at| at.seconds), Some(100_000 - 86_400));
        assert_eq!((request.reason(), request.dry_run), (pb::RevokeReason::OwnerLeft, true));
    }

    #[tokio::test]
    async fn the_server_is_asked_until_there_is_no_more() {
        let answers = vec![(vec![result("1", ""), result("2", "")], true), (vec![result("3", "")], false)];
        assert_eq!(played(answers).await, (expected_results(&[("1", ""), ("2", ""), ("3", "")]), 0));
    }

    #[tokio::test]
    async fn a_key_that_failed_is_told_once_and_ends_with_exit_code_1() {
        let answers = vec![
            (vec![result("1", "CONTENDED"), result("2", "")], true),
            (vec![result("1", "CONTENDED"), result("3", "")], false),
        ];
        assert_eq!(played(answers).await, (expected_results(&[("2", ""), ("1", "CONTENDED"), ("3", "")]), 1));
    }

    #[tokio::test]
    async fn keys_that_only_fail_are_not_asked_for_for_ever() {
        let answers = vec![(vec![result("1", "CONTENDED")], true)];
        assert_eq!(played(answers).await, (expected_results(&[("1", "CONTENDED")]), 1));
    }

    #[tokio::test]
    async fn what_was_revoked_before_a_failure_is_told_all_the_same() {
        assert_eq!(played(vec![(vec![result("1", "")], true)]).await, (expected_results(&[("1", "")]), 2));
    }

    #[test]
    fn a_dry_run_counts_and_says_when_there_are_more() {
        let response = |keys, more| pb::BulkRevokeKeysResponse { keys, more, ..Default::default() };
        assert_eq!(format_found_count(&response(vec![result("1", "")], false)), "1 key");
        assert_eq!(
            format_found_count(&response(vec![result("1", ""), result("2", "")], true)),
            "more than 2 keys"
        );
        assert!(render_results(&[result("1", "")], true, false).contains("would be revoked"));
    }
}
