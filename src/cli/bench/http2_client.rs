//! One HTTP/2 connection that sends prepared frames (RFC 9113), for a load that costs little: a client library would be
//! busy before the server is.
//!
//! It speaks as much of the protocol as that takes: requests whose headers are in the peer's table after the first
//! (RFC 7541), windows, pings. What an answer says is judged by its message; its headers are not read, so a call that
//! was refused shows as one without a message.

use std::{io, ops::Range};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use zeroize::Zeroizing;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_HEAD_BYTES: usize = 9;
/// What we let the server send before we say that we have read: as much as the protocol can say.
const RECEIVE_WINDOW: u32 = (1 << 31) - 1;
const INITIAL_WINDOW: u32 = 65_535;
/// How much is read before the server is told.
const WINDOW_UPDATE_THRESHOLD: u32 = 1 << 20;
/// The last stream id that is opened; then the connection has had its time.
const MAX_STREAM_ID: u32 = (1 << 31) - 1;

mod frame_type {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const RST_STREAM: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PING: u8 = 6;
    pub(super) const GOAWAY: u8 = 7;
    pub(super) const WINDOW_UPDATE: u8 = 8;
}

const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

/// What is asked, and by whom.
#[derive(Clone)]
pub(super) struct CallTarget {
    pub(super) address: String,
    /// `/package.Service/Method`.
    pub(super) path: String,
    /// The caller's token, if it shows one.
    pub(super) token: Option<Zeroizing<String>>,
}

/// What has come in.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Http2Event {
    /// A piece of a message, where it lies.
    Data { id: u32, range: Range<usize>, end: bool },
    /// Headers or trailers.
    Headers { id: u32, end: bool },
    /// The server has given a call up.
    Reset { id: u32 },
    /// The server lets a call send more.
    WindowUpdate { id: u32, more: u32 },
}

/// A connection.
pub(super) struct Http2Connection {
    stream: TcpStream,
    incoming: Vec<u8>,
    parsed: usize,
    outgoing: Vec<u8>,
    first_headers: Zeroizing<Vec<u8>>,
    indexed_headers: Vec<u8>,
    next_id: u32,
    /// How much the server takes on this connection still, and on a new call.
    connection_window: i64,
    initial_stream_window: i64,
    unacknowledged_bytes: u32,
    /// The server has sent its settings.
    settings_received: bool,
    /// The server has asked to open no more calls here.
    going_away: bool,
}

impl Http2Connection {
    /// Connects.
    ///
    /// # Errors
    /// When nobody answers.
    pub(super) async fn connect(target: &CallTarget) -> io::Result<Http2Connection> {
        let stream = TcpStream::connect(&target.address).await?;
        stream.set_nodelay(true)?;
        let (first, again) = encode_headers(target);
        let mut wire = Http2Connection {
            stream,
            incoming: Vec::with_capacity(256 * 1024),
            parsed: 0,
            outgoing: PREFACE.to_vec(),
            first_headers: first,
            indexed_headers: again,
            next_id: 1,
            connection_window: INITIAL_WINDOW.into(),
            initial_stream_window: INITIAL_WINDOW.into(),
            unacknowledged_bytes: 0,
            settings_received: false,
            going_away: false,
        };
        // No pushes, and the largest window.
        let mut settings = Vec::new();
        for (name, value) in [(2u16, 0u32), (4, RECEIVE_WINDOW)] {
            settings.extend(name.to_be_bytes());
            settings.extend(value.to_be_bytes());
        }
        write_frame(&mut wire.outgoing, frame_type::SETTINGS, 0, 0, &settings);
        write_frame(
            &mut wire.outgoing,
            frame_type::WINDOW_UPDATE,
            0,
            0,
            &(RECEIVE_WINDOW - INITIAL_WINDOW).to_be_bytes(),
        );
        wire.flush().await?;
        // Its settings tell how much it takes; nothing is sent before.
        while !wire.settings_received {
            wire.receive().await?;
            while wire.next_event().is_some() {}
        }
        wire.flush().await?;
        Ok(wire)
    }

    /// Whether another call can be opened with a message of this length.
    pub(super) fn can_open_call(&self, length: usize) -> bool {
        let length = i64::try_from(length).unwrap_or(i64::MAX);
        !self.is_exhausted() && self.connection_window >= length && self.initial_stream_window >= length
    }

