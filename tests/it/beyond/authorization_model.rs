//! A naive model of who may change what: it replays the log in the order of its revisions and judges each change in the
//! state right before it. It knows nothing of patterns, prefixes or indexes: it lists the concrete scopes, addresses and
//! customers of a small world and asks whether any is gained.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use keyward::{
    domain::{
        account::{Account, AccountMember, Role},
        key::{ApiKey, KeyOwner, KeySpec, QuotaPeriod},
        log::RecordChange,
        time::Timestamp,
    },
    pb,
};

/// Every concrete scope of the model's world.
const WORLD: [&str; 15] = [
    "a",
    "a:x",
    "a:other",
    "b",
    "b:x",
    "b:other",
    "other",
    "other:x",
    "keyward:check",
    "keyward:keys:read",
    "keyward:keys:write",
    "keyward:accounts:read",
    "keyward:accounts:write",
    "keyward:audit:read",
    "keyward:other",
];

type ConcreteScopes = BTreeSet<&'static str>;

/// The concrete scopes that grants reach.
fn concrete_scopes<'a>(grants: impl IntoIterator<Item = &'a str>) -> ConcreteScopes {
    let reaches = |grant: &str, scope: &str| match grant {
        "*" => !scope.starts_with("keyward"),
        grant => match grant.strip_suffix('*') {
            Some(start) => scope.starts_with(start),
            None => scope == grant,
        },
    };
    grants
        .into_iter()
        .flat_map(|grant| WORLD.into_iter().filter(move |scope| reaches(grant, scope)))
        .collect()
}

fn is_reserved(scope: &str) -> bool {
    scope.starts_with("keyward")
}

/// A change as the log tells of it.
pub(super) struct LoggedChange {
    pub(super) audit_entry: pb::AuditEntry,
    pub(super) change: RecordChange,
}

impl LoggedChange {
    pub(super) fn read(told: pb::AuditEntry) -> LoggedChange {
        let change = serde_json::from_str(&told.payload).unwrap();
        LoggedChange { audit_entry: told, change }
    }
}

/// Everything that is recorded, as of some revision.
#[derive(Default)]
pub(super) struct AuthorizationModel {
    keys: BTreeMap<String, Arc<ApiKey>>,
    accounts: BTreeMap<String, Arc<Account>>,
    /// A global role has no account.
    roles: BTreeMap<(Option<String>, String), Arc<Role>>,
    members: BTreeMap<(String, String), Arc<AccountMember>>,
}

/// What a change needs of its actor, and when.
struct ActingCaller<'a> {
    key: &'a ApiKey,
    operator: bool,
    account: &'a str,
    person: Option<&'a str>,
    holds: ConcreteScopes,
    at: Timestamp,
}

type ModelVerdict = Result<(), String>;

fn require(holds: bool, otherwise: impl Into<String>) -> ModelVerdict {
    if holds { Ok(()) } else { Err(otherwise.into()) }
}

impl AuthorizationModel {
    /// Judges a change in the state so far, and takes it in.
    pub(super) fn check_and_apply(&mut self, entry: &LoggedChange) -> ModelVerdict {
        let judged = self.check_change(entry);
        self.apply(&entry.change);
        judged
    }

    fn apply(&mut self, change: &RecordChange) {
        let role = |role: &Role| (role.account.as_ref().map(ToString::to_string), role.name.to_string());
        let member = |member: &AccountMember| (member.account.to_string(), member.user.to_string());
        match change {
            RecordChange::Key(key) => drop(self.keys.insert(key.id.to_string(), key.clone())),
            RecordChange::Account(account) => {
                drop(self.accounts.insert(account.id.to_string(), account.clone()))
            }
            RecordChange::Role(record) => drop(self.roles.insert(role(record), record.clone())),
            RecordChange::RoleDeleted(record) => drop(self.roles.remove(&role(record))),
            RecordChange::Member(record) => drop(self.members.insert(member(record), record.clone())),
            RecordChange::MemberRemoved(record) => drop(self.members.remove(&member(record))),
        }
    }

