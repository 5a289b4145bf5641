//! Formats and verifies the log as a file of JSON lines: a header, a line per entry with everything that its hash
//! covers, and a trailer. `docs/operations.md` describes how the hash is computed.

use serde::{Deserialize, Serialize};

use super::{
    lease::LogPosition,
    log::LogEntry,
    log_chain::ChainVerifier,
    log_payload::HexPosition,
    name::{AccountId, KeyId, UserId},
    text::escape_json,
    time::{Revision, Timestamp},
    token::{HexBytes, parse_hex_bytes},
};

/// The identification of the format in the header.
const EXPORT_FORMAT: &str = "keyward-log-1";

/// A line of the file.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum LogExportLine {
    Header { format: String, after: HexPosition },
    Entry(Box<LogExportEntry>),
    Trailer { end: HexPosition, entries: u64 },
}

/// An entry with all that is under its hash; instants in microseconds since 1970, hashes in hex.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogExportEntry {
    revision: Revision,
    at: Timestamp,
    action: String,
    account: Option<AccountId>,
    key_id: Option<KeyId>,
    user: Option<UserId>,
    actor: String,
    actor_account: Option<AccountId>,
    acting_user: Option<UserId>,
    method: String,
    payload: String,
    prev_hash: String,
    hash: String,
}

fn serialize_line(line: &LogExportLine) -> String {
    // Text and numbers always serialize. Unprintable characters are escaped because exports are read on terminals.
    let mut text = escape_json(serde_json::to_string(line).unwrap_or_default());
    text.push('\n');
    text
}

/// The first line of an export that begins after this entry.
#[must_use]
pub fn header_line(after: LogPosition) -> String {
    serialize_line(&LogExportLine::Header { format: EXPORT_FORMAT.to_owned(), after: after.into() })
}

/// Formats the trailer of an export.
#[must_use]
pub fn trailer_line(at: LogPosition, entries: u64) -> String {
    serialize_line(&LogExportLine::Trailer { end: at.into(), entries })
}

/// Formats the line of an entry.
#[must_use]
pub fn entry_line(row: &LogEntry) -> String {
    let LogEntry { revision, at, action, account, key_id, user, actor, actor_account, acting_user, .. } =
        row.clone();
    serialize_line(&LogExportLine::Entry(Box::new(LogExportEntry {
        revision,
        at,
        action,
        account,
        key_id,
        user,
        actor,
        actor_account,
        acting_user,
        method: row.method.clone(),
        payload: row.payload.clone(),
        prev_hash: HexBytes(&row.prev_hash).to_string(),
        hash: HexBytes(&row.hash).to_string(),
    })))
}

impl LogExportEntry {
    fn into_log_entry(self) -> Option<LogEntry> {
        Some(LogEntry {
            revision: self.revision,
            at: self.at,
            action: self.action,
            account: self.account,
            key_id: self.key_id,
            user: self.user,
            actor: self.actor,
            actor_account: self.actor_account,
            acting_user: self.acting_user,
            method: self.method,
            payload: self.payload,
            prev_hash: parse_hex_bytes(&self.prev_hash)?,
            hash: parse_hex_bytes(&self.hash)?,
        })
    }
}

/// Why an export is not whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct LogExportError {
    /// The line, counted from 1.
    pub line: u64,
    /// The problem with that line.
    pub problem: String,
}

/// What a whole export holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogExportSummary {
    /// It begins after this entry.
    pub after: LogPosition,
    /// The position of the last entry.
    pub end: LogPosition,
    /// The number of entries in the file.
    pub entry_count: u64,
    /// Whether the file has the expected entry with that hash; None = the file does not reach it.
    pub matches_expected: Option<bool>,
}

/// Verifies an export line by line.
#[derive(Debug, Default)]
pub struct LogExportVerifier {
    line_number: u64,
    start: Option<LogPosition>,
    chain: Option<ChainVerifier>,
    ended: bool,
    expected_position: Option<LogPosition>,
    matches_expected: Option<bool>,
}

impl LogExportVerifier {
    /// One that also looks for an entry whose hash is known from elsewhere.
    #[must_use]
    pub fn with_expected(expect: Option<LogPosition>) -> LogExportVerifier {
        LogExportVerifier { expected_position: expect, ..LogExportVerifier::default() }
    }

    fn error_at_line<T>(&self, problem: impl Into<String>) -> Result<T, LogExportError> {
        Err(LogExportError { line: self.line_number, problem: problem.into() })
    }

    /// Verifies the next line.
    ///
    /// # Errors
    /// If the line does not belong to an export, or does not fit.
    pub fn verify_line(&mut self, text: &str) -> Result<(), LogExportError> {
        self.line_number += 1;
        if self.ended {
            return self.error_at_line("something follows the end");
        }
        let Ok(line) = serde_json::from_str::<LogExportLine>(text) else {
            return self.error_at_line("it is no line of a log export");
        };
        match (line, self.chain) {
            (LogExportLine::Header { format, after }, None) => self.verify_header(&format, &after),
            (LogExportLine::Entry(entry), Some(_)) => self.verify_entry(*entry),
            (LogExportLine::Trailer { end, entries }, Some(chain)) => {
                self.verify_trailer(&end, entries, chain)
            }
            (LogExportLine::Header { .. }, Some(_)) => self.error_at_line("it begins twice"),
            (_, None) => self.error_at_line("the first line must be the export's header"),
        }
    }

