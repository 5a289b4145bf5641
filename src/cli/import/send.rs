//! Sends one batch of an import, retries after transient errors, and reports the result of each row.

use std::{cell::Cell, time::Duration};

use super::{
    row::RowSkipReason,
    source::{ImportBatch, ImportRow},
    text_reader::FilePosition,
};
use crate::{
    cli::error::{CliError, EXIT_UNANSWERED},
    pb,
};

/// The delay before each retry. Their sum is enough for a server to restart.
const RETRY_DELAYS: [Duration; 5] = [
    Duration::from_millis(250),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
];

/// Errors of the server rather than of the row: a retry may succeed.
const TRANSIENT_ERRORS: [&str; 9] = [
    "ACCOUNT_LIMIT",
    "CONTENDED",
    "DEADLINE_EXCEEDED",
    "NOT_RECORDED",
    "OUTCOME_UNKNOWN",
    "STARTING",
    "STOPPING",
    "STORE_FULL",
    "STORE_UNAVAILABLE",
];

/// A row that cannot be imported, with the reason.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RejectedRow {
    pub(super) line: u64,
    pub(super) error: String,
    pub(super) message: String,
    pub(super) raw: String,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct BatchResult {
    pub(super) end: FilePosition,
    pub(super) imported: u64,
    /// Rows that an earlier attempt had imported.
    pub(super) there_already: u64,
    /// Rows that are skipped because their keys have expired.
    pub(super) expired: u64,
    /// Rows that are skipped because their keys are revoked or disabled.
    pub(super) inactive: u64,
    pub(super) rejected: Vec<RejectedRow>,
}

/// The retry state that all batches of an import share.
#[derive(Debug)]
pub(super) struct RetryState {
    retry_delays: &'static [Duration],
    /// Whether the server has answered once; if so, a failed connection is retried too.
    server_answered: Cell<bool>,
}

impl Default for RetryState {
    fn default() -> RetryState {
        RetryState { retry_delays: &RETRY_DELAYS, server_answered: Cell::new(false) }
    }
}

/// Sends a batch and retries it. The server marks rows that an earlier attempt imported as `replayed`.
pub(super) async fn send_batch(
    batch: ImportBatch,
    attempts: &RetryState,
    call: impl AsyncFn(pb::ImportKeysRequest) -> Result<pb::ImportKeysResponse, CliError>,
) -> Result<BatchResult, CliError> {
    let mut done = BatchResult { end: batch.end, ..BatchResult::default() };
    let mut pending = Vec::new();
    for ImportRow { line, raw, key } in batch.rows {
        match key {
            Ok(key) => pending.push((line, raw, key)),
            Err(RowSkipReason::Expired) => done.expired += 1,
            Err(RowSkipReason::Inactive) => done.inactive += 1,
            Err(RowSkipReason::Unreadable(message)) => {
                done.rejected.push(RejectedRow { line, error: "UNREADABLE".to_owned(), message, raw });
            }
        }
    }
    let mut pauses = attempts.retry_delays.iter();
    while !pending.is_empty() {
        let keys = pending.iter().map(|(_, _, key)| key.clone()).collect();
        let trouble = match call(pb::ImportKeysRequest { keys }).await {
            Ok(response) => {
                attempts.server_answered.set(true);
                apply_results(&mut pending, response, &mut done)?
            }
            Err(failure)
                if failure.exit_code() == EXIT_UNANSWERED
                    && (attempts.server_answered.get() || failure.is_from_server()) =>
            {
                Some(failure)
            }
            Err(failure) => return Err(failure),
        };
        if let Some(failure) = trouble {
            let Some(pause) = pauses.next() else { return Err(failure) };
            tokio::time::sleep(*pause).await;
        }
    }
    done.rejected.sort_by_key(|row| row.line);
    Ok(done)
}

type PendingRows = Vec<(u64, String, pb::ImportKey)>;

