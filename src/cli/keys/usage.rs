//! `keyward keys usage`: shows as a bar chart how often a key was allowed and denied.

use std::{collections::BTreeMap, time::Duration};

use clap::Args;
use prost_types::Timestamp;

use crate::{
    cli::{
        api_client::DefaultTimeout,
        context::CommandContext,
        error::CliError,
        text_output::format_reason,
        value_format::{PastInstantArg, duration_to_proto, format_rfc3339, timestamp_from_micros},
    },
    clock::{Clock, SystemClock},
    config::duration,
    pb,
};

const SECONDS_PER_HOUR: i64 = 3_600;
const SECONDS_PER_DAY: i64 = 86_400;
/// The length of the longest bar in characters.
const BAR_WIDTH: u64 = 40;
/// Bars grow by eighths of a character.
const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
/// From this many on, consecutive steps without a Check share one line.
const MIN_COLLAPSED_STEPS: i64 = 4;

#[derive(Debug, Args)]
#[command(after_help = "Counts are kept by the hour for 90 days. Times are UTC.

Example: keyward keys usage 0197c0de-0000-7000-8000-000000000000 --from 14d --step 1d")]
pub(in crate::cli) struct KeyUsageArgs {
    #[command(flatten)]
    key: super::args::KeyIdArgs,
    /// Start with the step that contains this instant: a duration ago (12h) or an instant (RFC 3339) [default: 24 steps
    /// of less than a day, or 30 days]
    #[arg(long, value_name = "WHEN", value_parser = PastInstantArg::parse)]
    from: Option<PastInstantArg>,
    /// End with the hour that contains this instant [default: now]
    #[arg(long, value_name = "WHEN", value_parser = PastInstantArg::parse)]
    to: Option<PastInstantArg>,
    /// Length of a step in full hours: 1h, 6h, 1d; steps of full days start at midnight UTC
    #[arg(long, value_name = "DURATION", value_parser = parse_step, default_value = "1h")]
    step: Duration,
}

fn parse_step(text: &str) -> Result<Duration, String> {
    let step = duration::parse_duration(text)?;
    let hours = step.as_secs() / 3_600;
    let full = step.as_secs().is_multiple_of(3_600) && step.subsec_nanos() == 0;
    if full && (1..=90 * 24).contains(&hours) {
        return Ok(step);
    }
    Err("write full hours or days, up to 90d: 1h, 6h, 1d".to_owned())
}

impl KeyUsageArgs {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        let (step, request) = (step_seconds(self.step), self.build_request(&SystemClock));
        let from = request.from.map_or(0, |from| from.seconds);
        let response = cx
            .connect()?
            .call_keys(DefaultTimeout::Quick, request, async |mut client, request| {
                client.usage(request).await
            })
            .await?;
        cx.print_response(&response, |colors| render_usage(&response, from, step, colors))?;
        Ok(0)
    }

    /// Builds the request. The server counts steps from `from`, so it is aligned to the start of a step.
    fn build_request(&self, clock: &dyn Clock) -> pb::KeyUsageRequest {
        let step = step_seconds(self.step);
        let grid = if step % SECONDS_PER_DAY == 0 { SECONDS_PER_DAY } else { SECONDS_PER_HOUR };
        let end =
            self.to.map_or_else(|| timestamp_from_micros(clock.now().as_micros()), |to| to.resolve(clock));
        let from = self.from.map_or_else(
            || {
                end.seconds
                    - if grid == SECONDS_PER_DAY {
                        step.max(30 * SECONDS_PER_DAY) - SECONDS_PER_DAY
                    } else {
                        23 * step
                    }
            },
            |from| from.resolve(clock).seconds,
        );
        let from = from.div_euclid(grid) * grid;
        pb::KeyUsageRequest {
            id: self.key.id.clone(),
            from: Some(Timestamp { seconds: from, nanos: 0 }),
            to: self.to.map(|_| end),
            step: Some(duration_to_proto(self.step)),
        }
    }
}

fn step_seconds(step: Duration) -> i64 {
    i64::try_from(step.as_secs()).unwrap_or(i64::MAX).max(SECONDS_PER_HOUR)
}

