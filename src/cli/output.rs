//! Responses as people read them: which of their fields are shown, in which words and colours.

use comfy_table::Color;

use super::{
    table::{Record, clean},
    values::{rfc3339, show_quota, show_rate_limit, spoken, word},
};
use crate::pb;

/// A key's state and its colour.
pub(super) fn state(key: &pb::Key) -> (String, Option<Color>) {
    let colour = match key.state() {
        pb::KeyState::Active => Some(Color::Green),
        pb::KeyState::Disabled | pb::KeyState::Expired => Some(Color::Yellow),
        pb::KeyState::Revoked => Some(Color::Red),
        pb::KeyState::Unspecified => None,
    };
    (word(key.state().as_str_name(), "KEY_STATE_"), colour)
}

/// Who a key belongs to.
pub(super) fn owner(key: &pb::Key) -> String {
    if key.user.is_empty() { key.account.clone() } else { format!("user {}", key.user) }
}

/// A key in full.
pub(super) fn key(key: &pb::Key) -> Record {
    let (state, colour) = state(key);
    let pairs: Vec<String> = key.metadata.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let limits: Vec<String> = key.rate_limits.iter().map(show_rate_limit).collect();
    Record::new()
        .field("id", &key.id)
        .field("name", &key.name)
        .coloured("state", state, colour)
        .field("account", &key.account)
        .field("user", &key.user)
        .field("environment", &key.environment)
        .field("hint", &key.hint)
        .list("scopes", &key.scopes)
        .list("roles", &key.roles)
        .list("customers", &key.customers)
        .list("allowed cidrs", &key.allowed_cidrs)
        .list("rate limits", &limits)
        .field("quota", key.quota.as_ref().map(show_quota).unwrap_or_default())
        .list("metadata", &pairs)
        .instant("expires", key.expires_at.as_ref(), "never")
        .instant("last used", key.last_used_at.as_ref(), "never")
        .instant("created", key.created_at.as_ref(), "")
        .field("created by", &key.created_by)
        .instant("updated", key.updated_at.as_ref(), "")
        .and(revocation(key))
        .and(overlap(key))
        .field("revision", key.revision.to_string())
}

fn revocation(key: &pb::Key) -> Record {
    let record = Record::new().instant("revoked", key.revoked_at.as_ref(), "");
    match key.revoke_reason() {
        pb::RevokeReason::Unspecified => record,
        reason => record.field("reason", word(reason.as_str_name(), "REVOKE_REASON_")),
    }
    .field("comment", &key.revoke_comment)
}

/// The old token, while it still works.
fn overlap(key: &pb::Key) -> Record {
    key.secrets.iter().skip(1).fold(Record::new(), |record, secret| {
        let until = secret.expires_at.as_ref().map_or_else(|| "the key ends".to_owned(), rfc3339);
        let used = secret.last_used_at.as_ref().map_or_else(|| "never".to_owned(), rfc3339);
        record.field("old token", format!("{} works until {until}; last used: {used}", secret.hint))
    })
}

/// How far a change has reached, in one line.
pub(super) fn propagation(revision: u64, report: Option<&pb::Propagation>) -> String {
    match report {
        Some(report) if !report.complete => {
            let missing: Vec<&str> = report.unconfirmed.iter().map(|u| u.replica.as_str()).collect();
            let by = report.complete_by.as_ref().map_or_else(|| "an unknown instant".to_owned(), rfc3339);
            let missing = clean(&missing.join(", "));
            format!("Revision {revision}: in force everywhere by {by}; not confirmed yet by {missing}.\n")
        }
        Some(_) => format!("Revision {revision}: in force everywhere.\n"),
        None => format!("Revision {revision}.\n"),
    }
}

/// The verdict on a token, with what led to it.
pub(super) fn check(answer: &pb::CheckResponse) -> Record {
    let (verdict, colour) = if answer.allowed { ("allowed", Color::Green) } else { ("denied", Color::Red) };
    let failures: Vec<String> = answer.failures().map(reason_word).collect();
    let limits: Vec<String> = answer.rate_limits.iter().map(rate_limit_state).collect();
    let pairs: Vec<String> = answer.metadata.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let duration = |d: &Option<prost_types::Duration>| d.as_ref().map(spoken).unwrap_or_default();
    let known = !answer.key_id.is_empty();
    // Of a revoked key nothing is known but that.
    let has_expiry = known && answer.reason() != pb::Reason::Revoked;
    Record::new()
        .coloured("verdict", verdict.to_owned(), Some(colour))
        .field("reason", reason_word(answer.reason()))
        .field("message", &answer.message)
        .list("failures", &failures)
        .list("missing scopes", &answer.missing_scopes)
        .field("retry after", duration(&answer.retry_after))
        .field("key", &answer.key_id)
        .field("key name", &answer.key_name)
        .field("account", &answer.account)
        .field("user", &answer.user)
        .field("environment", &answer.environment)
        .list("scopes", &answer.scopes)
        .field("secret version", if known { answer.secret_version.to_string() } else { String::new() })
        .list("metadata", &pairs)
        .list("rate limits", &limits)
        .field(
            "inexact",
            if answer.limits_inexact { "the rate limits: counted by one replica alone" } else { "" },
        )
        .instant("expires", answer.expires_at.as_ref(), if has_expiry { "never" } else { "" })
        .field("revision", answer.revision.to_string())
        .field("staleness", duration(&answer.staleness))
        .field("max age", duration(&answer.max_age))
}

