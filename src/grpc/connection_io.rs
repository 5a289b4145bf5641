//! Reads and writes the bytes of a connection, so that a small response leaves in one packet.
//!
//! With vectored writes, h2 sends the trailers of a response separately. A process that dies in between leaves a
//! response without an end, which a proxy cannot retry. Without them, h2 copies payloads of up to 1 KiB and sends
//! headers, message and trailers together, which also saves a system call.
//!
//! Checks that an overloaded thread cannot answer in time are refused here, before
//! HTTP/2 sees them, by `early_shed.rs`.
//!
//! Closing lingers. A socket that is closed with unread bytes resets the connection, and a reset discards what the peer
//! has not read yet: responses and GOAWAY.

use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead as _, AsyncReadExt as _, AsyncWrite as _, ReadBuf},
    time::Sleep,
};

use crate::transport::socket::TransportStream;

use super::early_shed::{EarlyShed, FrameBoundary, MAX_REFUSAL_BYTES};

/// The connection preface of HTTP/2 (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long a socket may accept no bytes while some wait to be written.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a peer may take to close its side after the server has closed its own.
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// Bytes per read.
const READ_CHUNK: usize = 16 << 10;

/// A connection that has started with the HTTP/2 preface, and is written from one buffer at a time.
pub(super) struct SingleWriteIo {
    stream: TokioIo<TransportStream>,
    /// Bytes of the preface that hyper has read.
    preface_replayed: usize,
    /// How long the socket may take nothing while something waits to be written.
    write_timeout: Duration,
    /// Runs while the socket accepts no bytes.
    write_timer: Option<Pin<Box<Sleep>>>,
    early_shed: Option<EarlyShed>,
    /// Bytes for HTTP/2, and how many of them it has read.
    filtered: Vec<u8>,
    filtered_read: usize,
    /// Bytes of the refusals that are written.
    refusals_written: usize,
    boundary: FrameBoundary,
    /// Runs once the write side is closed, until the peer must have closed its own.
    linger_timer: Option<Pin<Box<Sleep>>>,
}

impl SingleWriteIo {
    /// Waits for the HTTP/2 preface. `None` if the peer sends anything else or closes. Fails if reading fails.
    pub(super) async fn read_preface(mut stream: TransportStream) -> io::Result<Option<SingleWriteIo>> {
        let (mut preface, mut filled) = ([0; PREFACE.len()], 0);
        while filled < preface.len() {
            let read = stream.read(&mut preface[filled..]).await?;
            filled += read;
            if read == 0 || preface[..filled] != PREFACE[..filled] {
                return Ok(None);
            }
        }
        Ok(Some(SingleWriteIo {
            stream: TokioIo::new(stream),
            preface_replayed: 0,
            write_timeout: WRITE_TIMEOUT,
            write_timer: None,
            early_shed: None,
            filtered: Vec::new(),
            filtered_read: 0,
            refusals_written: 0,
            boundary: FrameBoundary::default(),
            linger_timer: None,
        }))
    }

    /// Starts to refuse calls early.
    pub(super) fn enable_early_shed(&mut self, shed: EarlyShed) {
        self.early_shed = Some(shed);
    }

    /// Reads and filters frames of the peer; false at the end.
    fn poll_read_frames(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut bytes = [const { MaybeUninit::<u8>::uninit() }; READ_CHUNK];
        let mut bytes = ReadBuf::uninit(&mut bytes);
        ready!(Pin::new(self.stream.inner_mut()).poll_read(cx, &mut bytes))?;
        let bytes = bytes.filled();
        (self.filtered, self.filtered_read) = (Vec::with_capacity(bytes.len()), 0);
        match &mut self.early_shed {
            Some(shed) if bytes.is_empty() => self.filtered = shed.take_partial_frame(),
            Some(shed) => shed.filter(bytes, &mut self.filtered)?,
            None => self.filtered.extend(bytes),
        }
        Poll::Ready(Ok(!bytes.is_empty() || !self.filtered.is_empty()))
    }

    /// Writes refusals, unless HTTP/2 is within a frame.
    fn poll_write_refusals(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let SingleWriteIo { early_shed: Some(shed), stream, refusals_written, boundary, .. } = self else {
            return Poll::Ready(Ok(()));
        };
        if shed.refusals().is_empty() {
            return Poll::Ready(Ok(()));
        }
        if !boundary.is_at_boundary() {
            return Poll::Pending;
        }
        let mut written = Poll::Ready(Ok(()));
        while let Some(rest) = shed.refusals().get(*refusals_written..).filter(|rest| !rest.is_empty()) {
            match Pin::new(stream.inner_mut()).poll_write(cx, rest) {
                Poll::Ready(Ok(length)) if length > 0 => *refusals_written += length,
                Poll::Ready(Ok(_)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    written = Poll::Pending;
                    break;
                }
            }
        }
        if written.is_ready() {
            *refusals_written = 0;
            *shed.refusals() = Vec::new();
            written = Pin::new(stream.inner_mut()).poll_flush(cx);
        }
        self.enforce_write_timeout(cx, written)
    }

