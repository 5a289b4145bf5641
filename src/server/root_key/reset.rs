//! `keyward root-key reset`: revokes the root key, finds what descends from it, and creates a new one.
//!
//! Invariant: the new root key is recorded last. Until then the newest root key is the lost one, so repeating the
//! command finishes an interrupted reset.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use anyhow::bail;

use crate::{
    clock::{Clock, EntropySource},
    config::server::{RootKeyArgs, ServerSettings},
    domain::{
        key::{ApiKey, ApiKeyState, KeyOwner, Revocation, RevokeReason},
        lineage::{LineageLink, LineageLinkKind, find_descendants, suspect_since},
        log::{Actor, AuditAction, LogEntry, RecordChange},
        name::{AccountId, EnvironmentName, KeyId, KeyName},
        time::Timestamp,
        token::Token,
    },
    keys,
    replication::propagation::PropagationError,
    server::replicas::ReplicationRuntime,
    store::{self, KeyFilter, LogFilter, OwnerFilter, Store, WriteRejection, WriteRequest},
};

use super::token_file::RootKeyFile;

const METHOD: &str = "keyward root-key reset";
const PAGE_SIZE: u32 = 1000;
/// Rounds of the search for descendants. On PostgreSQL servers keep running, and a descendant may create another key
/// before its own revocation is in force.
const MAX_ROUNDS: u32 = 16;

/// Actions that grant rights, other than creating and rotating keys.
const RIGHTS_GRANTING_ACTIONS: [AuditAction; 8] = [
    AuditAction::KeyUpdated,
    AuditAction::KeyEnabled,
    AuditAction::RolePut,
    AuditAction::RoleDeleted,
    AuditAction::MemberPut,
    AuditAction::AccountCreated,
    AuditAction::AccountUpdated,
    AuditAction::AccountResumed,
];

/// The result of a reset.
#[derive(Debug)]
pub(crate) struct RootKeyReset {
    /// Token of the new root key, unless it went to a file.
    pub(crate) token: Option<Token>,
    /// The root key that was replaced.
    pub(crate) lost: KeyId,
    /// Older root keys.
    pub(crate) earlier_root_keys: Vec<KeyId>,
    /// Descendants of the lost key that were not revoked before.
    pub(crate) descendants: Vec<DescendantKey>,
    /// Whether the descendants are revoked now.
    pub(crate) descendants_revoked: bool,
    /// Other rights that the lost key and its descendants have granted, oldest first.
    pub(crate) rights_changes: Vec<RightsChange>,
    /// Why it is not confirmed that the revocations are in force on every replica.
    pub(crate) unconfirmed_reason: Option<String>,
}

/// A key that descends from the lost root key.
#[derive(Clone, Debug)]
pub(crate) struct DescendantKey {
    pub(crate) owner: KeyOwner,
    pub(crate) environment: EnvironmentName,
    pub(crate) name: Option<KeyName>,
    pub(crate) created_at: Timestamp,
    /// The creation or rotation by which the key descends.
    pub(crate) link: LineageLink,
}

/// A change by the lost key or a descendant that a revocation does not undo.
#[derive(Clone, Debug)]
pub(crate) struct RightsChange {
    /// The entry of the change.
    pub(crate) entry: LogEntry,
    /// The role that was changed or assigned.
    pub(crate) role: Option<String>,
}

/// Revokes the root key, and its descendants if the arguments ask for it; then creates a new root key. Servers may keep
/// running on a PostgreSQL database; an SQLite file must have no running server.
///
/// Fails if the store does not open or is new, `--lost` names no root key, or the new token cannot be written. Revocations
/// made before the error stay, and repeating the call finishes the reset.
pub(crate) async fn reset_root_key(
    settings: &ServerSettings,
    args: &RootKeyArgs,
    clock: Arc<dyn Clock>,
    entropy: &dyn EntropySource,
) -> anyhow::Result<RootKeyReset> {
    let store = store::open_existing(&settings.database).await?;
    let replication = ReplicationRuntime::new(&store, Arc::default(), clock.clone());
    let resetter = RootKeyResetter { store: &*store, clock: &*clock, replication };
    let done = resetter.run(settings, args, entropy).await;
    store.close().await;
    done
}

