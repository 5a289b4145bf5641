//! Reading a bootstrap: protobuf messages as YAML or JSON, whose fields may be written in two ways.

use std::time::Duration;

use serde_json::Value;

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
pub(super) enum Pattern<'v> {
    Exact(&'v str),
    Prefix(&'v str),
    /// A kind that is not told apart here; it is given the benefit of the doubt.
    Other,
}

impl Pattern<'_> {
    /// Whether it matches a name in lower case.
    pub(super) fn takes(&self, name: &str) -> bool {
        match self {
            Pattern::Exact(exact) => exact.eq_ignore_ascii_case(name),
            Pattern::Prefix(prefix) => name.starts_with(&prefix.to_ascii_lowercase()),
            Pattern::Other => true,
        }
    }
}

/// The patterns of a ListStringMatcher.
pub(super) fn patterns(list: &Value) -> Vec<Pattern<'_>> {
    let one = |pattern| match (Value::at(pattern, "exact"), Value::at(pattern, "prefix")) {
        (Some(Value::String(exact)), _) => Pattern::Exact(exact),
        (_, Some(Value::String(prefix))) => Pattern::Prefix(prefix),
        _ => Pattern::Other,
    };
    list.list("patterns").iter().map(one).collect()
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
    fn durations_are_read() {
        assert_eq!(duration("0.25s"), Some(Duration::from_millis(250)));
        assert_eq!((duration("1"), duration("-1s"), duration("xs")), (None, None, None));
    }
}
