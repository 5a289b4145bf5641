//! Formats a request's path for logs: without the query, with tokens redacted, at most 256 bytes. Clients choose the
//! path and sometimes put a credential into it.

use std::fmt;

use crate::domain::token::redact_tokens;

use super::{request::ProxyRequest, settings::GatewaySettings};

/// How much of a path is logged, in bytes.
const MAX_LOGGED_BYTES: usize = 256;
/// A credential of fewer characters is not looked for: it would be found by chance.
const MIN_CREDENTIAL_LEN: usize = 8;
/// What a query or parameters may follow. Some servers decode the path before they cut those off.
const DELIMITERS: [u8; 3] = *b"?#;";
/// How many times a path is decoded in search of a credential; each time costs a pass over the path.
const MAX_DECODINGS: usize = 3;

/// A path, to be displayed in a log line. Nothing is computed until then.
pub(super) struct LoggedPath<'a> {
    request: &'a ProxyRequest<'a>,
    settings: &'a GatewaySettings,
}

impl<'a> LoggedPath<'a> {
    /// The path of a request. Its credential is looked for whether or not the request gets far enough to be asked for it.
    pub(super) fn new(request: &'a ProxyRequest<'_>, settings: &'a GatewaySettings) -> LoggedPath<'a> {
        LoggedPath { request, settings }
    }
}

impl fmt::Display for LoggedPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // An imported token has any format: it is known only by what the request shows.
        let mut secrets = self.request.possible_credentials(self.settings);
        secrets.retain(|secret| secret.len() >= MIN_CREDENTIAL_LEN);
        // Redacted before it is cut: a part of a token is as bad as all of it.
        let path = redact_secrets(&self.request.path(), &secrets);
        let path = redact_tokens(&path);
        f.write_str(&path[..path.floor_char_boundary(MAX_LOGGED_BYTES)])
    }
}

/// A path up to its query or parameters, with `***` for each secret, plain or percent-encoded in part or more than once.
fn redact_secrets(path: &str, secrets: &[String]) -> String {
    let mut decoded = DecodedPath::new(path);
    let mut end = path.len();
    let mut hidden: Vec<(usize, usize)> = Vec::new();
    for _ in 0..=MAX_DECODINGS {
        end = end.min(decoded.path_end());
        hidden.extend(secrets.iter().flat_map(|secret| decoded.find_spans(secret.as_bytes())));
        if !decoded.decode() {
            break;
        }
    }
    hidden.sort_unstable();
    let (mut out, mut copied) = (Vec::new(), 0);
    for (from, to) in hidden.into_iter().filter(|(from, _)| *from < end) {
        if from >= copied {
            out.extend_from_slice(&path.as_bytes()[copied..from]);
            out.extend_from_slice(b"***");
        }
        copied = copied.max(to);
    }
    out.extend_from_slice(path.as_bytes().get(copied..end).unwrap_or_default());
    String::from_utf8_lossy(&out).into_owned()
}

/// A path, decoded some times, with the place in the path where each byte begins.
struct DecodedPath {
    bytes: Vec<u8>,
    /// One more than bytes: the last is the path's length.
    source_offsets: Vec<usize>,
}

impl DecodedPath {
    fn new(path: &str) -> DecodedPath {
        DecodedPath { bytes: path.as_bytes().to_vec(), source_offsets: (0..=path.len()).collect() }
    }

    /// Decodes the path once more. False = nothing changed.
    fn decode(&mut self) -> bool {
        let hex = |at: usize| self.bytes.get(at).and_then(|digit| char::from(*digit).to_digit(16));
        let (mut bytes, mut starts, mut at) = (Vec::new(), Vec::new(), 0);
        while let Some(byte) = self.bytes.get(at) {
            starts.push(self.source_offsets[at]);
            match (byte, hex(at + 1), hex(at + 2)) {
                (b'%', Some(high), Some(low)) => {
                    bytes.push(u8::try_from(high << 4 | low).unwrap_or_default());
                    at += 3;
                }
                _ => {
                    bytes.push(*byte);
                    at += 1;
                }
            }
        }
        starts.push(self.source_offsets[self.bytes.len()]);
        let changed = bytes.len() != self.bytes.len();
        *self = DecodedPath { bytes, source_offsets: starts };
        changed
    }

