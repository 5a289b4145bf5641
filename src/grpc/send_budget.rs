//! Bounds the bytes of responses that wait to be sent, per connection and per process.
//!
//! Bytes count until HTTP/2 has written or discarded them: each piece of a response carries a charge, which its
//! drop releases. A finished response is always sent. A connection over its limit gets no further calls, and its
//! streams produce no further messages.
//!
//! A connection counts in its own memory. It reserves what exceeds [`FREE_BYTES`] from the process in blocks, so that
//! Checks touch no memory that another core writes.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::{HeaderMap, HeaderName, HeaderValue};

use super::list_permits::{ListPermit, ListPermits};

/// Unsent bytes of one connection: two of the largest responses.
const CONNECTION_BYTES: usize = 8 << 20;
/// Unsent bytes of all connections together, beyond [`FREE_BYTES`] for each.
const PROCESS_BYTES: usize = 64 << 20;
/// Unsent bytes that a connection counts for itself alone.
const FREE_BYTES: usize = 16 << 10;
/// Bytes that a connection reserves from the process at a time.
const BLOCK_BYTES: usize = 64 << 10;
/// Memory overhead of each piece, in bytes.
const PIECE_OVERHEAD: usize = 64;
/// Number of periods by which charges are grouped.
const CHARGE_PERIODS: usize = 6;
/// Length of a period. Bytes that wait for five periods end their connection.
pub(super) const CHARGE_PERIOD: Duration = Duration::from_secs(60);

const STATUS_DETAILS_HEADER: HeaderName = HeaderName::from_static("grpc-status-details-bin");

/// Unsent bytes of the process.
#[derive(Debug, Default)]
pub(super) struct SendBudget {
    used_bytes: AtomicUsize,
    list_permits: ListPermits,
}

impl SendBudget {
    fn is_full(&self) -> bool {
        self.used_bytes.load(Ordering::Relaxed) >= PROCESS_BYTES
    }

    /// Whether peers that read nothing must be disconnected early, because others need the memory.
    fn is_under_pressure(&self) -> bool {
        self.used_bytes.load(Ordering::Relaxed) >= PROCESS_BYTES / 2 || self.list_permits.is_exhausted()
    }

    pub(super) fn list_permits(&self) -> &ListPermits {
        &self.list_permits
    }
}

/// Unsent bytes of one connection.
#[derive(Debug)]
pub(super) struct ConnectionSendBudget {
    process: Arc<SendBudget>,
    state: Mutex<SendBudgetState>,
}

#[derive(Debug, Default)]
struct SendBudgetState {
    bytes: usize,
    /// Bytes reserved from the process.
    reserved: usize,
    /// Number of charges by period, and the current period.
    charges_by_period: [usize; CHARGE_PERIODS],
    current_period: usize,
    /// Streams that wait for budget.
    waiting: Vec<Waker>,
}

