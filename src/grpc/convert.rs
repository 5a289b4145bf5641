//! Converts messages to domain values and back.
//!
//! Validation collects every violation of a request, so that the client sees all of them at once. Rules that need a
//! record or the caller belong to the use cases.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    net::IpAddr,
    time::Duration,
};

use ipnet::IpNet;
use prost_types::{Duration as PbDuration, Timestamp as PbTimestamp};

use crate::{
    domain::{
        account::{Account, Environment, EnvironmentSet},
        key::{ApiKeyState, KeySpec, Quota, QuotaPeriod, RateLimit, RevokeReason},
        name::{AccountId, CustomerId, KeyId, KeyName, NameError, RoleName},
        policy_decision::Reason,
        scope::{Scope, ScopeSet},
        text,
        time::{Revision, Timestamp},
    },
    keys::KeyDetails,
    pb,
    replication::propagation::{LaggingReplica, PropagationReport},
    service_error::InvalidFields,
};

const MAX_KEY_SCOPES: usize = 256;
const MAX_ROLES: usize = 16;
const MAX_CUSTOMERS: usize = 64;
const MAX_CIDRS: usize = 64;
const MAX_METADATA_BYTES: usize = 4096;
const MAX_COMMENT_CHARS: usize = 1024;
const MAX_RATE_LIMITS: usize = 8;
const MAX_RATE_LIMIT: u64 = 1_000_000_000;
const MIN_WINDOW: Duration = Duration::from_secs(1);
const MAX_WINDOW: Duration = Duration::from_secs(24 * 60 * 60);
const MAX_QUOTA: u64 = 1_000_000_000_000;
const MIN_KEY_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);
const MIN_TTL: Duration = Duration::from_secs(1);
const MAX_TTL: Duration = Duration::from_secs(100 * 366 * 24 * 60 * 60);

#[must_use]
pub(super) fn timestamp_to_proto(at: Timestamp) -> PbTimestamp {
    let micros = at.as_micros();
    PbTimestamp {
        seconds: micros.div_euclid(1_000_000),
        // The value is below a billion, so it fits.
        nanos: i32::try_from(micros.rem_euclid(1_000_000) * 1000).unwrap_or(0),
    }
}

/// Converts a duration; one beyond the range of `i64` seconds is capped.
#[must_use]
pub(super) fn duration_to_proto(length: Duration) -> PbDuration {
    PbDuration {
        seconds: i64::try_from(length.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(length.subsec_nanos()).unwrap_or(0),
    }
}

/// Checks a text filter: names and methods have no control characters.
pub(super) fn check_no_controls(field: &str, text: &str, v: &mut InvalidFields) {
    v.add_if(text.chars().any(char::is_control), field, "must not contain control characters");
}

/// Reads an instant between the years 1 and 9999.
pub(super) fn read_timestamp(
    field: &str,
    at: Option<PbTimestamp>,
    violations: &mut InvalidFields,
) -> Option<Timestamp> {
    let PbTimestamp { seconds, nanos } = at?;
    let is_valid =
        (-62_135_596_800..=253_402_300_799).contains(&seconds) && (0..1_000_000_000).contains(&nanos);
    violations.add_if(!is_valid, field, "must be a valid timestamp between the years 1 and 9999");
    is_valid.then(|| Timestamp::from_micros(seconds * 1_000_000 + i64::from(nanos / 1000)))
}

/// Reads a duration that is not negative.
pub(super) fn read_duration(
    field: &str,
    length: Option<PbDuration>,
    violations: &mut InvalidFields,
) -> Option<Duration> {
    let PbDuration { seconds, nanos } = length?;
    match (u64::try_from(seconds), u32::try_from(nanos)) {
        (Ok(seconds), Ok(nanos)) if nanos < 1_000_000_000 => Some(Duration::new(seconds, nanos)),
        _ => {
            violations.add(field, "must not be negative");
            None
        }
    }
}

pub(super) fn read_key_id(field: &str, id: &str, violations: &mut InvalidFields) -> Option<KeyId> {
    violations.ok_or_add(field, KeyId::parse(id))
}

/// Reads the name of a configured environment.
pub(super) fn read_environment<'e>(
    field: impl Display,
    name: &str,
    environments: &'e EnvironmentSet,
    violations: &mut InvalidFields,
) -> Option<&'e Environment> {
    let found = environments.get(name);
    let one_of = fmt::from_fn(|f| write!(f, "must be one of: {}", environments.names()));
    violations.add_if(found.is_none(), field, one_of);
    found
}

