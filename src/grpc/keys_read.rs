//! KeyService's requests, read into what the use cases take. Every violation of a request is collected first.

use std::collections::BTreeMap;

use prost::Message;
use sha2::{Digest as _, Sha256};

use crate::{
    access::Caller,
    domain::{
        key::State,
        name::{AccountId, IdempotencyKey, KeyId, TokenPrefix, UserId},
        text,
        time::Timestamp,
        token::{Digest, MAX_ENTROPY_BITS, MAX_LEN, MIN_ENTROPY_BITS},
    },
    keys::{
        Field, Keys, NewKey, Once, OwnerNamed, Patch,
        bulk::{BulkRevoke, ImportedKey},
    },
    pb,
    refusal::{Refusal, Thing, Violations},
    store::{Hour, KeyFilter, OwnerFilter},
};

use super::{convert, page};

const MAX_IMPORT: usize = 1000;
const MAX_HINT: usize = 32;
const HOUR: u64 = 60 * 60;
const MAX_STEP_HOURS: u64 = 90 * 24;

/// The request's name for itself, with a digest of all that it asks.
pub(super) fn read_once(
    method: &str,
    key: Option<&str>,
    request: &impl Message,
    violations: &mut Violations,
) -> Option<Once> {
    let key = violations.take("idempotency_key", IdempotencyKey::parse(key?))?;
    let mut sha = Sha256::new();
    sha.update(method);
    sha.update([0]);
    sha.update(request.encode_to_vec());
    Some(Once { key, fingerprint: sha.finalize().into() })
}

/// The name that a Create has for itself, if it is well-formed.
pub(super) fn read_once_alone(caller: &Caller, request: &pb::CreateKeyRequest) -> Option<Once> {
    read_once(caller.method, request.idempotency_key.as_deref(), request, &mut Violations::default())
}

/// A field that every finished reading has filled; what is missing was noted as a violation.
pub(super) fn filled<T>(value: Option<T>) -> Result<T, Refusal> {
    value.ok_or_else(|| Refusal::field("(message)", "could not be read"))
}

/// Who is meant: an account, a user, or, by an account's caller, nobody in particular.
fn read_owner(caller: &Caller, account: &str, user: &str, violations: &mut Violations) -> OwnerNamed {
    let both = !account.is_empty() && !user.is_empty();
    violations.note_if(both, "user", "must not be given together with account");
    let unowned = account.is_empty() && user.is_empty() && caller.is_operator();
    violations.note_if(unowned, "account", "or user is required from the operator account's callers");
    if !user.is_empty() {
        let user = violations.take("user", UserId::parse(user));
        return user.map_or(OwnerNamed::Nobody, OwnerNamed::User);
    }
    convert::read_account("account", account, violations).map_or(OwnerNamed::Nobody, OwnerNamed::Account)
}

/// Where a new key is to work: an account's caller that is bound to an environment makes keys of that alone, and need
/// not say so.
fn environment_meant<'a>(caller: &'a Caller, named: &'a str) -> &'a str {
    match caller.environment() {
        Some(own) if named.is_empty() && !caller.is_operator() => own.as_str(),
        _ => named,
    }
}

/// The fields that Create and Import have in common.
struct Common<'a> {
    account: &'a str,
    user: &'a str,
    environment: &'a str,
    expires_at: Option<prost_types::Timestamp>,
    ttl: Option<prost_types::Duration>,
    terms: convert::RawTerms<'a>,
    prefix: Option<&'a str>,
}

impl Common<'_> {
    fn read(mut self, keys: &Keys, caller: &Caller, now: Timestamp, v: &mut Violations) -> Option<NewKey> {
        let owner = read_owner(caller, self.account, self.user, v);
        let environment = convert::read_environment("environment", self.environment, keys.environments(), v);
        self.terms.expires_at = convert::read_expiry(self.expires_at, self.ttl, now, v);
        let ungranted = self.terms.scopes.is_empty() && self.terms.roles.is_empty();
        v.note_if(ungranted && !keys.has_default_role(), "scopes", "at least one scope or role is required");
        let terms = self.terms.read(v);
        let prefix = self.prefix.and_then(|prefix| v.take("prefix", TokenPrefix::parse(prefix)));
        Some(NewKey { owner, now, environment: environment?.clone(), terms, prefix })
    }
}

