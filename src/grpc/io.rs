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
use tokio::net::TcpStream;

/// A TCP connection that is written from one buffer at a time.
pub(super) struct OneBuffer(TokioIo<TcpStream>);

impl OneBuffer {
    pub(super) fn new(stream: TcpStream) -> OneBuffer {
        OneBuffer(TokioIo::new(stream))
    }
}

impl Read for OneBuffer {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

/// `is_write_vectored` is left at its default: false.
impl Write for OneBuffer {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
