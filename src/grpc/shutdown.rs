//! Waits for the signal that the server stops.

use tokio::sync::watch;

/// Waits until `stopping` turns true.
pub(super) async fn wait_until_stopping(stopping: &mut watch::Receiver<bool>) {
    // The sender is gone only when the server is.
    let _ = stopping.wait_for(|stop| *stop).await;
}
