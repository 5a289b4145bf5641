//! Refuses Checks before HTTP/2 sees them, while their serving thread is overloaded.
//!
//! In HTTP/2, refusing a call costs almost as much as answering it, so a thread that refuses there has no time left to
//! answer. Here a refusal costs only its bytes: the call's frames are withheld from HTTP/2, and a prepared response is
//! written between the frames that HTTP/2 writes.
//!
//! Only Checks are refused: management has limits per caller, and health must stay visible. Every call passes if:
//!
//! - the headers of its connection cannot be tracked,
//! - its peer has shrunk its header table (the next headers must acknowledge that, and only HTTP/2 can), or
//! - too many refusals wait already.
//!
//! When a thread is overloaded is decided in `load_shed.rs`; header compression belongs in `hpack.rs`.

use std::{io, sync::LazyLock};

use tonic::body::Body;

use super::{
    gzip::{ACCEPTED_ENCODINGS, GRPC_ACCEPT_ENCODING},
    hpack::{BlockSummary, HpackTable, is_fully_indexed, write_string},
    load_shed::ConnectionQueue,
    rpc,
    status::overloaded,
};

/// The head of a frame: three bytes of length, type, flags, four of stream id (RFC 9113, section 4.1).
const FRAME_HEAD_LEN: usize = 9;
/// The largest frame that this server accepts, in bytes.
const MAX_FRAME_LEN: usize = 16 << 10;
/// Refused calls of a connection that still send their message.
const MAX_REFUSED_STREAMS: usize = 128;
/// Withheld bytes after which flow-control credit is returned to the peer.
const WINDOW_UPDATE_THRESHOLD: u32 = 16 << 10;
/// Refusals that wait to be written, in bytes.
pub(super) const MAX_REFUSAL_BYTES: usize = 32 << 10;
/// The largest header block that is collected from several frames, in bytes.
const MAX_HEADER_BLOCK: usize = 64 << 10;
/// The setting of a peer's header table size, and its initial value (RFC 9113, section 6.5.2).
const SETTINGS_HEADER_TABLE_SIZE: [u8; 2] = [0, 1];
const INITIAL_TABLE_SIZE: u32 = 4096;
const MAX_STREAM_ID: u32 = (1 << 31) - 1;

mod frame_type {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const RST_STREAM: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const WINDOW_UPDATE: u8 = 8;
    pub(super) const CONTINUATION: u8 = 9;
}

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 0x20;

#[derive(Clone, Copy, Debug)]
struct FrameHead {
    length: usize,
    frame_type: u8,
    flags: u8,
    stream: u32,
}

impl FrameHead {
    fn read(bytes: &[u8]) -> Option<FrameHead> {
        let &[a, b, c, frame_type, flags, d, e, f, g] = bytes.first_chunk::<FRAME_HEAD_LEN>()?;
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        Some(FrameHead {
            length,
            frame_type,
            flags,
            stream: u32::from_be_bytes([d, e, f, g]) & MAX_STREAM_ID,
        })
    }

    fn has_flag(self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    fn write(self, out: &mut Vec<u8>) {
        let [_, length @ ..] = u32::try_from(self.length).unwrap_or(u32::MAX).to_be_bytes();
        out.extend(length);
        out.extend([self.frame_type, self.flags]);
        out.extend(self.stream.to_be_bytes());
    }
}

/// The header block of a refusal. It changes no header table, so HTTP/2's own encoder need not know about it.
static REFUSAL_HEADERS: LazyLock<Vec<u8>> = LazyLock::new(|| {
    // `:status: 200` is in the static table.
    let mut block = vec![0x88];
    let answer: http::Response<Body> = overloaded().into_http();
    let accepted = [(&GRPC_ACCEPT_ENCODING, &ACCEPTED_ENCODINGS)];
    for (name, value) in answer.headers().iter().chain(accepted) {
        block.push(0);
        write_string(&mut block, name.as_str().as_bytes());
        write_string(&mut block, value.as_bytes());
    }
    block
});

/// What to do with the next bytes.
#[derive(Clone, Copy)]
enum PayloadAction {
    Pass(usize),
    Withhold(usize),
}

/// Whether the headers of a connection can still be tracked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum HeaderTracking {
    /// HTTP/2 has the same header table as the peer.
    InSync,
    /// HTTP/2 lacks entries of withheld blocks, so it gets blocks without references.
    Rewritten,
    /// Tracking has ended: everything passes.
    Ended,
}