    fn verify_header(&mut self, format: &str, after: &HexPosition) -> Result<(), LogExportError> {
        if format != EXPORT_FORMAT {
            return self
                .error_at_line(format!("the format is {format:?}; this version reads {EXPORT_FORMAT:?}"));
        }
        let Some(after) = after.to_position() else {
            return self.error_at_line("a hash is 64 hexadecimal digits");
        };
        (self.start, self.chain) = (Some(after), Some(ChainVerifier::from_position(after)));
        self.compare_expected(after);
        Ok(())
    }

    fn verify_entry(&mut self, entry: LogExportEntry) -> Result<(), LogExportError> {
        let Some(row) = entry.into_log_entry() else {
            return self.error_at_line("a hash is 64 hexadecimal digits");
        };
        let Some(chain) = &mut self.chain else { return self.error_at_line("the file has no beginning") };
        let (taken, next) = (chain.verify_next(&row), chain.position.revision.next());
        if let Err(fault) = taken {
            return self.error_at_line(format!("entry {next}: {fault}"));
        }
        self.compare_expected(LogPosition { revision: row.revision, hash: row.hash });
        Ok(())
    }

    fn verify_trailer(
        &mut self,
        end: &HexPosition,
        entries: u64,
        chain: ChainVerifier,
    ) -> Result<(), LogExportError> {
        if end.to_position() != Some(chain.position) || entries != chain.entry_count {
            let problem = format!(
                "the file should hold {entries} entries up to {}, and holds {} up to {}",
                end.revision, chain.entry_count, chain.position.revision
            );
            return self.error_at_line(problem);
        }
        self.ended = true;
        Ok(())
    }

    fn compare_expected(&mut self, at: LogPosition) {
        if let Some(expect) = self.expected_position.filter(|expect| expect.revision == at.revision) {
            self.matches_expected = Some(expect.hash == at.hash);
        }
    }

    /// Verifies the end of the file.
    ///
    /// # Errors
    /// When its last line is missing: it was cut.
    pub fn finish(self) -> Result<LogExportSummary, LogExportError> {
        match (self.ended, self.start, self.chain) {
            (true, Some(after), Some(chain)) => Ok(LogExportSummary {
                after,
                end: chain.position,
                entry_count: chain.entry_count,
                matches_expected: self.matches_expected,
            }),
            _ => {
                let problem = "the file is truncated: its last line with the number of entries is missing";
                Err(LogExportError { line: self.line_number + 1, problem: problem.to_owned() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::log::{GENESIS_HASH, tests::sample_entry};

    fn file() -> Vec<String> {
        let mut lines = vec![header_line(LogPosition::START)];
        let mut hash = GENESIS_HASH;
        for revision in 1..=3 {
            let row = sample_entry(revision, hash);
            hash = row.hash;
            lines.push(entry_line(&row));
        }
        lines.push(trailer_line(LogPosition { revision: Revision(3), hash }, 3));
        lines
    }

    fn verify(lines: &[String], expect: Option<LogPosition>) -> Result<LogExportSummary, LogExportError> {
        let mut verifier = LogExportVerifier::with_expected(expect);
        for line in lines {
            verifier.verify_line(line.trim_end())?;
        }
        verifier.finish()
    }

    #[test]
    fn a_whole_export_verifies_and_knows_its_entries() {
        let whole = verify(&file(), None).unwrap();
        assert_eq!(
            (whole.entry_count, whole.after, whole.end.revision),
            (3, LogPosition::START, Revision(3))
        );
        let expect = |position| verify(&file(), Some(position)).unwrap().matches_expected;
        assert_eq!(expect(whole.end), Some(true));
        assert_eq!(expect(LogPosition { hash: [1; 32], ..whole.end }), Some(false));
        assert_eq!(expect(LogPosition { revision: Revision(9), ..whole.end }), None);
    }

    #[test]
    fn an_export_steers_no_terminal_and_verifies() {
        let mut row = sample_entry(1, GENESIS_HASH);
        row.payload = "{\"comment\":\"a\u{9b}2J\u{7f}\u{202e}\u{2028}\"}".to_owned();
        row.hash = row.compute_hash();
        let lines = [
            header_line(LogPosition::START),
            entry_line(&row),
            trailer_line(LogPosition { revision: Revision(1), hash: row.hash }, 1),
        ];
        assert!(lines[1].contains(r"a\u009b2J\u007f\u202e\u2028"), "{}", lines[1]);
        assert_eq!(verify(&lines, None).unwrap().entry_count, 1);
    }

    #[test]
    fn what_was_changed_taken_out_or_cut_is_found() {
        let mut changed = file();
        changed[2] = changed[2].replace("system", "somebody");
        let mut without = file();
        without.remove(2);
        let mut cut = file();
        cut.pop();
        let mut longer = file();
        longer.push(longer[1].clone());
        for (lines, line, problem) in [
            (changed, 3, "entry 2: the entry is not what its hash was made of"),
            (without, 3, "entry 2: the entry is missing; the next one there is 3"),
            (cut, 5, "is truncated"),
            (longer, 6, "follows the end"),
            (file()[1..].to_vec(), 1, "first line"),
            (vec!["x".to_owned()], 1, "no line of a log export"),
        ] {
            let error = verify(&lines, None).unwrap_err();
            assert!(error.line == line && error.problem.contains(problem), "{error}");
        }
    }
}
