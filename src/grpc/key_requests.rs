//! Validates the requests of KeyService and converts them to the inputs of the use cases.
//!
//! Every violation of a request is collected first. Conversion of single fields belongs in `convert.rs`.

use std::collections::BTreeMap;

use prost::Message;
use sha2::{Digest as _, Sha256};

use crate::{
    caller::Caller,
    domain::{
        key::ApiKeyState,
        name::{AccountId, IdempotencyKey, KeyId, TokenPrefix, UserId},
        text,
        time::Timestamp,
        token::{MAX_ENTROPY_BITS, MAX_TOKEN_LEN, MIN_ENTROPY_BITS, TokenDigest},
    },
    keys::{
        KeyField, KeyOperations, KeyPatch, NewKey, ReplayKey, RequestedOwner,
        bulk::{BulkRevocation, KeyImport},
    },
    pb,
    service_error::{InvalidFields, ResourceKind, ServiceError},
    store::{KeyFilter, OwnerFilter, UsageHour},
};

use super::{convert, page_token};

const MAX_IMPORT_ROWS: usize = 1000;
const MAX_HINT_LEN: usize = 32;
const SECONDS_PER_HOUR: u64 = 60 * 60;
const MAX_STEP_HOURS: u64 = 90 * 24;

/// Reads the idempotency key, with a digest of the whole request.
pub(super) fn read_idempotency(
    method: &str,
    key: Option<&str>,
    request: &impl Message,
    violations: &mut InvalidFields,
) -> Option<ReplayKey> {
    let key = violations.ok_or_add("idempotency_key", IdempotencyKey::parse(key?))?;
    let mut sha = Sha256::new();
    sha.update(method);
    sha.update([0]);
    sha.update(request.encode_to_vec());
    Some(ReplayKey { idempotency_key: key, fingerprint: sha.finalize().into() })
}

/// Reads the idempotency key of a Create, if it is valid.
pub(super) fn read_create_idempotency(caller: &Caller, request: &pb::CreateKeyRequest) -> Option<ReplayKey> {
    read_idempotency(
        caller.method,
        request.idempotency_key.as_deref(),
        request,
        &mut InvalidFields::default(),
    )
}

/// Unwraps a field that validation has filled. If it is missing, a violation was recorded before.
pub(super) fn require_read<T>(value: Option<T>) -> Result<T, ServiceError> {
    value.ok_or_else(|| ServiceError::invalid_field("(message)", "could not be read"))
}

/// Reads the owner: an account, a user, or unspecified if an account's caller names neither.
fn read_owner(caller: &Caller, account: &str, user: &str, violations: &mut InvalidFields) -> RequestedOwner {
    let both = !account.is_empty() && !user.is_empty();
    violations.add_if(both, "user", "must not be given together with account");
    let unowned = account.is_empty() && user.is_empty() && caller.is_operator();
    violations.add_if(unowned, "account", "or user is required from the operator account's callers");
    if !user.is_empty() {
        let user = violations.ok_or_add("user", UserId::parse(user));
        return user.map_or(RequestedOwner::Unspecified, RequestedOwner::User);
    }
    convert::read_account("account", account, violations)
        .map_or(RequestedOwner::Unspecified, RequestedOwner::Account)
}

/// The environment of a new key. A caller that is bound to an environment creates keys for it, and need not name it.
fn effective_environment<'a>(caller: &'a Caller, named: &'a str) -> &'a str {
    match caller.environment() {
        Some(own) if named.is_empty() && !caller.is_operator() => own.as_str(),
        _ => named,
    }
}

/// The fields that Create and Import share.
struct NewKeyFields<'a> {
    account: &'a str,
    user: &'a str,
    environment: &'a str,
    expires_at: Option<prost_types::Timestamp>,
    ttl: Option<prost_types::Duration>,
    spec: convert::KeySpecInput<'a>,
    prefix: Option<&'a str>,
}

impl NewKeyFields<'_> {
    fn read_new_key(
        mut self,
        keys: &KeyOperations,
        caller: &Caller,
        now: Timestamp,
        v: &mut InvalidFields,
    ) -> Option<NewKey> {
        let owner = read_owner(caller, self.account, self.user, v);
        let environment = convert::read_environment("environment", self.environment, keys.environments(), v);
        self.spec.expires_at = convert::read_expiry(self.expires_at, self.ttl, now, v);
        let ungranted = self.spec.scopes.is_empty() && self.spec.roles.is_empty();
        v.add_if(ungranted && !keys.has_default_role(), "scopes", "at least one scope or role is required");
        let spec = self.spec.read_spec(v);
        let prefix = self.prefix.and_then(|prefix| v.ok_or_add("prefix", TokenPrefix::parse(prefix)));
        Some(NewKey { owner, created_at: now, environment: environment?.clone(), spec, token_prefix: prefix })
    }
}