/// Filters the frames of one connection on their way from the peer to HTTP/2.
pub(super) struct EarlyShed {
    queue: ConnectionQueue,
    table: HpackTable,
    tracking: HeaderTracking,
    /// Whether the peer's header table has at least its initial size.
    may_refuse: bool,
    /// Incomplete headers, collected if they must be rewritten.
    pending_headers: Option<(FrameHead, Vec<u8>)>,
    /// The beginning of an incomplete frame.
    partial_frame: Vec<u8>,
    payload: PayloadAction,
    /// The last stream that the peer opened, and the last that HTTP/2 knows.
    last_opened: u32,
    last_passed: u32,
    /// Streams of refused calls whose message has not ended.
    refused_streams: Vec<u32>,
    withheld_bytes: u32,
    /// Frames to write to the peer.
    refusals: Vec<u8>,
}

impl EarlyShed {
    pub(super) fn new(queue: ConnectionQueue) -> EarlyShed {
        EarlyShed {
            queue,
            table: HpackTable::default(),
            tracking: HeaderTracking::InSync,
            may_refuse: true,
            pending_headers: None,
            partial_frame: Vec::new(),
            payload: PayloadAction::Pass(0),
            last_opened: 0,
            last_passed: 0,
            refused_streams: Vec::new(),
            withheld_bytes: 0,
            refusals: Vec::new(),
        }
    }

    /// Complete frames to write to the peer.
    pub(super) fn refusals(&mut self) -> &mut Vec<u8> {
        &mut self.refusals
    }

