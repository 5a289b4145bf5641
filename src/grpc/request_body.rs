//! Reads request bodies within limits of size, time and memory, and passes them on as whole messages.
//!
//! Compression belongs in `gzip.rs`, the memory budget in `transport/memory_budget.rs`.
//!
//! A buffer grows with the bytes that arrive, never with the announced size. A message that arrives whole is neither
//! copied nor counted. A request that must wait for bytes holds a reservation until it is complete.

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

/// Time limit of a request, and of each message of a stream once its first byte has arrived.
const READ_TIMEOUT: Duration = Duration::from_secs(10);
/// Memory of a waiting call besides headers and message: the HTTP/2 stream, a task, a timer.
const WAITING_CALL_BYTES: usize = 8 << 10;
/// Memory of a waiting stream, which keeps its buffers.
const WAITING_STREAM_BYTES: usize = 24 << 10;
/// Complete messages up to this size need no reservation: the limits on calls bound them.
const MAX_UNRESERVED_MESSAGE: usize = 64 << 10;
/// Bytes of a complete message that need no reservation while the end of its body is missing.
const MAX_UNRESERVED_INCOMPLETE: usize = 1 << 10;
/// Smallest buffer of a partial message, in bytes.
const MIN_BUFFER: usize = 256;
/// Top-level fields of a large message. Those of a small message cost little.
const MAX_FIELDS: usize = 8192;
/// Memory of a decoded field besides its bytes.
const FIELD_OVERHEAD: usize = 32;

/// Estimates the memory of a call's headers, in bytes.
fn estimate_header_bytes(headers: &HeaderMap) -> usize {
    headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 64).sum()
}

/// Reserves memory for a call that waits for its message. Fails if none is left.
pub(super) fn reserve_waiting_call(
    budget: &Arc<ConnectionMemoryBudget>,
    headers: &HeaderMap,
    priority: CallPriority,
) -> Result<MemoryReservation, Status> {
    budget.reserve(WAITING_CALL_BYTES + estimate_header_bytes(headers), priority).ok_or_else(overloaded)
}

/// How long the rest of an unneeded body is still read.
const BODY_DRAIN_TIMEOUT: Duration = Duration::from_millis(100);

/// A body whose rest is read for a short time after it is dropped.
///
/// A refusal can overtake the message of its call. HTTP/2 counts a message for a reset stream as an error of the peer,
/// and enough of those end the connection, with other calls on it.
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
            // Later bytes count as an error of the peer.
            let _ = timeout(BODY_DRAIN_TIMEOUT, rest).await;
        };
        // The stream counts against its connection until then. When the process ends, there is no runtime.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(drain);
        }
    }
}

/// A request body whose beginning may have been read already.
pub(super) struct PeekableBody {
    peeked: Option<Bytes>,
    /// Why reading the rest failed.
    read_error: Option<hyper::Error>,
    rest: DrainOnDropBody,
}

impl From<Incoming> for PeekableBody {
    fn from(rest: Incoming) -> PeekableBody {
        PeekableBody { peeked: None, read_error: None, rest: DrainOnDropBody(Some(rest)) }
    }
}

