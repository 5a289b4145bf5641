//! Renders responses for people: which fields are shown, with which labels and colors.

use comfy_table::Color;

use super::{
    table::{DetailTable, escape_terminal},
    value_format::{
        format_enum_name, format_proto_duration, format_quota, format_rate_limit, format_rfc3339,
    },
};
use crate::pb;

pub(super) fn format_key_state(key: &pb::Key) -> (String, Option<Color>) {
    let color = match key.state() {
        pb::KeyState::Active => Some(Color::Green),
        pb::KeyState::Disabled | pb::KeyState::Expired => Some(Color::Yellow),
        pb::KeyState::Revoked => Some(Color::Red),
        pb::KeyState::Unspecified => None,
    };
    (format_enum_name(key.state().as_str_name(), "KEY_STATE_"), color)
}

pub(super) fn format_key_owner(key: &pb::Key) -> String {
    if key.user.is_empty() { key.account.clone() } else { format!("user {}", key.user) }
}

pub(super) fn describe_key(key: &pb::Key) -> DetailTable {
    let (state, color) = format_key_state(key);
    let pairs: Vec<String> = key.metadata.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let limits: Vec<String> = key.rate_limits.iter().map(format_rate_limit).collect();
    DetailTable::new()
        .field("id", &key.id)
        .field("name", &key.name)
        .colored_field("state", state, color)
        .field("account", &key.account)
        .field("user", &key.user)
        .field("environment", &key.environment)
        .field("hint", &key.hint)
        .list_field("scopes", &key.scopes)
        .list_field("roles", &key.roles)
        .list_field("customers", &key.customers)
        .list_field("allowed cidrs", &key.allowed_cidrs)
        .list_field("rate limits", &limits)
        .field("quota", key.quota.as_ref().map(format_quota).unwrap_or_default())
        .list_field("metadata", &pairs)
        .instant_field("expires", key.expires_at.as_ref(), "never")
        .instant_field("last used", key.last_used_at.as_ref(), "never")
        .instant_field("created", key.created_at.as_ref(), "")
        .field("created by", &key.created_by)
        .instant_field("updated", key.updated_at.as_ref(), "")
        .merge(describe_revocation(key))
        .merge(describe_old_tokens(key))
        .field("revision", key.revision.to_string())
}

fn describe_revocation(key: &pb::Key) -> DetailTable {
    let record = DetailTable::new().instant_field("revoked", key.revoked_at.as_ref(), "");
    match key.revoke_reason() {
        pb::RevokeReason::Unspecified => record,
        reason => record.field("reason", format_enum_name(reason.as_str_name(), "REVOKE_REASON_")),
    }
    .field("comment", &key.revoke_comment)
}

/// The old token of a rotation, while it still works.
fn describe_old_tokens(key: &pb::Key) -> DetailTable {
    key.secrets.iter().skip(1).fold(DetailTable::new(), |record, secret| {
        let until = secret.expires_at.as_ref().map_or_else(|| "the key ends".to_owned(), format_rfc3339);
        let used = secret.last_used_at.as_ref().map_or_else(|| "never".to_owned(), format_rfc3339);
        record.field("old token", format!("{} works until {until}; last used: {used}", secret.hint))
    })
}

/// Describes in one line how far a change has propagated.
pub(super) fn format_propagation(revision: u64, report: Option<&pb::Propagation>) -> String {
    match report {
        Some(report) if !report.complete => {
            let missing: Vec<&str> = report.unconfirmed.iter().map(|u| u.replica.as_str()).collect();
            let by =
                report.complete_by.as_ref().map_or_else(|| "an unknown instant".to_owned(), format_rfc3339);
            let missing = escape_terminal(&missing.join(", "));
            format!("Revision {revision}: in force everywhere by {by}; not confirmed yet by {missing}.\n")
        }
        Some(_) => format!("Revision {revision}: in force everywhere.\n"),
        None => format!("Revision {revision}.\n"),
    }
}

