//! `keyward audit verify`: of the log as a server has it, or of a file that was exported or archived.

use std::{
    fs::File,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
};

use clap::Args;

use crate::{
    cli::{client::Patience, context::Context, failure::Failure, table::clean, values::shown_path},
    domain::{
        export::{NotWhole, Verifier, Whole},
        lease::Position,
        time::Revision,
        token::{Hex, from_hex},
    },
    pb,
};

/// Flags of `keyward audit verify`.
#[derive(Debug, Args)]
pub(in crate::cli) struct VerifyArgs {
    /// Verify an exported or archived file; no server is asked
    #[arg(long, value_name = "FILE", conflicts_with_all = ["from", "to", "chain_only"])]
    file: Option<PathBuf>,
    /// An entry whose hash is known from elsewhere, such as the heads that servers log every minute
    #[arg(long, value_name = "REVISION:HASH", value_parser = expected)]
    expect: Option<Position>,
    /// The first entry to verify [default: the oldest there is]
    #[arg(long, value_name = "REVISION", default_value_t = 0, hide_default_value = true)]
    from: u64,
    /// The last entry to verify [default: the newest]
    #[arg(long, value_name = "REVISION")]
    to: Option<u64>,
    /// Verify the chain alone, and not whether the database agrees with it
    #[arg(long)]
    chain_only: bool,
}

fn expected(text: &str) -> Result<Position, String> {
    let read = |(revision, hash): (&str, &str)| {
        Some(Position { revision: Revision(revision.parse().ok()?), hash: from_hex(hash)? })
    };
    let wrong =
        "write the revision, a colon, and the hash in 64 hexadecimal digits, as the log of a server has them";
    text.split_once(':').and_then(read).ok_or_else(|| wrong.to_owned())
}

impl VerifyArgs {
    pub(in crate::cli) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        match &self.file {
            Some(path) => {
                let whole = verify_file(path, self.expect)?;
                cx.console.print(&told_of_file(path, &whole))?;
                judge_file(self.expect, &whole)
            }
            None => self.ask(cx).await,
        }
    }

    async fn ask(&self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        let question = pb::VerifyAuditLogRequest {
            from_revision: self.from,
            to_revision: self.to,
            expect_revision: self.expect.map(|expect| expect.revision.0),
            expect_hash: self.expect.map(|expect| expect.hash.to_vec()).unwrap_or_default(),
            chain_only: self.chain_only,
        };
        let answer = cx
            .session()?
            .audit(Patience::Reading, question, async |mut client, request| client.verify(request).await)
            .await?;
        cx.show(&answer, |_| told(&answer))?;
        Ok(u8::from(!answer.valid))
    }
}

fn verify_file(path: &Path, expect: Option<Position>) -> Result<Whole, Failure> {
    let unreadable =
        |error: std::io::Error| Failure::usage(format!("{} cannot be read: {error}", shown_path(path)));
    let wrong = |error: NotWhole| Failure::refused(format!("{} is not whole: {error}", shown_path(path)));
    let mut verifier = Verifier::expecting(expect);
    for line in BufReader::new(File::open(path).map_err(unreadable)?).lines() {
        verifier.take(&line.map_err(unreadable)?).map_err(wrong)?;
    }
    verifier.finish().map_err(wrong)
}

fn told_of_file(path: &Path, whole: &Whole) -> String {
    format!(
        "{} is whole: {} entries, after {}:{} up to {}:{}.\n",
        path.display(),
        whole.entries,
        whole.after.revision,
        Hex(&whole.after.hash),
        whole.end.revision,
        Hex(&whole.end.hash)
    )
}

fn judge_file(expect: Option<Position>, whole: &Whole) -> Result<u8, Failure> {
    match (expect, whole.expected) {
        (None, _) | (Some(_), Some(true)) => Ok(0),
        (Some(expect), Some(false)) => Err(Failure::refused(format!(
            "entry {} has another hash: this is another history",
            expect.revision
        ))),
        (Some(expect), None) => {
            Err(Failure::refused(format!("entry {} is not in the file", expect.revision)))
        }
    }
}

fn told(answer: &pb::VerifyAuditLogResponse) -> String {
    let mut lines = vec![if answer.valid {
        "The log is whole.".to_owned()
    } else {
        "THE LOG IS NOT WHOLE, OR THE DATABASE DOES NOT AGREE WITH IT.".to_owned()
    }];
    if answer.broken_at > 0 || !answer.problem.is_empty() {
        lines.push(format!("entry {}: {}", answer.broken_at, clean(&answer.problem)));
    }
    lines.push(format!(
        "verified: {} entries, from {} to {}:{}",
        answer.entries,
        answer.first_revision,
        answer.last_revision,
        Hex(&answer.last_hash)
    ));
    lines.push(format!("head: {}:{}", answer.head, Hex(&answer.head_hash)));
    if let Some(made) = &answer.checkpoint {
        let told = format!("archived: {} entries, up to {}:{}", made.entries, made.revision, Hex(&made.hash));
        lines.push(told);
    }
    lines.push(format!("records of the database that agree with it: {}", answer.records));
    for one in &answer.mismatches {
        lines.push(format!("{}, entry {}: {}", clean(&one.record), one.revision, clean(&one.problem)));
    }
    lines.extend(told_expected(answer.expected()).map(str::to_owned));
    lines.join("\n") + "\n"
}

fn told_expected(expected: pb::ExpectedEntry) -> Option<&'static str> {
    Some(match expected {
        pb::ExpectedEntry::Unspecified => return None,
        pb::ExpectedEntry::Found => "expected: the log has that entry",
        pb::ExpectedEntry::Differs => {
            "expected: the log has ANOTHER entry in its place: it was written anew, or this is another database"
        }
        pb::ExpectedEntry::Archived => {
            "expected: that entry was archived; verify the archive with --file and the same --expect"
        }
        pb::ExpectedEntry::Lost => {
            "expected: the log ENDS BEFORE that entry: entries were lost, or a backup was restored"
        }
        pb::ExpectedEntry::Outside => "expected: that entry lies outside of what was verified",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_head_is_read_as_a_server_logs_it() {
        let hash = "ab".repeat(32);
        assert_eq!(
            expected(&format!("7:{hash}")).unwrap(),
            Position { revision: Revision(7), hash: [0xab; 32] }
        );
        for bad in ["7", "7:", "x:00", &format!("7:{hash}0")] {
            assert!(expected(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_before_the_figures() {
        let answer = pb::VerifyAuditLogResponse {
            broken_at: 3,
            problem: "it was changed".into(),
            expected: pb::ExpectedEntry::Lost.into(),
            ..Default::default()
        };
        let text = told(&answer);
        assert!(text.starts_with("THE LOG IS NOT WHOLE"), "{text}");
        assert!(text.contains("entry 3: it was changed") && text.contains("ENDS BEFORE"), "{text}");
    }
}