/// Reads an optional account id.
pub(super) fn read_account(field: &str, id: &str, violations: &mut InvalidFields) -> Option<AccountId> {
    if id.is_empty() { None } else { violations.ok_or_add(field, AccountId::parse(id)) }
}

/// Reads an expiry: an instant in the future, or a lifetime from now.
pub(super) fn read_expiry(
    expires_at: Option<PbTimestamp>,
    ttl: Option<PbDuration>,
    now: Timestamp,
    violations: &mut InvalidFields,
) -> Option<Timestamp> {
    violations.add_if(
        expires_at.is_some() && ttl.is_some(),
        "ttl",
        "must not be given together with expires_at",
    );
    let ttl = read_duration("ttl", ttl, violations);
    let out_of_range = ttl.is_some_and(|ttl| !(MIN_TTL..=MAX_TTL).contains(&ttl));
    violations.add_if(out_of_range, "ttl", "must be one second to 100 years");
    let at = read_future_timestamp("expires_at", expires_at, now, violations);
    at.or_else(|| ttl.map(|ttl| now.saturating_add(ttl)))
}

fn read_future_timestamp(
    field: &str,
    at: Option<PbTimestamp>,
    now: Timestamp,
    violations: &mut InvalidFields,
) -> Option<Timestamp> {
    let at = read_timestamp(field, at, violations)?;
    violations.add_if(at <= now, field, "must be in the future");
    Some(at)
}

/// The fields of a request that make a key's spec, not validated yet.
#[derive(Debug)]
pub(super) struct KeySpecInput<'a> {
    /// Precedes each field's name in violations.
    pub(super) field_prefix: &'static str,
    pub(super) name: Option<&'a str>,
    pub(super) scopes: &'a [String],
    pub(super) roles: &'a [String],
    pub(super) customers: &'a [String],
    pub(super) allowed_cidrs: &'a [String],
    pub(super) rate_limits: &'a [pb::RateLimit],
    pub(super) quota: Option<&'a pb::Quota>,
    pub(super) metadata: &'a BTreeMap<String, String>,
    /// Already validated, see [`read_expiry`].
    pub(super) expires_at: Option<Timestamp>,
}

impl KeySpecInput<'_> {
    pub(super) fn read_spec(&self, violations: &mut InvalidFields) -> KeySpec {
        let field = |name: &str| format!("{}{name}", self.field_prefix);
        let scopes = violations.parse_list(field("scopes"), self.scopes, MAX_KEY_SCOPES, Scope::parse_grant);
        let roles = violations.parse_list(field("roles"), self.roles, MAX_ROLES, RoleName::parse);
        let customers =
            violations.parse_list(field("customers"), self.customers, MAX_CUSTOMERS, CustomerId::parse);
        let allowed_cidrs =
            violations.parse_list(field("allowed_cidrs"), self.allowed_cidrs, MAX_CIDRS, parse_network);
        let rate_limits = read_rate_limits(&field("rate_limits"), self.rate_limits, violations);
        let quota = self.quota.and_then(|quota| read_quota(&field("quota"), quota, violations));
        let metadata = read_metadata(&field("metadata"), self.metadata, violations);
        KeySpec {
            name: self.name.and_then(|name| violations.ok_or_add(field("name"), KeyName::parse(name))),
            scopes: ScopeSet::from(scopes),
            roles,
            expires_at: self.expires_at,
            customers,
            allowed_cidrs,
            rate_limits,
            quota,
            metadata,
        }
    }
}

/// Reads metadata. Names follow the rules of key names; values are unchanged.
fn read_metadata(
    field: &str,
    metadata: &BTreeMap<String, String>,
    violations: &mut InvalidFields,
) -> BTreeMap<String, String> {
    let size: usize = metadata.iter().map(|(name, value)| name.len() + value.len()).sum();
    if size > MAX_METADATA_BYTES {
        let problem =
            format!("has {size} bytes of names and values; at most {MAX_METADATA_BYTES} are allowed");
        violations.add(field, problem);
        return BTreeMap::new();
    }
    let mut read = BTreeMap::new();
    for (name, value) in metadata {
        let checked = text::check_multiline(value).map_err(|error| format!("value of {name:?} {error}"));
        violations.ok_or_add(field, checked);
        let parsed = text::parse_name(name).map_err(|error| format!("name {name:?} {error}"));
        let Some(normalized) = violations.ok_or_add(field, parsed) else { continue };
        let is_duplicate = read.insert(normalized.into_owned(), value.clone()).is_some();
        violations.add_if(is_duplicate, field, format_args!("name {name:?} is given in two Unicode forms"));
    }
    read
}