    /// Where a query or parameters begin, in the path.
    fn path_end(&self) -> usize {
        let at = self.bytes.iter().position(|byte| DELIMITERS.contains(byte));
        self.source_offsets[at.unwrap_or(self.bytes.len())]
    }

    /// Every place of a text, from and to, in the path.
    fn find_spans(&self, text: &[u8]) -> Vec<(usize, usize)> {
        let windows = self.bytes.windows(text.len()).enumerate().filter(|(_, window)| *window == text);
        windows.map(|(at, _)| (self.source_offsets[at], self.source_offsets[at + text.len()])).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::{ClientSource, ProxyProtocol};
    use proptest::prelude::*;

    fn logged_with(path: &str, headers: &[(&str, &str)], settings: &GatewaySettings) -> String {
        let request = ProxyRequest {
            protocol: ProxyProtocol::ExtAuthz,
            proxy_removes_headers: true,
            method: b"GET",
            host: b"api.test",
            target: path.as_bytes(),
            headers: headers.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect(),
            client_source: ClientSource::Peer(None),
            proxy_request_id: b"",
        };
        LoggedPath::new(&request, settings).to_string()
    }

    fn logged(path: &str, credential: Option<&str>) -> String {
        let bearer = credential.map(|token| format!("Bearer {token}"));
        let headers: Vec<_> = bearer.iter().map(|value| ("authorization", &**value)).collect();
        logged_with(path, &headers, &GatewaySettings::default())
    }

    #[test]
    fn a_path_is_logged_without_query_and_tokens_and_cut() {
        let token = format!("kw_live_{}", "0".repeat(49));
        assert_eq!(logged(&format!("/a/{token}/b?x={token}"), None), "/a/kw_live_***/b");
        for query in ["?", "#", ";", "%3f", "%3F", "%23", "%3B", "%253f", "%25253B"] {
            assert_eq!(logged(&format!("/a{query}api_key=legacy-token"), None), "/a", "{query}");
        }
        assert_eq!(logged("/a/b", Some("a")), "/a/b", "a word of the path by chance");
        // A token that lies across the end leaves nothing of itself.
        let long = format!("/{}{token}", "x".repeat(MAX_LOGGED_BYTES - 20));
        assert!(logged(&long, None).ends_with("kw_live_***"), "{}", logged(&long, None));
        assert_eq!(logged(&"\u{e9}".repeat(200), None).len(), MAX_LOGGED_BYTES);
    }

    #[test]
    fn an_imported_token_in_a_path_is_not_logged_in_any_encoding() {
        for token in [
            "legacy-token-12345",
            "legacy%2Dtoken%2D12345",
            "%6cegacy-token-1234%35",
            "legacy%252Dtoken-12345",
        ] {
            for (before, after) in [("/a/", "/b"), ("/a//", ""), ("/./x-", "-y"), ("/caf%C3%A9/", "/%zz")] {
                let path = format!("{before}{token}{after}");
                assert_eq!(
                    logged(&path, Some("legacy-token-12345")),
                    format!("{before}***{after}"),
                    "{path}"
                );
            }
        }
        assert_eq!(logged("/a/legacy%C3%A9token/b", Some("legacyétoken")), "/a/***/b");
    }

    #[test]
    fn every_credential_that_a_request_shows_is_looked_for() {
        let settings = GatewaySettings { credential_query: Some("key".into()), ..Default::default() };
        let headers =
            [("X-Api-Key", "token-one"), ("x_api_key", "token-two"), ("authorization", "bearer token-three")];
        for token in ["token-one", "token-two", "token-three", "token-four", "token-five"] {
            let path = format!("/a/{token}/b?key=token-four&key=token%2Dfive");
            assert_eq!(logged_with(&path, &headers, &settings), "/a/***/b");
        }
    }

    proptest! {
        #[test]
        fn no_path_makes_it_panic_or_shows_the_token(path in any::<String>(), odd in "(a|b|%|25|3f|61|é|aaaaaaaa){0,12}") {
            prop_assert!(!logged(&odd, Some("aaaaaaaa")).contains("aaaaaaaa"));
            let _ = logged(&path, Some(&odd));
        }
    }
}