pub(super) fn read_create(
    keys: &Keys,
    caller: &Caller,
    request: &pb::CreateKeyRequest,
) -> Result<(NewKey, Option<Once>), Refusal> {
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
    let common = Common {
        account,
        user,
        environment: environment_meant(caller, environment),
        expires_at: *expires_at,
        ttl: *ttl,
        terms: convert::RawTerms {
            prefix: "",
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
    let mut violations = Violations::default();
    let new = common.read(keys, caller, keys.now(), &mut violations);
    let once = read_once(caller.method, idempotency_key.as_deref(), request, &mut violations);
    violations.finish()?;
    Ok((filled(new)?, once))
}

/// Reads the rows of an import: a wrong row has its own result and stops no other.
pub(super) fn read_import(
    keys: &Keys,
    caller: &Caller,
    request: pb::ImportKeysRequest,
) -> Result<Vec<Result<ImportedKey, Refusal>>, Refusal> {
    let rows = request.keys;
    if !(1..=MAX_IMPORT).contains(&rows.len()) {
        let problem = format!("has {} entries; 1 to {MAX_IMPORT} are allowed", rows.len());
        return Err(Refusal::field("keys", problem));
    }
    let now = keys.now();
    Ok(rows.iter().map(|row| read_import_row(keys, caller, row, now)).collect())
}

fn read_import_row(
    keys: &Keys,
    caller: &Caller,
    row: &pb::ImportKey,
    now: Timestamp,
) -> Result<ImportedKey, Refusal> {
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
    let common = Common {
        account,
        user,
        environment,
        expires_at: *expires_at,
        ttl: *ttl,
        terms: convert::RawTerms {
            prefix: "",
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
    let mut violations = Violations::default();
    let key = common.read(keys, caller, now, &mut violations);
    let digest = <[u8; 32]>::try_from(sha256.as_slice()).ok().map(Digest::from_bytes);
    violations.note_if(
        digest.is_none(),
        "sha256",
        format!("has {} bytes; the SHA-256 of the token has 32", sha256.len()),
    );
    let short = hint.len() <= MAX_HINT && hint.bytes().all(|b| (0x21..=0x7e).contains(&b));
    violations.note_if(!short, "hint", format!("must be at most {MAX_HINT} visible ASCII characters"));
    if let Some(bits) = entropy_bits {
        check_entropy(*bits, &mut violations);
    }
    violations.finish()?;
    Ok(ImportedKey { key: filled(key)?, digest: filled(digest)?, hint: hint.clone() })
}

/// Refuses a token that is too weak, and a strength that no token has.
fn check_entropy(bits: u32, violations: &mut Violations) {
    violations.note_if(
        bits < MIN_ENTROPY_BITS,
        "entropy_bits",
        format!(
            "{bits} is too few: with less than {MIN_ENTROPY_BITS} bits, a reader of the database can find the token; \
             create a new key in its place"
        ),
    );
    violations.note_if(
        bits > MAX_ENTROPY_BITS,
        "entropy_bits",
        format!("{bits} is more than a token of {MAX_LEN} characters can hold, which is {MAX_ENTROPY_BITS}"),
    );
}

/// A page that was asked for.
pub(super) struct Page {
    pub(super) filters: Vec<u8>,
    pub(super) before: Option<KeyId>,
    pub(super) size: u32,
}

/// Whose keys are meant; what does not exist for the caller is NOT_FOUND.
fn owner_filter(caller: &Caller, owner: OwnerNamed) -> Result<OwnerFilter, Refusal> {
    Ok(match owner {
        OwnerNamed::Account(account) => OwnerFilter::Account(caller.account_meant(Some(account))?),
        OwnerNamed::Nobody => OwnerFilter::Account(caller.account_meant(None::<AccountId>)?),
        OwnerNamed::User(user) => {
            if !caller.sees(&crate::domain::key::Owner::User(user.clone())) {
                return Err(Refusal::NotFound(Thing::Key));
            }
            OwnerFilter::User(user)
        }
    })
}

pub(super) fn read_filter(
    keys: &Keys,
    caller: &Caller,
    request: &pb::ListKeysRequest,
) -> Result<(KeyFilter, Page), Refusal> {
    let mut violations = Violations::default();
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
    let size = page::size(*page_size, v);
    let before = page::decode(&filters, page_token, v).and_then(|cursor| read_cursor(&cursor, v));
    let owner = read_owner(caller, account, user, v);
    let environment = (!environment.is_empty())
        .then(|| convert::read_environment("environment", environment, keys.environments(), v))
        .flatten();
    let mut states = convert::read_states(states, v);
    convert::note_controls("name_prefix", name_prefix, v);
    let unused_since = convert::read_timestamp("unused_since", *unused_since, v);
    let expires_before = convert::read_timestamp("expires_before", *expires_before, v);
    let created_before = convert::read_timestamp("created_before", *created_before, v);
    violations.finish()?;
    // These two look for keys to revoke: one that is revoked is listed only if a request names the state.
    if states.is_empty() && (unused_since.is_some() || expires_before.is_some()) {
        states = State::NOT_REVOKED.to_vec();
    }
    let filter = KeyFilter {
        owner: owner_filter(caller, owner)?,
        environment: environment.map(|environment| environment.name.clone()),
        states,
        name_prefix: text::normalize(name_prefix).into_owned(),
        unused_since,
        expires_before,
        created_before,
        now: keys.now(),
    };
    Ok((filter, Page { filters, before, size }))
}

pub(super) fn read_bulk(
    keys: &Keys,
    caller: &Caller,
    request: &pb::BulkRevokeKeysRequest,
) -> Result<BulkRevoke, Refusal> {
    let mut violations = Violations::default();
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
    v.note_if(named != 1, "account", "exactly one of account, user and all_accounts is required");
    let account = convert::read_account("account", account, v);
    let user = (!user.is_empty()).then(|| v.take("user", UserId::parse(user))).flatten();
    let environment = (!environment.is_empty())
        .then(|| convert::read_environment("environment", environment, keys.environments(), v))
        .flatten();
    let created_before = convert::read_timestamp("created_before", *created_before, v);
    convert::note_controls("name_prefix", name_prefix, v);
    let reason = convert::read_revoke_reason(*reason, v);
    convert::check_comment(comment, v);
    violations.finish()?;
    let owner = match (account, user) {
        _ if *all_accounts => OwnerFilter::AllButOperators,
        (Some(account), _) => owner_filter(caller, OwnerNamed::Account(account))?,
        (None, Some(user)) => owner_filter(caller, OwnerNamed::User(user))?,
        (None, None) => return Err(Refusal::field("account", "is required")),
    };
    let filter = KeyFilter {
        owner,
        environment: environment.map(|environment| environment.name.clone()),
        states: State::NOT_REVOKED.to_vec(),
        name_prefix: text::normalize(name_prefix).into_owned(),
        unused_since: None,
        expires_before: None,
        created_before,
        now: keys.now(),
    };
    Ok(BulkRevoke { filter, dry_run: *dry_run, reason, comment: comment.clone() })
}

pub(super) fn read_usage(
    keys: &Keys,
    request: &pb::KeyUsageRequest,
) -> Result<(KeyId, Hour, Hour, u32), Refusal> {
    let mut violations = Violations::default();
    let v = &mut violations;
    let pb::KeyUsageRequest { id, from, to, step } = request;
    let id = convert::read_key_id("id", id, v);
    let to = Hour::of(convert::read_timestamp("to", *to, v).unwrap_or_else(|| keys.now()));
    let from = convert::read_timestamp("from", *from, v).map_or(Hour(to.0 - 23), Hour::of);
    v.note_if(from > to, "from", "must not be later than to");
    let step = convert::read_duration("step", *step, v).map_or(HOUR, |step| step.as_secs());
    let hours = step / HOUR;
    let good = step.is_multiple_of(HOUR) && (1..=MAX_STEP_HOURS).contains(&hours);
    v.note_if(!good, "step", "must be full hours, one hour to 90 days");
    violations.finish()?;
    Ok((filled(id)?, from, Hour(to.0 + 1), u32::try_from(hours).unwrap_or(1)))
}

pub(super) fn read_update(keys: &Keys, request: &pb::UpdateKeyRequest) -> Result<(KeyId, Patch), Refusal> {
    let mut violations = Violations::default();
    let v = &mut violations;
    let pb::UpdateKeyRequest { key, update_mask } = request;
    let Some(key) = key else { return Err(Refusal::field("key", "is required")) };
    let paths = update_mask.as_ref().map(|mask| mask.paths.as_slice()).unwrap_or_default();
    v.note_if(paths.is_empty(), "update_mask", "must name at least one field");
    let fields = read_fields(paths, v);
    let id = convert::read_key_id("key.id", &key.id, v);
    let has = |field| fields.contains(&field);
    let expires_at = has(Field::ExpiresAt).then(|| {
        let at = convert::read_timestamp("key.expires_at", key.expires_at, v);
        v.note_if(at.is_some_and(|at| at <= keys.now()), "key.expires_at", "must be in the future");
        at
    });
    let nothing = BTreeMap::new();
    fn given<T>(has: bool, list: &[T]) -> &[T] {
        if has { list } else { &[] }
    }
    let raw = convert::RawTerms {
        prefix: "key.",
        name: Some(key.name.as_str()).filter(|name| has(Field::Name) && !name.is_empty()),
        scopes: given(has(Field::Scopes), &key.scopes),
        roles: given(has(Field::Roles), &key.roles),
        customers: given(has(Field::Customers), &key.customers),
        allowed_cidrs: given(has(Field::AllowedCidrs), &key.allowed_cidrs),
        rate_limits: given(has(Field::RateLimits), &key.rate_limits),
        quota: key.quota.as_ref().filter(|_| has(Field::Quota)),
        metadata: if has(Field::Metadata) { &key.metadata } else { &nothing },
        expires_at: expires_at.flatten(),
    };
    let terms = raw.read(v);
    violations.finish()?;
    Ok((filled(id)?, Patch { fields, terms }))
}

fn read_cursor(cursor: &[u8], violations: &mut Violations) -> Option<KeyId> {
    let id = cursor.try_into().ok().map(KeyId::from_bytes);
    if id.is_none() {
        page::not_ours(violations);
    }
    id
}

fn read_fields(paths: &[String], violations: &mut Violations) -> Vec<Field> {
    let mut fields = Vec::new();
    for (at, path) in paths.iter().enumerate() {
        match Field::parse(path) {
            Some(field) => fields.push(field),
            // The value is not repeated: it could be a token, put in the wrong place.
            None => violations.note(
                format!("update_mask.paths[{at}]"),
                "cannot be changed; name, scopes, roles, expires_at, customers, allowed_cidrs, rate_limits, quota \
                 and metadata can",
            ),
        }
    }
    fields
}
