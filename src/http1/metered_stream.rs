//! Charges a connection's read buffer to the memory budget. The HTTP/1.1 parser keeps the largest buffer that a
//! connection needed, so that much stays reserved until the connection closes.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::transport::memory_budget::{CallPriority, ConnectionMemoryBudget, MemoryReservation};

/// Requests up to this size need no reservation, because the connection limit bounds them. Health checks thus succeed
/// even if the budget is exhausted.
const MAX_UNRESERVED_BYTES: usize = 8 << 10;

/// A stream that counts the bytes read until they are answered.
#[derive(Debug)]
pub(super) struct MeteredStream<S> {
    stream: S,
    budget: Arc<ConnectionMemoryBudget>,
    /// Bytes read since the last response.
    unanswered_bytes: usize,
    reserved_bytes: usize,
    reservation: Option<MemoryReservation>,
}

impl<S> MeteredStream<S> {
    pub(super) fn new(stream: S, budget: Arc<ConnectionMemoryBudget>) -> MeteredStream<S> {
        MeteredStream { stream, budget, unanswered_bytes: 0, reserved_bytes: 0, reservation: None }
    }

    /// Counts read bytes and reserves for them. The parser doubles its buffer as it grows.
    fn count_read(&mut self, read: usize) -> io::Result<()> {
        self.unanswered_bytes += read;
        if self.unanswered_bytes <= MAX_UNRESERVED_BYTES || self.unanswered_bytes <= self.reserved_bytes {
            return Ok(());
        }
        let bytes = self.unanswered_bytes.next_power_of_two();
        let fits = match &mut self.reservation {
            Some(reservation) => reservation.resize(bytes, CallPriority::Anonymous),
            None => {
                self.reservation = self.budget.reserve(bytes, CallPriority::Anonymous);
                self.reservation.is_some()
            }
        };
        self.reserved_bytes = bytes;
        if fits { Ok(()) } else { Err(io::Error::other("no memory is left for requests")) }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for MeteredStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        Poll::Ready(self.count_read(buffer.filled().len() - before))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for MeteredStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.unanswered_bytes = 0;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.unanswered_bytes = 0;
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::{clock::SystemClock, transport::memory_budget::MemoryBudget};

    #[tokio::test]
    async fn what_a_request_takes_is_reserved_and_a_small_one_takes_nothing() {
        let process = MemoryBudget::new(8 * (64 << 10), Arc::new(SystemClock));
        let (mut peer, stream) = tokio::io::duplex(1 << 20);
        let mut metered = MeteredStream::new(stream, ConnectionMemoryBudget::new(process.clone()));
        let mut buffer = vec![0; 64 << 10];
        for (size, reserved) in [
            (MAX_UNRESERVED_BYTES, 0),
            (MAX_UNRESERVED_BYTES + 1, 2 * MAX_UNRESERVED_BYTES),
            (MAX_UNRESERVED_BYTES, 2 * MAX_UNRESERVED_BYTES),
            (5 * MAX_UNRESERVED_BYTES, 8 * MAX_UNRESERVED_BYTES),
        ] {
            peer.write_all(&buffer[..size]).await.unwrap();
            metered.read_exact(&mut buffer[..size]).await.unwrap();
            assert_eq!(process.used_bytes(), reserved, "{size}");
            metered.write_all(b"answer").await.unwrap();
        }
        peer.write_all(&buffer).await.unwrap();
        peer.write_all(&[0]).await.unwrap();
        metered.read_exact(&mut buffer).await.unwrap();
        assert!(metered.read_exact(&mut [0]).await.is_err(), "an eighth of the budget is the most");
        drop(metered);
        assert_eq!(process.used_bytes(), 0);
    }
}
