//! Request bodies: read within a limit, a time and a budget, and handed on as whole messages.
//!
//! A buffer grows with the bytes that arrive, never with the size that a message announces. What arrives whole is neither
//! copied nor counted; a request that must wait for bytes holds a reservation until it has them, or ends.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame};
use hyper::body::Incoming;
use prost::encoding::decode_varint;
use tokio::time::{Sleep, sleep, timeout};
use tonic::Status;

use crate::transport::memory_budget::{CallPriority, ConnectionMemoryBudget, MemoryReservation};

use super::{
    gzip::{InflateError, inflate},
    raw_codec::{COMPRESSED_FLAG, MESSAGE_PREFIX_LEN},
    status::{
        inflated_message_too_large, message_too_large, overloaded, request_too_slow, too_many_fields,
        unreadable_request,
    },
};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Time limit of a request, and of each message of a stream once it has begun.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// What a waiting call costs besides its headers and its bytes: HTTP/2's stream, a task, a timer.
const WAITING_CALL_BYTES: usize = 8 << 10;
/// The same of a stream of messages, whose buffers stay.
const WAITING_STREAM_BYTES: usize = 24 << 10;
/// Messages up to this size may be held without a reservation once they are whole: what else limits calls bounds them.
const MAX_UNRESERVED_MESSAGE: usize = 64 << 10;
/// Bytes of a message that may be held while only the end of its body is missing.
const MAX_UNRESERVED_INCOMPLETE: usize = 1 << 10;
/// The smallest buffer.
const MIN_BUFFER: usize = 256;
/// Fields at the top of a message. Those of a small message cost little.
const MAX_FIELDS: usize = 8192;
/// What a decoded field costs besides its bytes.
const FIELD_OVERHEAD: usize = 32;

/// The memory that the headers of a call take, about.
fn estimate_header_bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 64).sum()
}

/// Reserves memory for a call that waits for its message.
///
/// # Errors
/// When there is none left.
pub(super) fn reserve_waiting_call(
    budget: &Arc<ConnectionMemoryBudget>,
    headers: &HeaderMap,
    priority: CallPriority,
) -> Result<MemoryReservation, Status> {
    budget.reserve(WAITING_CALL_BYTES + estimate_header_bytes(headers), priority).ok_or_else(overloaded)
}

/// How long the rest of a body that nobody needs is still read.
const BODY_DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

/// A body that is read to its end, for a short time, also when its call was answered before: a refusal overtakes the
/// message of its call, and HTTP/2 counts a message for a stream that it has reset as an error of the peer. Enough of
/// those end the connection, with the calls of others on it.
struct DrainOnDropBody(Option<Incoming>);

impl DrainOnDropBody {
    fn poll_raw_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let Some(body) = &mut self.0 else { return Poll::Ready(None) };
        Pin::new(body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.0.as_ref().is_none_or(Incoming::is_end_stream)
    }
}

impl Drop for DrainOnDropBody {
    fn drop(&mut self) {
        let Some(mut body) = self.0.take().filter(|body| !body.is_end_stream()) else { return };
        let drain = async move {
            let rest =
                async { while let Some(Ok(_)) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {} };
            // What comes later is an error of the peer.
            let _ = timeout(BODY_DRAIN_TIMEOUT, rest).await;
        };
        // The stream counts among those of its connection until then. At the end of the process there is no runtime.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(drain);
        }
    }
}

/// A request body of which some may have been read already.
pub(super) struct PeekableBody {
    peeked: Option<Bytes>,
    /// How reading the rest failed, if it has.
    read_error: Option<hyper::Error>,
    rest: DrainOnDropBody,
}

impl From<Incoming> for PeekableBody {
    fn from(rest: Incoming) -> PeekableBody {
        PeekableBody { peeked: None, read_error: None, rest: DrainOnDropBody(Some(rest)) }
    }
}

