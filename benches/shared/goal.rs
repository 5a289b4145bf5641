//! One line for each goal of `docs/performance.md`: whether it is met, what it is, what was found in this run, what was
//! wanted. `make bench` gathers these lines.

#![allow(dead_code, reason = "each benchmark uses its part")]

/// A goal that is met by so much or more.
pub(crate) fn at_least(what: &str, wanted: f64, found: f64, note: &str) {
    print_goal(found >= wanted, what, found, &format!(">= {wanted}"), note);
}

/// A goal that is met by so much or less.
pub(crate) fn at_most(what: &str, wanted: f64, found: f64, note: &str) {
    print_goal(found <= wanted, what, found, &format!("<= {wanted}"), note);
}

fn print_goal(met: bool, what: &str, found: f64, wanted: &str, note: &str) {
    let verdict = if met { "met" } else { "MISSED" };
    let line = format!("{verdict:<7} {what:<60} {found:>9.2}  goal {wanted:<8}  {note}");
    println!("{}", line.trim_end());
}

/// The one in the middle.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