/// Checks the comment of a revocation.
pub(super) fn check_comment(comment: &str, violations: &mut InvalidFields) {
    let length = comment.chars().count();
    violations.add_if(
        length > MAX_COMMENT_CHARS,
        "comment",
        format_args!("has {length} characters; at most {MAX_COMMENT_CHARS} are allowed"),
    );
    violations.ok_or_add("comment", text::check_multiline(comment));
}

fn read_rate_limits(field: &str, limits: &[pb::RateLimit], violations: &mut InvalidFields) -> Vec<RateLimit> {
    let too_many = limits.len() > MAX_RATE_LIMITS;
    violations.add_if(
        too_many,
        field,
        format!("has {} entries; at most {MAX_RATE_LIMITS} are allowed", limits.len()),
    );
    let mut read: Vec<RateLimit> = Vec::new();
    for (at, pb::RateLimit { name, limit, window }) in limits.iter().take(MAX_RATE_LIMITS).enumerate() {
        let field = |name: &str| format!("{field}[{at}].{name}");
        // Responses to Checks use the name `quota` for the quota.
        let is_valid_name = RoleName::parse(name).is_ok() && name != "quota";
        violations.add_if(
            !is_valid_name,
            field("name"),
            "must be 1-64 characters of [a-z0-9_-], and not \"quota\"",
        );
        let is_duplicate = read.iter().any(|other| other.name == *name);
        violations.add_if(is_duplicate, field("name"), format!("{name:?} is given twice"));
        let in_range = (1..=MAX_RATE_LIMIT).contains(limit);
        violations.add_if(!in_range, field("limit"), format!("must be 1 to {MAX_RATE_LIMIT}"));
        violations.add_if(window.is_none(), field("window"), "is required: one second to one day");
        let window = read_duration(&field("window"), *window, violations).unwrap_or(MIN_WINDOW);
        let is_valid = (MIN_WINDOW..=MAX_WINDOW).contains(&window);
        violations.add_if(!is_valid, field("window"), "must be one second to one day");
        read.push(RateLimit { name: name.clone(), limit: *limit, window });
    }
    read
}

fn read_quota(field: &str, quota: &pb::Quota, violations: &mut InvalidFields) -> Option<Quota> {
    let in_range = (1..=MAX_QUOTA).contains(&quota.limit);
    violations.add_if(!in_range, format_args!("{field}.limit"), format!("must be 1 to {MAX_QUOTA}"));
    let period = match pb::QuotaPeriod::try_from(quota.period) {
        Ok(pb::QuotaPeriod::Hour) => QuotaPeriod::Hour,
        Ok(pb::QuotaPeriod::Day) => QuotaPeriod::Day,
        Ok(pb::QuotaPeriod::Month) => QuotaPeriod::Month,
        Ok(pb::QuotaPeriod::Total) => QuotaPeriod::Total,
        Ok(pb::QuotaPeriod::Unspecified) | Err(_) => {
            let periods =
                "must be QUOTA_PERIOD_HOUR, QUOTA_PERIOD_DAY, QUOTA_PERIOD_MONTH or QUOTA_PERIOD_TOTAL";
            violations.add(format!("{field}.period"), periods);
            return None;
        }
    };
    Some(Quota { limit: quota.limit, period })
}

/// Reads the maximum lifetime of an account's keys.
pub(super) fn read_max_lifetime(
    field: &str,
    lifetime: Option<PbDuration>,
    violations: &mut InvalidFields,
) -> Option<Duration> {
    let lifetime = read_duration(field, lifetime, violations)?;
    violations.add_if(
        !(MIN_KEY_LIFETIME..=MAX_TTL).contains(&lifetime),
        field,
        "must be one day to 100 years",
    );
    Some(lifetime)
}

/// Parses a network; a single address is a network of one.
fn parse_network(text: &str) -> Result<IpNet, NameError> {
    const RULE: NameError = NameError("must be a network such as 10.0.0.0/8 or 2001:db8::/32, or an address");
    let net = text.parse::<IpNet>().or_else(|_| text.parse::<IpAddr>().map(IpNet::from)).map_err(|_| RULE)?;
    match net {
        IpNet::V6(v6) if v6.network().to_ipv4_mapped().is_some() && v6.prefix_len() >= 96 => {
            Err(NameError("must be written as IPv4: IPv4-mapped IPv6 addresses count as IPv4"))
        }
        net => Ok(net.trunc()),
    }
}

/// Reads an optional client address.
pub(super) fn read_client_ip(
    field: impl Display,
    text: Option<&str>,
    violations: &mut InvalidFields,
) -> Option<IpAddr> {
    let parsed = text?.parse::<IpAddr>().map_err(|_| "must be an IPv4 or IPv6 address");
    violations.ok_or_add(field, parsed)
}