pub(super) fn read_create(
    keys: &KeyOperations,
    caller: &Caller,
    request: &pb::CreateKeyRequest,
) -> Result<(NewKey, Option<ReplayKey>), ServiceError> {
    let pb::CreateKeyRequest {
        account,
        user,
        environment,
        name,
        scopes,
        roles,
        expires_at,
        ttl,
        prefix,
        customers,
        allowed_cidrs,
        rate_limits,
        quota,
        metadata,
        idempotency_key,
    } = request;
    let common = NewKeyFields {
        account,
        user,
        environment: effective_environment(caller, environment),
        expires_at: *expires_at,
        ttl: *ttl,
        spec: convert::KeySpecInput {
            field_prefix: "",
            name: name.as_deref(),
            scopes,
            roles,
            customers,
            allowed_cidrs,
            rate_limits,
            quota: quota.as_ref(),
            metadata,
            expires_at: None,
        },
        prefix: prefix.as_deref(),
    };
    let mut violations = InvalidFields::default();
    let new = common.read_new_key(keys, caller, keys.now(), &mut violations);
    let replay_key = read_idempotency(caller.method, idempotency_key.as_deref(), request, &mut violations);
    violations.into_result()?;
    Ok((require_read(new)?, replay_key))
}

/// Reads the rows of an import. An invalid row fails alone.
pub(super) fn read_import(
    keys: &KeyOperations,
    caller: &Caller,
    request: pb::ImportKeysRequest,
) -> Result<Vec<Result<KeyImport, ServiceError>>, ServiceError> {
    let rows = request.keys;
    if !(1..=MAX_IMPORT_ROWS).contains(&rows.len()) {
        let problem = format!("has {} entries; 1 to {MAX_IMPORT_ROWS} are allowed", rows.len());
        return Err(ServiceError::invalid_field("keys", problem));
    }
    let now = keys.now();
    Ok(rows.iter().map(|row| read_import_row(keys, caller, row, now)).collect())
}

fn read_import_row(
    keys: &KeyOperations,
    caller: &Caller,
    row: &pb::ImportKey,
    now: Timestamp,
) -> Result<KeyImport, ServiceError> {
    let pb::ImportKey {
        account,
        user,
        environment,
        name,
        scopes,
        roles,
        expires_at,
        ttl,
        customers,
        allowed_cidrs,
        rate_limits,
        quota,
        metadata,
        sha256,
        hint,
        entropy_bits,
    } = row;
    let common = NewKeyFields {
        account,
        user,
        environment,
        expires_at: *expires_at,
        ttl: *ttl,
        spec: convert::KeySpecInput {
            field_prefix: "",
            name: name.as_deref(),
            scopes,
            roles,
            customers,
            allowed_cidrs,
            rate_limits,
            quota: quota.as_ref(),
            metadata,
            expires_at: None,
        },
        prefix: None,
    };
    let mut violations = InvalidFields::default();
    let key = common.read_new_key(keys, caller, now, &mut violations);
    let digest = <[u8; 32]>::try_from(sha256.as_slice()).ok().map(TokenDigest::from_bytes);
    violations.add_if(
        digest.is_none(),
        "sha256",
        format!("has {} bytes; the SHA-256 of the token has 32", sha256.len()),
    );
    let short = hint.len() <= MAX_HINT_LEN && hint.bytes().all(|b| (0x21..=0x7e).contains(&b));
    violations.add_if(!short, "hint", format!("must be at most {MAX_HINT_LEN} visible ASCII characters"));
    if let Some(bits) = entropy_bits {
        check_entropy_bits(*bits, &mut violations);
    }
    violations.into_result()?;
    Ok(KeyImport { key: require_read(key)?, digest: require_read(digest)?, hint: hint.clone() })
}

/// Refuses a token that is too weak, and an entropy that no token can have.
fn check_entropy_bits(bits: u32, violations: &mut InvalidFields) {
    violations.add_if(
        bits < MIN_ENTROPY_BITS,
        "entropy_bits",
        format!(
            "{bits} is too few: below {MIN_ENTROPY_BITS} bits, a reader of the database can guess the token; create a \
             new key instead"
        ),
    );
    violations.add_if(
        bits > MAX_ENTROPY_BITS,
        "entropy_bits",
        format!(
            "{bits} is more than a token of {MAX_TOKEN_LEN} characters can hold, which is {MAX_ENTROPY_BITS}"
        ),
    );
}

