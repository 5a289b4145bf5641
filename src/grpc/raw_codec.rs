//! Frames gRPC messages, and passes them through tonic as bytes for calls that are encoded by hand.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// gRPC's message prefix: one byte of flags, four of length (big-endian).
pub(super) const MESSAGE_PREFIX_LEN: usize = 5;
/// Flag byte of a compressed message.
pub(super) const COMPRESSED_FLAG: u8 = 1;

/// A codec whose messages are bytes in both directions.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RawCodec;

impl Codec for RawCodec {
    type Encode = BytesMut;
    type Decode = Bytes;
    type Encoder = RawCodec;
    type Decoder = RawCodec;

    fn encoder(&mut self) -> RawCodec {
        RawCodec
    }

    fn decoder(&mut self) -> RawCodec {
        RawCodec
    }
}

impl Encoder for RawCodec {
    type Item = BytesMut;
    type Error = Status;

    fn encode(&mut self, message: BytesMut, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put_slice(&message);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(message.copy_to_bytes(message.remaining())))
    }
}