/// Renders the bars, the totals and the reasons of denials.
fn render_usage(response: &pb::KeyUsageResponse, from: i64, step: i64, colors: bool) -> String {
    if response.buckets.is_empty() {
        return "No checks.\n".to_owned();
    }
    let largest = response.buckets.iter().map(|bucket| bucket.allowed.saturating_add(bucket.denied)).max();
    let (scale, mut at, mut text) = (largest.unwrap_or(0).max(1), from, String::new());
    for bucket in &response.buckets {
        let start = bucket.start.map_or(at, |start| start.seconds);
        text.push_str(&render_idle_steps(at, start, step));
        text.push_str(&render_step(start, step, bucket, scale, colors));
        at = start.saturating_add(step);
    }
    text + "\n" + &render_totals(response, colors)
}

/// Renders the steps from `at` to `start`, which have no Checks.
fn render_idle_steps(at: i64, start: i64, step: i64) -> String {
    let steps = start.saturating_sub(at).max(0) / step;
    if steps >= MIN_COLLAPSED_STEPS {
        return format!("{:16}  {steps} steps without a check\n", "");
    }
    (0..steps).map(|n| format!("{}  0\n", format_step_start(at + n * step, step))).collect()
}

/// Formats the start of a step: `2026-01-31 14:00`, or only the day.
fn format_step_start(start: i64, step: i64) -> String {
    let instant = format_rfc3339(&Timestamp { seconds: start, nanos: 0 });
    let length = if step % SECONDS_PER_DAY == 0 { 10 } else { 16 };
    format!("{:16}", instant.get(..length).unwrap_or(&instant).replace('T', " "))
}

fn render_step(start: i64, step: i64, bucket: &pb::UsageBucket, scale: u64, colors: bool) -> String {
    let allowed = colorize(&render_allowed_bar(bucket.allowed, scale), "32", colors);
    let denied = colorize(&render_denied_bar(bucket.denied, scale), "31", colors);
    let mut counts = bucket.allowed.to_string();
    if bucket.denied > 0 {
        counts.push_str(&format!(" + {} denied", bucket.denied));
    }
    format!("{}  {allowed}{denied} {counts}\n", format_step_start(start, step))
}

/// Renders a bar of full and partial blocks; a count above 0 is always visible.
fn render_allowed_bar(count: u64, scale: u64) -> String {
    let eighths = scale_to_width(count, BAR_WIDTH * 8, scale);
    let mut bar = "█".repeat((eighths / 8) as usize);
    bar.extend(EIGHTHS.get((eighths % 8) as usize).filter(|part| **part != ' '));
    bar
}

/// Renders a bar that differs from the allowed one even without colors.
fn render_denied_bar(count: u64, scale: u64) -> String {
    "░".repeat(scale_to_width(count, BAR_WIDTH, scale) as usize)
}

/// Scales a count to `width`, rounded down, but to at least 1 for a count above 0.
fn scale_to_width(count: u64, width: u64, scale: u64) -> u64 {
    let share = u128::from(count) * u128::from(width) / u128::from(scale.max(1));
    u64::try_from(share).unwrap_or(width).clamp(u64::from(count > 0), width)
}

