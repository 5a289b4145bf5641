//! A request's path as logs show it: without the query, without tokens, and not longer than 256 bytes. Clients choose it,
//! and sometimes put a credential into it.

use std::{borrow::Cow, fmt};

use crate::domain::token::redacted;

use super::{Asked, asked::Credential};

/// How much of a path is logged, in bytes.
const MAX_LEN: usize = 256;
/// A credential of fewer characters is not looked for: it would be found by chance.
const SHORTEST_CREDENTIAL: usize = 8;
/// What a query or parameters may follow, in lower case. Some servers decode the path before they cut those off.
const DELIMITERS: [&str; 6] = ["?", "#", ";", "%3f", "%23", "%3b"];

/// A path, to be displayed in a log line.
pub(super) struct LoggedPath<'a> {
    path: Cow<'a, str>,
    credential: Option<&'a str>,
}

impl<'a> LoggedPath<'a> {
    /// The path of a request that showed this credential.
    pub(super) fn new(asked: &Asked<'a>, credential: &'a Credential<'_>) -> LoggedPath<'a> {
        let credential = match credential {
            Credential::One { token, .. } => Some(&**token),
            Credential::None | Credential::Many => None,
        };
        LoggedPath { path: asked.path(), credential }
    }
}

impl fmt::Display for LoggedPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // ASCII alone changes, so that places are the same in both.
        let lower = self.path.to_ascii_lowercase();
        let end = DELIMITERS.iter().filter_map(|delimiter| lower.find(delimiter)).min();
        let path = &self.path[..end.unwrap_or(self.path.len())];
        // An imported token has any format: it is known only by the credential that the request shows.
        let credential = self.credential.filter(|token| token.len() >= SHORTEST_CREDENTIAL);
        let path = match credential {
            Some(token) if path.contains(token) => Cow::Owned(path.replace(token, "***")),
            _ => Cow::Borrowed(path),
        };
        // Redacted before it is cut: a part of a token is as bad as all of it.
        let path = redacted(&path);
        f.write_str(&path[..path.floor_char_boundary(MAX_LEN)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logged(path: &str, credential: Option<&str>) -> String {
        LoggedPath { path: path.into(), credential }.to_string()
    }

    #[test]
    fn a_path_is_logged_without_query_and_tokens_and_cut() {
        let token = format!("kw_live_{}", "0".repeat(49));
        assert_eq!(logged(&format!("/a/{token}/b?x={token}"), None), "/a/kw_live_***/b");
        for query in ["?", "#", ";", "%3f", "%3F", "%23", "%3B"] {
            assert_eq!(logged(&format!("/a{query}api_key=legacy-token"), None), "/a", "{query}");
        }
        assert_eq!(logged("/a/legacy-token/b", Some("legacy-token")), "/a/***/b");
        assert_eq!(logged("/a/b", Some("a")), "/a/b", "a word of the path by chance");
        // A token that lies across the end leaves nothing of itself.
        let long = format!("/{}{token}", "x".repeat(MAX_LEN - 20));
        assert!(logged(&long, None).ends_with("kw_live_***"), "{}", logged(&long, None));
        assert_eq!(logged(&"\u{e9}".repeat(200), None).len(), MAX_LEN);
    }
}
