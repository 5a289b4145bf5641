//! Verifying the log: every hash made anew, link by link, a page at a time; the checkpoint that it begins with stated in
//! the chain; and the tables held against it (`records.rs`).

use crate::{
    domain::{
        chain::Chain,
        entry::Told,
        lease::Position,
        log::{Action, LogRow},
        time::Revision,
    },
    refusal::{Refusal, Violations},
    store::{BulkReader, Checkpoint, Store, StoreError},
};

pub use super::records::Mismatch;
use super::records::Records;

/// How many entries are in memory at once, about a megabyte: fewer cost more turns from thread to thread, and more would
/// leave the processor's cache before they are compared.
const PAGE: u32 = 1000;

/// What is to be verified.
#[derive(Clone, Copy, Debug, Default)]
pub struct Question {
    /// From this entry on; None = from the oldest.
    pub from: Option<Revision>,
    /// Up to this entry; None = up to the newest.
    pub to: Option<Revision>,
    /// An entry whose hash is known from elsewhere.
    pub expect: Option<Position>,
    /// The chain alone, without the tables.
    pub chain_only: bool,
}

/// What became of an entry whose hash is known from elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// The log has it, with this hash.
    Found,
    /// The log has another one in its place: this is another history.
    Differs,
    /// It was archived: the file has it.
    Archived,
    /// The log ends before it: entries were lost.
    Lost,
    /// It lies outside of what was verified.
    Outside,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Verified {
    /// The first entry that was to be verified.
    pub first: Revision,
    /// The newest that was found to fit.
    pub last: Position,
    /// How many were.
    pub entries: u64,
    /// Where the log ended when this began.
    pub head: Position,
    /// Up to where it was archived.
    pub checkpoint: Option<Checkpoint>,
    /// The first entry that does not fit, and what is wrong with it.
    pub broken: Option<(Revision, String)>,
    /// How many records of the tables were held against the log.
    pub records: u64,
    /// Where they differ; the first of them.
    pub mismatches: Vec<Mismatch>,
    /// What became of the entry that was asked for.
    pub expected: Option<Expected>,
}

impl Verified {
    /// Whether everything fits.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        self.broken.is_none()
            && self.mismatches.is_empty()
            && !matches!(self.expected, Some(Expected::Differs | Expected::Lost | Expected::Outside))
    }
}

/// Verifies the log of a store.
///
/// # Errors
/// When the question makes no sense for this log, or the store fails.
pub async fn verify(store: &dyn Store, question: Question) -> Result<Verified, Refusal> {
    // The checkpoint first: should it move meanwhile, entries are missing, and the caller asks again.
    let checkpoint = store.checkpoint().await?;
    let head = store.head().await?;
    let head = Position { revision: head.revision, hash: head.hash };
    let oldest = checkpoint.map_or(Position::START, |made| position(&made));
    let (from, to) = range(question, oldest.revision, head.revision)?;
    let mut walk = Walk {
        reader: store.bulk_reader(to.next().0.saturating_sub(from.0)),
        chain: Chain::after(oldest),
        to,
        expect: question.expect,
        expected: question.expect.map(|expect| outside(expect, oldest, from, to, head.revision)),
        checkpoint,
        is_stated: false,
        broken: None,
        records: (!question.chain_only).then(|| Records::starting_at(from)),
    };
    if from > oldest.revision.next() {
        walk.begin_after(store, Revision(from.0 - 1)).await?;
    }
    walk.run(store).await?;
    walk.ends_at(head);
    walk.states_checkpoint(from == oldest.revision.next() && to == head.revision);
    let whole = walk.broken.is_none();
    let (records, mismatches) = match walk.records {
        Some(mut records) => {
            // Of a broken chain nothing is to be learnt about the tables.
            if whole {
                records.planted(store, &mut *walk.reader, oldest.revision).await?;
            }
            records.finish()
        }
        None => (0, Vec::new()),
    };
    let (last, entries) = (walk.chain.at, walk.chain.entries);
    let (broken, expected) = (walk.broken, walk.expected);
    Ok(Verified { first: from, last, entries, head, checkpoint, broken, records, mismatches, expected })
}

fn position(checkpoint: &Checkpoint) -> Position {
    Position { revision: checkpoint.at.revision, hash: checkpoint.at.hash }
}

fn range(question: Question, archived: Revision, head: Revision) -> Result<(Revision, Revision), Refusal> {
    let (from, to) = (question.from.unwrap_or(archived.next()), question.to.unwrap_or(head));
    let mut violations = Violations::default();
    violations.note_if(
        from <= archived,
        "from_revision",
        format!("is archived, as is all up to {archived}: 'keyward audit verify --file' verifies an archive"),
    );
    violations.note_if(from > head.next(), "from_revision", format!("the log ends at {head}"));
    violations.note_if(to > head, "to_revision", format!("the log ends at {head}"));
    violations.note_if(to.next() < from, "to_revision", "must not lie before from_revision");
    violations.finish()?;
    Ok((from, to))
}