/// Describes the verdict on a token with its reasons.
pub(super) fn describe_check(response: &pb::CheckResponse) -> DetailTable {
    let (verdict, color) = if response.allowed { ("allowed", Color::Green) } else { ("denied", Color::Red) };
    let failures: Vec<String> = response.failures().map(format_reason).collect();
    let limits: Vec<String> = response.rate_limits.iter().map(format_rate_limit_state).collect();
    let pairs: Vec<String> =
        response.metadata.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let duration =
        |d: &Option<prost_types::Duration>| d.as_ref().map(format_proto_duration).unwrap_or_default();
    let has_key = !response.key_id.is_empty();
    // The response has no other details of a revoked key.
    let has_expiry = has_key && response.reason() != pb::Reason::Revoked;
    DetailTable::new()
        .colored_field("verdict", verdict.to_owned(), Some(color))
        .field("reason", format_reason(response.reason()))
        .field("message", &response.message)
        .list_field("failures", &failures)
        .list_field("missing scopes", &response.missing_scopes)
        .field("retry after", duration(&response.retry_after))
        .field("key", &response.key_id)
        .field("key name", &response.key_name)
        .field("account", &response.account)
        .field("user", &response.user)
        .field("environment", &response.environment)
        .list_field("scopes", &response.scopes)
        .field("secret version", if has_key { response.secret_version.to_string() } else { String::new() })
        .list_field("metadata", &pairs)
        .list_field("rate limits", &limits)
        .field(
            "inexact",
            if response.limits_inexact { "the rate limits: counted by one replica alone" } else { "" },
        )
        .instant_field("expires", response.expires_at.as_ref(), if has_expiry { "never" } else { "" })
        .field("revision", response.revision.to_string())
        .field("staleness", duration(&response.staleness))
        .field("max age", duration(&response.max_age))
}

pub(super) fn format_reason(reason: pb::Reason) -> String {
    format_enum_name(reason.as_str_name(), "REASON_")
}

fn format_rate_limit_state(state: &pb::RateLimitState) -> String {
    let reset = state.reset_after.as_ref().map(format_proto_duration).unwrap_or_default();
    format!("{}: {} of {} left, full in {reset}", state.name, state.remaining, state.limit)
}

pub(super) fn describe_account(account: &pb::Account) -> DetailTable {
    let (state, color) = format_account_state(account);
    DetailTable::new()
        .field("id", &account.id)
        .field("name", &account.name)
        .colored_field("state", state, color)
        .field("longest life", format_longest_life(account))
        .instant_field("created", account.created_at.as_ref(), "")
        .instant_field("updated", account.updated_at.as_ref(), "")
        .field("revision", account.revision.to_string())
}

pub(super) fn format_longest_life(account: &pb::Account) -> String {
    account.longest_life.as_ref().map_or_else(|| "never ends".to_owned(), format_proto_duration)
}

pub(super) fn format_account_state(account: &pb::Account) -> (String, Option<Color>) {
    let (state, color) = if account.suspended { ("suspended", Color::Red) } else { ("active", Color::Green) };
    (state.to_owned(), Some(color))
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
        let text = describe_key(&a_key()).render(false);
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
        assert!(describe_key(&a_key()).render(false).contains("note=\\u{1b}[31mred"));
        let mut hidden = a_key();
        hidden.name = "a\u{202e}b\u{200b}\u{9b}2J\n".into();
        let shown = describe_key(&hidden).render(false);
        let is_escaped =
            |line: &str| line.starts_with("name ") && line.ends_with(r" a\u{202e}b\u{200b}\u{9b}2J\n");
        assert!(shown.lines().any(is_escaped), "{shown:?}");
    }

    #[test]
    fn states_are_coloured_only_where_colours_are_wanted() {
        assert!(!describe_key(&a_key()).render(false).contains('\u{1b}'));
        assert!(describe_key(&a_key()).render(true).contains("\u{1b}["));
    }

    #[test]
    fn the_overlap_of_a_rotation_shows_whether_the_old_token_has_fallen_silent() {
        let secret =
            |version| pb::Secret { version, hint: format!("kw_live_{version}"), ..Default::default() };
        let text = describe_key(&pb::Key { secrets: vec![secret(2), secret(1)], ..a_key() }).render(false);
        assert!(text.contains("kw_live_1 works until the key ends; last used: never"), "{text}");
        assert!(!text.contains("kw_live_2"), "{text}");
    }

    #[test]
    fn a_denial_says_every_reason() {
        let mut response = pb::CheckResponse { missing_scopes: vec!["a:b".into()], ..Default::default() };
        response.set_reason(pb::Reason::Expired);
        response.push_failures(pb::Reason::Expired);
        response.push_failures(pb::Reason::MissingScope);
        let text = describe_check(&response).render(false);
        assert!(
            text.contains("denied") && text.contains("expired, missing-scope") && text.contains("a:b"),
            "{text}"
        );
        assert!(!text.contains("never"), "an unknown key does not expire never: {text}");
    }

    #[test]
    fn an_account_says_how_long_its_keys_may_live() {
        let text =
            |life| describe_account(&pb::Account { longest_life: life, ..Default::default() }).render(false);
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
        assert!(format_propagation(7, Some(&report)).contains("not confirmed yet by eu-2"));
        let done = pb::Propagation { complete: true, ..Default::default() };
        assert_eq!(format_propagation(7, Some(&done)), "Revision 7: in force everywhere.\n");
    }
}