/// A page of a List.
pub(super) struct KeyPageRequest {
    pub(super) filters: Vec<u8>,
    pub(super) before: Option<KeyId>,
    pub(super) size: u32,
}

/// Reads the owners of a filter. What the caller may not see is NOT_FOUND.
fn read_owner_filter(caller: &Caller, owner: RequestedOwner) -> Result<OwnerFilter, ServiceError> {
    Ok(match owner {
        RequestedOwner::Account(account) => OwnerFilter::Account(caller.resolve_account(Some(account))?),
        RequestedOwner::Unspecified => OwnerFilter::Account(caller.resolve_account(None::<AccountId>)?),
        RequestedOwner::User(user) => {
            if !caller.can_see_owner(&crate::domain::key::KeyOwner::User(user.clone())) {
                return Err(ServiceError::NotFound(ResourceKind::Key));
            }
            OwnerFilter::User(user)
        }
    })
}

pub(super) fn read_list(
    keys: &KeyOperations,
    caller: &Caller,
    request: &pb::ListKeysRequest,
) -> Result<(KeyFilter, KeyPageRequest), ServiceError> {
    let mut violations = InvalidFields::default();
    let v = &mut violations;
    let unpaged = pb::ListKeysRequest { page_size: None, page_token: String::new(), ..request.clone() };
    let pb::ListKeysRequest {
        account,
        user,
        environment,
        states,
        name_prefix,
        unused_since,
        expires_before,
        page_size,
        page_token,
        created_before,
    } = request;
    let filters = unpaged.encode_to_vec();
    let size = page_token::read_page_size(*page_size, v);
    let before = page_token::decode(&filters, page_token, v).and_then(|cursor| read_key_cursor(&cursor, v));
    let owner = read_owner(caller, account, user, v);
    let environment = (!environment.is_empty())
        .then(|| convert::read_environment("environment", environment, keys.environments(), v))
        .flatten();
    let mut states = convert::read_states(states, v);
    convert::check_no_controls("name_prefix", name_prefix, v);
    let unused_since = convert::read_timestamp("unused_since", *unused_since, v);
    let expires_before = convert::read_timestamp("expires_before", *expires_before, v);
    let created_before = convert::read_timestamp("created_before", *created_before, v);
    violations.into_result()?;
    // These filters look for keys to revoke, so revoked ones are listed only if the request names that state.
    if states.is_empty() && (unused_since.is_some() || expires_before.is_some()) {
        states = ApiKeyState::UNREVOKED.to_vec();
    }
    let filter = KeyFilter {
        owner: read_owner_filter(caller, owner)?,
        environment: environment.map(|environment| environment.name.clone()),
        states,
        name_prefix: text::normalize_nfc(name_prefix).into_owned(),
        unused_since,
        expires_before,
        created_before,
        now: keys.now(),
    };
    Ok((filter, KeyPageRequest { filters, before, size }))
}

pub(super) fn read_bulk_revoke(
    keys: &KeyOperations,
    caller: &Caller,
    request: &pb::BulkRevokeKeysRequest,
) -> Result<BulkRevocation, ServiceError> {
    let mut violations = InvalidFields::default();
    let v = &mut violations;
    let pb::BulkRevokeKeysRequest {
        account,
        user,
        all_accounts,
        environment,
        created_before,
        name_prefix,
        dry_run,
        reason,
        comment,
    } = request;
    let named = usize::from(!account.is_empty()) + usize::from(!user.is_empty()) + usize::from(*all_accounts);
    v.add_if(named != 1, "account", "exactly one of account, user and all_accounts is required");
    let account = convert::read_account("account", account, v);
    let user = (!user.is_empty()).then(|| v.ok_or_add("user", UserId::parse(user))).flatten();
    let environment = (!environment.is_empty())
        .then(|| convert::read_environment("environment", environment, keys.environments(), v))
        .flatten();
    let created_before = convert::read_timestamp("created_before", *created_before, v);
    convert::check_no_controls("name_prefix", name_prefix, v);
    let reason = convert::read_revoke_reason(*reason, v);
    convert::check_comment(comment, v);
    violations.into_result()?;
    let owner = match (account, user) {
        _ if *all_accounts => OwnerFilter::ExceptOperator,
        (Some(account), _) => read_owner_filter(caller, RequestedOwner::Account(account))?,
        (None, Some(user)) => read_owner_filter(caller, RequestedOwner::User(user))?,
        (None, None) => return Err(ServiceError::invalid_field("account", "is required")),
    };
    let filter = KeyFilter {
        owner,
        environment: environment.map(|environment| environment.name.clone()),
        states: ApiKeyState::UNREVOKED.to_vec(),
        name_prefix: text::normalize_nfc(name_prefix).into_owned(),
        unused_since: None,
        expires_before: None,
        created_before,
        now: keys.now(),
    };
    Ok(BulkRevocation { filter, dry_run: *dry_run, reason, comment: comment.clone() })
}