    /// Ready if the peer reads its refusals, so that more may be read from it.
    fn poll_refusals_taken(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let waiting = self.early_shed.as_mut().map_or(0, |shed| shed.refusals().len());
        if waiting < MAX_REFUSAL_BYTES { Poll::Ready(Ok(())) } else { self.poll_write_refusals(cx) }
    }

    /// Returns the outcome of a write, or an error if the socket has accepted nothing for too long.
    fn enforce_write_timeout<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.write_timer = None;
            return written;
        }
        let timeout = self.write_timeout;
        let timer = self.write_timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl Read for SingleWriteIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if self.preface_replayed < PREFACE.len() {
            let rest = &PREFACE[self.preface_replayed..];
            let rest = &rest[..rest.len().min(buffer.remaining())];
            buffer.put_slice(rest);
            self.preface_replayed += rest.len();
            return Poll::Ready(Ok(()));
        }
        loop {
            if let Some(rest) = self.filtered.get(self.filtered_read..).filter(|rest| !rest.is_empty()) {
                let rest = &rest[..rest.len().min(buffer.remaining())];
                let length = rest.len();
                buffer.put_slice(rest);
                self.filtered_read += length;
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_refusals_taken(cx))?;
            match self.poll_read_frames(cx) {
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(Ok(false)) => return Poll::Ready(Ok(())),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    // An idle connection holds no buffer.
                    (self.filtered, self.filtered_read) = (Vec::new(), 0);
                    if let Poll::Ready(written) = self.poll_write_refusals(cx) {
                        written?;
                    }
                    return Poll::Pending;
                }
            }
        }
    }
}

/// `is_write_vectored` keeps its default: false.
impl Write for SingleWriteIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.boundary.is_at_boundary() {
            ready!(self.poll_write_refusals(cx))?;
        }
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        if let Poll::Ready(Ok(length)) = &written {
            self.boundary.advance(&bytes[..*length]);
        }
        self.enforce_write_timeout(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.boundary.is_at_boundary() {
            ready!(self.poll_write_refusals(cx))?;
        }
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.enforce_write_timeout(cx, flushed)
    }

    /// Closes the write side, then discards input until the peer closes its side or the time is over.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.linger_timer.is_none() {
            if self.boundary.is_at_boundary() {
                ready!(self.poll_write_refusals(cx))?;
            }
            let closed = Pin::new(self.stream.inner_mut()).poll_shutdown(cx);
            ready!(self.enforce_write_timeout(cx, closed))?;
        }
        let SingleWriteIo { stream, linger_timer: closed, .. } = &mut *self;
        let mut stream = Pin::new(stream.inner_mut());
        let linger = closed.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER_TIMEOUT)));
        let mut unread = [0; 4096];
        loop {
            if linger.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Ok(()));
            }
            let mut unread = ReadBuf::new(&mut unread);
            match ready!(stream.as_mut().poll_read(cx, &mut unread)) {
                Ok(()) if !unread.filled().is_empty() => {}
                Ok(()) | Err(_) => return Poll::Ready(Ok(())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{future::poll_fn, poll};
    use tokio::{
        io::AsyncWriteExt as _,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[tokio::test]
    async fn a_peer_that_still_sends_is_told_the_last_of_it_and_not_cut_off() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        peer.write_all(PREFACE).await.unwrap();
        let stream = TransportStream::Tcp(listener.accept().await.unwrap().0);
        let mut server = SingleWriteIo::read_preface(stream).await.unwrap().unwrap();
        peer.write_all(&[0; 20_000]).await.unwrap();
        poll_fn(|cx| Pin::new(&mut server).poll_write(cx, b"the last")).await.unwrap();
        let mut closing = poll_fn(|cx| Pin::new(&mut server).poll_shutdown(cx));
        assert!(poll!(&mut closing).is_pending(), "the peer's side is open");
        let mut received = String::new();
        peer.read_to_string(&mut received).await.unwrap();
        assert_eq!(received, "the last");
        drop(peer);
        closing.await.unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_takes_nothing_fails_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        peer.write_all(PREFACE).await.unwrap();
        let stream = TransportStream::Tcp(listener.accept().await.unwrap().0);
        let mut server = SingleWriteIo::read_preface(stream).await.unwrap().unwrap();
        server.write_timeout = Duration::from_millis(10);
        let failed = loop {
            if let Err(error) = poll_fn(|cx| Pin::new(&mut server).poll_write(cx, &[0; 65_536])).await {
                break error;
            }
        };
        assert_eq!(failed.kind(), io::ErrorKind::TimedOut);
        drop(peer);
    }
}