struct RootKeyResetter<'a> {
    store: &'a dyn Store,
    clock: &'a dyn Clock,
    replication: ReplicationRuntime,
}

impl RootKeyResetter<'_> {
    async fn run(
        &self,
        settings: &ServerSettings,
        args: &RootKeyArgs,
        entropy: &dyn EntropySource,
    ) -> anyhow::Result<RootKeyReset> {
        let mut roots: Vec<_> = self.root_keys().await?.iter().map(|key| key.id).collect();
        roots.sort();
        let Some(newest) = roots.pop() else {
            bail!(
                "this database is new and has no root key yet; 'keyward serve' creates one at its first start"
            );
        };
        let lost = args.lost.unwrap_or(newest);
        if lost != newest && !roots.contains(&lost) {
            let root_ids: Vec<_> = roots.iter().chain([&newest]).map(KeyId::to_string).collect();
            bail!("--lost {lost} is no root key of this database; its root keys are {}", root_ids.join(", "));
        }
        if let Some(file) = &settings.root_key_file {
            // Find out before anything is revoked.
            RootKeyFile::check_creatable(file)?;
        }
        self.revoke_root_keys(None).await?;
        let revoked = args.revoke_descendants;
        let (family, descendants) = if revoked {
            self.revoke_descendants(lost).await?
        } else {
            let family = self.find_descendants(lost).await?;
            let living = self.find_unrevoked(&family).await?;
            (family, living)
        };
        let changes = self.find_rights_changes(lost, &family).await?;
        let (new, token) = self.create_root_key(settings, entropy).await?;
        // From here on, no error may hide the token from the user.
        let unconfirmed =
            self.confirm_revocations(new).await.unwrap_or_else(|error| Some(format!("{error:#}")));
        let earlier = roots.into_iter().filter(|root| *root != lost).collect();
        Ok(RootKeyReset {
            token,
            lost,
            earlier_root_keys: earlier,
            descendants,
            descendants_revoked: revoked,
            rights_changes: changes,
            unconfirmed_reason: unconfirmed,
        })
    }

    /// Creates and records the new root key. Returns its id, and its token unless that went to a file.
    async fn create_root_key(
        &self,
        settings: &ServerSettings,
        entropy: &dyn EntropySource,
    ) -> anyhow::Result<(Option<KeyId>, Option<Token>)> {
        let mut root = keys::root_key::create_root_key(self.clock, entropy, &settings.key_settings, METHOD)?;
        let token_file = RootKeyFile::write(settings.root_key_file.as_deref(), &root.token)?;
        loop {
            let write = std::slice::from_ref(&root.write);
            let committed = self
                .store
                .commit(write)
                .await
                .inspect_err(|error| token_file.discard_unless_recorded(error))?;
            match committed.outcomes.first() {
                Some(Ok(_)) => break,
                // Another key of the operator account has the name "root".
                Some(Err(WriteRejection::NameTaken)) if root.clear_name() => {}
                other => {
                    token_file.discard();
                    bail!("the root key was not recorded: {other:?}; run the command again");
                }
            }
        }
        token_file.commit()?;
        let token = settings.root_key_file.is_none().then_some(root.token);
        Ok((root.write.change.key_id(), token))
    }

    /// Revokes all older root keys, and waits until every replica denies them. Returns the reason if that is not
    /// confirmed.
    async fn confirm_revocations(&self, new: Option<KeyId>) -> anyhow::Result<Option<String>> {
        // Of two concurrent resets, the newest root key stays.
        self.revoke_root_keys(new).await?;
        Ok(self.wait_until_in_force().await?.err().map(describe_incomplete))
    }

    /// All root keys, including revoked ones.
    async fn root_keys(&self) -> anyhow::Result<Vec<ApiKey>> {
        let mut roots = Vec::new();
        self.for_each_key(OwnerFilter::Account(AccountId::operator()), |key| {
            // Its name may have changed, but the system creates no other keys.
            if key.created_by == Actor::SYSTEM.to_string() {
                roots.push(key);
            }
        })
        .await?;
        Ok(roots)
    }

    /// Revokes every root key, or only those older than one.
    async fn revoke_root_keys(&self, older_than: Option<KeyId>) -> anyhow::Result<()> {
        loop {
            let roots = self.root_keys().await?;
            let is_older = |key: &ApiKey| older_than.is_none_or(|new| key.id < new);
            let living = roots.into_iter().filter(|key| is_older(key) && key.revocation.is_none());
            let comment = "replaced by root-key reset";
            let batch: Vec<_> =
                living.map(|key| self.build_revocation(key, RevokeReason::Superseded, comment)).collect();
            // A running server may change a key concurrently.
            if batch.is_empty() || self.store.commit(&batch).await?.outcomes.iter().all(Result::is_ok) {
                return Ok(());
            }
        }
    }

    /// All descendants of a key, including revoked ones.
    async fn find_descendants(&self, lost: KeyId) -> anyhow::Result<HashMap<KeyId, LineageLink>> {
        Ok(find_descendants(&[lost], &self.load_links().await?))
    }

    /// Revokes the descendants of a key until none is left. Returns all of them, and those that it revoked.
    async fn revoke_descendants(
        &self,
        lost: KeyId,
    ) -> anyhow::Result<(HashMap<KeyId, LineageLink>, Vec<DescendantKey>)> {
        let comment = format!("descends from the root key {lost}, which root-key reset replaced");
        let mut revoked = BTreeMap::new();
        for _ in 0..MAX_ROUNDS {
            let family = self.find_descendants(lost).await?;
            let living = self.find_unrevoked(&family).await?;
            if living.is_empty() {
                return Ok((family, revoked.into_values().collect()));
            }
            for part in living.chunks(PAGE_SIZE as usize) {
                let ids: Vec<_> = part.iter().map(|found| found.link.child).collect();
                let keys = self.load_unrevoked_keys(&ids).await?;
                let batch: Vec<_> =
                    keys.map(|key| self.build_revocation(key, RevokeReason::Compromised, &comment)).collect();
                // A key that a running server changes concurrently is found again in the next round.
                self.store.commit(&batch).await?;
            }
            revoked.extend(living.into_iter().map(|found| (found.link.child, found)));
            // From then on the revoked keys create nothing. If that is not certain, the report has the reason.
            let _ = self.wait_until_in_force().await?;
        }
        bail!(
            "{} descendants of the root key {lost} are revoked, but new ones keep appearing: stop the servers, \
             then run the command again",
            revoked.len()
        )
    }

    /// All creations and rotations of a key by another key.
    async fn load_links(&self) -> anyhow::Result<Vec<LineageLink>> {
        let mut links = Vec::new();
        for owner in [OwnerFilter::ExceptOperator, OwnerFilter::Account(AccountId::operator())] {
            self.for_each_key(owner, |key| {
                let by = KeyId::parse(&key.created_by).ok();
                let link = |by| LineageLink {
                    child: key.id,
                    parent: by,
                    kind: LineageLinkKind::Created,
                    at: key.created_at,
                };
                links.extend(by.map(link));
            })
            .await?;
        }
        self.for_each_entry(AuditAction::KeyRotated, |row| {
            let by = KeyId::parse(&row.actor).ok();
            let link =
                |(child, by)| LineageLink { child, parent: by, kind: LineageLinkKind::Rotated, at: row.at };
            // A key that rotates itself has no new ancestor.
            links.extend(row.key_id.zip(by).filter(|(child, by)| child != by).map(link));
        })
        .await?;
        Ok(links)
    }

    /// The members of a family that are not revoked.
    async fn find_unrevoked(
        &self,
        family: &HashMap<KeyId, LineageLink>,
    ) -> anyhow::Result<Vec<DescendantKey>> {
        let mut ids: Vec<_> = family.keys().copied().collect();
        ids.sort();
        let mut living = Vec::new();
        for part in ids.chunks(PAGE_SIZE as usize) {
            living.extend(self.load_unrevoked_keys(part).await?.filter_map(|key| {
                let ApiKey { owner, environment, created_at, .. } = key;
                Some(DescendantKey {
                    owner,
                    environment,
                    name: key.spec.name,
                    created_at,
                    link: *family.get(&key.id)?,
                })
            }));
        }
        Ok(living)
    }

    async fn load_unrevoked_keys(
        &self,
        ids: &[KeyId],
    ) -> anyhow::Result<impl Iterator<Item = ApiKey> + use<>> {
        let keys = self.store.get_keys(ids).await?.into_iter().map(|stored| stored.key);
        Ok(keys.filter(|key| key.revocation.is_none()))
    }

    /// The rights that the lost key and its descendants have granted to keys outside of the family.
    async fn find_rights_changes(
        &self,
        lost: KeyId,
        links: &HashMap<KeyId, LineageLink>,
    ) -> anyhow::Result<Vec<RightsChange>> {
        let lost = lost.to_string();
        let since: HashMap<String, Timestamp> =
            links.iter().map(|(id, link)| (id.to_string(), suspect_since(link))).collect();
        let family: HashSet<_> = links.keys().copied().collect();
        let mut changes = Vec::new();
        for action in RIGHTS_GRANTING_ACTIONS {
            self.for_each_entry(action, |entry| {
                let by_family =
                    entry.actor == lost || since.get(&entry.actor).is_some_and(|since| entry.at >= *since);
                if by_family && entry.key_id.is_none_or(|about| !family.contains(&about)) {
                    changes.push(RightsChange { role: affected_role(&entry), entry });
                }
            })
            .await?;
        }
        changes.sort_by_key(|change| change.entry.revision);
        Ok(changes)
    }

    async fn for_each_key(&self, owner: OwnerFilter, mut take: impl FnMut(ApiKey)) -> anyhow::Result<()> {
        let filter = KeyFilter {
            owner,
            environment: None,
            states: Vec::<ApiKeyState>::new(),
            name_prefix: String::new(),
            unused_since: None,
            expires_before: None,
            created_before: None,
            now: self.clock.now(),
        };
        let mut before = None;
        loop {
            let page = self.store.list_keys(&filter, before, PAGE_SIZE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            before = Some(last.key.id);
            page.into_iter().for_each(|stored| take(stored.key));
        }
    }

    async fn for_each_entry(
        &self,
        action: AuditAction,
        mut take: impl FnMut(LogEntry),
    ) -> anyhow::Result<()> {
        let action = Some(action.as_str().to_owned());
        let filter = LogFilter { action, oldest_first: true, ..LogFilter::default() };
        let mut cursor = None;
        loop {
            let page = self.store.list_log(&filter, cursor, PAGE_SIZE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            cursor = Some(last.revision);
            page.into_iter().for_each(&mut take);
        }
    }

    fn build_revocation(&self, mut key: ApiKey, reason: RevokeReason, comment: &str) -> WriteRequest {
        let now = self.clock.now();
        let expect = Some(key.revision);
        key.revocation = Some(Revocation { at: now, reason, comment: comment.to_owned() });
        key.updated_at = now;
        WriteRequest::from_system(
            RecordChange::Key(Arc::new(key)),
            expect,
            AuditAction::KeyRevoked,
            METHOD,
            now,
        )
    }

    /// Waits until no running replica can allow a revoked key. Returns the reason if that is not confirmed.
    async fn wait_until_in_force(&self) -> anyhow::Result<Result<(), PropagationError>> {
        let revision = self.store.log_head().await?.revision;
        Ok(self.replication.propagation.wait(revision, false, None).await.map(drop))
    }
}

fn describe_incomplete(incomplete: PropagationError) -> String {
    match incomplete {
        PropagationError::TimedOut(report) => {
            let silent: Vec<_> = report.unconfirmed.into_iter().map(|replica| replica.replica).collect();
            format!("not confirmed by {}", silent.join(", "))
        }
        PropagationError::Lost(revision) => format!("the database has lost revision {revision}"),
        PropagationError::DatabaseUnavailable | PropagationError::Stopping(_) => {
            "the database did not answer".to_owned()
        }
    }
}

/// The role that an entry changes, or assigns to a member.
fn affected_role(entry: &LogEntry) -> Option<String> {
    match serde_json::from_str(&entry.payload).ok()? {
        RecordChange::Role(role) | RecordChange::RoleDeleted(role) => Some(role.name.to_string()),
        RecordChange::Member(member) | RecordChange::MemberRemoved(member) => Some(member.role.to_string()),
        RecordChange::Key(_) | RecordChange::Account(_) => None,
    }
}