pub(super) fn read_usage(
    keys: &KeyOperations,
    request: &pb::KeyUsageRequest,
) -> Result<(KeyId, UsageHour, UsageHour, u32), ServiceError> {
    let mut violations = InvalidFields::default();
    let v = &mut violations;
    let pb::KeyUsageRequest { id, from, to, step } = request;
    let id = convert::read_key_id("id", id, v);
    let to = UsageHour::from_timestamp(convert::read_timestamp("to", *to, v).unwrap_or_else(|| keys.now()));
    let from =
        convert::read_timestamp("from", *from, v).map_or(UsageHour(to.0 - 23), UsageHour::from_timestamp);
    v.add_if(from > to, "from", "must not be later than to");
    let step = convert::read_duration("step", *step, v).map_or(SECONDS_PER_HOUR, |step| step.as_secs());
    let hours = step / SECONDS_PER_HOUR;
    let good = step.is_multiple_of(SECONDS_PER_HOUR) && (1..=MAX_STEP_HOURS).contains(&hours);
    v.add_if(!good, "step", "must be full hours, one hour to 90 days");
    violations.into_result()?;
    Ok((require_read(id)?, from, UsageHour(to.0 + 1), u32::try_from(hours).unwrap_or(1)))
}

pub(super) fn read_update(
    keys: &KeyOperations,
    request: &pb::UpdateKeyRequest,
) -> Result<(KeyId, KeyPatch), ServiceError> {
    let mut violations = InvalidFields::default();
    let v = &mut violations;
    let pb::UpdateKeyRequest { key, update_mask } = request;
    let Some(key) = key else { return Err(ServiceError::invalid_field("key", "is required")) };
    let paths = update_mask.as_ref().map(|mask| mask.paths.as_slice()).unwrap_or_default();
    v.add_if(paths.is_empty(), "update_mask", "must name at least one field");
    let fields = read_update_mask(paths, v);
    let id = convert::read_key_id("key.id", &key.id, v);
    let has = |field| fields.contains(&field);
    let expires_at = has(KeyField::ExpiresAt).then(|| {
        let at = convert::read_timestamp("key.expires_at", key.expires_at, v);
        v.add_if(at.is_some_and(|at| at <= keys.now()), "key.expires_at", "must be in the future");
        at
    });
    let nothing = BTreeMap::new();
    fn if_masked<T>(has: bool, list: &[T]) -> &[T] {
        if has { list } else { &[] }
    }
    let raw = convert::KeySpecInput {
        field_prefix: "key.",
        name: Some(key.name.as_str()).filter(|name| has(KeyField::Name) && !name.is_empty()),
        scopes: if_masked(has(KeyField::Scopes), &key.scopes),
        roles: if_masked(has(KeyField::Roles), &key.roles),
        customers: if_masked(has(KeyField::Customers), &key.customers),
        allowed_cidrs: if_masked(has(KeyField::AllowedCidrs), &key.allowed_cidrs),
        rate_limits: if_masked(has(KeyField::RateLimits), &key.rate_limits),
        quota: key.quota.as_ref().filter(|_| has(KeyField::Quota)),
        metadata: if has(KeyField::Metadata) { &key.metadata } else { &nothing },
        expires_at: expires_at.flatten(),
    };
    let spec = raw.read_spec(v);
    violations.into_result()?;
    Ok((require_read(id)?, KeyPatch { fields, new_spec: spec }))
}

fn read_key_cursor(cursor: &[u8], violations: &mut InvalidFields) -> Option<KeyId> {
    let id = cursor.try_into().ok().map(KeyId::from_bytes);
    if id.is_none() {
        page_token::reject_token(violations);
    }
    id
}

fn read_update_mask(paths: &[String], violations: &mut InvalidFields) -> Vec<KeyField> {
    let mut fields = Vec::new();
    for (at, path) in paths.iter().enumerate() {
        match KeyField::from_path(path) {
            Some(field) => fields.push(field),
            // The value is not echoed: it could be a token in the wrong field.
            None => violations.add(
                format!("update_mask.paths[{at}]"),
                "cannot be changed; name, scopes, roles, expires_at, customers, allowed_cidrs, rate_limits, quota \
                 and metadata can",
            ),
        }
    }
    fields
}
