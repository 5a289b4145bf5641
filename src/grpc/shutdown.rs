//! Waits for the signal that the server stops. The order of the shutdown belongs in `server.rs`.

use tokio::sync::watch;

/// Waits until `stopping` turns true.
pub(super) async fn wait_until_stopping(stopping: &mut watch::Receiver<bool>) {
    // The sender is dropped only with the server.
    let _ = stopping.wait_for(|stop| *stop).await;
}
