//! Files that are read again when they change. The content is compared, not the time of change: links that are
//! swapped, and clocks, say nothing wrong. A file that is being written is left alone until it stands still.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// How often a file is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Gives the text of a file to `take` whenever it differs from what was last known, and was the same at two looks.
/// `read` may block.
pub async fn watch(path: PathBuf, known: String, read: fn(&Path) -> io::Result<String>, take: impl Fn(&str)) {
    watch_every(LOOK_EVERY, path, known, read, take).await;
}

async fn watch_every(
    every: Duration,
    path: PathBuf,
    mut known: String,
    read: fn(&Path) -> io::Result<String>,
    take: impl Fn(&str),
) {
    let (mut before, mut readable) = (known.clone(), true);
    loop {
        tokio::time::sleep(every).await;
        let file = path.clone();
        let text = match tokio::task::spawn_blocking(move || read(&file)).await {
            Ok(Ok(text)) => text,
            Ok(Err(error)) => {
                if std::mem::take(&mut readable) {
                    let error = &error as &dyn std::error::Error;
                    tracing::error!(error, path = %path.display(), "a file cannot be read any more; what it said last stays in force");
                }
                continue;
            }
            // The runtime ends.
            Err(_) => return,
        };
        readable = true;
        if text != known && text == before {
            take(&text);
            known.clone_from(&text);
        }
        before = text;
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
        let watching = tokio::spawn(watch_every(
            Duration::from_millis(1),
            watched,
            "1".to_owned(),
            |path| std::fs::read_to_string(path),
            move |text| taken.send(text.to_owned()).unwrap(),
        ));
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
        watching.abort();
    }
}
