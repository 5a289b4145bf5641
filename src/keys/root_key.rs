//! Builds a root key, for the first start and for `keyward root-key reset`.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    clock::{Clock, EntropyError, EntropySource, random_bytes},
    domain::{
        key::{ApiKey, KeyOwner, KeySpec},
        log::{Actor, AuditAction, RecordChange},
        name::{AccountId, KeyId, KeyName},
        scope::Scope,
        time::Revision,
        token::Token,
    },
    store::WriteRequest,
};

use super::{KeySettings, first_secret};

/// A root key that is not recorded yet: every permission, for the operator account.
#[derive(Debug)]
pub(crate) struct RootKey {
    pub(crate) token: Token,
    /// The write request that records the key.
    pub(crate) write: WriteRequest,
}

impl RootKey {
    /// Removes the key's name. Returns false if it has none.
    pub(crate) fn clear_name(&mut self) -> bool {
        match &mut self.write.change {
            RecordChange::Key(key) => Arc::make_mut(key).spec.name.take().is_some(),
            _ => false,
        }
    }
}

/// Builds a root key; the caller records it.
pub(crate) fn create_root_key(
    clock: &dyn Clock,
    entropy: &dyn EntropySource,
    settings: &KeySettings,
    method: &'static str,
) -> Result<RootKey, EntropyError> {
    let now = clock.now();
    let environment = settings.environments.first();
    let token = Token::generate(&settings.prefix, &environment.tag, &random_bytes(entropy)?);
    let named = |text: &str| KeyName::parse(text).ok();
    let all = Scope::parse_grant("keyward:*");
    let key = ApiKey {
        id: KeyId::generate(now, random_bytes(entropy)?),
        owner: KeyOwner::Account(AccountId::operator()),
        environment: environment.name.clone(),
        spec: KeySpec {
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
    let change = RecordChange::Key(Arc::new(key));
    let write = WriteRequest::from_system(change, None, AuditAction::RootKeyCreated, method, now);
    Ok(RootKey { token, write })
}
