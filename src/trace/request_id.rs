//! Request ids, and the random numbers behind ids and sampling.
//!
//! The numbers must not repeat but need not be secret: they come from a seed, without a system call.

use std::{
    cell::Cell,
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use http::{HeaderMap, HeaderValue};

const MAX_REQUEST_ID_LEN: usize = 128;

/// The id of a request: received from the caller, or a generated UUIDv7.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RequestId(RequestIdRepr);

#[derive(Clone, Debug, PartialEq, Eq)]
enum RequestIdRepr {
    Received(HeaderValue),
    Generated { millis: u64, random: RandomId },
}

impl RequestId {
    /// Reads the header `x-request-id`; `None` if it is missing or malformed.
    #[must_use]
    pub(crate) fn from_headers(headers: &HeaderMap) -> Option<RequestId> {
        let value = headers.get("x-request-id")?;
        is_valid_request_id(value.as_bytes()).then(|| RequestId(RequestIdRepr::Received(value.clone())))
    }

    /// Parses the value of the header.
    #[must_use]
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<RequestId> {
        let value = is_valid_request_id(bytes).then(|| HeaderValue::from_bytes(bytes).ok())?;
        value.map(|value| RequestId(RequestIdRepr::Received(value)))
    }
}

/// 1 to 128 letters, digits and `-.:=+/`. `_` is excluded because every Keyward token has one: a client that mixes up
/// headers must not put its token into a log.
fn is_valid_request_id(bytes: &[u8]) -> bool {
    let good = |byte: &u8| byte.is_ascii_alphanumeric() || b"-.:=+/".contains(byte);
    (1..=MAX_REQUEST_ID_LEN).contains(&bytes.len()) && bytes.iter().all(good)
}

impl From<RequestId> for HeaderValue {
    fn from(id: RequestId) -> HeaderValue {
        match id.0 {
            RequestIdRepr::Received(value) => value,
            RequestIdRepr::Generated { millis, random } => {
                let mut text = uuid::Uuid::encode_buffer();
                let text = random.uuid(millis).hyphenated().encode_lower(&mut text);
                HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static(""))
            }
        }
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            RequestIdRepr::Received(value) => f.write_str(value.to_str().unwrap_or_default()),
            RequestIdRepr::Generated { millis, random } => random.uuid(*millis).fmt(f),
        }
    }
}

/// A generator of pseudorandom ids that do not repeat.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RandomIds {
    seed: u64,
}

/// A generated 64-bit number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RandomId(u64);

impl RandomIds {
    /// Processes must have different seeds, or they generate the same ids.
    #[must_use]
    pub(crate) const fn with_seed(seed: u64) -> RandomIds {
        RandomIds { seed }
    }

    /// Returns the next id. Each thread has its own counter, so threads do not contend.
    #[must_use]
    pub(crate) fn next_id(self) -> RandomId {
        static THREADS: AtomicU64 = AtomicU64::new(0);
        thread_local! {
            static COUNT: Cell<u64> = Cell::new(THREADS.fetch_add(1, Ordering::Relaxed) << 40);
        }
        let count = COUNT.with(|count| count.replace(count.get() + 1));
        RandomId(split_mix64(self.seed.wrapping_add(count)))
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): a bijection whose outputs look random.
const fn split_mix64(number: u64) -> u64 {
    let number = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

impl RandomId {
    /// A request id with this time, in milliseconds since 1970.
    #[must_use]
    pub(crate) fn request_id(self, millis: u64) -> RequestId {
        RequestId(RequestIdRepr::Generated { millis, random: self })
    }

    /// A UUIDv7 with this time, in milliseconds since 1970.
    #[must_use]
    pub(crate) fn uuid(self, millis: u64) -> uuid::Uuid {
        uuid::Builder::from_unix_timestamp_millis(millis, &self.random_bytes()).into_uuid()
    }

    fn random_bytes(self) -> [u8; 10] {
        let mut random = [0; 10];
        random[..8].copy_from_slice(&self.0.to_be_bytes());
        random[8..].copy_from_slice(&split_mix64(self.0).to_be_bytes()[..2]);
        random
    }

    /// Derives a number that is statistically independent of this one.
    #[must_use]
    pub(crate) const fn derive_independent(self) -> RandomId {
        RandomId(split_mix64(self.0 ^ 0x6b65_7977_6172_6421))
    }

    /// Whether the number is below the threshold: true with a probability of `threshold` in 2^64, and always for
    /// `u64::MAX`.
    #[must_use]
    pub(crate) const fn is_below(self, threshold: u64) -> bool {
        threshold == u64::MAX || self.0 < threshold
    }
}

/// Converts a ratio of 0 to 1 into a threshold for [`RandomId::is_below`].
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "it saturates"
)]
pub(crate) fn sampling_threshold(share: f64) -> u64 {
    (share * u64::MAX as f64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_holds_nothing_that_could_be_a_token() {
        for good in ["r-1", "2f1e6f84-6d4f-4b1a-9f6f-0c7f3a1d2e3b", "Root=1-67891233-abcdef"] {
            assert_eq!(RequestId::from_bytes(good.as_bytes()).unwrap().to_string(), good);
        }
        for bad in ["", "kw_live_abc", "a b", "a\n", "\u{e9}", &"x".repeat(129), "\"", "a,b"] {
            assert_eq!(RequestId::from_bytes(bad.as_bytes()), None, "{bad:?}");
        }
    }

    #[test]
    fn ids_do_not_repeat_and_are_uuids_of_their_time() {
        let ids = RandomIds::with_seed(3);
        let made: std::collections::HashSet<_> =
            (0..1000).map(|_| ids.next_id().request_id(1_767_225_600_000).to_string()).collect();
        assert_eq!(made.len(), 1000);
        assert!(made.iter().all(|id| uuid::Uuid::parse_str(id).unwrap().get_version_num() == 7));
    }

    #[test]
    fn a_share_is_kept() {
        let below = |share: f64| {
            let mut draws =
                std::iter::repeat_with(|| RandomIds::with_seed(11).next_id().derive_independent());
            draws.by_ref().take(10_000).filter(|draw| draw.is_below(sampling_threshold(share))).count()
        };
        assert_eq!((below(0.0), below(1.0)), (0, 10_000));
        let tenth = below(0.1);
        assert!((800..1200).contains(&tenth), "{tenth}");
    }
}
