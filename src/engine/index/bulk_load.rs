//! Loads one part of a snapshot into the index; each part packs its keys in its own thread.
//!
//! Parts synchronize only to publish a full block, and to intern a value that they see for the first time.

use std::{collections::HashMap, sync::Arc};

use foldhash::quality::RandomState;

use crate::{
    domain::{key::KeyOwner, key_policy::KeyPolicy, name::KeyId, time::Timestamp, token::TokenDigest},
    store::{self, LoadedKey},
};

use super::{
    cold_fields::{ColdFields, ColdFieldsView},
    key_block::{BlockEntryRef, RECORDS_PER_BLOCK},
    key_table::KeyTable,
};

/// The interner of a part is reset beyond this number of values.
const MAX_INTERNED: usize = 65_536;

/// One part of a snapshot: packs keys until a block is full.
pub(super) struct IndexSnapshotPart {
    keys: Arc<KeyTable>,
    owners: LocalInterner<KeyOwner>,
    policies: LocalInterner<KeyPolicy>,
    /// The keys of at most one block.
    pending_keys: Vec<PendingKey>,
    /// The names of the pending keys, concatenated.
    names: String,
}

/// A key that waits until its block is full.
struct PendingKey {
    id: KeyId,
    digest: TokenDigest,
    version: u32,
    /// The end of its name in `names`.
    name_end: usize,
    expires_at: Option<Timestamp>,
    revoked_at: Option<Timestamp>,
    /// Its owner in the part's own interner; the policy likewise.
    owner_number: usize,
    policy_number: usize,
    cold_fields: Option<Arc<ColdFields>>,
}

impl IndexSnapshotPart {
    pub(super) fn new(keys: Arc<KeyTable>) -> IndexSnapshotPart {
        let (owners, policies) = (LocalInterner::default(), LocalInterner::default());
        IndexSnapshotPart {
            keys,
            owners,
            policies,
            pending_keys: Vec::with_capacity(RECORDS_PER_BLOCK),
            names: String::new(),
        }
    }

    /// Publishes the pending keys as a block.
    fn flush_block(&mut self) {
        let mut start = 0;
        let entries: Vec<_> = self
            .pending_keys
            .iter()
            .map(|pending| {
                let name = &self.names[start..pending.name_end];
                start = pending.name_end;
                Some(BlockEntryRef {
                    id: pending.id,
                    digest: pending.digest,
                    version: pending.version,
                    name,
                    expires_at: pending.expires_at,
                    revoked_at: pending.revoked_at,
                    owner: self.owners.get(pending.owner_number),
                    policy: self.policies.get(pending.policy_number),
                    cold_fields: pending.cold_fields.as_ref(),
                })
            })
            .collect();
        self.keys.load_block(&entries);
        drop(entries);
        self.pending_keys.clear();
        self.names.clear();
        self.owners.reset_if_full();
        self.policies.reset_if_full();
    }
}

impl store::SnapshotPart for IndexSnapshotPart {
    fn add_key(&mut self, key: &LoadedKey<'_>) {
        let Some(newest) = key.secrets.first() else { return };
        if key.secrets.iter().any(|secret| self.keys.find_by_digest(&secret.digest).is_some()) {
            // The key was already loaded, for example by a change.
            return self.keys.load_key(&key.to_key(), key.retired_secrets);
        }
        let revoked_at = key.revocation.as_ref().map(|revocation| revocation.at);
        let cold_fields = ColdFieldsView {
            secrets: key.secrets,
            updated_at: key.updated_at,
            disabled_at: key.disabled_at,
            revoked_at,
            metadata: &key.metadata,
        };
        let (keys, names) = (&self.keys, &mut self.names);
        names.push_str(key.name.unwrap_or_default());
        self.pending_keys.push(PendingKey {
            id: key.id,
            digest: newest.digest,
            version: newest.version,
            name_end: names.len(),
            expires_at: key.expires_at,
            revoked_at,
            owner_number: self.owners.intern(key.owner, |owner| keys.intern_owner(owner)),
            policy_number: self.policies.intern(key.policy, |policy| keys.intern_policy(policy)),
            cold_fields: cold_fields.with_retired_secrets(key.retired_secrets),
        });
        if self.pending_keys.len() == RECORDS_PER_BLOCK {
            self.flush_block();
        }
    }

    fn finish(mut self: Box<Self>) {
        self.flush_block();
    }
}

/// Maps values of the snapshot to interned ones, without a lock.
struct LocalInterner<T> {
    /// By the address of the source. `sources` keeps it alive, so the address cannot be reused.
    numbers: HashMap<usize, usize, RandomState>,
    sources: Vec<Arc<T>>,
    interned: Vec<Arc<T>>,
}

impl<T> Default for LocalInterner<T> {
    fn default() -> Self {
        LocalInterner { numbers: HashMap::default(), sources: Vec::new(), interned: Vec::new() }
    }
}

impl<T> LocalInterner<T> {
    fn intern(&mut self, source: &Arc<T>, keep: impl FnOnce(&Arc<T>) -> Arc<T>) -> usize {
        let address = Arc::as_ptr(source).addr();
        if let Some(number) = self.numbers.get(&address) {
            return *number;
        }
        self.numbers.insert(address, self.sources.len());
        self.interned.push(keep(source));
        self.sources.push(source.clone());
        self.sources.len() - 1
    }

    fn get(&self, number: usize) -> &Arc<T> {
        &self.interned[number]
    }

    /// Clears the interner if it is too large. No key may be pending.
    fn reset_if_full(&mut self) {
        if self.sources.len() > MAX_INTERNED {
            *self = LocalInterner::default();
        }
    }
}