impl PeekableBody {
    /// The message of a unary call that is plainly in order: it comes in one piece, uncompressed, with nothing behind
    /// it, and has at most `limit` bytes. None = it does not; nothing of the body is lost.
    pub(super) async fn peek_plain_message(&mut self, limit: usize) -> Option<Bytes> {
        // It may have been begun before, and left when it had to wait.
        let mut data = match &self.peeked {
            Some(read) => read.clone(),
            None => self.next_data().await?,
        };
        self.peeked = Some(data.clone());
        let [flags, length @ ..] = *data.first_chunk::<MESSAGE_PREFIX_LEN>()?;
        let length = u32::from_be_bytes(length) as usize;
        if flags != 0 || length > limit || length != data.len() - MESSAGE_PREFIX_LEN {
            return None;
        }
        while !self.rest.is_end_stream() {
            let next = futures_util::poll!(pin!(self.next_data()));
            let more = match next {
                Poll::Ready(more) => more,
                // Counted the other way.
                Poll::Pending if data.len() > MAX_UNRESERVED_INCOMPLETE => return None,
                Poll::Pending => {
                    // A part of a buffer would keep all of it.
                    data = Bytes::copy_from_slice(&data);
                    self.peeked = Some(data.clone());
                    self.next_data().await
                }
            };
            match more {
                Some(more) if more.is_empty() => {}
                Some(more) => {
                    self.peeked = Some([data, more].concat().into());
                    return None;
                }
                None => break,
            }
        }
        // A body that breaks off after its message is not in order.
        self.read_error.is_none().then(|| data.slice(MESSAGE_PREFIX_LEN..))
    }

    /// The next bytes; None at the end, and where reading fails.
    async fn next_data(&mut self) -> Option<Bytes> {
        match poll_fn(|cx| self.rest.poll_raw_frame(cx)).await? {
            // What is no data stands at the end.
            Ok(frame) => frame.into_data().ok(),
            Err(error) => {
                self.read_error = Some(error);
                None
            }
        }
    }

    fn poll_buffered_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(data) = self.peeked.take() {
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        match self.read_error.take() {
            Some(error) => Poll::Ready(Some(Err(error))),
            None => self.rest.poll_raw_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.peeked.is_none() && self.read_error.is_none() && self.rest.is_end_stream()
    }
}

/// A request body that gives whole messages alone, each of `limit` bytes at most.
pub(super) struct MessageBody {
    inner: PeekableBody,
    max_message: usize,
    /// Messages may be compressed. They are taken one by one then.
    is_gzip_allowed: bool,
    /// Messages that are whole and not yet given.
    complete: Option<Bytes>,
    /// The beginning of a message.
    partial: Vec<u8>,
    memory: BodyMemory,
    /// The bytes of a message that is larger than `limit`: what it announced, or of a compressed one the least it can have.
    oversize_length: Option<usize>,
    /// Set while bytes are due.
    read_timer: Option<Pin<Box<Sleep>>>,
    phase: BodyPhase,
}

/// What is expected of a body.
#[derive(Clone, Copy, PartialEq, Eq)]
enum BodyPhase {
    /// Messages, now and then.
    Stream,
    /// One message, and then the end.
    Unary,
    /// Nothing more: a unary request that has been read to its end.
    UnaryComplete,
}

/// The memory that a body may hold.
struct BodyMemory {
    budget: Arc<ConnectionMemoryBudget>,
    priority: CallPriority,
    header_bytes: usize,
    reservation: Option<MemoryReservation>,
}

impl BodyMemory {
    /// Holds so many bytes from now on.
    fn reserve(&mut self, bytes: usize) -> Result<(), Status> {
        let BodyMemory { budget, priority, reservation, .. } = self;
        let fits = match reservation {
            Some(reservation) => reservation.resize(bytes, *priority),
            None => {
                *reservation = budget.reserve(bytes, *priority);
                reservation.is_some()
            }
        };
        if fits { Ok(()) } else { Err(overloaded()) }
    }
}

impl MessageBody {
    /// A body of a call with these headers, which counts as anonymous until it is known whose it is.
    pub(super) fn new(
        body: impl Into<PeekableBody>,
        headers: &HeaderMap,
        limit: usize,
        is_gzip_allowed: bool,
        budget: Arc<ConnectionMemoryBudget>,
    ) -> Self {
        let (priority, headers) = (CallPriority::Anonymous, estimate_header_bytes(headers));
        MessageBody {
            inner: body.into(),
            max_message: limit,
            is_gzip_allowed,
            complete: None,
            partial: Vec::new(),
            memory: BodyMemory { budget, priority, header_bytes: headers, reservation: None },
            oversize_length: None,
            read_timer: None,
            phase: BodyPhase::Stream,
        }
    }

