//! A connection's bytes, written so that a small answer leaves in one piece.
//!
//! Where h2 may write from several buffers at once it sends an answer's trailers by a write of their own, and a
//! process that dies between the two leaves an answer without an end, which a proxy cannot ask for again. Without,
//! it copies payloads of up to 1 KiB and sends headers, message and trailers together. That is a system call less, too.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncReadExt as _;

use crate::transport::socket::Stream;

/// How HTTP/2 begins (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A connection that is written from one buffer at a time, and has begun as HTTP/2 does.
pub(super) struct OneBuffer {
    stream: TokioIo<Stream>,
    /// How much of the preface hyper has been given.
    given: usize,
}

impl OneBuffer {
    /// Waits for the bytes with which HTTP/2 begins. None when the peer begins otherwise, or ends.
    ///
    /// # Errors
    /// When reading fails.
    pub(super) async fn open(mut stream: Stream) -> io::Result<Option<OneBuffer>> {
        let (mut begun, mut have) = ([0; PREFACE.len()], 0);
        while have < begun.len() {
            let read = stream.read(&mut begun[have..]).await?;
            have += read;
            if read == 0 || begun[..have] != PREFACE[..have] {
                return Ok(None);
            }
        }
        Ok(Some(OneBuffer { stream: TokioIo::new(stream), given: 0 }))
    }
}

impl Read for OneBuffer {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if self.given < PREFACE.len() {
            let rest = &PREFACE[self.given..];
            let rest = &rest[..rest.len().min(buffer.remaining())];
            buffer.put_slice(rest);
            self.given += rest.len();
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

/// `is_write_vectored` is left at its default: false.
impl Write for OneBuffer {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
