//! A codec for calls whose answers are written by hand: messages come in as prost reads them, and go out as the bytes
//! that they are already.

use std::marker::PhantomData;

use bytes::{BufMut as _, BytesMut};
use tonic::{
    Status,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
};
use tonic_prost::ProstDecoder;

/// Reads `D`, and sends bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Written<D>(PhantomData<fn() -> D>);

impl<D> Default for Written<D> {
    fn default() -> Self {
        Written(PhantomData)
    }
}

impl<D: prost::Message + Default + Send + 'static> Codec for Written<D> {
    type Encode = BytesMut;
    type Decode = D;
    type Encoder = Bytes;
    type Decoder = ProstDecoder<D>;

    fn encoder(&mut self) -> Bytes {
        Bytes
    }

    fn decoder(&mut self) -> ProstDecoder<D> {
        ProstDecoder::new(BufferSettings::default())
    }
}

/// Sends bytes as they are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bytes;

impl Encoder for Bytes {
    type Item = BytesMut;
    type Error = Status;

    fn encode(&mut self, message: BytesMut, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put_slice(&message);
        Ok(())
    }
}
