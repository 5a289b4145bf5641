//! Rewords the error messages of serde and TOML without terms of Rust.

use std::borrow::Cow;

use crate::domain::credential_mask::{mask_value, mask_words};

/// Rewords a message of serde, and masks anything that looks like a credential.
#[must_use]
pub(crate) fn rephrase_serde_error(message: &str) -> String {
    let message = masked(message);
    reword(&message)
}

/// Masks the quoted text, which may contain quotes and blanks, then every word.
fn masked(message: &str) -> String {
    let quoted = message.find('"').zip(message.rfind('"')).filter(|(first, last)| first < last);
    let message = match quoted {
        Some((first, last)) => {
            let value = mask_value(&message[first + 1..last]);
            Cow::from(format!("{}{value}{}", &message[..=first], &message[last..]))
        }
        None => message.into(),
    };
    mask_words(&message).into_owned()
}

fn reword(message: &str) -> String {
    let (problem, wanted) = message.split_once(", expected ").unwrap_or((message, ""));
    let wanted = wanted.trim_start_matches("one of ");
    for (start, word) in [("unknown field ", "unknown key "), ("unknown variant ", "unknown value ")] {
        if let Some(name) = problem.strip_prefix(start) {
            let known =
                if wanted.is_empty() { String::new() } else { format!("; the known ones are {wanted}") };
            return format!("{word}{name}{known}");
        }
    }
    if let Some(name) = problem.strip_prefix("missing field ") {
        return format!("the key {name} is missing");
    }
    if let Some(found) = problem.strip_prefix("invalid type: ").or(problem.strip_prefix("invalid value: ")) {
        return format!("{} found, and {} is needed", rephrase_type_name(found), rephrase_type_name(wanted));
    }
    message.to_owned()
}

/// Rewords the name of a type, which the value may follow.
fn rephrase_type_name(text: &str) -> String {
    const KINDS: [(&str, &str); 10] = [
        ("a string", "text"),
        ("string", "the text"),
        ("a boolean", "true or false"),
        ("boolean", "the truth value"),
        ("integer", "the number"),
        ("floating point", "the number"),
        ("a sequence", "a list"),
        ("sequence", "a list"),
        ("a map", "a table"),
        ("map", "a table"),
    ];
    if ["u64", "u32", "usize", "i64", "a nonzero usize"].contains(&text) {
        return "a whole number".to_owned();
    }
    let known = KINDS.iter().find_map(|(start, word)| Some(format!("{word}{}", text.strip_prefix(start)?)));
    known.unwrap_or_else(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only whether it can be read is asked")]
    struct SampleDocument {
        name: String,
        count: Option<u64>,
        list: Option<Vec<String>>,
        is_on: Option<bool>,
    }

    #[test]
    fn what_a_parser_says_is_said_without_words_of_rust() {
        for (text, wanted) in [
            ("nam = 'x'", "unknown key `nam`; the known ones are `name`, `count`, `list`, `is_on`"),
            ("count = 1", "the key `name` is missing"),
            ("name = 5", "the number `5` found, and text is needed"),
            ("name = []", "a list found, and text is needed"),
            ("name = 'x'\ncount = 'y'", "the text \"y\" found, and a whole number is needed"),
            ("name = 'x'\nlist = 1.5", "the number `1.5` found, and a list is needed"),
            ("name = 'x'\nis_on = { a = 1 }", "a table found, and true or false is needed"),
        ] {
            let error = toml::from_str::<SampleDocument>(text).unwrap_err();
            assert_eq!(rephrase_serde_error(error.message()), wanted, "{text}");
        }
        assert_eq!(rephrase_serde_error("unclosed table"), "unclosed table");
    }

    #[test]
    fn a_value_that_looks_like_a_credential_is_not_repeated() {
        for text in [
            "count = 'postgres://u:ses ame@h'",
            "name = 'n'\n'postgres://u:sesame@h' = 1",
            "is_on = 'u:ses\"ame@h'",
        ] {
            let error = rephrase_serde_error(toml::from_str::<SampleDocument>(text).unwrap_err().message());
            assert!(!error.contains("ses") && !error.contains("ame@"), "{error}");
        }
    }
}
