//! The log as a file that anybody can verify: JSON, a line for the beginning, a line for each entry with all that its
//! hash is made of, a line for the end. `docs/operations.md` says how the hash is made.

use serde::{Deserialize, Serialize};

use super::{
    chain::Chain,
    entry::Upto,
    lease::Position,
    log::LogRow,
    name::{AccountId, KeyId, UserId},
    text::escape_json,
    time::{Revision, Timestamp},
    token::{Hex, from_hex},
};

/// What the first line says of the format.
const FORMAT: &str = "keyward-log-1";

/// A line of the file.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Line {
    Begin { format: String, after: Upto },
    Entry(Box<Entry>),
    End { end: Upto, entries: u64 },
}

/// An entry with all that is under its hash; instants in microseconds since 1970, hashes in hex.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
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

fn said(line: &Line) -> String {
    // Text and numbers: there is nothing that JSON cannot say. An export is often read on a terminal.
    let mut text = escape_json(serde_json::to_string(line).unwrap_or_default());
    text.push('\n');
    text
}

/// The first line of an export that begins after this entry.
#[must_use]
pub fn begin(after: Position) -> String {
    said(&Line::Begin { format: FORMAT.to_owned(), after: after.into() })
}

/// The last line of an export of so many entries.
#[must_use]
pub fn end(at: Position, entries: u64) -> String {
    said(&Line::End { end: at.into(), entries })
}

/// An entry's line.
#[must_use]
pub fn line(row: &LogRow) -> String {
    let LogRow { revision, at, action, account, key_id, user, actor, actor_account, acting_user, .. } =
        row.clone();
    said(&Line::Entry(Box::new(Entry {
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
        prev_hash: Hex(&row.prev_hash).to_string(),
        hash: Hex(&row.hash).to_string(),
    })))
}

impl Entry {
    fn row(self) -> Option<LogRow> {
        Some(LogRow {
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
            prev_hash: from_hex(&self.prev_hash)?,
            hash: from_hex(&self.hash)?,
        })
    }
}

/// Why an export is not whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {problem}")]
pub struct NotWhole {
    /// The line, counted from 1.
    pub line: u64,
    /// What is wrong.
    pub problem: String,
}

/// What a whole export holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Whole {
    /// It begins after this entry.
    pub after: Position,
    /// Its last entry.
    pub end: Position,
    /// How many entries.
    pub entries: u64,
    /// Whether it has the entry that was asked for, with that hash; None = it does not reach there.
    pub expected: Option<bool>,
}

/// Verifies an export line by line.
#[derive(Debug, Default)]
pub struct Verifier {
    line: u64,
    after: Option<Position>,
    chain: Option<Chain>,
    ended: bool,
    expect: Option<Position>,
    expected: Option<bool>,
}

impl Verifier {
    /// One that also looks for an entry whose hash is known from elsewhere.
    #[must_use]
    pub fn expecting(expect: Option<Position>) -> Verifier {
        Verifier { expect, ..Verifier::default() }
    }

    fn wrong<T>(&self, problem: impl Into<String>) -> Result<T, NotWhole> {
        Err(NotWhole { line: self.line, problem: problem.into() })
    }

    /// Takes the next line.
    ///
    /// # Errors
    /// When it is none of an export, or does not fit.
    pub fn take(&mut self, text: &str) -> Result<(), NotWhole> {
        self.line += 1;
        if self.ended {
            return self.wrong("something follows the end");
        }
        let Ok(line) = serde_json::from_str::<Line>(text) else {
            return self.wrong("it is no line of a log export");
        };
        match (line, self.chain) {
            (Line::Begin { format, after }, None) => self.begin(&format, &after),
            (Line::Entry(entry), Some(_)) => self.entry(*entry),
            (Line::End { end, entries }, Some(chain)) => self.end(&end, entries, chain),
            (Line::Begin { .. }, Some(_)) => self.wrong("it begins twice"),
            (_, None) => self.wrong("the first line must say what the file is"),
        }
    }

    fn begin(&mut self, format: &str, after: &Upto) -> Result<(), NotWhole> {
        if format != FORMAT {
            return self.wrong(format!("the format is {format:?}; this version reads {FORMAT:?}"));
        }
        let Some(after) = after.position() else { return self.wrong("a hash is 64 hexadecimal digits") };
        (self.after, self.chain) = (Some(after), Some(Chain::after(after)));
        self.look(after);
        Ok(())
    }