    /// The incomplete frame that is left when the peer closes its side.
    pub(super) fn take_partial_frame(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.partial_frame)
    }

    /// Filters bytes of the peer, and appends those for HTTP/2 to `passed`. Fails if a block that
    /// must be rewritten cannot be.
    pub(super) fn filter(&mut self, bytes: &[u8], passed: &mut Vec<u8>) -> io::Result<()> {
        self.queue.mark_read();
        let mut joined = std::mem::take(&mut self.partial_frame);
        let mut rest = if joined.is_empty() {
            bytes
        } else {
            joined.extend(bytes);
            &joined
        };
        while let Some(taken) = self.process_frame(rest, passed)? {
            rest = &rest[taken..];
        }
        if !rest.is_empty() {
            self.partial_frame = rest.to_vec();
        }
        Ok(())
    }

    /// Processes a frame or a part of one, and returns its length. `None` if more bytes are needed.
    fn process_frame(&mut self, bytes: &[u8], passed: &mut Vec<u8>) -> io::Result<Option<usize>> {
        match &mut self.payload {
            _ if bytes.is_empty() => return Ok(None),
            PayloadAction::Pass(left) if *left > 0 => {
                let taken = bytes.len().min(*left);
                *left -= taken;
                passed.extend(&bytes[..taken]);
                return Ok(Some(taken));
            }
            PayloadAction::Withhold(left) if *left > 0 => {
                let taken = bytes.len().min(*left);
                *left -= taken;
                return Ok(Some(taken));
            }
            PayloadAction::Pass(_) | PayloadAction::Withhold(_) => {}
        }
        let Some(head) = FrameHead::read(bytes) else { return Ok(None) };
        if self.pending_headers.is_some() && head.frame_type != frame_type::CONTINUATION {
            return Err(io::ErrorKind::InvalidData.into());
        }
        if self.is_buffered(head) {
            let Some(payload) = bytes.get(FRAME_HEAD_LEN..FRAME_HEAD_LEN + head.length) else {
                return Ok(None);
            };
            match head.frame_type {
                frame_type::SETTINGS => self.pass_settings(head, payload, passed),
                frame_type::CONTINUATION => self.process_continuation(head, payload, passed)?,
                _ => self.process_headers(head, payload, passed)?,
            }
            return Ok(Some(FRAME_HEAD_LEN + head.length));
        }
        if self.should_withhold(head) {
            self.payload = PayloadAction::Withhold(head.length);
            return Ok(Some(FRAME_HEAD_LEN));
        }
        if matches!(head.frame_type, frame_type::HEADERS | frame_type::CONTINUATION) {
            self.stop_tracking()?;
        }
        passed.extend(&bytes[..FRAME_HEAD_LEN]);
        self.payload = PayloadAction::Pass(head.length);
        Ok(Some(FRAME_HEAD_LEN))
    }

    /// Whether a frame must be buffered until it is complete.
    fn is_buffered(&self, head: FrameHead) -> bool {
        let is_read = match head.frame_type {
            frame_type::HEADERS => self.tracking != HeaderTracking::Ended,
            frame_type::CONTINUATION => self.tracking == HeaderTracking::Rewritten,
            frame_type::SETTINGS => true,
            _ => false,
        };
        is_read && head.length <= MAX_FRAME_LEN
    }

    /// Passes settings, and reads the size of the peer's header table.
    fn pass_settings(&mut self, head: FrameHead, payload: &[u8], passed: &mut Vec<u8>) {
        for setting in payload.chunks_exact(6) {
            let (id, value) = setting.split_at(2);
            if let Ok(value) = value.try_into()
                && id == SETTINGS_HEADER_TABLE_SIZE
            {
                self.may_refuse &= u32::from_be_bytes(value) >= INITIAL_TABLE_SIZE;
            }
        }
        head.write(passed);
        passed.extend(payload);
    }

    /// Whether a frame belongs to a call that HTTP/2 does not know.
    fn should_withhold(&mut self, head: FrameHead) -> bool {
        let FrameHead { length, frame_type, stream, .. } = head;
        let unfinished = self.refused_streams.iter().position(|refused| *refused == stream);
        // For HTTP/2, a stream beyond the last known one is idle: a frame on it would end the connection.
        let unknown = stream > self.last_passed && stream <= self.last_opened;
        match frame_type {
            frame_type::DATA => {
                let Some(at) = unfinished else { return false };
                if head.has_flag(END_STREAM) {
                    self.refused_streams.swap_remove(at);
                }
                self.return_credit(length);
                true
            }
            frame_type::RST_STREAM => {
                unfinished.map(|at| self.refused_streams.swap_remove(at));
                unfinished.is_some() || unknown
            }
            frame_type::WINDOW_UPDATE => unfinished.is_some() || unknown,
            _ => false,
        }
    }

    /// Returns flow-control credit for withheld bytes.
    fn return_credit(&mut self, bytes: usize) {
        self.withheld_bytes += u32::try_from(bytes).unwrap_or(0);
        if self.withheld_bytes >= WINDOW_UPDATE_THRESHOLD {
            FrameHead { length: 4, frame_type: frame_type::WINDOW_UPDATE, flags: 0, stream: 0 }
                .write(&mut self.refusals);
            self.refusals.extend(self.withheld_bytes.to_be_bytes());
            self.withheld_bytes = 0;
        }
    }

    fn process_headers(&mut self, head: FrameHead, payload: &[u8], passed: &mut Vec<u8>) -> io::Result<()> {
        let block = header_block(head, payload);
        if self.tracking == HeaderTracking::Rewritten && !head.has_flag(END_HEADERS) {
            let block = block.ok_or(io::ErrorKind::InvalidData)?;
            self.pending_headers = Some((head, block.to_vec()));
            return Ok(());
        }
        self.pass_or_refuse(head, block.filter(|_| head.has_flag(END_HEADERS)), payload, passed)
    }

    /// Collects headers that come in several frames, and processes them when they are complete.
    fn process_continuation(
        &mut self,
        head: FrameHead,
        payload: &[u8],
        passed: &mut Vec<u8>,
    ) -> io::Result<()> {
        let pending = self.pending_headers.take().filter(|(first, _)| first.stream == head.stream);
        let (first, mut block) = pending.ok_or(io::ErrorKind::InvalidData)?;
        if block.len() + payload.len() > MAX_HEADER_BLOCK {
            return Err(io::ErrorKind::InvalidData.into());
        }
        block.extend(payload);
        if head.has_flag(END_HEADERS) {
            return self.pass_or_refuse(first, Some(&block), &[], passed);
        }
        self.pending_headers = Some((first, block));
        Ok(())
    }

    /// Refuses headers or passes them. `payload` is that of their frame if they have only one.
    fn pass_or_refuse(
        &mut self,
        head: FrameHead,
        block: Option<&[u8]>,
        payload: &[u8],
        passed: &mut Vec<u8>,
    ) -> io::Result<()> {
        let opens_call = head.stream % 2 == 1 && head.stream > self.last_opened;
        if opens_call {
            self.last_opened = head.stream;
        }
        let full = opens_call && self.can_refuse_another() && self.queue.is_full();
        let mut rewritten = Vec::new();
        let read = match block {
            // The block changes no table, and its path does not matter.
            Some(block) if !full && self.tracking == HeaderTracking::InSync && is_fully_indexed(block) => {
                Some(BlockSummary::default())
            }
            Some(block) => {
                let out = (self.tracking == HeaderTracking::Rewritten).then_some(&mut rewritten);
                self.table.decode_block(block, rpc::is_check_path, out).ok()
            }
            None => None,
        };
        let Some(summary) = read else {
            self.stop_tracking()?;
            self.pass(head, payload, opens_call, passed);
            return Ok(());
        };
        let trails = self.refused_streams.iter().position(|refused| *refused == head.stream);
        if let Some(at) = trails.filter(|_| !opens_call) {
            self.refused_streams.swap_remove(at);
        } else if !opens_call && head.stream > self.last_passed && head.stream <= self.last_opened {
            // The stream of a refused call cannot be opened again.
            return Err(io::ErrorKind::InvalidData.into());
        } else if full && summary.path_matches {
            self.refuse(head);
        } else {
            match self.tracking {
                HeaderTracking::Rewritten => self.pass_rewritten(head, &rewritten, opens_call, passed),
                HeaderTracking::InSync | HeaderTracking::Ended => {
                    self.pass(head, payload, opens_call, passed)
                }
            }
            return Ok(());
        }
        if summary.changes_table {
            self.tracking = HeaderTracking::Rewritten;
        }
        Ok(())
    }

    fn can_refuse_another(&self) -> bool {
        self.may_refuse
            && self.refused_streams.len() < MAX_REFUSED_STREAMS
            && self.refusals.len() < MAX_REFUSAL_BYTES
    }

    fn pass(&mut self, head: FrameHead, payload: &[u8], opens_call: bool, passed: &mut Vec<u8>) {
        head.write(passed);
        passed.extend(payload);
        self.count_passed(head, opens_call);
    }

    /// Passes rewritten headers, in as many frames as needed.
    fn pass_rewritten(&mut self, head: FrameHead, block: &[u8], opens_call: bool, passed: &mut Vec<u8>) {
        let (mut frame_type, mut flags, mut rest) = (frame_type::HEADERS, head.flags & END_STREAM, block);
        loop {
            let (piece, after) = rest.split_at(rest.len().min(MAX_FRAME_LEN));
            flags |= if after.is_empty() { END_HEADERS } else { 0 };
            FrameHead { length: piece.len(), frame_type, flags, stream: head.stream }.write(passed);
            passed.extend(piece);
            if after.is_empty() {
                break;
            }
            (frame_type, flags, rest) = (frame_type::CONTINUATION, 0, after);
        }
        self.count_passed(head, opens_call);
    }

    fn count_passed(&mut self, head: FrameHead, opens_call: bool) {
        if opens_call {
            self.last_passed = head.stream;
            self.queue.count_passed();
        }
    }

    /// Answers a call that HTTP/2 never sees with a refusal.
    fn refuse(&mut self, head: FrameHead) {
        self.queue.count_refused();
        let (length, flags) = (REFUSAL_HEADERS.len(), END_STREAM | END_HEADERS);
        FrameHead { length, frame_type: frame_type::HEADERS, flags, stream: head.stream }
            .write(&mut self.refusals);
        self.refusals.extend(&*REFUSAL_HEADERS);
        if !head.has_flag(END_STREAM) {
            self.refused_streams.push(head.stream);
        }
    }

    /// Stops tracking headers. Fails if HTTP/2 depends on rewritten blocks.
    fn stop_tracking(&mut self) -> io::Result<()> {
        let rewritten = self.tracking == HeaderTracking::Rewritten;
        self.tracking = HeaderTracking::Ended;
        self.table = HpackTable::default();
        if rewritten { Err(io::ErrorKind::InvalidData.into()) } else { Ok(()) }
    }
}

