//! Accounts and keys as products have them: names of their own, twenty sets of scopes, half of the keys expire.

#![allow(dead_code, reason = "each benchmark uses its part")]

use std::{collections::BTreeMap, time::Duration};

use keyward::domain::{
    account::Account,
    key::{ApiKey, KeyOwner, KeySecret, KeySpec},
    name::{AccountId, DisplayName, EnvironmentName, KeyId, KeyName},
    scope::{Scope, ScopeSet},
    time::{Revision, Timestamp},
    token::TokenDigest,
};

pub(crate) const ACCOUNTS: u64 = 1000;
pub(crate) const SCOPE_SETS: u64 = 20;
pub(crate) const ENVIRONMENTS: [&str; 3] = ["production", "staging", "development"];

/// SplitMix64.
fn splitmix64(number: u64) -> u64 {
    let z = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub(crate) fn account(number: u64, now: Timestamp) -> Account {
    Account {
        id: AccountId::parse(&format!("account-{number}")).unwrap(),
        name: DisplayName::parse(&format!("Account {number}")).unwrap(),
        suspended_at: None,
        longest_life: None,
        created_at: now,
        updated_at: now,
        revision: Revision(0),
    }
}

/// The sets that keys have one of.
pub(crate) fn scope_sets() -> Vec<ScopeSet> {
    (0..SCOPE_SETS).map(scopes).collect()
}

fn scopes(number: u64) -> ScopeSet {
    let things = ["monitors", "alerts", "billing", "reports", "users"];
    let grant = |at: u64| {
        let thing = things[usize::try_from(splitmix64(number * 8 + at) % 5).unwrap()];
        Scope::parse_grant(&format!("{thing}:{}", if at == 0 { "*" } else { "read" })).unwrap()
    };
    let own = Scope::parse_grant(&own_scope(number)).unwrap();
    (0..=number % 4).map(grant).chain([own]).collect()
}

/// Which of [`ENVIRONMENTS`] a key is in.
pub(crate) fn environment(number: u64) -> usize {
    usize::try_from(splitmix64(number) % ENVIRONMENTS.len() as u64).unwrap()
}

/// Which of the sets a key has.
pub(crate) fn scope_set(number: u64) -> usize {
    usize::try_from(splitmix64(number) / 3 % SCOPE_SETS).unwrap()
}

/// A scope that the keys with this set have, and no others.
pub(crate) fn own_scope(set: u64) -> String {
    format!("product-{set}:write")
}

/// Every key has another name and digest.
pub(crate) fn key(number: u64, digest: TokenDigest, sets: &[ScopeSet], now: Timestamp) -> ApiKey {
    let chance = splitmix64(number);
    let mut random = [0; 10];
    random[..8].copy_from_slice(&chance.to_be_bytes());
    ApiKey {
        id: KeyId::generate(now.saturating_add(Duration::from_micros(number * 100)), random),
        owner: KeyOwner::Account(AccountId::parse(&format!("account-{}", chance % ACCOUNTS)).unwrap()),
        environment: EnvironmentName::parse(ENVIRONMENTS[environment(number)]).unwrap(),
        spec: KeySpec {
            name: Some(KeyName::parse(&format!("deploy-agent-{number:07}")).unwrap()),
            scopes: sets[scope_set(number)].clone(),
            roles: Vec::new(),
            expires_at: (chance & 1 == 0)
                .then(|| now.saturating_add(Duration::from_secs(90 * 86_400 + number))),
            customers: Vec::new(),
            allowed_cidrs: Vec::new(),
            rate_limits: Vec::new(),
            quota: None,
            metadata: BTreeMap::new(),
        },
        created_at: now,
        created_by: "system".to_owned(),
        updated_at: now,
        disabled_at: None,
        revocation: None,
        secrets: vec![KeySecret {
            version: 1,
            digest,
            hint: "kw_live_a1b2".to_owned(),
            created_at: now,
            expires_at: None,
        }],
        revision: Revision(0),
    }
}
