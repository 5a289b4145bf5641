//! Watches files, and passes on their content when it changes.
//!
//! The content is compared, not the modification time, which is wrong for swapped links and adjusted clocks. A file
//! that is being written is ignored until two reads give the same content.

use std::{path::Path, time::Duration};

use tokio::sync::watch;

/// Interval between two reads of a file.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Passes the result of `read` to `take` when it differs from the last known one and two reads agree. A change of
/// `reload` passes it at once, even if it is equal. `read` may block; `path` is for the log.
pub(crate) async fn watch_file<T, E>(
    path: &Path,
    last_known: T,
    read: impl Fn() -> Result<T, E> + Clone + Send + 'static,
    take: impl Fn(&T),
    reload: watch::Receiver<()>,
) where
    T: Clone + PartialEq + Send + 'static,
    E: std::error::Error + Send + 'static,
{
    watch_file_every(POLL_INTERVAL, path, last_known, read, take, reload).await;
}

async fn watch_file_every<T, E>(
    every: Duration,
    path: &Path,
    mut last_known: T,
    read: impl Fn() -> Result<T, E> + Clone + Send + 'static,
    take: impl Fn(&T),
    mut reload: watch::Receiver<()>,
) where
    T: Clone + PartialEq + Send + 'static,
    E: std::error::Error + Send + 'static,
{
    let (mut before, mut readable) = (last_known.clone(), true);
    loop {
        let at_once = tokio::select! {
            () = tokio::time::sleep(every) => false,
            Ok(()) = reload.changed() => true,
        };
        let found = match tokio::task::spawn_blocking(read.clone()).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                if std::mem::take(&mut readable) || at_once {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(error, path = %path.display(), "the file cannot be read any more; its last content stays in use");
                }
                continue;
            }
            // The runtime is shutting down.
            Err(_) => return,
        };
        readable = true;
        if at_once || (found != last_known && found == before) {
            take(&found);
            last_known.clone_from(&found);
        }
        before = found;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_is_taken_when_it_has_changed_and_stands_still() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rules.toml");
        std::fs::write(&path, "1").unwrap();
        let (taken, mut takes) = tokio::sync::mpsc::unbounded_channel();
        let watched = path.clone();
        let (ask, reload) = watch::channel(());
        let watching = tokio::spawn(async move {
            let read = watched.clone();
            let read = move || std::fs::read_to_string(&read);
            let take = move |text: &String| taken.send(text.to_owned()).unwrap();
            watch_file_every(Duration::from_millis(1), &watched, "1".to_owned(), read, take, reload).await;
        });
        // The same text again is no change: it would arrive before the next one.
        for (texts, seen) in [(&["1", "2"][..], "2"), (&["2", "1"], "1")] {
            for text in texts {
                // Readers see one text or the other, never half of it.
                let new = folder.path().join("new");
                std::fs::write(&new, text).unwrap();
                std::fs::rename(new, &path).unwrap();
            }
            assert_eq!(takes.recv().await.unwrap(), seen);
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "3").unwrap();
        assert_eq!(takes.recv().await.unwrap(), "3", "a file that is gone for a while ends nothing");
        ask.send_replace(());
        assert_eq!(takes.recv().await.unwrap(), "3", "a reload passes it again");
        watching.abort();
    }
}