/// Reads the states of a filter.
pub(super) fn read_states(states: &[i32], violations: &mut InvalidFields) -> Vec<ApiKeyState> {
    let mut read = Vec::new();
    for (at, state) in states.iter().enumerate() {
        match pb::KeyState::try_from(*state) {
            Ok(pb::KeyState::Active) => read.push(ApiKeyState::Active),
            Ok(pb::KeyState::Disabled) => read.push(ApiKeyState::Disabled),
            Ok(pb::KeyState::Expired) => read.push(ApiKeyState::Expired),
            Ok(pb::KeyState::Revoked) => read.push(ApiKeyState::Revoked),
            Ok(pb::KeyState::Unspecified) | Err(_) => violations.add(
                format!("states[{at}]"),
                "must be KEY_STATE_ACTIVE, KEY_STATE_DISABLED, KEY_STATE_EXPIRED or KEY_STATE_REVOKED",
            ),
        }
    }
    read
}

/// Reads the reason of a revocation.
pub(super) fn read_revoke_reason(reason: i32, violations: &mut InvalidFields) -> RevokeReason {
    match pb::RevokeReason::try_from(reason) {
        Ok(pb::RevokeReason::Unspecified) => RevokeReason::Unspecified,
        Ok(pb::RevokeReason::Compromised) => RevokeReason::Compromised,
        Ok(pb::RevokeReason::Superseded) => RevokeReason::Superseded,
        Ok(pb::RevokeReason::NoLongerNeeded) => RevokeReason::NoLongerNeeded,
        Ok(pb::RevokeReason::OwnerLeft) => RevokeReason::OwnerLeft,
        Err(_) => {
            violations.add("reason", "is not a RevokeReason");
            RevokeReason::Unspecified
        }
    }
}

fn revoke_reason_to_proto(reason: RevokeReason) -> pb::RevokeReason {
    match reason {
        RevokeReason::Unspecified => pb::RevokeReason::Unspecified,
        RevokeReason::Compromised => pb::RevokeReason::Compromised,
        RevokeReason::Superseded => pb::RevokeReason::Superseded,
        RevokeReason::NoLongerNeeded => pb::RevokeReason::NoLongerNeeded,
        RevokeReason::OwnerLeft => pb::RevokeReason::OwnerLeft,
    }
}

fn key_state_to_proto(state: ApiKeyState) -> pb::KeyState {
    match state {
        ApiKeyState::Active => pb::KeyState::Active,
        ApiKeyState::Disabled => pb::KeyState::Disabled,
        ApiKeyState::Expired => pb::KeyState::Expired,
        ApiKeyState::Revoked => pb::KeyState::Revoked,
    }
}

fn rate_limit_to_proto(RateLimit { name, limit, window }: RateLimit) -> pb::RateLimit {
    pb::RateLimit { name, limit, window: Some(duration_to_proto(window)) }
}

fn quota_to_proto(Quota { limit, period }: &Quota) -> pb::Quota {
    let period = match period {
        QuotaPeriod::Hour => pb::QuotaPeriod::Hour,
        QuotaPeriod::Day => pb::QuotaPeriod::Day,
        QuotaPeriod::Month => pb::QuotaPeriod::Month,
        QuotaPeriod::Total => pb::QuotaPeriod::Total,
    };
    pb::Quota { limit: *limit, period: period.into() }
}

pub(super) fn to_strings<T: ToString>(list: impl IntoIterator<Item = T>) -> Vec<String> {
    list.into_iter().map(|item| item.to_string()).collect()
}

/// The protobuf number of a reason.
#[must_use]
pub(super) fn reason_to_proto(reason: Reason) -> i32 {
    // Domain and protobuf use the same numbers, which a test checks.
    i32::from(reason as u8)
}

