//! Parses values that many keys share only once.
//!
//! A million keys have about a thousand owners and a few dozen policies. Parsing the scopes of each key would take
//! longer than reading it.

use std::{
    collections::{BTreeMap, HashMap},
    str::FromStr as _,
    sync::Arc,
};

use foldhash::quality::RandomState;
use ipnet::IpNet;

use crate::domain::{
    key::{KeyOwner, KeySecret, Revocation},
    key_policy::KeyPolicy,
    name::{AccountId, CustomerId, EnvironmentName, KeyId, KeyName, NameError, RoleName, UserId},
    scope::{Scope, ScopeSet},
    time::Timestamp,
};

use super::{
    error::StoreError,
    row_format::{KeyRow, damaged_error, parse_json, parse_words, revision_from_i64},
    snapshot_loader::LoadedKey,
};

/// The maximum number of different texts in the cache.
const MAX_ENTRIES: usize = 65_536;

/// Owners and policies that were parsed before.
#[derive(Default)]
pub(super) struct KeyParseCache {
    owners: ParseCache<Arc<KeyOwner>>,
    policies: ParseCache<Arc<KeyPolicy>>,
}

impl KeyParseCache {
    /// The owner and the policy of a key.
    pub(super) fn get_or_parse(
        &mut self,
        row: &KeyRow<'_>,
    ) -> Result<(&Arc<KeyOwner>, &Arc<KeyPolicy>), String> {
        let owner_columns = [row.account.as_deref(), row.user_id.as_deref()];
        let policy_columns = [
            Some(&*row.environment),
            Some(&*row.scopes),
            Some(&*row.roles),
            Some(&*row.customers),
            Some(&*row.allowed_cidrs),
            row.rate_limits.as_deref(),
            row.quota.as_deref(),
        ];
        let owner = self.owners.get_or_parse(&owner_columns, || parse_owner(row).map(Arc::new))?;
        let policy = self.policies.get_or_parse(&policy_columns, || parse_policy(row).map(Arc::new))?;
        Ok((owner, policy))
    }

    /// Parses a row into a key with these secrets: those in its record, and those that left it.
    pub(super) fn load_key<'a>(
        &'a mut self,
        row: &'a KeyRow<'_>,
        secrets: (&'a [KeySecret], &'a [KeySecret]),
    ) -> Result<LoadedKey<'a>, StoreError> {
        let id = KeyId::from_bytes(row.id);
        self.parse_row(id, row, secrets).map_err(|problem| damaged_error(format_args!("key {id}"), problem))
    }

    fn parse_row<'a>(
        &'a mut self,
        id: KeyId,
        row: &'a KeyRow<'_>,
        (secrets, retired_secrets): (&'a [KeySecret], &'a [KeySecret]),
    ) -> Result<LoadedKey<'a>, String> {
        let (owner, policy) = self.get_or_parse(row)?;
        let revocation = match (row.revoked_at, row.revoke_reason.as_deref()) {
            (Some(at), Some(reason)) => Some(Revocation {
                at: Timestamp::from_micros(at),
                reason: parse_json(&format!("\"{reason}\""))?,
                comment: row.revoke_comment.as_deref().unwrap_or_default().to_owned(),
            }),
            (None, None) => None,
            _ => return Err("its revocation is incomplete".to_owned()),
        };
        let name = row.name.as_deref();
        name.map(KeyName::check_stored).transpose().map_err(|error| error.to_string())?;
        let metadata = row.metadata.as_deref().map(parse_json::<BTreeMap<_, _>>).transpose()?;
        Ok(LoadedKey {
            id,
            owner,
            policy,
            name,
            expires_at: row.expires_at.map(Timestamp::from_micros),
            metadata: metadata.unwrap_or_default(),
            created_at: Timestamp::from_micros(row.created_at),
            created_by: &row.created_by,
            updated_at: Timestamp::from_micros(row.updated_at),
            disabled_at: row.disabled_at.map(Timestamp::from_micros),
            revocation,
            revision: revision_from_i64(row.revision),
            secrets,
            retired_secrets,
        })
    }
}