fn colorize(text: &str, code: &str, colors: bool) -> String {
    if colors && !text.is_empty() { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
}

fn render_totals(response: &pb::KeyUsageResponse, colors: bool) -> String {
    let mut reasons: BTreeMap<i32, u64> = BTreeMap::new();
    for count in response.buckets.iter().flat_map(|bucket| &bucket.denied_by_reason) {
        *reasons.entry(count.reason).or_default() += count.count;
    }
    let mut text = format!("{}  {}\n", colorize("allowed", "32", colors), response.allowed);
    text.push_str(&format!("{}   {}\n", colorize("denied", "31", colors), response.denied));
    for (reason, count) in reasons {
        let word = pb::Reason::try_from(reason).map_or_else(|_| format!("reason {reason}"), format_reason);
        text.push_str(&format!("  {word}: {count}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use proptest::prelude::*;

    use super::*;
    use crate::{clock::ManualClock, domain::time};

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        args: KeyUsageArgs,
    }

    /// The request at 2026-01-01T12:30:00Z.
    fn parse_usage(line: &str) -> pb::KeyUsageRequest {
        let line = format!("usage 0197 {line}");
        let args = Only::try_parse_from(line.split_whitespace()).unwrap().args;
        args.build_request(&ManualClock::new(time::Timestamp::from_micros(1_767_270_600_000_000)))
    }

    fn bucket(start: i64, allowed: u64, denied: u64) -> pb::UsageBucket {
        let start = Some(Timestamp { seconds: start, nanos: 0 });
        let reason = pb::ReasonCount { reason: pb::Reason::Expired.into(), count: denied };
        let denied_by_reason = if denied > 0 { vec![reason] } else { Vec::new() };
        pb::UsageBucket { start, allowed, denied, denied_by_reason }
    }

    fn response(buckets: Vec<pb::UsageBucket>) -> pb::KeyUsageResponse {
        let allowed = buckets.iter().map(|bucket| bucket.allowed).sum();
        let denied = buckets.iter().map(|bucket| bucket.denied).sum();
        pb::KeyUsageResponse { buckets, allowed, denied }
    }

    #[test]
    fn steps_begin_at_full_hours_and_days_at_midnight() {
        let from = |line: &str| parse_usage(line).from.map(|from| format_rfc3339(&from)).unwrap();
        assert_eq!(from(""), "2025-12-31T13:00:00Z");
        assert_eq!(from("--from 1h30m --step 1h"), "2026-01-01T11:00:00Z");
        assert_eq!(from("--step 1d"), "2025-12-03T00:00:00Z");
        assert_eq!(from("--step 90d"), "2025-10-04T00:00:00Z");
        assert_eq!(from("--step 1d --from 7d"), "2025-12-25T00:00:00Z");
        assert_eq!(parse_usage("").to, None, "the server's clock says what is now");
        assert!(parse_usage("--to 1d").to.is_some());
    }

    #[test]
    fn a_step_is_full_hours() {
        for good in ["1h", "6h", "1d", "1w", "90d"] {
            assert!(parse_step(good).is_ok(), "{good}");
        }
        for bad in ["30m", "1h30m", "0h", "91d", "x", "1h1ms"] {
            assert!(parse_step(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_longest_bar_is_full_and_the_least_is_seen() {
        let text = render_usage(
            &response(vec![bucket(0, 1_000_000, 0), bucket(SECONDS_PER_HOUR, 1, 1)]),
            0,
            SECONDS_PER_HOUR,
            false,
        );
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], format!("1970-01-01 00:00  {} 1000000", "█".repeat(40)));
        assert_eq!(lines[1], "1970-01-01 01:00  ▏░ 1 + 1 denied");
    }

    #[test]
    fn steps_without_a_check_are_shown_and_many_of_them_in_one_line() {
        let text = render_usage(
            &response(vec![bucket(2 * SECONDS_PER_DAY, 1, 0), bucket(10 * SECONDS_PER_DAY, 1, 0)]),
            0,
            SECONDS_PER_DAY,
            false,
        );
        assert!(text.starts_with("1970-01-01        0\n1970-01-02        0\n1970-01-03        █"), "{text}");
        assert!(text.contains("7 steps without a check\n1970-01-11"), "{text}");
        assert_eq!(render_usage(&response(vec![]), 0, SECONDS_PER_DAY, false), "No checks.\n");
    }

    #[test]
    fn denials_are_summed_by_reason() {
        let text = render_usage(
            &response(vec![bucket(0, 5, 2), bucket(SECONDS_PER_HOUR, 1, 3)]),
            0,
            SECONDS_PER_HOUR,
            false,
        );
        assert!(text.ends_with("\nallowed  6\ndenied   5\n  expired: 5\n"), "{text}");
    }

    #[test]
    fn colours_come_only_where_they_are_wanted() {
        let usage = response(vec![bucket(0, 5, 2)]);
        assert!(!render_usage(&usage, 0, SECONDS_PER_HOUR, false).contains('\u{1b}'));
        assert!(
            render_usage(&usage, 0, SECONDS_PER_HOUR, true).contains("\u{1b}[32m")
                && render_usage(&usage, 0, SECONDS_PER_HOUR, true).contains("31m")
        );
    }

    proptest! {
        #[test]
        fn no_answer_makes_the_drawing_panic_or_grow_too_wide(
            starts in proptest::collection::vec((any::<i64>(), any::<u32>(), any::<u32>()), 0..20),
            from: i64,
        ) {
            let buckets = starts.iter().map(|(at, a, d)| bucket(*at, u64::from(*a), u64::from(*d))).collect();
            for line in render_usage(&response(buckets), from, SECONDS_PER_HOUR, false).lines() {
                prop_assert!(line.chars().count() < 120, "{line}");
            }
        }
    }
}
