//! `keyward audit`: lists, verifies, exports and archives the audit log.

pub(super) mod archive;
mod export;
mod verify;

use clap::{Args, Subcommand};

use super::{
    api_client::DefaultTimeout,
    context::CommandContext,
    error::CliError,
    paging::PageArgs,
    table::{ListTable, plain_cell},
    value_format::{PastInstantArg, format_rfc3339},
};
use crate::{clock::SystemClock, pb};

#[derive(Debug, Subcommand)]
pub(super) enum AuditCommand {
    /// List changes, newest first
    List(AuditListArgs),
    /// Verify that the log is complete and that the database agrees with it; exit code 0 if both hold
    Verify(verify::AuditVerifyArgs),
    /// Export the log as JSON lines that anybody can verify without a server
    Export(export::AuditExportArgs),
    /// Move the oldest entries to a file, with direct access to the database
    Archive(archive::AuditArchiveArgs),
}

impl AuditCommand {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        match self {
            AuditCommand::List(args) => args.run(cx).await,
            AuditCommand::Verify(args) => args.run(cx).await,
            AuditCommand::Export(args) => args.run(cx).await,
            // `cli::main` runs it, because it needs the database instead of a server.
            AuditCommand::Archive(_) => Ok(0),
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct AuditListArgs {
    /// Only changes in this account
    #[arg(long, value_name = "ID")]
    account: Option<String>,
    /// Only changes of this key
    #[arg(long, value_name = "ID")]
    key: Option<String>,
    /// Only changes made by the key with this id
    #[arg(long, value_name = "ID")]
    actor: Option<String>,
    /// Only changes made on behalf of this user
    #[arg(long, value_name = "USER")]
    acting_user: Option<String>,
    /// Only changes of this kind, such as key.revoked
    #[arg(long, value_name = "ACTION")]
    action: Option<String>,
    /// List the oldest changes first
    #[arg(long)]
    oldest_first: bool,
    /// Only changes since then: a duration ago (12h) or an instant (RFC 3339)
    #[arg(long, value_name = "WHEN", value_parser = PastInstantArg::parse)]
    from: Option<PastInstantArg>,
    /// Only changes before then: a duration ago (12h) or an instant (RFC 3339)
    #[arg(long, value_name = "WHEN", value_parser = PastInstantArg::parse)]
    to: Option<PastInstantArg>,
    #[command(flatten)]
    page: PageArgs,
}

impl AuditListArgs {
    async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        let session = cx.connect()?;
        let request = pb::ListAuditEntriesRequest {
            account: self.account.unwrap_or_default(),
            key_id: self.key.unwrap_or_default(),
            actor: self.actor.unwrap_or_default(),
            from: self.from.map(|past| past.resolve(&SystemClock)),
            to: self.to.map(|past| past.resolve(&SystemClock)),
            acting_user: self.acting_user.unwrap_or_default(),
            action: self.action.unwrap_or_default(),
            oldest_first: self.oldest_first,
            ..Default::default()
        };
        let fetched = self
            .page
            .fetch_pages(async |size, page_token| {
                let request =
                    pb::ListAuditEntriesRequest { page_size: Some(size), page_token, ..request.clone() };
                let response = session
                    .call_audit(DefaultTimeout::Quick, request, async |mut client, request| {
                        client.list(request).await
                    })
                    .await?;
                Ok((response.entries, response.next_page_token))
            })
            .await?;
        let note = fetched.truncation_note();
        let response =
            pb::ListAuditEntriesResponse { entries: fetched.items, next_page_token: fetched.next_page_token };
        cx.print_response(&response, |colors| render_entries(&response.entries, colors))?;
        cx.console.eprint(&note.unwrap_or_default());
        Ok(0)
    }
}

fn render_entries(entries: &[pb::AuditEntry], colors: bool) -> String {
    let mut rows = ListTable::new(
        &["REVISION", "AT", "ACTION", "ACCOUNT", "USER", "KEY", "ACTOR", "FOR", "METHOD", "CHANGED"],
        colors,
    );
    for entry in entries {
        rows.add_row([
            plain_cell(entry.revision.to_string()),
            plain_cell(entry.at.as_ref().map(format_rfc3339).unwrap_or_default()),
            plain_cell(&entry.action),
            plain_cell(&entry.account),
            plain_cell(&entry.user),
            plain_cell(&entry.key_id),
            plain_cell(&entry.actor),
            plain_cell(&entry.acting_user),
            plain_cell(entry.method.rsplit('.').next().unwrap_or_default()),
            plain_cell(format_changed_fields(entry)),
        ]);
    }
    rows.render("No changes.")
}

/// Lists the fields that an entry changed, or "new" for a new record.
fn format_changed_fields(entry: &pb::AuditEntry) -> String {
    if entry.previous_revision == Some(0) {
        return "new".to_owned();
    }
    let names = entry.changes.iter().map(|change| change.field.as_str());
    // `updated_at` changes with every entry, so it carries no information.
    names.filter(|name| *name != "updated_at").collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_who_did_what_when() {
        let entry = pb::AuditEntry {
            revision: 7,
            at: Some(prost_types::Timestamp { seconds: 0, nanos: 0 }),
            action: "key.revoked".into(),
            actor: "system".into(),
            method: "keyward.v1.KeyService/Revoke".into(),
            ..Default::default()
        };
        let text = render_entries(&[entry], false);
        for part in ["7", "1970-01-01T00:00:00Z", "key.revoked", "system", "KeyService/Revoke"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
