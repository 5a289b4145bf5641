//! Reading a bootstrap: protobuf messages as YAML or JSON, whose fields may be written in two ways.

use std::time::Duration;

use regex::bytes::{Regex, RegexBuilder};
use serde_json::Value;

/// How large a compiled pattern may be, in bytes.
const MAX_REGEX: usize = 1 << 20;

/// A message.
pub(super) trait Object {
    /// A field by its proto name; JSON may say `failureModeAllow` for `failure_mode_allow`.
    fn at(&self, name: &str) -> Option<&Value>;
    /// Whether a field is true.
    fn is_true(&self, name: &str) -> bool;
    /// The members of a list; none where there is no list.
    fn list(&self, name: &str) -> &[Value];
    /// A field of text; empty where there is none.
    fn text(&self, name: &str) -> &str;
}

impl Object for Value {
    fn at(&self, name: &str) -> Option<&Value> {
        self.get(name).or_else(|| self.get(camel(name))).filter(|value| !value.is_null())
    }

    fn is_true(&self, name: &str) -> bool {
        self.at(name).is_some_and(|value| *value == true)
    }

    fn list(&self, name: &str) -> &[Value] {
        self.at(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    fn text(&self, name: &str) -> &str {
        self.at(name).and_then(Value::as_str).unwrap_or_default()
    }
}

fn camel(name: &str) -> String {
    let mut up = false;
    let letters = name.chars().filter_map(|letter| match letter {
        '_' => {
            up = true;
            None
        }
        letter if std::mem::take(&mut up) => Some(letter.to_ascii_uppercase()),
        letter => Some(letter),
    });
    letters.collect()
}

/// Every message of this type, wherever it is.
pub(super) fn typed<'v>(root: &'v Value, ending: &str) -> Vec<&'v Value> {
    objects(root).into_iter().filter(|object| object.text("@type").ends_with(ending)).collect()
}

/// Every object at and below a value.
pub(super) fn objects(root: &Value) -> Vec<&Value> {
    let (mut found, mut left) = (Vec::new(), vec![root]);
    while let Some(value) = left.pop() {
        match value {
            Value::Object(fields) => {
                found.push(value);
                left.extend(fields.values());
            }
            Value::Array(members) => left.extend(members),
            _ => {}
        }
    }
    found
}

/// A matcher of header names.
pub(super) enum Pattern {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Contains(String),
    /// A whole name.
    Regex(Regex),
    /// A kind that is not told apart here; it is given the benefit of the doubt.
    Other,
}

impl Pattern {
    /// Whether it matches a name in lower case.
    pub(super) fn takes(&self, name: &str) -> bool {
        match self {
            Pattern::Exact(exact) => exact == name,
            Pattern::Prefix(prefix) => name.starts_with(prefix),
            Pattern::Suffix(suffix) => name.ends_with(suffix),
            Pattern::Contains(part) => name.contains(part),
            Pattern::Regex(regex) => regex.is_match(name.as_bytes()),
            Pattern::Other => true,
        }
    }

    /// The same, with the doubt the other way round.
    pub(super) fn surely_takes(&self, name: &str) -> bool {
        !matches!(self, Pattern::Other) && self.takes(name)
    }

    /// Reads a StringMatcher. Envoy's names are in lower case, so what has other letters and does not ignore case
    /// matches none.
    fn read(matcher: &Value) -> Pattern {
        let text = |name: &str| match matcher.at(name) {
            Some(Value::String(text)) if matcher.is_true("ignore_case") => Some(text.to_ascii_lowercase()),
            Some(Value::String(text)) => Some(text.clone()),
            _ => None,
        };
        let regex = || whole_match(matcher.at("safe_regex")?.text("regex"));
        None.or_else(|| text("exact").map(Pattern::Exact))
            .or_else(|| text("prefix").map(Pattern::Prefix))
            .or_else(|| text("suffix").map(Pattern::Suffix))
            .or_else(|| text("contains").map(Pattern::Contains))
            .or_else(|| regex().map(Pattern::Regex))
            .unwrap_or(Pattern::Other)
    }
}

/// An expression that has to match a whole name; `None` if it is not understood here.
pub(super) fn whole_match(regex: &str) -> Option<Regex> {
    let whole = format!("^(?:{regex})$");
    // RE2's classes are of ASCII unless they say otherwise.
    RegexBuilder::new(&whole).unicode(false).size_limit(MAX_REGEX).build().ok()
}

/// The patterns of a ListStringMatcher.
pub(super) fn patterns(list: &Value) -> Vec<Pattern> {
    list.list("patterns").iter().map(Pattern::read).collect()
}

/// A duration as protobuf's JSON has it: `0.25s`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    Duration::try_from_secs_f64(text.strip_suffix('s')?.parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_either_name() {
        let value = serde_json::json!({"failureModeAllow": true, "stat_prefix": "x", "none": null});
        assert!(value.is_true("failure_mode_allow") && value.text("stat_prefix") == "x");
        assert!(value.at("none").is_none());
    }

    #[test]
    fn every_kind_of_pattern_is_told_apart() {
        let takes = |matcher: Value, name: &str| Pattern::read(&matcher).takes(name);
        for (matcher, taken, left) in [
            (serde_json::json!({"exact": "x-a"}), "x-a", "x-a-b"),
            (serde_json::json!({"exact": "X-A", "ignore_case": true}), "x-a", "x-b"),
            (serde_json::json!({"prefix": "x-k"}), "x-keyward-user", "x.keyward"),
            (serde_json::json!({"suffix": "-user"}), "x-user", "x-users"),
            (serde_json::json!({"contains": "."}), "x.user", "x-user"),
            (
                serde_json::json!({"safe_regex": {"regex": ".*[^a-z0-9:-].*"}}),
                "x.keyward-user",
                "x-keyward-user",
            ),
            (serde_json::json!({"safeRegex": {"regex": "a|b"}}), "b", "bc"),
        ] {
            assert!(takes(matcher.clone(), taken) && !takes(matcher.clone(), left), "{matcher}");
        }
        for matcher in [serde_json::json!({"custom": {}}), serde_json::json!({"safe_regex": {"regex": "("}})]
        {
            assert!(matches!(Pattern::read(&matcher), Pattern::Other), "{matcher}");
        }
    }

    #[test]
    fn durations_are_read() {
        assert_eq!(duration("0.25s"), Some(Duration::from_millis(250)));
        assert_eq!((duration("1"), duration("-1s"), duration("xs")), (None, None, None));
    }
}