/// The header block in a frame, without padding and priority.
fn header_block(head: FrameHead, payload: &[u8]) -> Option<&[u8]> {
    let (mut rest, mut padding) = (payload, 0);
    if head.has_flag(PADDED) {
        let (length, after) = rest.split_first()?;
        (rest, padding) = (after, usize::from(*length));
    }
    if head.has_flag(PRIORITY) {
        rest = rest.get(5..)?;
    }
    rest.get(..rest.len().checked_sub(padding)?)
}

/// Tracks the frames that HTTP/2 writes, since refusals may be written only between frames and not within headers.
#[derive(Default)]
pub(super) struct FrameBoundary {
    head: Vec<u8>,
    payload_left: usize,
    in_headers: bool,
}

impl FrameBoundary {
    /// Whether the last byte ended a frame, with no headers incomplete.
    pub(super) fn is_at_boundary(&self) -> bool {
        self.payload_left == 0 && self.head.is_empty() && !self.in_headers
    }

    /// Advances over bytes that were written.
    pub(super) fn advance(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.payload_left > 0 {
                let taken = bytes.len().min(self.payload_left);
                (bytes, self.payload_left) = (&bytes[taken..], self.payload_left - taken);
                continue;
            }
            let taken = bytes.len().min(FRAME_HEAD_LEN - self.head.len());
            self.head.extend(&bytes[..taken]);
            bytes = &bytes[taken..];
            if let Some(head) = FrameHead::read(&self.head) {
                self.head.clear();
                self.payload_left = head.length;
                if matches!(head.frame_type, frame_type::HEADERS | frame_type::CONTINUATION) {
                    self.in_headers = !head.has_flag(END_HEADERS);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
