//! What many keys say alike, parsed once: a million keys have a thousand owners and a few dozen grants, and to parse
//! each key's scopes would take longer than to read it.

use std::{collections::HashMap, str::FromStr as _, sync::Arc};

use foldhash::quality::RandomState;
use ipnet::IpNet;

use crate::domain::{
    key::Owner,
    name::{AccountId, CustomerId, EnvironmentName, NameError, RoleName, UserId},
    policy::Policy,
    scope::{Scope, ScopeSet},
};

use super::rows::{KeyRow, from_json, parse_words};

/// How many different texts are remembered at the most.
const KEPT: usize = 65_536;

/// What was parsed already.
#[derive(Default)]
pub(super) struct Alike {
    owners: Seen<Arc<Owner>>,
    policies: Seen<Arc<Policy>>,
}

impl Alike {
    /// A key's owner and its policy.
    pub(super) fn of(&mut self, row: &KeyRow<'_>) -> Result<(&Arc<Owner>, &Arc<Policy>), String> {
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
        let owner = self.owners.of(&owner_columns, || owner(row).map(Arc::new))?;
        let policy = self.policies.of(&policy_columns, || policy(row).map(Arc::new))?;
        Ok((owner, policy))
    }
}

/// Values by the texts that they were parsed from.
struct Seen<T> {
    numbers: HashMap<Box<[u8]>, usize, RandomState>,
    values: Vec<T>,
    /// The texts that are looked for, one after the other.
    texts: Vec<u8>,
}

impl<T> Default for Seen<T> {
    fn default() -> Self {
        Seen { numbers: HashMap::default(), values: Vec::new(), texts: Vec::new() }
    }
}

impl<T> Seen<T> {
    fn of(
        &mut self,
        columns: &[Option<&str>],
        parse: impl FnOnce() -> Result<T, String>,
    ) -> Result<&T, String> {
        self.texts.clear();
        // Each with its length, so that no two rows read alike.
        for column in columns {
            let length = column.map_or(u64::MAX, |text| text.len() as u64);
            self.texts.extend(length.to_ne_bytes());
            self.texts.extend_from_slice(column.unwrap_or_default().as_bytes());
        }
        let number = match self.numbers.get(&*self.texts) {
            Some(number) => *number,
            None => {
                let parsed = parse()?;
                if self.values.len() == KEPT {
                    self.numbers.clear();
                    self.values.clear();
                }
                self.numbers.insert(self.texts.as_slice().into(), self.values.len());
                self.values.push(parsed);
                self.values.len() - 1
            }
        };
        Ok(&self.values[number])
    }
}

fn named(error: NameError) -> String {
    error.to_string()
}

fn owner(row: &KeyRow<'_>) -> Result<Owner, String> {
    match (&row.account, &row.user_id) {
        (Some(account), None) => Ok(Owner::Account(AccountId::parse(account).map_err(named)?)),
        (None, Some(user)) => Ok(Owner::User(UserId::parse(user).map_err(named)?)),
        _ => Err("it has not exactly one owner".to_owned()),
    }
}

fn policy(row: &KeyRow<'_>) -> Result<Policy, String> {
    let nets = row.allowed_cidrs.split(' ').filter(|word| !word.is_empty());
    let nets = nets.map(IpNet::from_str).collect::<Result<_, _>>();
    Ok(Policy {
        environment: EnvironmentName::parse(&row.environment).map_err(named)?,
        scopes: ScopeSet::from(parse_words(&row.scopes, Scope::parse_grant).map_err(named)?),
        roles: parse_words(&row.roles, RoleName::parse).map_err(named)?.into(),
        customers: parse_words(&row.customers, CustomerId::parse).map_err(named)?.into(),
        allowed_cidrs: nets.map_err(|error| error.to_string())?,
        rate_limits: row.rate_limits.as_deref().map(from_json).transpose()?.unwrap_or_default(),
        quota: row.quota.as_deref().map(from_json).transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_read_alike_together_are_different() {
        let mut seen = Seen::default();
        let rows: [[Option<&str>; 2]; 4] =
            [[Some("ab"), Some("c")], [Some("a"), Some("bc")], [Some("abc"), None], [Some("abc"), Some("")]];
        for (number, row) in rows.iter().enumerate() {
            assert_eq!(seen.of(row, || Ok(number)), Ok(&number));
        }
        for (number, row) in rows.iter().enumerate() {
            assert_eq!(seen.of(row, || Err("parsed again".to_owned())), Ok(&number));
        }
    }

    #[test]
    fn what_cannot_be_parsed_is_not_remembered_and_what_is_remembered_has_an_end() {
        let mut seen = Seen::default();
        assert_eq!(seen.of(&[None], || Err("no".to_owned())), Err("no".to_owned()));
        assert_eq!(seen.of(&[None], || Ok(0)), Ok(&0));
        for number in 0..2 * KEPT {
            assert_eq!(seen.of(&[Some(&number.to_string())], || Ok(number)), Ok(&number));
        }
        assert!(seen.values.len() <= KEPT);
    }
}