/// What is to be said of an expected entry that the walk does not meet.
fn outside(expect: Position, oldest: Position, from: Revision, to: Revision, head: Revision) -> Expected {
    match expect.revision {
        revision if revision > head => Expected::Lost,
        revision if revision < oldest.revision => Expected::Archived,
        revision if revision == oldest.revision && expect.hash == oldest.hash => Expected::Found,
        revision if revision == oldest.revision => Expected::Differs,
        revision if revision < from || revision > to => Expected::Outside,
        // It is found, unless the chain breaks before.
        _ => Expected::Outside,
    }
}

struct Walk<'s> {
    reader: Box<dyn BulkReader + 's>,
    chain: Chain,
    to: Revision,
    expect: Option<Position>,
    expected: Option<Expected>,
    checkpoint: Option<Checkpoint>,
    /// The chain says that the checkpoint was made.
    is_stated: bool,
    broken: Option<(Revision, String)>,
    records: Option<Records>,
}

impl Walk<'_> {
    fn breaks(&mut self, problem: impl ToString) {
        let at = self.chain.at.revision.next();
        self.broken.get_or_insert((at, problem.to_string()));
    }

    /// Begins in the middle: after an entry that is believed.
    async fn begin_after(&mut self, store: &dyn Store, revision: Revision) -> Result<(), StoreError> {
        match store.log_at(&[revision]).await?.pop() {
            Some(row) => self.chain = Chain::after(Position { revision, hash: row.hash }),
            None => self.broken = Some((revision, "the entry is missing".to_owned())),
        }
        Ok(())
    }

    async fn run(&mut self, store: &dyn Store) -> Result<(), StoreError> {
        while self.broken.is_none() && self.chain.at.revision < self.to {
            let left = self.to.0 - self.chain.at.revision.0;
            let page = u32::try_from(left).unwrap_or(PAGE).min(PAGE);
            let rows = match self.reader.log_after(self.chain.at.revision, page).await {
                Ok(rows) => rows,
                Err(StoreError::Damaged(_)) => self.readable(store, page).await?,
                Err(error) => return Err(error),
            };
            if rows.is_empty() {
                self.breaks(format!("the entry is missing; the log should go on to {}", self.to));
            }
            self.page(store, &rows).await?;
        }
        Ok(())
    }

    /// The entries of a page before the first that cannot be read as one.
    async fn readable(&mut self, store: &dyn Store, page: u32) -> Result<Vec<LogRow>, StoreError> {
        let (mut rows, mut after) = (Vec::new(), self.chain.at.revision);
        while rows.len() < page as usize {
            match store.log_after(after, 1).await {
                Ok(next) => match next.into_iter().next() {
                    Some(row) => {
                        after = row.revision;
                        rows.push(row);
                    }
                    None => break,
                },
                Err(StoreError::Damaged(what)) if rows.is_empty() => {
                    self.breaks(format!("the entry cannot be read: {what}"));
                    break;
                }
                Err(StoreError::Damaged(_)) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(rows)
    }

    async fn page(&mut self, store: &dyn Store, rows: &[LogRow]) -> Result<(), StoreError> {
        let mut fitting = 0;
        for row in rows {
            if self.broken.is_some() {
                break;
            }
            match self.chain.take(row) {
                Ok(()) => fitting += 1,
                Err(fault) => self.breaks(fault),
            }
            self.look_at(row);
        }
        match &mut self.records {
            Some(records) => records.entries(store, &mut *self.reader, &rows[..fitting]).await,
            None => Ok(()),
        }
    }

    fn look_at(&mut self, row: &LogRow) {
        if let Some(expect) = self.expect.filter(|expect| expect.revision == row.revision) {
            self.expected = Some(if row.hash == expect.hash { Expected::Found } else { Expected::Differs });
        }
        if row.action == Action::LogArchived.as_str()
            && let Some(archived) = Told::read(&row.payload).and_then(|told| told.via.archived)
            && archived.upto.position() == self.checkpoint.map(|made| position(&made))
        {
            self.is_stated = true;
        }
    }

    /// The newest entry is the one that the tables call the head.
    fn ends_at(&mut self, head: Position) {
        if self.broken.is_none() && self.to == head.revision && self.chain.at != head {
            let problem = "the newest entry is not the one that the database calls its head";
            self.broken = Some((head.revision, problem.to_owned()));
        }
    }

    /// A checkpoint that the chain does not state covers up that entries were taken away.
    fn states_checkpoint(&mut self, has_walked_all: bool) {
        if let Some(made) = self.checkpoint
            && self.broken.is_none()
            && has_walked_all
            && !self.is_stated
        {
            let problem = "the entries up to here are gone, and no entry says that they were archived";
            self.broken = Some((made.at.revision, problem.to_owned()));
        }
    }
}