/// Counts the results. Rows with a transient error stay pending; the first such error is returned.
fn apply_results(
    pending: &mut PendingRows,
    response: pb::ImportKeysResponse,
    done: &mut BatchResult,
) -> Result<Option<CliError>, CliError> {
    if response.results.len() != pending.len() {
        return Err(CliError::new("the number of results in the response differs from the number of rows"));
    }
    let mut trouble = None;
    for ((line, raw, key), result) in std::mem::take(pending).into_iter().zip(response.results) {
        let pb::ImportResult { error, message, replayed, .. } = result;
        match error.as_str() {
            "" if replayed => done.there_already += 1,
            "" => done.imported += 1,
            code if TRANSIENT_ERRORS.contains(&code) => {
                trouble.get_or_insert_with(|| CliError::new(format!("line {line}: {message} ({code})")));
                pending.push((line, raw, key));
            }
            _ => done.rejected.push(RejectedRow { line, error, message, raw }),
        }
    }
    Ok(trouble)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Plays the answer to a key that was imported before.
    const REPLAYED: &str = "replayed";

    fn batch(names: &[&str]) -> ImportBatch {
        let row = |(at, name): (usize, &&str)| ImportRow {
            line: at as u64 + 2,
            raw: (*name).to_owned(),
            key: match *name {
                "" => Err(RowSkipReason::Unreadable("has 1 fields".to_owned())),
                "expired" => Err(RowSkipReason::Expired),
                "revoked" => Err(RowSkipReason::Inactive),
                name => Ok(pb::ImportKey { name: Some(name.to_owned()), ..Default::default() }),
            },
        };
        ImportBatch {
            rows: names.iter().enumerate().map(row).collect(),
            end: FilePosition { bytes: 9, lines: 9 },
        }
    }

    /// Plays a server that gives each call's keys these errors; what it was asked, and what came of it.
    async fn played(
        names: &[&str],
        answers: Vec<Result<Vec<&str>, CliError>>,
    ) -> (Vec<Vec<String>>, Result<BatchResult, String>) {
        let (sent_names, answers) = (RefCell::new(Vec::new()), RefCell::new(answers.into_iter()));
        let attempts = RetryState { retry_delays: &[Duration::ZERO; 3], ..RetryState::default() };
        let done = send_batch(batch(names), &attempts, async |request| {
            sent_names.borrow_mut().push(request.keys.into_iter().filter_map(|key| key.name).collect());
            let errors = answers.borrow_mut().next().unwrap_or_else(|| Err(CliError::refused("no more")))?;
            let results = errors.iter().map(|error| pb::ImportResult {
                error: error.trim_start_matches(REPLAYED).to_owned(),
                message: format!("about {error}"),
                replayed: *error == REPLAYED,
                ..Default::default()
            });
            Ok(pb::ImportKeysResponse { results: results.collect() })
        })
        .await;
        (sent_names.into_inner(), done.map_err(|failure| failure.to_string()))
    }

    fn counts(done: &BatchResult) -> (u64, u64, Vec<(u64, &str)>) {
        let rejected = done.rejected.iter().map(|row| (row.line, row.error.as_str())).collect();
        (done.imported, done.there_already, rejected)
    }

    #[tokio::test]
    async fn rows_that_fail_stop_no_other() {
        let (sent_names, done) = played(&["a", "", "b", "c"], vec![Ok(vec!["", "KEY_NAME_TAKEN", ""])]).await;
        assert_eq!(sent_names, [["a", "b", "c"]]);
        assert_eq!(counts(&done.unwrap()), (2, 0, vec![(3, "UNREADABLE"), (4, "KEY_NAME_TAKEN")]));
    }

    #[tokio::test]
    async fn only_the_server_decides_whether_a_row_was_imported_before() {
        let answers = vec![Ok(vec!["STARTING", "STARTING"]), Ok(vec!["DIGEST_TAKEN", REPLAYED])];
        let (_, done) = played(&["a", "b"], answers).await;
        assert_eq!(counts(&done.unwrap()), (0, 1, vec![(2, "DIGEST_TAKEN")]));
    }

    #[tokio::test]
    async fn what_the_server_could_not_do_is_sent_again_alone() {
        let answers = vec![
            Ok(vec!["", "OUTCOME_UNKNOWN", "NOT_RECORDED"]),
            Err(CliError::new("cannot reach the server")),
            Ok(vec![REPLAYED, ""]),
        ];
        let (sent_names, done) = played(&["a", "b", "c"], answers).await;
        assert_eq!(sent_names, [vec!["a", "b", "c"], vec!["b", "c"], vec!["b", "c"]]);
        assert_eq!(counts(&done.unwrap()), (2, 1, vec![]));
    }

    #[tokio::test]
    async fn a_row_that_the_server_knows_as_imported_is_there_already() {
        let attempts = RetryState::default();
        let done = send_batch(batch(&["a", "b"]), &attempts, async |_| {
            let result = |replayed| pb::ImportResult { replayed, ..Default::default() };
            Ok(pb::ImportKeysResponse { results: vec![result(true), result(false)] })
        });
        assert_eq!(counts(&done.await.unwrap()), (1, 1, vec![]));
    }

    #[tokio::test]
    #[expect(clippy::disallowed_methods, reason = "a server's answer is made here")]
    async fn a_batch_whose_outcome_is_unknown_is_sent_again_though_the_server_answered_nothing_before() {
        let server = crate::config::client::ServerUrl::parse("http://localhost:1").unwrap();
        let unknown = CliError::from_status(&tonic::Status::unavailable("unknown"), &server);
        let answers = vec![Err(unknown), Ok(vec!["", ""])];
        let (sent_names, done) = played(&["a", "b"], answers).await;
        assert_eq!(sent_names.len(), 2);
        assert_eq!(counts(&done.unwrap()), (2, 0, vec![]));
    }

    #[tokio::test]
    async fn trouble_that_does_not_end_stops_the_import_and_says_where() {
        let (sent_names, done) = played(&["a"], (0..9).map(|_| Ok(vec!["STORE_FULL"])).collect()).await;
        assert_eq!(sent_names.len(), 4, "once, and after each pause");
        assert!(done.unwrap_err().contains("line 2: about STORE_FULL (STORE_FULL)"));
    }

    #[tokio::test]
    async fn a_server_that_never_answered_is_not_waited_for() {
        let (sent_names, done) = played(&["a"], vec![Err(CliError::new("cannot reach it"))]).await;
        assert_eq!(sent_names.len(), 1);
        assert!(done.unwrap_err().contains("cannot reach it"));
    }

    #[tokio::test]
    async fn keys_that_have_ended_are_counted_and_not_sent() {
        let (sent_names, done) = played(&["expired", "a", "revoked"], vec![Ok(vec![""])]).await;
        assert_eq!(sent_names, [["a"]]);
        let done = done.unwrap();
        assert_eq!((done.imported, done.expired, done.inactive, done.rejected.len()), (1, 1, 1, 0));
    }

    #[tokio::test]
    async fn a_batch_of_unreadable_rows_asks_nothing() {
        let (sent_names, done) = played(&["", ""], vec![]).await;
        assert!(sent_names.is_empty());
        assert_eq!(done.unwrap().rejected.len(), 2);
    }
}