/// Converts a key with its state, its usage, and the secrets that still work.
#[must_use]
pub(super) fn key_to_proto(details: KeyDetails) -> pb::Key {
    let KeyDetails { key, last_used, as_of: now, effect: _ } = details;
    let key_state = key.state(now);
    let used =
        |version| last_used.iter().find(|(of, _)| *of == version).map(|(_, at)| timestamp_to_proto(*at));
    let living = key.secrets.iter().filter(|secret| !secret.is_superseded(now));
    let secrets = living.map(|secret| pb::Secret {
        version: secret.version,
        hint: secret.hint.clone(),
        created_at: Some(timestamp_to_proto(secret.created_at)),
        expires_at: secret.expires_at.map(timestamp_to_proto),
        last_used_at: used(secret.version),
    });
    let spec = &key.spec;
    pb::Key {
        secrets: secrets.collect(),
        id: key.id.to_string(),
        account: key.owner.account().map(ToString::to_string).unwrap_or_default(),
        user: key.owner.user().map(ToString::to_string).unwrap_or_default(),
        environment: key.environment.to_string(),
        name: spec.name.as_ref().map(ToString::to_string).unwrap_or_default(),
        hint: key.newest_hint().to_owned(),
        scopes: to_strings(&spec.scopes),
        roles: to_strings(&spec.roles),
        customers: to_strings(&spec.customers),
        allowed_cidrs: to_strings(&spec.allowed_cidrs),
        rate_limits: spec.rate_limits.iter().cloned().map(rate_limit_to_proto).collect(),
        quota: spec.quota.as_ref().map(quota_to_proto),
        metadata: spec.metadata.clone(),
        state: key_state_to_proto(key_state).into(),
        created_at: Some(timestamp_to_proto(key.created_at)),
        created_by: key.created_by,
        updated_at: Some(timestamp_to_proto(key.updated_at)),
        expires_at: spec.expires_at.map(timestamp_to_proto),
        last_used_at: last_used.iter().map(|(_, at)| *at).max().map(timestamp_to_proto),
        revoked_at: key.revocation.as_ref().map(|revocation| timestamp_to_proto(revocation.at)),
        revoke_reason: key
            .revocation
            .as_ref()
            .map_or(pb::RevokeReason::Unspecified, |revocation| revoke_reason_to_proto(revocation.reason))
            .into(),
        revision: key.revision.0,
        revoke_comment: key.revocation.map(|revocation| revocation.comment).unwrap_or_default(),
    }
}

#[must_use]
pub(super) fn account_to_proto(account: &Account) -> pb::Account {
    let Account { id, name, suspended_at, longest_life, created_at, updated_at, revision } = account;
    pb::Account {
        id: id.to_string(),
        name: name.to_string(),
        suspended: suspended_at.is_some(),
        created_at: Some(timestamp_to_proto(*created_at)),
        updated_at: Some(timestamp_to_proto(*updated_at)),
        revision: revision.0,
        longest_life: longest_life.map(duration_to_proto),
    }
}

#[must_use]
pub(super) fn propagation_to_proto(report: PropagationReport) -> pb::Propagation {
    let PropagationReport { revision: _, complete, confirmed, unconfirmed, complete_by, sync_replicated } =
        report;
    let unconfirmed = unconfirmed.into_iter().map(|LaggingReplica { replica, last_seen, lease_ends_by }| {
        pb::UnconfirmedReplica {
            replica,
            last_seen: Some(timestamp_to_proto(last_seen)),
            lease_ends_by: lease_ends_by.map(timestamp_to_proto),
        }
    });
    pb::Propagation {
        complete,
        confirmed,
        unconfirmed: unconfirmed.collect(),
        complete_by: complete_by.map(timestamp_to_proto),
        sync_replicated,
    }
}

#[must_use]
pub(super) fn read_revision(revision: Option<u64>) -> Option<Revision> {
    revision.map(Revision)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_wire_and_the_domain_number_reasons_alike() {
        for domain in Reason::ALL {
            let wire = pb::Reason::try_from(reason_to_proto(domain)).unwrap();
            assert_eq!(wire.as_str_name().to_lowercase(), format!("reason_{}", domain.as_str()));
        }
    }

    #[test]
    fn networks_are_read_in_their_shortest_form() {
        let read = |text| parse_network(text).map(|net| net.to_string());
        assert_eq!(read("10.1.2.3/8").as_deref(), Ok("10.0.0.0/8"));
        assert_eq!(read("10.1.2.3").as_deref(), Ok("10.1.2.3/32"));
        assert_eq!(read("2001:db8::1/32").as_deref(), Ok("2001:db8::/32"));
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "::ffff:10.0.0.0/104", "example.org"] {
            assert!(parse_network(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn instants_read_back(micros in -62_135_596_800_000_000i64..=253_402_300_799_999_999) {
            let at = Timestamp::from_micros(micros);
            let mut violations = InvalidFields::default();
            prop_assert_eq!(read_timestamp("f", Some(timestamp_to_proto(at)), &mut violations), Some(at));
        }

        #[test]
        fn no_instant_or_duration_makes_the_reader_panic(seconds: i64, nanos: i32) {
            let mut violations = InvalidFields::default();
            let _ = read_timestamp("f", Some(PbTimestamp { seconds, nanos }), &mut violations);
            let _ = read_duration("f", Some(PbDuration { seconds, nanos }), &mut violations);
        }
    }
}
