//! Files that are read again when they change. The content is compared, not the time of change: links that are
//! swapped, and clocks, say nothing wrong. A file that is being written is left alone until it stands still.

use std::{path::Path, time::Duration};

use tokio::sync::watch;

/// How often a file is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Gives what `read` finds to `take` whenever it differs from what was last known, and was the same at two looks. When
/// `asked` changes it is given at once, whether it differs or not. `read` may block; `path` is what the log names.
pub(crate) async fn watch_file<T, E>(
    path: &Path,
    known: T,
    read: impl Fn() -> Result<T, E> + Clone + Send + 'static,
    take: impl Fn(&T),
    asked: watch::Receiver<()>,
) where
    T: Clone + PartialEq + Send + 'static,
    E: std::error::Error + Send + 'static,
{
    watch_file_every(POLL_INTERVAL, path, known, read, take, asked).await;
}

async fn watch_file_every<T, E>(
    every: Duration,
    path: &Path,
    mut known: T,
    read: impl Fn() -> Result<T, E> + Clone + Send + 'static,
    take: impl Fn(&T),
    mut asked: watch::Receiver<()>,
) where
    T: Clone + PartialEq + Send + 'static,
    E: std::error::Error + Send + 'static,
{
    let (mut before, mut readable) = (known.clone(), true);
    loop {
        let at_once = tokio::select! {
            () = tokio::time::sleep(every) => false,
            Ok(()) = asked.changed() => true,
        };
        let found = match tokio::task::spawn_blocking(read.clone()).await {
            Ok(Ok(found)) => found,
            Ok(Err(error)) => {
                if std::mem::take(&mut readable) || at_once {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(error, path = %path.display(), "a file cannot be read any more; what it said last stays in force");
                }
                continue;
            }
            // The runtime ends.
            Err(_) => return,
        };
        readable = true;
        if at_once || (found != known && found == before) {
            take(&found);
            known.clone_from(&found);
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
        let (ask, asked) = watch::channel(());
        let watching = tokio::spawn(async move {
            let read = watched.clone();
            let read = move || std::fs::read_to_string(&read);
            let take = move |text: &String| taken.send(text.to_owned()).unwrap();
            watch_file_every(Duration::from_millis(1), &watched, "1".to_owned(), read, take, asked).await;
        });
        // The same text once more is no change: it would be taken before the next.
        for (texts, seen) in [(&["1", "2"][..], "2"), (&["2", "1"], "1")] {
            for text in texts {
                // Readers see one text or the other, and never half of it.
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
        assert_eq!(takes.recv().await.unwrap(), "3", "who asks is given it again");
        watching.abort();
    }
}