    /// Whose memory it takes from now on.
    pub(super) fn set_priority(&mut self, priority: CallPriority) {
        self.memory.priority = priority;
    }

    /// The length of the message that was refused, since it is larger than the limit; and the limit. In bytes. Of a
    /// compressed message the length is the least that it can have.
    pub(super) fn oversize(&self) -> Option<(usize, usize)> {
        self.oversize_length.map(|length| (length, self.max_message))
    }

    fn reject_size(&mut self, length: usize) -> Status {
        self.oversize_length = Some(length);
        message_too_large(length, self.max_message)
    }

    /// Reads a unary request to its end.
    ///
    /// # Errors
    /// When it is too large, comes too slowly, finds no memory or breaks off.
    pub(super) async fn read_to_end(&mut self) -> Result<(), Status> {
        self.phase = BodyPhase::Unary;
        while let Some(messages) = self.next_messages().await? {
            // Of what comes behind the first message nothing is kept.
            self.complete.get_or_insert(messages);
        }
        (self.phase, self.read_timer, self.partial) = (BodyPhase::UnaryComplete, None, Vec::new());
        match self.complete.as_ref().map_or(0, Bytes::len) {
            length if length > MAX_UNRESERVED_MESSAGE => self.memory.reserve(length)?,
            _ => self.memory.reservation = None,
        }
        Ok(())
    }

    /// Reads the first message of a stream.
    ///
    /// # Errors
    /// As [`MessageBody::read_to_end`].
    pub(super) async fn read_first_message(&mut self) -> Result<(), Status> {
        let first = timeout(READ_TIMEOUT, self.next_messages()).await;
        self.complete = first.map_err(|_| request_too_slow())??;
        Ok(())
    }

    /// Requires that the message has at most `limit` bytes besides a part that is passed over when it is decoded.
    ///
    /// # Errors
    /// When it has more: what is decoded costs many times its bytes.
    pub(super) fn check_length_excluding(
        &self,
        part: fn(&[u8]) -> usize,
        limit: usize,
    ) -> Result<(), Status> {
        let message =
            self.complete.as_ref().and_then(|message| message.get(MESSAGE_PREFIX_LEN..)).unwrap_or_default();
        match message.len() {
            length if length > limit && length - part(message) > limit => {
                Err(message_too_large(length - part(message), limit))
            }
            _ => Ok(()),
        }
    }

    /// Reserves what the message takes when it is decoded, where that can be much more than its bytes. `nested`: its
    /// fields are messages with many fields.
    ///
    /// # Errors
    /// When it has too many fields, or there is no memory.
    pub(super) fn reserve_for_decoding(&mut self, nested: bool) -> Result<(), Status> {
        let Some(message) = self.complete.as_ref().filter(|message| message.len() > MAX_UNRESERVED_MESSAGE)
        else {
            return Ok(());
        };
        let (mut top, mut below) = (0, 0);
        for field in protobuf_fields(message.get(MESSAGE_PREFIX_LEN..).unwrap_or_default()) {
            top += 1;
            below += if nested { protobuf_fields(field).count() } else { 0 };
        }
        if top > MAX_FIELDS {
            return Err(too_many_fields(top, MAX_FIELDS));
        }
        let bytes = message.len() + below * FIELD_OVERHEAD;
        self.memory.reserve(bytes)
    }

    /// The reservation of a large message, to be kept for as long as its call.
    pub(super) fn take_reservation(&mut self) -> Option<MemoryReservation> {
        self.memory.reservation.take()
    }

    async fn next_messages(&mut self) -> Result<Option<Bytes>, Status> {
        loop {
            match poll_fn(|cx| self.poll_messages(cx)).await.transpose()? {
                Some(frame) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
                None => return Ok(None),
            }
        }
    }

