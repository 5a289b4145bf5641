//! Files that are read again when they change. The content is compared, not the time of change: links that are
//! swapped, and clocks, say nothing wrong. A file that is being written is left alone until it stands still.

use std::{io, path::PathBuf, time::Duration};

/// How often a file is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Gives the text of a file to `take` whenever it differs from what was last known, and was the same at two looks.
/// `read` may block.
pub async fn watch(
    path: PathBuf,
    mut known: String,
    read: fn(&std::path::Path) -> io::Result<String>,
    take: impl Fn(&str),
) {
    let (mut before, mut readable) = (known.clone(), true);
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
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
    use std::sync::mpsc;

    #[tokio::test(start_paused = true)]
    async fn a_file_is_taken_when_it_has_changed_and_stands_still() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rules.toml");
        std::fs::write(&path, "1").unwrap();
        let (taken, takes) = mpsc::channel();
        let watched = path.clone();
        let watching = tokio::spawn(watch(
            watched,
            "1".to_owned(),
            |path| std::fs::read_to_string(path),
            move |text| {
                taken.send(text.to_owned()).unwrap();
            },
        ));
        let mut seen = Vec::new();
        for text in ["2", "2", "2", "1", "1", "1"] {
            std::fs::write(&path, text).unwrap();
            tokio::time::sleep(LOOK_EVERY * 2).await;
            seen.extend(takes.try_iter());
        }
        std::fs::remove_file(&path).unwrap();
        tokio::time::sleep(LOOK_EVERY * 4).await;
        assert!(!watching.is_finished());
        seen.extend(takes.try_iter());
        assert_eq!(seen, ["2", "1"]);
    }
}