    fn entry(&mut self, entry: Entry) -> Result<(), NotWhole> {
        let Some(row) = entry.row() else { return self.wrong("a hash is 64 hexadecimal digits") };
        let Some(chain) = &mut self.chain else { return self.wrong("the file has no beginning") };
        let (taken, next) = (chain.take(&row), chain.at.revision.next());
        if let Err(fault) = taken {
            return self.wrong(format!("entry {next}: {fault}"));
        }
        self.look(Position { revision: row.revision, hash: row.hash });
        Ok(())
    }

    fn end(&mut self, end: &Upto, entries: u64, chain: Chain) -> Result<(), NotWhole> {
        if end.position() != Some(chain.at) || entries != chain.entries {
            let told = format!(
                "the file should hold {entries} entries up to {}, and holds {} up to {}",
                end.revision, chain.entries, chain.at.revision
            );
            return self.wrong(told);
        }
        self.ended = true;
        Ok(())
    }

    fn look(&mut self, at: Position) {
        if let Some(expect) = self.expect.filter(|expect| expect.revision == at.revision) {
            self.expected = Some(expect.hash == at.hash);
        }
    }

    /// Ends the file.
    ///
    /// # Errors
    /// When its last line is missing: it was cut.
    pub fn finish(self) -> Result<Whole, NotWhole> {
        match (self.ended, self.after, self.chain) {
            (true, Some(after), Some(chain)) => {
                Ok(Whole { after, end: chain.at, entries: chain.entries, expected: self.expected })
            }
            _ => {
                let problem = "the file ends too early: its last line, which says how many entries there are, is missing";
                Err(NotWhole { line: self.line + 1, problem: problem.to_owned() })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::log::{GENESIS, tests::row};

    fn file() -> Vec<String> {
        let mut lines = vec![begin(Position::START)];
        let mut hash = GENESIS;
        for revision in 1..=3 {
            let row = row(revision, hash);
            hash = row.hash;
            lines.push(line(&row));
        }
        lines.push(end(Position { revision: Revision(3), hash }, 3));
        lines
    }

    fn verify(lines: &[String], expect: Option<Position>) -> Result<Whole, NotWhole> {
        let mut verifier = Verifier::expecting(expect);
        for line in lines {
            verifier.take(line.trim_end())?;
        }
        verifier.finish()
    }

    #[test]
    fn a_whole_export_verifies_and_knows_its_entries() {
        let whole = verify(&file(), None).unwrap();
        assert_eq!((whole.entries, whole.after, whole.end.revision), (3, Position::START, Revision(3)));
        let expect = |position| verify(&file(), Some(position)).unwrap().expected;
        assert_eq!(expect(whole.end), Some(true));
        assert_eq!(expect(Position { hash: [1; 32], ..whole.end }), Some(false));
        assert_eq!(expect(Position { revision: Revision(9), ..whole.end }), None);
    }

    #[test]
    fn an_export_steers_no_terminal_and_verifies() {
        let mut row = row(1, GENESIS);
        row.payload = "{\"comment\":\"a\u{9b}2J\u{7f}\u{202e}\u{2028}\"}".to_owned();
        row.hash = row.expected_hash();
        let lines =
            [begin(Position::START), line(&row), end(Position { revision: Revision(1), hash: row.hash }, 1)];
        assert!(lines[1].contains(r"a\u009b2J\u007f\u202e\u2028"), "{}", lines[1]);
        assert_eq!(verify(&lines, None).unwrap().entries, 1);
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
        for (lines, line, said) in [
            (changed, 3, "entry 2: the entry is not what its hash was made of"),
            (without, 3, "entry 2: the entry is missing; the next one there is 3"),
            (cut, 5, "ends too early"),
            (longer, 6, "follows the end"),
            (file()[1..].to_vec(), 1, "first line"),
            (vec!["x".to_owned()], 1, "no line of a log export"),
        ] {
            let error = verify(&lines, None).unwrap_err();
            assert!(error.line == line && error.problem.contains(said), "{error}");
        }
    }
}