    /// The next whole messages, or the trailers.
    fn poll_messages(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(length) = announced_length(&self.partial).filter(|length| *length > self.max_message) {
            return Poll::Ready(Some(Err(self.reject_size(length))));
        }
        // Behind a compressed message another may be whole already.
        if self.is_gzip_allowed
            && let Some(whole) = self.take_complete_messages().transpose()
        {
            return Poll::Ready(Some(whole.map(Frame::data)));
        }
        loop {
            let frame = match self.inner.poll_buffered_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(None) if self.partial.is_empty() => return Poll::Ready(None),
                // It breaks off within a message.
                Poll::Ready(None | Some(Err(_))) => return Poll::Ready(Some(Err(unreadable_request()))),
                Poll::Pending => return self.poll_read_timeout(cx).map(|timer| Some(Err(timer))),
            };
            let whole = match frame.into_data() {
                Ok(data) => self.push(data),
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            };
            if let Some(whole) = whole.transpose() {
                return Poll::Ready(Some(whole.map(Frame::data)));
            }
        }
    }

    /// Waits for bytes; ready when they do not come in time, or may not be waited for.
    fn poll_read_timeout(&mut self, cx: &mut Context<'_>) -> Poll<Status> {
        if let Err(refused) = self.memory.reserve(self.waiting_bytes() + self.partial.capacity()) {
            return Poll::Ready(refused);
        }
        if self.phase == BodyPhase::Stream && self.partial.is_empty() {
            self.read_timer = None;
            return Poll::Pending;
        }
        let timer = self.read_timer.get_or_insert_with(|| Box::pin(sleep(READ_TIMEOUT)));
        timer.as_mut().poll(cx).map(|()| request_too_slow())
    }

    /// What it holds while it waits, but for the beginning of a message.
    fn waiting_bytes(&self) -> usize {
        let call = if self.phase == BodyPhase::Stream { WAITING_STREAM_BYTES } else { WAITING_CALL_BYTES };
        call + self.memory.header_bytes + self.complete.as_ref().map_or(0, Bytes::len)
    }

    /// Takes bytes that have come; gives the messages that are whole.
    fn push(&mut self, data: Bytes) -> Result<Option<Bytes>, Status> {
        if self.partial.is_empty() && !self.is_gzip_allowed {
            let end =
                complete_messages_len(&data, self.max_message).map_err(|length| self.reject_size(length))?;
            self.buffer_partial(&data[end..])?;
            return Ok((end > 0).then(|| data.slice(..end)));
        }
        self.buffer_partial(&data)?;
        self.take_complete_messages()
    }

    /// The whole messages of those bytes that are kept.
    fn take_complete_messages(&mut self) -> Result<Option<Bytes>, Status> {
        let end = match complete_messages_len(&self.partial, self.max_message)
            .map_err(|length| self.reject_size(length))?
        {
            0 => return Ok(None),
            _ if self.is_gzip_allowed => MESSAGE_PREFIX_LEN + announced_length(&self.partial).unwrap_or(0),
            end => end,
        };
        let rest = self.partial.split_off(end);
        let whole = std::mem::replace(&mut self.partial, rest);
        self.read_timer = self.read_timer.take().filter(|_| self.phase == BodyPhase::Unary);
        if self.phase == BodyPhase::Stream && self.memory.reservation.is_some() {
            self.memory.reserve(self.waiting_bytes() + self.partial.capacity())?;
        }
        // Behind the message of a unary call nothing is read.
        let compressed =
            self.is_gzip_allowed && whole.first() == Some(&COMPRESSED_FLAG) && self.complete.is_none();
        if !compressed {
            return Ok(Some(whole.into()));
        }
        let held = self.waiting_bytes() + self.partial.capacity() + whole.capacity();
        let memory = &mut self.memory;
        match inflate(&whole, self.max_message, |bytes| memory.reserve(held + bytes)) {
            Ok(message) => Ok(Some(message.into())),
            Err(InflateError::TooLarge) => {
                // How large it is nobody knows: inflation ends at the first byte beyond the limit.
                self.oversize_length = Some(self.max_message + 1);
                Err(inflated_message_too_large(self.max_message))
            }
            Err(InflateError::Failed(status)) => Err(status),
        }
    }