pub(super) fn reason_word(reason: pb::Reason) -> String {
    word(reason.as_str_name(), "REASON_")
}

fn rate_limit_state(state: &pb::RateLimitState) -> String {
    let reset = state.reset_after.as_ref().map(spoken).unwrap_or_default();
    format!("{}: {} of {} left, full in {reset}", state.name, state.remaining, state.limit)
}

/// An account in full.
pub(super) fn account(account: &pb::Account) -> Record {
    let (state, colour) = account_state(account);
    Record::new()
        .field("id", &account.id)
        .field("name", &account.name)
        .coloured("state", state, colour)
        .field("longest life", longest_life(account))
        .instant("created", account.created_at.as_ref(), "")
        .instant("updated", account.updated_at.as_ref(), "")
        .field("revision", account.revision.to_string())
}

/// How long an account's keys may live.
pub(super) fn longest_life(account: &pb::Account) -> String {
    account.longest_life.as_ref().map_or_else(|| "never ends".to_owned(), spoken)
}

/// An account's state and its colour.
pub(super) fn account_state(account: &pb::Account) -> (String, Option<Color>) {
    let (state, colour) =
        if account.suspended { ("suspended", Color::Red) } else { ("active", Color::Green) };
    (state.to_owned(), Some(colour))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_key() -> pb::Key {
        let mut key = pb::Key {
            id: "0197".into(),
            account: "acme".into(),
            scopes: vec!["monitors:read".into(), "agents:*".into()],
            metadata: [("note".to_owned(), "\u{1b}[31mred".to_owned())].into(),
            ..Default::default()
        };
        key.set_state(pb::KeyState::Active);
        key
    }

    #[test]
    fn a_key_is_told_line_by_line_without_what_is_empty() {
        let text = key(&a_key()).show(false);
        assert!(text.starts_with("id "), "{text}");
        assert!(
            text.lines().any(|l| l.starts_with("scopes") && l.ends_with("monitors:read, agents:*")),
            "{text}"
        );
        assert!(text.lines().any(|line| line.starts_with("expires") && line.ends_with("never")), "{text}");
        assert!(!text.contains("user") && !text.contains("quota"), "{text}");
    }

    #[test]
    fn what_a_key_holds_cannot_steer_the_terminal() {
        assert!(key(&a_key()).show(false).contains("note=\\u{1b}[31mred"));
        let mut hidden = a_key();
        hidden.name = "a\u{202e}b\u{200b}\u{9b}2J\n".into();
        let shown = key(&hidden).show(false);
        let is_escaped =
            |line: &str| line.starts_with("name ") && line.ends_with(r" a\u{202e}b\u{200b}\u{9b}2J\n");
        assert!(shown.lines().any(is_escaped), "{shown:?}");
    }

    #[test]
    fn states_are_coloured_only_where_colours_are_wanted() {
        assert!(!key(&a_key()).show(false).contains('\u{1b}'));
        assert!(key(&a_key()).show(true).contains("\u{1b}["));
    }

    #[test]
    fn the_overlap_of_a_rotation_shows_whether_the_old_token_has_fallen_silent() {
        let secret =
            |version| pb::Secret { version, hint: format!("kw_live_{version}"), ..Default::default() };
        let text = key(&pb::Key { secrets: vec![secret(2), secret(1)], ..a_key() }).show(false);
        assert!(text.contains("kw_live_1 works until the key ends; last used: never"), "{text}");
        assert!(!text.contains("kw_live_2"), "{text}");
    }

    #[test]
    fn a_denial_says_every_reason() {
        let mut answer = pb::CheckResponse { missing_scopes: vec!["a:b".into()], ..Default::default() };
        answer.set_reason(pb::Reason::Expired);
        answer.push_failures(pb::Reason::Expired);
        answer.push_failures(pb::Reason::MissingScope);
        let text = check(&answer).show(false);
        assert!(
            text.contains("denied") && text.contains("expired, missing-scope") && text.contains("a:b"),
            "{text}"
        );
        assert!(!text.contains("never"), "an unknown key does not expire never: {text}");
    }

    #[test]
    fn an_account_says_how_long_its_keys_may_live() {
        let text = |life| account(&pb::Account { longest_life: life, ..Default::default() }).show(false);
        let days = prost_types::Duration { seconds: 90 * 86_400, nanos: 0 };
        assert!(text(Some(days)).lines().any(|l| l.starts_with("longest life") && l.ends_with("90d")));
        assert!(text(None).lines().any(|l| l.starts_with("longest life") && l.ends_with("never ends")));
    }

    #[test]
    fn a_change_that_has_not_reached_everyone_is_told_so() {
        let report = pb::Propagation {
            unconfirmed: vec![pb::UnconfirmedReplica { replica: "eu-2".into(), ..Default::default() }],
            ..Default::default()
        };
        assert!(propagation(7, Some(&report)).contains("not confirmed yet by eu-2"));
        let done = pb::Propagation { complete: true, ..Default::default() };
        assert_eq!(propagation(7, Some(&done)), "Revision 7: in force everywhere.\n");
    }
}