    /// Whether a message of this length fits the connection's window.
    pub(super) fn has_window_for(&self, length: usize) -> bool {
        self.connection_window >= i64::try_from(length).unwrap_or(i64::MAX)
    }

    /// Whether it opens no more calls.
    pub(super) fn is_exhausted(&self) -> bool {
        self.going_away || self.next_id >= MAX_STREAM_ID
    }

    /// How much a new call may send.
    pub(super) fn initial_stream_window(&self) -> i64 {
        self.initial_stream_window
    }

    /// Opens a call.
    pub(super) fn open_stream(&mut self) -> u32 {
        let id = self.next_id;
        self.next_id += 2;
        if self.first_headers.is_empty() {
            write_frame(&mut self.outgoing, frame_type::HEADERS, END_HEADERS, id, &self.indexed_headers);
        } else {
            let first = std::mem::take(&mut self.first_headers);
            write_frame(&mut self.outgoing, frame_type::HEADERS, END_HEADERS, id, &first);
        }
        id
    }

    /// Sends a message on a call; `end` = it was the last.
    pub(super) fn send(&mut self, id: u32, message: &[u8], end: bool) {
        self.connection_window -= i64::try_from(message.len()).unwrap_or(i64::MAX);
        write_frame(&mut self.outgoing, frame_type::DATA, if end { END_STREAM } else { 0 }, id, message);
    }

    /// Hands over what was sent.
    ///
    /// # Errors
    /// When the connection is lost.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        if !self.outgoing.is_empty() {
            self.stream.write_all(&self.outgoing).await?;
            self.outgoing.clear();
        }
        Ok(())
    }

    /// Waits for more from the server.
    ///
    /// # Errors
    /// When the connection is lost.
    pub(super) async fn receive(&mut self) -> io::Result<()> {
        self.incoming.drain(..self.parsed);
        self.parsed = 0;
        match self.stream.read_buf(&mut self.incoming).await? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection")),
            _ => Ok(()),
        }
    }

    /// The bytes of a [`Http2Event::Data`], until the next [`Http2Connection::receive`].
    pub(super) fn bytes(&self, range: Range<usize>) -> &[u8] {
        self.incoming.get(range).unwrap_or_default()
    }

    /// The next frame that is there whole and concerns a call; the others are answered here.
    pub(super) fn next_event(&mut self) -> Option<Http2Event> {
        loop {
            let rest = self.incoming.get(self.parsed..)?;
            let head = rest.get(..FRAME_HEAD_BYTES)?;
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let (kind, flags) = (head[3], head[4]);
            let id = u32::from_be_bytes([head[5], head[6], head[7], head[8]]) & MAX_STREAM_ID;
            let payload = rest.get(FRAME_HEAD_BYTES..FRAME_HEAD_BYTES + length)?;
            let number = payload.get(..4).map_or(0, |bytes| {
                u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) & MAX_STREAM_ID
            });
            let start = self.parsed + FRAME_HEAD_BYTES;
            self.parsed = start + length;
            let end = flags & END_STREAM != 0;
            match kind {
                frame_type::DATA => {
                    self.unacknowledged_bytes += u32::try_from(length).unwrap_or(0);
                    // Nobody pads answers; one who does is not understood, and shows as wrong.
                    let range = if flags & PADDED == 0 { start..start + length } else { start..start };
                    self.update_windows(id, length, end);
                    return Some(Http2Event::Data { id, range, end });
                }
                frame_type::HEADERS => return Some(Http2Event::Headers { id, end }),
                frame_type::RST_STREAM => return Some(Http2Event::Reset { id }),
                frame_type::WINDOW_UPDATE if id == 0 => self.connection_window += i64::from(number),
                frame_type::WINDOW_UPDATE => return Some(Http2Event::WindowUpdate { id, more: number }),
                frame_type::SETTINGS if flags & ACK == 0 => {
                    let window = payload.chunks_exact(6).rev().find(|setting| setting[..2] == [0, 4]);
                    if let Some(&[_, _, a, b, c, d]) = window {
                        self.initial_stream_window = u32::from_be_bytes([a, b, c, d]).into();
                    }
                    self.settings_received = true;
                    write_frame(&mut self.outgoing, frame_type::SETTINGS, ACK, 0, &[]);
                }
                frame_type::PING if flags & ACK == 0 => {
                    let payload = payload.to_vec();
                    write_frame(&mut self.outgoing, frame_type::PING, ACK, 0, &payload);
                }
                frame_type::GOAWAY => self.going_away = true,
                _ => {}
            }
        }
    }

    /// Lets the server send as much again.
    fn update_windows(&mut self, id: u32, length: usize, end: bool) {
        if self.unacknowledged_bytes >= WINDOW_UPDATE_THRESHOLD {
            write_frame(
                &mut self.outgoing,
                frame_type::WINDOW_UPDATE,
                0,
                0,
                &self.unacknowledged_bytes.to_be_bytes(),
            );
            self.unacknowledged_bytes = 0;
        }
        // A call's own window is too large to matter, but for one that never ends.
        if !end && length > 8 * 1024 {
            let length = u32::try_from(length).unwrap_or(0);
            write_frame(&mut self.outgoing, frame_type::WINDOW_UPDATE, 0, id, &length.to_be_bytes());
        }
    }
}

