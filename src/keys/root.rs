//! The root key: made at the first start, and by `keyward root-key reset`.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    clock::{Clock, Entropy, NoEntropy, random},
    domain::{
        key::{Key, Owner, Terms},
        log::{Action, Actor, Change},
        name::{AccountId, KeyId, KeyName},
        scope::Scope,
        time::Revision,
        token::Token,
    },
    store::Write,
};

use super::{KeySettings, first_secret};

/// A root key: every permission over Keyward, for the operator account.
#[derive(Debug)]
pub struct RootKey {
    /// Its token.
    pub token: Token,
    /// What records it.
    pub write: Write,
}

impl RootKey {
    /// Takes away the key's name. False if it has none.
    pub fn take_name(&mut self) -> bool {
        match &mut self.write.change {
            Change::Key(key) => Arc::make_mut(key).terms.name.take().is_some(),
            _ => false,
        }
    }
}

/// Makes a root key that is not recorded yet.
///
/// # Errors
/// When no random bytes can be had.
pub fn root_key(
    clock: &dyn Clock,
    entropy: &dyn Entropy,
    tokens: &KeySettings,
    method: &'static str,
) -> Result<RootKey, NoEntropy> {
    let now = clock.now();
    let environment = tokens.environments.first();
    let token = Token::generate(&tokens.prefix, &environment.tag, &random(entropy)?);
    let named = |text: &str| KeyName::parse(text).ok();
    let all = Scope::parse_grant("keyward:*");
    let key = Key {
        id: KeyId::generate(now, random(entropy)?),
        owner: Owner::Account(AccountId::operator()),
        environment: environment.name.clone(),
        terms: Terms {
            name: named("root"),
            scopes: all.into_iter().collect(),
            roles: Vec::new(),
            expires_at: None,
            customers: Vec::new(),
            allowed_cidrs: Vec::new(),
            rate_limits: Vec::new(),
            quota: None,
            metadata: BTreeMap::new(),
        },
        created_at: now,
        created_by: Actor::SYSTEM.to_string(),
        updated_at: now,
        disabled_at: None,
        revocation: None,
        secrets: vec![first_secret(&token, now)],
        revision: Revision::default(),
    };
    let change = Change::Key(Arc::new(key));
    let write = Write::by_system(change, None, Action::RootKeyCreated, method, now);
    Ok(RootKey { token, write })
}
