//! A codec for calls whose messages are read and written by hand: they come in and go out as the bytes that they are.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use tonic::{
    Status,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
};

/// gRPC's prefix of a message: one byte of flags, four of length (big-endian).
pub(super) const MESSAGE_PREFIX_LEN: usize = 5;
/// The flag of a compressed message.
pub(super) const COMPRESSED_FLAG: u8 = 1;

/// Messages as bytes, both ways.
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