fn write_frame(out: &mut Vec<u8>, kind: u8, flags: u8, id: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX).to_be_bytes();
    out.extend(&length[1..]);
    out.extend([kind, flags]);
    out.extend(id.to_be_bytes());
    out.extend(payload);
}

/// A request's headers: those of the first call, which the server keeps in its table, and those of all others, which
/// name them by their places there. The table is filled from its front, at 62.
fn encode_headers(target: &CallTarget) -> (Zeroizing<Vec<u8>>, Vec<u8>) {
    // :method: POST and :scheme: http stand in every table.
    const COMMON: [u8; 2] = [0x83, 0x86];
    let bearer = target.token.as_ref().map(|token| Zeroizing::new(format!("Bearer {}", token.as_str())));
    let named: [(u8, &str, Option<&str>); 5] = [
        (4, "", Some(&target.path)),
        (1, "", Some(&target.address)),
        (31, "", Some("application/grpc")),
        (0, "te", Some("trailers")),
        (23, "", bearer.as_ref().map(|text| text.as_str())),
    ];
    let (mut first, mut kept) = (Zeroizing::new(COMMON.to_vec()), 0u8);
    for (place, name, value) in named {
        let Some(value) = value else { continue };
        // A literal that is to be kept.
        first.push(0x40 | place);
        if place == 0 {
            write_string(&mut first, name);
        }
        write_string(&mut first, value);
        kept += 1;
    }
    let again = COMMON.into_iter().chain((0..kept).rev().map(|place| 0x80 | (62 + place))).collect();
    (first, again)
}

/// A string, not compressed.
fn write_string(out: &mut Vec<u8>, text: &str) {
    const SEVEN: usize = 0x7f;
    if text.len() < SEVEN {
        out.push(u8::try_from(text.len()).unwrap_or(0));
    } else {
        out.push(0x7f);
        let mut rest = text.len() - SEVEN;
        while rest >= 128 {
            out.push(0x80 | u8::try_from(rest % 128).unwrap_or(0));
            rest /= 128;
        }
        out.push(u8::try_from(rest).unwrap_or(0));
    }
    out.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_named_by_their_places_after_the_first_call() {
        let token = Some(Zeroizing::new("t".to_owned()));
        let target = CallTarget { address: "h:1".to_owned(), path: "/s/m".to_owned(), token };
        let (first, again) = encode_headers(&target);
        assert_eq!(again, [0x83, 0x86, 0x80 | 66, 0x80 | 65, 0x80 | 64, 0x80 | 63, 0x80 | 62]);
        assert_eq!(first[..8], [0x83, 0x86, 0x44, 4, b'/', b's', b'/', b'm']);
        let (_, again) = encode_headers(&CallTarget { token: None, ..target });
        assert_eq!(again.len(), 6);
    }

    #[test]
    fn long_strings_have_long_lengths() {
        let mut out = Vec::new();
        write_string(&mut out, &"a".repeat(127 + 300));
        // RFC 7541, section 5.1.
        assert_eq!(out[..3], [0x7f, 0x80 | (300 % 128) as u8, (300 / 128) as u8]);
    }
}
