//! Encodes and decodes page tokens: the cursor of a page, bound to the filters of its List.
//!
//! Tokens are opaque, but no secret: each page is authorized separately.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use crate::service_error::InvalidFields;

/// Entries of a page if the request names no size.
const DEFAULT_PAGE_SIZE: u32 = 50;
/// Entries of the largest page.
const MAX_PAGE_SIZE: u32 = 1000;
const INVALID_TOKEN: &str = "is not the next_page_token of a List with the same filters";

/// Encodes the token of the page that begins after `cursor`, for a List with these filters.
#[must_use]
pub(super) fn encode(filters: &[u8], cursor: &[u8]) -> String {
    let mut bytes = checksum(filters, cursor).to_be_bytes().to_vec();
    bytes.extend_from_slice(cursor);
    URL_SAFE_NO_PAD.encode(bytes)
}

/// Decodes the cursor of a token; `None` for the first page.
pub(super) fn decode(filters: &[u8], token: &str, violations: &mut InvalidFields) -> Option<Vec<u8>> {
    if token.is_empty() {
        return None;
    }
    let bytes = URL_SAFE_NO_PAD.decode(token).unwrap_or_default();
    match bytes.split_first_chunk::<4>() {
        Some((sum, cursor)) if u32::from_be_bytes(*sum) == checksum(filters, cursor) => Some(cursor.to_vec()),
        _ => {
            violations.add("page_token", INVALID_TOKEN);
            None
        }
    }
}

/// Adds the violation that the token is invalid.
pub(super) fn reject_token(violations: &mut InvalidFields) {
    violations.add("page_token", INVALID_TOKEN);
}

/// Parses the name in a cursor.
pub(super) fn parse_cursor<T, E>(
    cursor: &[u8],
    parse: impl Fn(&str) -> Result<T, E>,
    violations: &mut InvalidFields,
) -> Option<T> {
    let name = std::str::from_utf8(cursor).ok().and_then(|name| parse(name).ok());
    if name.is_none() {
        reject_token(violations);
    }
    name
}

/// Reads the page size, or its default.
pub(super) fn read_page_size(requested: Option<u32>, violations: &mut InvalidFields) -> u32 {
    let size = requested.unwrap_or(DEFAULT_PAGE_SIZE);
    violations.add_if(
        !(1..=MAX_PAGE_SIZE).contains(&size),
        "page_size",
        format!("must be 1 to {MAX_PAGE_SIZE}; leave it out for {DEFAULT_PAGE_SIZE}"),
    );
    size
}

fn checksum(filters: &[u8], cursor: &[u8]) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(&(filters.len() as u64).to_be_bytes());
    sum.update(filters);
    sum.update(cursor);
    sum.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_leads_back_to_its_cursor_under_the_same_filters_alone() {
        let token = encode(b"filters", b"cursor");
        let mut violations = InvalidFields::default();
        assert_eq!(decode(b"filters", &token, &mut violations).as_deref(), Some(b"cursor".as_slice()));
        assert!(violations.is_empty());
        assert_eq!(decode(b"other", &token, &mut violations), None);
        assert!(!violations.is_empty());
    }

    #[test]
    fn nonsense_is_refused() {
        for token in ["x", "!!!!", "AAAA", "AAAAAAAA"] {
            let mut violations = InvalidFields::default();
            assert_eq!(decode(b"", token, &mut violations), None);
            assert!(!violations.is_empty(), "{token}");
        }
    }
}