    /// Keeps bytes of a message that is not whole. The buffer doubles, and never exceeds what the message announces.
    fn buffer_partial(&mut self, data: &[u8]) -> Result<(), Status> {
        let needed = self.partial.len() + data.len();
        if needed > self.partial.capacity() {
            let announced =
                announced_length(if self.partial.is_empty() { data } else { &self.partial }).unwrap_or(0);
            let capacity = (2 * needed).max(MIN_BUFFER).min(needed.max(MESSAGE_PREFIX_LEN + announced));
            self.memory.reserve(self.waiting_bytes() + capacity)?;
            self.partial.reserve_exact(capacity - self.partial.len());
        }
        self.partial.extend_from_slice(data);
        Ok(())
    }
}

/// The length that a message announces, if its prefix has come.
fn announced_length(message: &[u8]) -> Option<usize> {
    let [_, length @ ..] = *message.first_chunk::<MESSAGE_PREFIX_LEN>()?;
    Some(u32::from_be_bytes(length) as usize)
}

/// How many of these bytes are whole messages.
///
/// # Errors
/// When the first message that is not whole is too large: its length.
fn complete_messages_len(data: &[u8], limit: usize) -> Result<usize, usize> {
    let mut end = 0;
    while let Some(length) = data.get(end..).and_then(announced_length) {
        // Those before it are answered first.
        if length > limit && end == 0 {
            return Err(length);
        }
        match end + MESSAGE_PREFIX_LEN + length {
            next if next <= data.len() && length <= limit => end = next,
            _ => break,
        }
    }
    Ok(end)
}

/// The fields of a protobuf message, each as the bytes of its value, up to where it is malformed.
fn protobuf_fields(message: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = message;
    std::iter::from_fn(move || {
        let tag = decode_varint(&mut rest).ok()?;
        let length = match tag & 7 {
            0 => rest.iter().position(|byte| *byte < 0x80)? + 1,
            1 => 8,
            2 => usize::try_from(decode_varint(&mut rest).ok()?).ok()?,
            5 => 4,
            // Groups are skipped by their fields.
            3 | 4 => 0,
            _ => return None,
        };
        let (value, after) = rest.split_at_checked(length)?;
        rest = after;
        Some(value)
    })
}

impl Body for MessageBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        if let Some(whole) = this.complete.take() {
            return Poll::Ready(Some(Ok(Frame::data(whole))));
        }
        if this.phase == BodyPhase::UnaryComplete {
            return Poll::Ready(None);
        }
        this.poll_messages(cx).map(|next| next.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        let ended =
            self.phase == BodyPhase::UnaryComplete || self.partial.is_empty() && self.inner.is_end_stream();
        self.complete.is_none() && ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u32, bytes: usize) -> Vec<u8> {
        [&[0], &length.to_be_bytes()[..], &vec![b'x'; bytes]].concat()
    }

    #[test]
    fn messages_are_given_whole_and_those_before_one_that_is_too_large_first() {
        let (small, large) = (message(3, 3), message(99, 0));
        assert_eq!(complete_messages_len(&[], 10).unwrap(), 0);
        assert_eq!(complete_messages_len(&small[..7], 10).unwrap(), 0);
        assert_eq!(complete_messages_len(&[&small[..], &small, &small[..4]].concat(), 10).unwrap(), 16);
        assert_eq!(complete_messages_len(&[&small[..], &large].concat(), 10).unwrap(), 8);
        assert_eq!(complete_messages_len(&large, 10), Err(99));
    }

    #[test]
    fn fields_are_counted_as_far_as_a_message_is_well_formed() {
        // A varint, two strings, one of them empty, eight bytes, four bytes.
        let good = [8, 0x96, 1, 0x12, 2, b'h', b'i', 0x1a, 0, 0x21, 1, 2, 3, 4, 5, 6, 7, 8, 0x2d, 1, 2, 3, 4];
        assert_eq!(protobuf_fields(&good).count(), 5);
        assert_eq!(protobuf_fields(&good).nth(1), Some(&b"hi"[..]));
        for bad in [&[0x12, 5, b'x'][..], &[0x80], &[0x0f], &[8, 0x80], &[]] {
            assert_eq!(protobuf_fields(bad).count(), 0, "{bad:?}");
        }
    }
}