    /// What a role's name grants in an account.
    fn role(&self, account: Option<&str>, name: &str) -> Option<ConcreteScopes> {
        let place = |account: Option<&str>| (account.map(str::to_owned), name.to_owned());
        let own = account.and_then(|account| self.roles.get(&place(Some(account))));
        let role = own.or_else(|| self.roles.get(&place(None)))?;
        Some(concrete_scopes(role.scopes.iter().map(|scope| scope.as_str())))
    }

    fn member_holds(&self, account: &str, user: &str) -> Option<ConcreteScopes> {
        let member = self.members.get(&(account.to_owned(), user.to_owned()))?;
        Some(self.role(Some(account), member.role.as_str()).unwrap_or_default())
    }

    /// What terms grant to a key of this owner.
    fn granted(&self, owner: &KeyOwner, terms: &KeySpec) -> ConcreteScopes {
        let mut granted = concrete_scopes(terms.scopes.iter().map(|scope| scope.as_str()));
        let account = owner.account().map(|account| account.as_str());
        for role in &terms.roles {
            granted.extend(self.role(account, role.as_str()).unwrap_or_default());
        }
        granted
    }

    fn check_change(&self, LoggedChange { audit_entry: told, change }: &LoggedChange) -> ModelVerdict {
        if told.actor == "system" {
            return Ok(());
        }
        let key = self.keys.get(&told.actor).ok_or("no such key calls")?;
        if told.method.ends_with("/RevokeSelf") {
            return require(told.key_id == told.actor && told.action == "key.revoked", "it is not itself");
        }
        let actor = self.actor(key, told)?;
        let needed = match told.method.contains("KeyService") {
            true => "keyward:keys:write",
            false => "keyward:accounts:write",
        };
        require(actor.holds.contains(needed), format!("it does not hold {needed}"))?;
        match change {
            RecordChange::Key(after) => self.check_key_change(&actor, told, after),
            RecordChange::Account(_) => require(actor.operator, "it is no operator"),
            RecordChange::Role(after) => {
                let account = after.account.as_ref().map(|account| account.as_str());
                self.check_account_access(&actor, account)?;
                require_unrestricted(&actor)?;
                check_grants(&actor, &concrete_scopes(after.scopes.iter().map(|scope| scope.as_str())))?;
                check_grants(&actor, &self.role(account, after.name.as_str()).unwrap_or_default())
            }
            RecordChange::RoleDeleted(before) => {
                self.check_account_access(&actor, before.account.as_ref().map(|account| account.as_str()))?;
                require_unrestricted(&actor)?;
                check_grants(&actor, &concrete_scopes(before.scopes.iter().map(|scope| scope.as_str())))
            }
            RecordChange::Member(after) => {
                let account = after.account.as_str();
                self.check_account_access(&actor, Some(account))?;
                require_unrestricted(&actor)?;
                let role = self.role(Some(account), after.role.as_str()).ok_or("there is no such role")?;
                check_grants(&actor, &role)?;
                check_grants(&actor, &self.member_holds(account, after.user.as_str()).unwrap_or_default())
            }
            RecordChange::MemberRemoved(before) => {
                self.check_account_access(&actor, Some(before.account.as_str()))
            }
        }
    }

    /// The actor, if it may call at all.
    fn actor<'a>(&self, key: &'a ApiKey, told: &'a pb::AuditEntry) -> Result<ActingCaller<'a>, String> {
        let at = told.at.ok_or("it has no time")?;
        let at = Timestamp::from_micros(at.seconds * 1_000_000 + i64::from(at.nanos) / 1000);
        require(key.revocation.is_none(), "it is revoked")?;
        require(key.disabled_at.is_none(), "it is disabled")?;
        require(key.spec.expires_at.is_none_or(|end| at < end), "it has expired")?;
        let account = told.actor_account.as_str();
        let suspended = self.accounts.get(account).map(|account| account.suspended_at.is_some());
        require(suspended == Some(false), format!("its account is suspended: {suspended:?}"))?;
        let mut holds = self.granted(&key.owner, &key.spec);
        match &key.owner {
            KeyOwner::Account(own) => require(own.as_str() == account, "it acts in another account")?,
            KeyOwner::User(user) => {
                let member = self.member_holds(account, user.as_str()).ok_or("its user is no member")?;
                holds.retain(|scope| member.contains(scope));
            }
        }
        let person = Some(told.acting_user.as_str()).filter(|person| !person.is_empty());
        Ok(ActingCaller { key, operator: account == "keyward", account, person, holds, at })
    }

