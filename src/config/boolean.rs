//! Parses the truth values of flags and environment variables.

/// Parses a truth value: `1`, `true`, `yes`, `on` or `0`, `false`, `no`, `off`, in any case.
///
/// # Errors
/// A message with the accepted words.
pub(super) fn parse_boolean(text: &str) -> Result<bool, &'static str> {
    let is = |words: [&str; 4]| words.iter().any(|word| text.eq_ignore_ascii_case(word));
    if is(["1", "true", "yes", "on"]) {
        Ok(true)
    } else if is(["0", "false", "no", "off"]) {
        Ok(false)
    } else {
        Err("must be 1, true, yes, on, 0, false, no or off")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truth_value_is_one_of_eight_words_in_any_case() {
        for (text, value) in [
            ("1", Some(true)),
            ("true", Some(true)),
            ("YES", Some(true)),
            ("On", Some(true)),
            ("0", Some(false)),
            ("False", Some(false)),
            ("no", Some(false)),
            ("off", Some(false)),
            ("", None),
            ("2", None),
            ("y", None),
            (" true", None),
        ] {
            assert_eq!(parse_boolean(text).ok(), value, "{text:?}");
        }
    }
}