impl PeekableBody {
    /// Reads the message of a plain unary call: in one frame, uncompressed, with nothing after it, and with at most
    /// `limit` bytes. `None` if it is not plain; the body is intact then.
    pub(super) async fn peek_plain_message(&mut self, limit: usize) -> Option<Bytes> {
        // An earlier call may have started to read, and stopped when it had to wait.
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
                // The slow path reserves memory for it.
                Poll::Pending if data.len() > MAX_UNRESERVED_INCOMPLETE => return None,
                Poll::Pending => {
                    // A slice would keep the whole buffer alive.
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
        // The body must not break off after its message.
        self.read_error.is_none().then(|| data.slice(MESSAGE_PREFIX_LEN..))
    }

    /// The next bytes; `None` at the end and if reading fails.
    async fn next_data(&mut self) -> Option<Bytes> {
        match poll_fn(|cx| self.rest.poll_raw_frame(cx)).await? {
            // Other frames come only at the end.
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

/// A request body that yields only whole messages of at most `max_message` bytes.
pub(super) struct MessageBody {
    inner: PeekableBody,
    max_message: usize,
    /// Whether messages may be compressed. If so, they are taken one by one.
    is_gzip_allowed: bool,
    /// Complete messages that are not yet taken.
    complete: Option<Bytes>,
    /// The beginning of an incomplete message.
    partial: Vec<u8>,
    memory: BodyMemory,
    /// The length of a message that exceeds `max_message`: the announced length or, if compressed, a lower bound.
    oversize_length: Option<usize>,
    /// Runs while bytes are due.
    read_timer: Option<Pin<Box<Sleep>>>,
    phase: BodyPhase,
}

/// What a body may still contain.
#[derive(Clone, Copy, PartialEq, Eq)]
enum BodyPhase {
    /// Messages at any time.
    Stream,
    /// One message, then the end.
    Unary,
    /// Nothing: the unary request is complete.
    UnaryComplete,
}

/// The memory reservation of a body.
struct BodyMemory {
    budget: Arc<ConnectionMemoryBudget>,
    priority: CallPriority,
    header_bytes: usize,
    reservation: Option<MemoryReservation>,
}

impl BodyMemory {
    /// Changes the reservation to `bytes`.
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
    /// Wraps the body of a call with these headers. It counts as anonymous until `set_priority`.
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

    /// Sets the priority that decides how far it may fill the budget.
    pub(super) fn set_priority(&mut self, priority: CallPriority) {
        self.memory.priority = priority;
    }

    /// Length of the refused message and its limit, in bytes. For a compressed message the length is a lower bound.
    pub(super) fn oversize(&self) -> Option<(usize, usize)> {
        self.oversize_length.map(|length| (length, self.max_message))
    }

    fn reject_size(&mut self, length: usize) -> Status {
        self.oversize_length = Some(length);
        message_too_large(length, self.max_message)
    }

    /// Reads a unary request to its end. Fails if it is too large, too slow, finds no memory or breaks off.
    pub(super) async fn read_to_end(&mut self) -> Result<(), Status> {
        self.phase = BodyPhase::Unary;
        while let Some(messages) = self.next_messages().await? {
            // Further messages are discarded.
            self.complete.get_or_insert(messages);
        }
        (self.phase, self.read_timer, self.partial) = (BodyPhase::UnaryComplete, None, Vec::new());
        match self.complete.as_ref().map_or(0, Bytes::len) {
            length if length > MAX_UNRESERVED_MESSAGE => self.memory.reserve(length)?,
            _ => self.memory.reservation = None,
        }
        Ok(())
    }

    /// Reads the first message of a stream. Fails like [`MessageBody::read_to_end`].
    pub(super) async fn read_first_message(&mut self) -> Result<(), Status> {
        let first = timeout(READ_TIMEOUT, self.next_messages()).await;
        self.complete = first.map_err(|_| request_too_slow())??;
        Ok(())
    }

    /// Checks that the message has at most `limit` bytes besides a part that decoding skips: decoded data takes
    /// many times its encoded size.
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

    /// Reserves the memory of the decoded message, if that can be much more than its bytes. `nested`: its fields are
    /// messages with many fields. Fails if it has too many fields or no memory is left.
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

    /// Takes the reservation of a large message, to be held as long as its call runs.
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

    /// Polls the next whole messages, or the trailers.
    fn poll_messages(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(length) = announced_length(&self.partial).filter(|length| *length > self.max_message) {
            return Poll::Ready(Some(Err(self.reject_size(length))));
        }
        // Another message may be complete behind a compressed one.
        if self.is_gzip_allowed
            && let Some(whole) = self.take_complete_messages().transpose()
        {
            return Poll::Ready(Some(whole.map(Frame::data)));
        }
        loop {
            let frame = match self.inner.poll_buffered_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Ready(None) if self.partial.is_empty() => return Poll::Ready(None),
                // The body breaks off within a message.
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

    /// Waits for bytes. Ready if they are late, or no memory is left for waiting.
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

    /// Memory that it holds while it waits, without `partial`.
    fn waiting_bytes(&self) -> usize {
        let call = if self.phase == BodyPhase::Stream { WAITING_STREAM_BYTES } else { WAITING_CALL_BYTES };
        call + self.memory.header_bytes + self.complete.as_ref().map_or(0, Bytes::len)
    }

    /// Adds bytes that have arrived, and returns messages that are complete.
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

    /// Takes the complete messages out of the buffer.
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
        // After the message of a unary call nothing is inflated.
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
                // The size is unknown: inflation stops at the first byte beyond the limit.
                self.oversize_length = Some(self.max_message + 1);
                Err(inflated_message_too_large(self.max_message))
            }
            Err(InflateError::Failed(status)) => Err(status),
        }
    }

    /// Buffers bytes of an incomplete message. The buffer doubles, and never exceeds the announced length.
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

/// The announced length of a message, if its prefix is complete.
fn announced_length(message: &[u8]) -> Option<usize> {
    let [_, length @ ..] = *message.first_chunk::<MESSAGE_PREFIX_LEN>()?;
    Some(u32::from_be_bytes(length) as usize)
}

/// How many of these bytes are whole messages. Fails with the length of the first message if that is too large.
fn complete_messages_len(data: &[u8], limit: usize) -> Result<usize, usize> {
    let mut end = 0;
    while let Some(length) = data.get(end..).and_then(announced_length) {
        // Messages before it are answered first.
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

/// Iterates over the fields of a protobuf message as the bytes of their values, until it is malformed.
fn protobuf_fields(message: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = message;
    std::iter::from_fn(move || {
        let tag = decode_varint(&mut rest).ok()?;
        let length = match tag & 7 {
            0 => rest.iter().position(|byte| *byte < 0x80)? + 1,
            1 => 8,
            2 => usize::try_from(decode_varint(&mut rest).ok()?).ok()?,
            5 => 4,
            // The fields of a group are iterated like others.
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