    /// Whether the actor reaches an account, or, with none, what is global.
    fn check_account_access(&self, actor: &ActingCaller<'_>, account: Option<&str>) -> ModelVerdict {
        let Some(account) = account else {
            return require(actor.operator, "global roles are the operators'");
        };
        require(actor.operator || account == actor.account, "it is another account")?;
        match actor.person {
            Some(person) => require(self.member_holds(account, person).is_some(), "the person is no member"),
            None => Ok(()),
        }
    }

    fn check_key_change(
        &self,
        actor: &ActingCaller<'_>,
        told: &pb::AuditEntry,
        after: &ApiKey,
    ) -> ModelVerdict {
        let before = self.keys.get(&told.key_id).map(Arc::as_ref);
        if told.method.ends_with("/RemoveMember") {
            return require(
                actor.operator && told.action == "key.revoked",
                "the keys are the operators' to revoke",
            );
        }
        match &after.owner {
            KeyOwner::User(user) => {
                let own = actor.key.owner.user() == Some(user);
                let theirs = actor.person.is_none_or(|person| person == user.as_str());
                require((actor.operator || own) && theirs, "it is another's user key")?;
            }
            KeyOwner::Account(account) => {
                self.check_account_access(actor, Some(account.as_str()))?;
                if let Some(person) = actor.person {
                    let holds = self.member_holds(account.as_str(), person).unwrap_or_default();
                    require(holds.contains("keyward:keys:write"), "the person may not write keys")?;
                }
            }
        }
        match (told.action.as_str(), before) {
            ("key.created" | "key.imported", None) => {
                self.check_lifetime(actor, after)?;
                self.check_grantable(actor, after)
            }
            ("key.updated", Some(before)) => {
                let (old, new) = (&before.spec, &after.spec);
                let limited = !old.rate_limits.is_empty() || old.quota.is_some();
                let lifted = (&old.rate_limits, &old.quota) != (&new.rate_limits, &new.quota);
                require(!(actor.key.id == after.id && limited && lifted), "it lifts its own limits")?;
                if old.expires_at != new.expires_at {
                    self.check_lifetime(actor, after)?;
                }
                self.check_grantable(actor, before)?;
                self.check_grantable(actor, after)
            }
            ("key.enabled" | "key.rotated", Some(before)) => self.check_grantable(actor, before),
            ("key.disabled" | "key.revoked" | "key.rotation_finished", Some(_)) => Ok(()),
            (action, _) => Err(format!("{action} is out of order")),
        }
    }

    fn check_lifetime(&self, actor: &ActingCaller<'_>, key: &ApiKey) -> ModelVerdict {
        let account = key.owner.account().and_then(|account| self.accounts.get(account.as_str()));
        let Some(longest) = account.and_then(|account| account.longest_life) else { return Ok(()) };
        let latest = actor.at.saturating_add(longest);
        require(
            key.spec.expires_at.is_some_and(|end| end <= latest),
            "it lives longer than the account allows",
        )
    }

