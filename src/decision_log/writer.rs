//! The thread that writes the decision log. It is a separate thread because files and standard error may block.

use std::{
    fs::File,
    io::{self, BufWriter, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Weak,
};

use anyhow::Context as _;
use tokio::sync::{mpsc, oneshot};

use crate::private_file;

use super::{
    queue::{DecisionLogState, WriterMessage},
    record::DecisionRecord,
    settings::DecisionLogTarget,
};

/// Records that are written before the file is checked for rotation again.
const MAX_BATCH_SIZE: usize = 256;

/// A handle to wait for the thread's end.
pub(super) struct WriterThread(oneshot::Receiver<()>);

impl WriterThread {
    /// Opens the target and starts the thread.
    pub(super) fn start(
        target: &DecisionLogTarget,
        waiting: mpsc::Receiver<WriterMessage>,
        log: Weak<DecisionLogState>,
    ) -> anyhow::Result<WriterThread> {
        let sink = match target {
            DecisionLogTarget::Log => DecisionSink::Log,
            DecisionLogTarget::File(path) => {
                let open = RotatedLogFile::open(path);
                DecisionSink::File(open.with_context(|| {
                    format!(
                        "decision_log.file = {path:?} cannot be opened; name a file that this user can write"
                    )
                })?)
            }
        };
        let (ending, ended) = oneshot::channel();
        std::thread::Builder::new().name("keyward-decisions".to_owned()).spawn(move || {
            run_writer(sink, waiting, &log);
            // The waiting side may have timed out.
            let _ = ending.send(());
        })?;
        Ok(WriterThread(ended))
    }

    /// Waits until the thread has ended.
    pub(super) async fn join(self) {
        let _ = self.0.await;
    }
}

enum DecisionSink {
    Log,
    File(RotatedLogFile),
}

fn run_writer(
    mut sink: DecisionSink,
    mut waiting: mpsc::Receiver<WriterMessage>,
    log: &Weak<DecisionLogState>,
) {
    let (mut batch, mut failing) = (Vec::with_capacity(MAX_BATCH_SIZE), false);
    while waiting.blocking_recv_many(&mut batch, MAX_BATCH_SIZE) > 0 {
        let end = batch.iter().any(|item| matches!(item, WriterMessage::Stop));
        let records: Vec<_> = batch
            .drain(..)
            .filter_map(|item| match item {
                WriterMessage::Record(record) => Some(*record),
                WriterMessage::Stop => None,
            })
            .collect();
        let written = match &mut sink {
            DecisionSink::Log => {
                records.iter().for_each(log_record);
                Ok(())
            }
            DecisionSink::File(file) => file.append(&records),
        };
        if let (Err(_), Some(log)) = (&written, log.upgrade()) {
            log.add_dropped(records.len() as u64);
        }
        match written {
            Err(error) if !std::mem::replace(&mut failing, true) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "decisions cannot be written; they are dropped until they can");
            }
            Ok(()) if std::mem::take(&mut failing) => tracing::info!("decisions are written again"),
            _ => {}
        }
        if end {
            return;
        }
    }
}

/// Writes a record to the server's log, under the names of its fields.
fn log_record(record: &DecisionRecord) {
    let list = |texts: &[String]| (!texts.is_empty()).then(|| texts.join(" "));
    let (needed, missing) = (list(&record.needed_scopes), list(&record.missing_scopes));
    let DecisionRecord { decision_id, time, kind, allowed, reason, shadow, revision, .. } = record;
    tracing::info!(
        target: "keyward::decision",
        decision_id,
        time,
        kind,
        allowed,
        reason,
        shadow = shadow.then_some(true),
        action = record.action,
        key_id = record.key_id,
        account = record.account,
        user = record.user,
        role = record.role,
        environment = record.environment,
        needed_scopes = needed,
        missing_scopes = missing,
        customer = record.customer,
        client_ip = record.client_ip,
        peer = record.peer,
        revision,
        actor = record.actor,
        actor_account = record.actor_account,
        acting_user = record.acting_user,
        method = record.method,
        request_id = record.request_id,
        trace_id = record.trace_id,
        http_id = record.http_id,
    );
}

/// An append-only file. If log rotation moves it away, a new one is created.
struct RotatedLogFile {
    path: PathBuf,
    file: BufWriter<File>,
    inode: u64,
}

impl RotatedLogFile {
    fn open(path: &Path) -> io::Result<RotatedLogFile> {
        let file = private_file::append_or_create(path)?;
        let inode = file.metadata()?.ino();
        Ok(RotatedLogFile { path: path.to_owned(), file: BufWriter::new(file), inode })
    }

    fn append(&mut self, records: &[DecisionRecord]) -> io::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        if !std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            *self = RotatedLogFile::open(&self.path)?;
        }
        for record in records {
            serde_json::to_writer(&mut self.file, record)?;
            self.file.write_all(b"\n")?;
        }
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: &'static str) -> DecisionRecord {
        DecisionRecord { kind, ..DecisionRecord::default() }
    }

    #[test]
    fn a_file_that_is_moved_away_is_begun_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (path, moved) = (folder.path().join("decisions"), folder.path().join("decisions.1"));
        let mut file = RotatedLogFile::open(&path).unwrap();
        file.append(&[record("check")]).unwrap();
        std::fs::rename(&path, &moved).unwrap();
        file.append(&[record("change")]).unwrap();
        let text = |path: &Path| std::fs::read_to_string(path).unwrap();
        assert!(text(&moved).contains("check") && !text(&moved).contains("change"));
        assert_eq!(text(&path), "{\"decision_id\":\"\",\"time\":\"\",\"kind\":\"change\"}\n");
    }
}