/// Parsed values by the texts of their columns.
struct ParseCache<T> {
    indices: HashMap<Box<[u8]>, usize, RandomState>,
    values: Vec<T>,
    /// The columns that are looked up, concatenated.
    lookup_key: Vec<u8>,
}

impl<T> Default for ParseCache<T> {
    fn default() -> Self {
        ParseCache { indices: HashMap::default(), values: Vec::new(), lookup_key: Vec::new() }
    }
}

impl<T> ParseCache<T> {
    fn get_or_parse(
        &mut self,
        columns: &[Option<&str>],
        parse: impl FnOnce() -> Result<T, String>,
    ) -> Result<&T, String> {
        self.lookup_key.clear();
        // Each with its length, so that different rows have different keys.
        for column in columns {
            let length = column.map_or(u64::MAX, |text| text.len() as u64);
            self.lookup_key.extend(length.to_ne_bytes());
            self.lookup_key.extend_from_slice(column.unwrap_or_default().as_bytes());
        }
        let number = match self.indices.get(&*self.lookup_key) {
            Some(number) => *number,
            None => {
                let parsed = parse()?;
                if self.values.len() == MAX_ENTRIES {
                    self.indices.clear();
                    self.values.clear();
                }
                self.indices.insert(self.lookup_key.as_slice().into(), self.values.len());
                self.values.push(parsed);
                self.values.len() - 1
            }
        };
        Ok(&self.values[number])
    }
}

fn name_error_text(error: NameError) -> String {
    error.to_string()
}

fn parse_owner(row: &KeyRow<'_>) -> Result<KeyOwner, String> {
    match (&row.account, &row.user_id) {
        (Some(account), None) => Ok(KeyOwner::Account(AccountId::parse(account).map_err(name_error_text)?)),
        (None, Some(user)) => Ok(KeyOwner::User(UserId::parse(user).map_err(name_error_text)?)),
        _ => Err("it has not exactly one owner".to_owned()),
    }
}

fn parse_policy(row: &KeyRow<'_>) -> Result<KeyPolicy, String> {
    let nets = row.allowed_cidrs.split(' ').filter(|word| !word.is_empty());
    let nets = nets.map(IpNet::from_str).collect::<Result<_, _>>();
    Ok(KeyPolicy {
        environment: EnvironmentName::parse(&row.environment).map_err(name_error_text)?,
        scopes: ScopeSet::from(parse_words(&row.scopes, Scope::parse_grant).map_err(name_error_text)?),
        roles: parse_words(&row.roles, RoleName::parse).map_err(name_error_text)?.into(),
        customers: parse_words(&row.customers, CustomerId::parse).map_err(name_error_text)?.into(),
        allowed_cidrs: nets.map_err(|error| error.to_string())?,
        rate_limits: row.rate_limits.as_deref().map(parse_json).transpose()?.unwrap_or_default(),
        quota: row.quota.as_deref().map(parse_json).transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_read_alike_together_are_different() {
        let mut seen = ParseCache::default();
        let rows: [[Option<&str>; 2]; 4] =
            [[Some("ab"), Some("c")], [Some("a"), Some("bc")], [Some("abc"), None], [Some("abc"), Some("")]];
        for (number, row) in rows.iter().enumerate() {
            assert_eq!(seen.get_or_parse(row, || Ok(number)), Ok(&number));
        }
        for (number, row) in rows.iter().enumerate() {
            assert_eq!(seen.get_or_parse(row, || Err("parsed again".to_owned())), Ok(&number));
        }
    }

    #[test]
    fn what_cannot_be_parsed_is_not_remembered_and_what_is_remembered_has_an_end() {
        let mut seen = ParseCache::default();
        assert_eq!(seen.get_or_parse(&[None], || Err("no".to_owned())), Err("no".to_owned()));
        assert_eq!(seen.get_or_parse(&[None], || Ok(0)), Ok(&0));
        for number in 0..2 * MAX_ENTRIES {
            assert_eq!(seen.get_or_parse(&[Some(&number.to_string())], || Ok(number)), Ok(&number));
        }
        assert!(seen.values.len() <= MAX_ENTRIES);
    }
}
