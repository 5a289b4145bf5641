//! A connection's bytes, written so that a small answer leaves in one piece.
//!
//! Where h2 may write from several buffers at once it sends an answer's trailers by a write of their own, and a
//! process that dies between the two leaves an answer without an end, which a proxy cannot ask for again. Without,
//! it copies payloads of up to 1 KiB and sends headers, message and trailers together. That is a system call less, too.
//!
//! And closed so that the last answers arrive. A socket that is closed while bytes of the peer are unread resets the
//! connection, and a reset takes from the peer what it has not read yet: answers, and the word that the connection ends.

use std::{
    io,
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

use crate::transport::socket::Stream;

/// How HTTP/2 begins (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How long a socket may take nothing while something waits to be written.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a peer that has been told all may take to close its side.
const FAREWELL: Duration = Duration::from_secs(1);

/// A connection that is written from one buffer at a time, and has begun as HTTP/2 does.
pub(super) struct OneBuffer {
    stream: TokioIo<Stream>,
    /// How much of the preface hyper has been given.
    given: usize,
    /// How long the socket may take nothing while something waits to be written.
    write_timeout: Duration,
    /// The socket takes nothing, until when.
    stuck: Option<Pin<Box<Sleep>>>,
    /// Our side is closed; how long the peer's may still be open.
    closed: Option<Pin<Box<Sleep>>>,
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
        let (stream, write_timeout) = (TokioIo::new(stream), WRITE_TIMEOUT);
        Ok(Some(OneBuffer { stream, given: 0, write_timeout, stuck: None, closed: None }))
    }

    /// The outcome of a write, or an error when the socket has taken nothing for too long.
    fn in_time<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stuck = None;
            return written;
        }
        let timeout = self.write_timeout;
        let stuck = self.stuck.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        ready!(stuck.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
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
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.in_time(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.in_time(cx, flushed)
    }

    /// Closes our side, and then reads, for nobody, until the peer has closed its own or has had its time.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.closed.is_none() {
            let closed = Pin::new(self.stream.inner_mut()).poll_shutdown(cx);
            ready!(self.in_time(cx, closed))?;
        }
        let OneBuffer { stream, closed, .. } = &mut *self;
        let mut stream = Pin::new(stream.inner_mut());
        let patience = closed.get_or_insert_with(|| Box::pin(tokio::time::sleep(FAREWELL)));
        let mut unread = [0; 4096];
        loop {
            if patience.as_mut().poll(cx).is_ready() {
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
        let stream = Stream::Tcp(listener.accept().await.unwrap().0);
        let mut server = OneBuffer::open(stream).await.unwrap().unwrap();
        peer.write_all(&[0; 20_000]).await.unwrap();
        poll_fn(|cx| Pin::new(&mut server).poll_write(cx, b"the last")).await.unwrap();
        let mut closing = poll_fn(|cx| Pin::new(&mut server).poll_shutdown(cx));
        assert!(poll!(&mut closing).is_pending(), "the peer's side is open");
        let mut told = String::new();
        peer.read_to_string(&mut told).await.unwrap();
        assert_eq!(told, "the last");
        drop(peer);
        closing.await.unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_takes_nothing_fails_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        peer.write_all(PREFACE).await.unwrap();
        let stream = Stream::Tcp(listener.accept().await.unwrap().0);
        let mut server = OneBuffer::open(stream).await.unwrap().unwrap();
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