    /// Whether the actor could make this key.
    fn check_grantable(&self, actor: &ActingCaller<'_>, key: &ApiKey) -> ModelVerdict {
        let account = key.owner.account().map(|account| account.as_str());
        for role in &key.spec.roles {
            self.role(account, role.as_str()).ok_or("there is no such role")?;
        }
        let granted = self.granted(&key.owner, &key.spec);
        check_grants(actor, &granted)?;
        if let (Some(person), Some(account)) = (actor.person, account) {
            let holds = self.member_holds(account, person).unwrap_or_default();
            let beyond = granted.iter().find(|scope| is_reserved(scope) && !holds.contains(*scope));
            require(beyond.is_none(), format!("it goes beyond the person's role: {beyond:?}"))?;
        }
        let (own, given) = (&actor.key.spec, &key.spec);
        let life = |terms: &KeySpec| terms.expires_at.map_or(i64::MAX, Timestamp::as_micros);
        require(life(given) <= life(own), "it lives longer")?;
        require(served(given).is_subset(&served(own)), "it serves other customers")?;
        require(addresses(given).is_subset(&addresses(own)), "it works from other addresses")?;
        if actor.operator {
            return Ok(());
        }
        require(key.environment == actor.key.environment, "it works in another environment")?;
        require(
            spans().all(|span| max_units_in_span(given, span) <= max_units_in_span(own, span)),
            "its rate limits allow more",
        )?;
        require(units(given).zip(units(own)).all(|(given, own)| given <= own), "its quota allows more")
    }
}

fn check_grants(actor: &ActingCaller<'_>, granted: &ConcreteScopes) -> ModelVerdict {
    let may = |scope: &str| actor.holds.contains(scope) || actor.operator && !is_reserved(scope);
    let beyond = granted.iter().find(|scope| !may(scope));
    require(beyond.is_none(), format!("it goes beyond what the caller holds: {beyond:?}"))
}

/// Roles and memberships are bound to nothing.
fn require_unrestricted(actor: &ActingCaller<'_>) -> ModelVerdict {
    let own = &actor.key.spec;
    require(
        own.customers.is_empty() && own.allowed_cidrs.is_empty(),
        "it is bound to customers or networks",
    )?;
    let free = own.expires_at.is_none() && own.rate_limits.is_empty() && own.quota.is_none();
    require(actor.operator || free, "it is bound to a time or to limits")?;
    require(actor.operator || actor.key.environment.as_str() == "production", "it works in one environment")
}

/// The customers that terms serve, one whom nobody names and none included.
fn served(terms: &KeySpec) -> BTreeSet<&'static str> {
    let serves = |customer: &&str| {
        terms.customers.is_empty() || terms.customers.iter().any(|served| served.as_str() == *customer)
    };
    ["c1", "c2", "c3", "another", "none"].into_iter().filter(serves).collect()
}

/// The addresses that terms can be used from.
fn addresses(terms: &KeySpec) -> BTreeSet<IpAddr> {
    let world = ["127.0.0.1", "127.0.0.2", "127.9.0.1", "10.0.0.1", "8.8.8.8", "2001:db8::1"];
    let world = world.map(|address| address.parse::<IpAddr>().unwrap());
    let nets = &terms.allowed_cidrs;
    world.into_iter().filter(|ip| nets.is_empty() || nets.iter().any(|net| net.contains(ip))).collect()
}

fn spans() -> impl Iterator<Item = u64> {
    [0, 1, 59, 60, 120, 3600, 86_400].into_iter()
}

/// How many units the tightest rate limit of terms allows in a span of so many seconds.
fn max_units_in_span(terms: &KeySpec, span: u64) -> u64 {
    let limits = terms.rate_limits.iter();
    let allowed = limits.map(|limit| limit.limit + limit.limit * span / limit.window.as_secs());
    allowed.min().unwrap_or(u64::MAX)
}

/// How many units the quota of terms allows in an hour, a day, a month and for ever.
fn units(terms: &KeySpec) -> impl Iterator<Item = u64> {
    let allowed = |hours: u64| match &terms.quota {
        None => u64::MAX,
        Some(quota) => {
            let period = match quota.period {
                QuotaPeriod::Hour => 1,
                QuotaPeriod::Day => 24,
                QuotaPeriod::Month => 28 * 24,
                QuotaPeriod::Total => u64::MAX,
            };
            quota.limit.saturating_mul(hours.div_ceil(period))
        }
    };
    [1, 24, 28 * 24, u64::MAX].map(allowed).into_iter()
}