impl ConnectionSendBudget {
    pub(super) fn new(process: Arc<SendBudget>) -> Arc<ConnectionSendBudget> {
        Arc::new(ConnectionSendBudget { process, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, SendBudgetState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Charges bytes until the charge is dropped.
    pub(super) fn charge(self: &Arc<Self>, bytes: usize) -> SendCharge {
        let bytes = bytes + PIECE_OVERHEAD;
        let mut state = self.state();
        state.bytes += bytes;
        let period = state.current_period;
        state.charges_by_period[period] += 1;
        if let Some(missing) =
            state.bytes.checked_sub(state.reserved + FREE_BYTES).filter(|missing| *missing > 0)
        {
            let blocks = missing.next_multiple_of(BLOCK_BYTES);
            state.reserved += blocks;
            self.process.used_bytes.fetch_add(blocks, Ordering::Relaxed);
        }
        drop(state);
        SendCharge { budget: self.clone(), bytes, period }
    }

    /// Whether the connection may start another call.
    pub(super) fn has_room(&self) -> bool {
        self.is_within_limits(self.state().bytes)
    }

    fn is_within_limits(&self, bytes: usize) -> bool {
        bytes < FREE_BYTES || bytes < CONNECTION_BYTES && !self.process.is_full()
    }

    /// Waits until a stream of the connection may produce another message.
    pub(super) fn poll_has_room(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if self.is_within_limits(state.bytes) {
            return Poll::Ready(());
        }
        if state.waiting.iter().all(|waker| !waker.will_wake(cx.waker())) {
            state.waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Whether peers that read nothing must be disconnected early, because others need the memory.
    pub(super) fn is_under_pressure(&self) -> bool {
        self.process.is_under_pressure()
    }

    /// Begins the next period. Returns whether any bytes have waited for five periods.
    pub(super) fn begin_period(&self) -> bool {
        let mut state = self.state();
        state.current_period = (state.current_period + 1) % CHARGE_PERIODS;
        state.charges_by_period[state.current_period] > 0
    }

    /// Charges the headers of a refusal, or the trailers of a stream. HTTP/2's flow control does not hold them back;
    /// they wait for the socket alone.
    pub(super) fn charge_headers(self: &Arc<Self>, headers: &mut HeaderMap) {
        let bytes = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32).sum();
        let Some(details) = headers.get_mut(STATUS_DETAILS_HEADER) else { return };
        let held = ChargedHeaderValue { value: details.clone(), _charge: self.charge(bytes) };
        if let Ok(mut value) = HeaderValue::from_maybe_shared(Bytes::from_owner(held)) {
            // Otherwise HTTP/2 would keep the value in its header table, with the charge.
            value.set_sensitive(true);
            *details = value;
        }
    }
}

impl Drop for ConnectionSendBudget {
    fn drop(&mut self) {
        let reserved = self.state().reserved;
        self.process.used_bytes.fetch_sub(reserved, Ordering::Relaxed);
    }
}

/// A charge for unsent bytes, released on drop.
#[derive(Debug)]
pub(super) struct SendCharge {
    budget: Arc<ConnectionSendBudget>,
    bytes: usize,
    period: usize,
}

impl Drop for SendCharge {
    fn drop(&mut self) {
        let mut state = self.budget.state();
        state.bytes -= self.bytes;
        state.charges_by_period[self.period] -= 1;
        if state.bytes > FREE_BYTES / 2 {
            return;
        }
        if state.reserved > 0 {
            let reserved = std::mem::take(&mut state.reserved);
            self.budget.process.used_bytes.fetch_sub(reserved, Ordering::Relaxed);
        }
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        waiting.into_iter().for_each(Waker::wake);
    }
}

/// A header value that carries its charge.
struct ChargedHeaderValue {
    value: HeaderValue,
    _charge: SendCharge,
}

impl AsRef<[u8]> for ChargedHeaderValue {
    fn as_ref(&self) -> &[u8] {
        self.value.as_bytes()
    }
}

/// The charge that a piece holds.
#[derive(Debug)]
enum PieceCharge {
    /// The piece is the whole message, and holds its charge.
    Whole { _charge: SendCharge },
    /// The message has further pieces, which share its memory and charge.
    SharedMessage { _message: Arc<LargeMessageCharge> },
}

/// The charge and permit of a message in several pieces.
#[derive(Debug)]
struct LargeMessageCharge {
    _charge: SendCharge,
    _list_permit: Option<ListPermit>,
}

/// A piece of a response on its way to the socket.
#[derive(Debug)]
pub(super) struct MessagePiece {
    bytes: Bytes,
    _held: PieceCharge,
}

impl Buf for MessagePiece {
    fn remaining(&self) -> usize {
        self.bytes.len()
    }

    fn chunk(&self) -> &[u8] {
        &self.bytes
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
    }
}

/// Splits a message into pieces, so that HTTP/2 buffers at most one unsent piece for each stream.
#[derive(Debug, Default)]
pub(super) struct MessageSplitter {
    rest: Bytes,
    message: Option<Arc<LargeMessageCharge>>,
}

impl MessageSplitter {
    /// The largest piece, in bytes: one frame of HTTP/2.
    const MAX_PIECE_LEN: usize = 16 << 10;

    /// Starts a message and returns its first piece.
    pub(super) fn start(
        &mut self,
        bytes: Bytes,
        budget: &Arc<ConnectionSendBudget>,
        list_permit: Option<ListPermit>,
    ) -> MessagePiece {
        let charge = budget.charge(bytes.len());
        if bytes.len() <= MessageSplitter::MAX_PIECE_LEN && list_permit.is_none() {
            return MessagePiece { bytes, _held: PieceCharge::Whole { _charge: charge } };
        }
        self.rest = bytes;
        self.message = Some(Arc::new(LargeMessageCharge { _charge: charge, _list_permit: list_permit }));
        self.next_piece().unwrap_or_else(|| MessagePiece {
            bytes: Bytes::new(),
            _held: PieceCharge::Whole { _charge: budget.charge(0) },
        })
    }

    /// Returns the next piece of the message.
    pub(super) fn next_piece(&mut self) -> Option<MessagePiece> {
        let message = self.message.clone()?;
        let bytes = self.rest.split_to(self.rest.len().min(MessageSplitter::MAX_PIECE_LEN));
        if self.rest.is_empty() {
            self.message = None;
        }
        Some(MessagePiece { bytes, _held: PieceCharge::SharedMessage { _message: message } })
    }

    /// Whether every piece was returned.
    pub(super) fn is_done(&self) -> bool {
        self.message.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> (Arc<SendBudget>, Arc<ConnectionSendBudget>) {
        let process = Arc::new(SendBudget::default());
        (process.clone(), ConnectionSendBudget::new(process))
    }

    fn used(process: &SendBudget) -> usize {
        process.used_bytes.load(Ordering::Relaxed)
    }

    #[test]
    fn what_waits_on_a_connection_and_in_the_process_is_bounded_and_given_back() {
        let (process, budget) = connection();
        let small = budget.charge(FREE_BYTES / 2);
        assert_eq!(used(&process), 0, "a little is free");
        let charges: Vec<_> = (0..8).map(|_| budget.charge(1 << 20)).collect();
        assert!(!budget.has_room(), "8 MiB of one connection");
        let other = ConnectionSendBudget::new(process.clone());
        assert!(other.has_room() && !other.is_under_pressure());
        let others: Vec<_> = (0..8)
            .map(|_| ConnectionSendBudget::new(process.clone()))
            .map(|one| one.charge(7 << 20))
            .collect();
        let little = other.charge(FREE_BYTES);
        assert!(other.is_under_pressure() && !other.has_room(), "64 MiB of all");
        drop((others, charges));
        assert!(budget.has_room() && other.has_room() && !other.is_under_pressure());
        drop((little, small));
        assert_eq!(used(&process), 0);
    }

    #[test]
    fn the_memory_of_a_message_counts_until_its_last_piece_is_sent() {
        let (_, budget) = connection();
        let mut pieces = MessageSplitter::default();
        let mut sent = vec![pieces.start(vec![7; 100_000].into(), &budget, None)];
        while let Some(piece) = pieces.next_piece() {
            sent.push(piece);
        }
        assert!(
            pieces.is_done() && sent.iter().all(|piece| piece.remaining() <= MessageSplitter::MAX_PIECE_LEN)
        );
        assert_eq!(sent.iter().map(Buf::remaining).sum::<usize>(), 100_000);
        let last = sent.pop();
        drop(sent);
        assert!(budget.state().bytes >= 100_000);
        drop(last);
        assert_eq!(budget.state().bytes, 0);
    }

    #[test]
    fn bytes_that_are_not_taken_for_five_periods_are_overdue() {
        let (_, budget) = connection();
        let old = budget.charge(1);
        for _ in 0..CHARGE_PERIODS - 1 {
            assert!(!budget.begin_period());
            drop(budget.charge(1));
        }
        assert!(budget.begin_period());
        drop(old);
        for _ in 0..2 * CHARGE_PERIODS {
            assert!(!budget.begin_period());
        }
    }

    #[test]
    fn a_refusals_headers_count_until_they_are_written() {
        let (_, budget) = connection();
        let mut headers = HeaderMap::new();
        headers.insert(STATUS_DETAILS_HEADER, HeaderValue::from_static("AAAA"));
        budget.charge_headers(&mut headers);
        assert_eq!(headers[STATUS_DETAILS_HEADER], "AAAA");
        assert!(budget.state().bytes > 0);
        drop(headers);
        assert_eq!(budget.state().bytes, 0);
    }
}
