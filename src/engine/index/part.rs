//! Keys of a snapshot on their way into the index: one thread's, which packs them by itself. It meets the others only
//! when it has a block full, and when it meets something for the first time.

use std::{collections::HashMap, sync::Arc};

use foldhash::quality::RandomState;

use crate::{
    domain::{key::Owner, name::KeyId, policy::Policy, time::Timestamp, token::Digest},
    store::{self, LoadedKey},
};

use super::{
    held::{BLOCK, Placed, Rare, Uncommon},
    keys::Keys,
};

/// How many things are remembered at the most.
const KEPT: usize = 65_536;

/// A part of a snapshot.
pub(super) struct Part {
    keys: Arc<Keys>,
    owners: Met<Owner>,
    policies: Met<Policy>,
    /// Of one block at the most.
    coming: Vec<Coming>,
    /// Their names, one after the other.
    names: String,
}

/// A key that waits for the others of its block.
struct Coming {
    id: KeyId,
    digest: Digest,
    version: u32,
    /// Where its name ends.
    name_end: usize,
    expires_at: Option<Timestamp>,
    revoked_at: Option<Timestamp>,
    /// Their numbers among what this part has met.
    owner: usize,
    policy: usize,
    rare: Option<Arc<Rare>>,
}

impl Part {
    pub(super) fn of(keys: Arc<Keys>) -> Part {
        let (owners, policies) = (Met::default(), Met::default());
        Part { keys, owners, policies, coming: Vec::with_capacity(BLOCK), names: String::new() }
    }

    /// Places what has come.
    fn place(&mut self) {
        let mut start = 0;
        let placed: Vec<_> = self
            .coming
            .iter()
            .map(|coming| {
                let name = &self.names[start..coming.name_end];
                start = coming.name_end;
                Some(Placed {
                    id: coming.id,
                    digest: coming.digest,
                    version: coming.version,
                    name,
                    expires_at: coming.expires_at,
                    revoked_at: coming.revoked_at,
                    owner: self.owners.kept(coming.owner),
                    policy: self.policies.kept(coming.policy),
                    rare: coming.rare.as_ref(),
                })
            })
            .collect();
        self.keys.place(&placed);
        drop(placed);
        self.coming.clear();
        self.names.clear();
        self.owners.limit();
        self.policies.limit();
    }
}

impl store::Part for Part {
    fn key(&mut self, key: &LoadedKey<'_>) {
        let Some(newest) = key.secrets.first() else { return };
        if key.secrets.iter().any(|secret| self.keys.find(&secret.digest).is_some()) {
            // It came some other way.
            return self.keys.load(&key.to_key(), key.left);
        }
        let revoked_at = key.revocation.as_ref().map(|revocation| revocation.at);
        let uncommon = Uncommon {
            secrets: key.secrets,
            updated_at: key.updated_at,
            disabled_at: key.disabled_at,
            revoked_at,
            metadata: &key.metadata,
        };
        let (keys, names) = (&self.keys, &mut self.names);
        names.push_str(key.name.unwrap_or_default());
        self.coming.push(Coming {
            id: key.id,
            digest: newest.digest,
            version: newest.version,
            name_end: names.len(),
            expires_at: key.expires_at,
            revoked_at,
            owner: self.owners.number(key.owner, |owner| keys.owner(owner)),
            policy: self.policies.number(key.policy, |policy| keys.policy(policy)),
            rare: uncommon.loaded(key.left),
        });
        if self.coming.len() == BLOCK {
            self.place();
        }
    }

    fn end(mut self: Box<Self>) {
        self.place();
    }
}

/// Things as they came, and as the index keeps them.
struct Met<T> {
    /// By the address of what came, which is kept so that nothing else has it.
    numbers: HashMap<usize, usize, RandomState>,
    came: Vec<Arc<T>>,
    kept: Vec<Arc<T>>,
}

impl<T> Default for Met<T> {
    fn default() -> Self {
        Met { numbers: HashMap::default(), came: Vec::new(), kept: Vec::new() }
    }
}

impl<T> Met<T> {
    fn number(&mut self, came: &Arc<T>, keep: impl FnOnce(&Arc<T>) -> Arc<T>) -> usize {
        let address = Arc::as_ptr(came).addr();
        if let Some(number) = self.numbers.get(&address) {
            return *number;
        }
        self.numbers.insert(address, self.came.len());
        self.kept.push(keep(came));
        self.came.push(came.clone());
        self.came.len() - 1
    }

    fn kept(&self, number: usize) -> &Arc<T> {
        &self.kept[number]
    }

    /// Begins again, once there is too much. Nothing may wait then.
    fn limit(&mut self) {
        if self.came.len() > KEPT {
            *self = Met::default();
        }
    }
}
