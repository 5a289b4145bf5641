//! `keyward audit verify`: verifies the audit log of a server, or a file that was exported or archived.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
};

use clap::Args;

use crate::{
    cli::{
        api_client::DefaultTimeout, context::CommandContext, error::CliError, table::escape_terminal,
        value_format::shown_path,
    },
    domain::{
        lease::LogPosition,
        log_export::{LogExportError, LogExportSummary, LogExportVerifier},
        time::Revision,
        token::{HexBytes, parse_hex_bytes},
    },
    pb,
};

#[derive(Debug, Args)]
pub(in crate::cli) struct AuditVerifyArgs {
    /// Verify an exported or archived file, without a server
    #[arg(long, value_name = "FILE", conflicts_with_all = ["from", "to", "chain_only"])]
    file: Option<PathBuf>,
    /// An entry with its hash from another source, such as the heads that servers log every minute
    #[arg(long, value_name = "REVISION:HASH", value_parser = parse_position)]
    expect: Option<LogPosition>,
    /// The first entry to verify [default: the oldest]
    #[arg(long, value_name = "REVISION", default_value_t = 0, hide_default_value = true)]
    from: u64,
    /// The last entry to verify [default: the newest]
    #[arg(long, value_name = "REVISION")]
    to: Option<u64>,
    /// Verify only the hash chain, not whether the database agrees with it
    #[arg(long)]
    chain_only: bool,
}

fn parse_position(text: &str) -> Result<LogPosition, String> {
    let read = |(revision, hash): (&str, &str)| {
        Some(LogPosition { revision: Revision(revision.parse().ok()?), hash: parse_hex_bytes(hash)? })
    };
    let usage = "write the revision, a colon, and the hash in 64 hexadecimal digits, as a server logs them";
    text.split_once(':').and_then(read).ok_or_else(|| usage.to_owned())
}

impl AuditVerifyArgs {
    pub(in crate::cli) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        match &self.file {
            Some(path) => {
                let summary = verify_file(path, self.expect)?;
                cx.console.print(&format_file_summary(path, &summary))?;
                check_expected_entry(self.expect, &summary)
            }
            None => self.verify_on_server(cx).await,
        }
    }

    async fn verify_on_server(&self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        let request = pb::VerifyAuditLogRequest {
            from_revision: self.from,
            to_revision: self.to,
            expect_revision: self.expect.map(|expect| expect.revision.0),
            expect_hash: self.expect.map(|expect| expect.hash.to_vec()).unwrap_or_default(),
            chain_only: self.chain_only,
        };
        let response = cx
            .connect()?
            .call_audit(DefaultTimeout::FullScan, request, async |mut client, request| {
                client.verify(request).await
            })
            .await?;
        cx.print_response(&response, |_| format_report(&response))?;
        Ok(u8::from(!response.valid))
    }
}

fn verify_file(path: &Path, expect: Option<LogPosition>) -> Result<LogExportSummary, CliError> {
    let unreadable =
        |error: std::io::Error| CliError::new(format!("cannot read {}: {error}", shown_path(path)));
    let invalid =
        |error: LogExportError| CliError::refused(format!("{} is not valid: {error}", shown_path(path)));
    let mut verifier = LogExportVerifier::with_expected(expect);
    for line in BufReader::new(File::open(path).map_err(unreadable)?).lines() {
        verifier.verify_line(&line.map_err(unreadable)?).map_err(invalid)?;
    }
    verifier.finish().map_err(invalid)
}

fn format_file_summary(path: &Path, summary: &LogExportSummary) -> String {
    format!(
        "{} is valid: {} entries, after {}:{} up to {}:{}.\n",
        path.display(),
        summary.entry_count,
        summary.after.revision,
        HexBytes(&summary.after.hash),
        summary.end.revision,
        HexBytes(&summary.end.hash)
    )
}

fn check_expected_entry(expect: Option<LogPosition>, summary: &LogExportSummary) -> Result<u8, CliError> {
    match (expect, summary.matches_expected) {
        (None, _) | (Some(_), Some(true)) => Ok(0),
        (Some(expect), Some(false)) => Err(CliError::refused(format!(
            "entry {} has another hash: the file has a different history",
            expect.revision
        ))),
        (Some(expect), None) => {
            Err(CliError::refused(format!("entry {} is not in the file", expect.revision)))
        }
    }
}

fn format_report(response: &pb::VerifyAuditLogResponse) -> String {
    let mut lines = vec![if response.valid {
        "The log is valid.".to_owned()
    } else {
        "THE LOG IS NOT VALID, OR THE DATABASE DOES NOT AGREE WITH IT.".to_owned()
    }];
    if response.broken_at > 0 || !response.problem.is_empty() {
        lines.push(format!("entry {}: {}", response.broken_at, escape_terminal(&response.problem)));
    }
    lines.push(format!(
        "verified: {} entries, from {} to {}:{}",
        response.entries,
        response.first_revision,
        response.last_revision,
        HexBytes(&response.last_hash)
    ));
    lines.push(format!("head: {}:{}", response.head, HexBytes(&response.head_hash)));
    if let Some(archive) = &response.checkpoint {
        lines.push(format!(
            "archived: {} entries, up to {}:{}",
            archive.entries,
            archive.revision,
            HexBytes(&archive.hash)
        ));
    }
    lines.push(format!("database records that agree with it: {}", response.records));
    for mismatch in &response.mismatches {
        lines.push(format!(
            "{}, entry {}: {}",
            escape_terminal(&mismatch.record),
            mismatch.revision,
            escape_terminal(&mismatch.problem)
        ));
    }
    lines.extend(format_expected_entry(response.expected()).map(str::to_owned));
    lines.join("\n") + "\n"
}

fn format_expected_entry(expected: pb::ExpectedEntry) -> Option<&'static str> {
    Some(match expected {
        pb::ExpectedEntry::Unspecified => return None,
        pb::ExpectedEntry::Found => "expected: the log has that entry",
        pb::ExpectedEntry::Differs => {
            "expected: the log has ANOTHER entry in its place: it was rewritten, or this is another database"
        }
        pb::ExpectedEntry::Archived => {
            "expected: that entry was archived; verify the archive with --file and the same --expect"
        }
        pb::ExpectedEntry::Lost => {
            "expected: the log ENDS BEFORE that entry: entries were lost, or a backup was restored"
        }
        pb::ExpectedEntry::Outside => "expected: that entry is outside of the verified range",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_head_is_read_as_a_server_logs_it() {
        let hash = "ab".repeat(32);
        assert_eq!(
            parse_position(&format!("7:{hash}")).unwrap(),
            LogPosition { revision: Revision(7), hash: [0xab; 32] }
        );
        for bad in ["7", "7:", "x:00", &format!("7:{hash}0")] {
            assert!(parse_position(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_before_the_figures() {
        let response = pb::VerifyAuditLogResponse {
            broken_at: 3,
            problem: "it was changed".into(),
            expected: pb::ExpectedEntry::Lost.into(),
            ..Default::default()
        };
        let text = format_report(&response);
        assert!(text.starts_with("THE LOG IS NOT VALID"), "{text}");
        assert!(text.contains("entry 3: it was changed") && text.contains("ENDS BEFORE"), "{text}");
    }
}
