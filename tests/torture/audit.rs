//! Whether everything that was acknowledged is in the database: the log after each fault, the log and the keys at the
//! end.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use keyward::pb;
use tonic::{Request, Status};

use crate::{
    judge::{LogEntry, find_lost},
    key_lives::ACCOUNT,
    process::AuthorizedClients,
    shared_state::SharedState,
};

const PAGE: u32 = 1000;
/// How long the database may take to come back.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(90);

/// What is known of the log.
#[derive(Default)]
pub(crate) struct LogAudit {
    callers: Vec<AuthorizedClients>,
    log: BTreeMap<u64, LogEntry>,
    /// So many acknowledged changes were found in it.
    found: usize,
}

impl LogAudit {
    /// Reads what the log has gained; what was acknowledged before that it lacks.
    pub(crate) async fn newest(&mut self, field: &SharedState) -> Vec<String> {
        let acknowledged = field.records().acknowledged[self.found..].to_vec();
        let known = self.log.last_key_value().map_or(0, |(revision, _)| *revision);
        let newest = acknowledged.iter().map(|change| change.revision).max();
        let Some(mut entries) = self.entries_up_to(field, known, newest).await else {
            return vec!["the log cannot be read".to_owned()];
        };
        let mut stories = Vec::new();
        for (revision, entry) in &entries {
            if self.log.get(revision).is_some_and(|before| before != entry) {
                stories.push(format!("entry {revision} of the log is another one now: {entry:?}"));
            }
        }
        self.log.append(&mut entries);
        let lost = find_lost(&acknowledged, &self.log);
        self.found += acknowledged.len();
        stories.extend(lost.iter().map(|change| {
            format!("{change:?} is not in the log, which has {:?} there", self.log.get(&change.revision))
        }));
        stories
    }

    /// Reads the whole log and every key.
    pub(crate) async fn everything(&mut self, field: &SharedState) -> Vec<String> {
        self.log.clear();
        self.found = 0;
        let mut stories = self.newest(field).await;
        let expected = field.records().keys.clone();
        let Some(keys) = self.keys(field).await else {
            stories.push("the keys cannot be read".to_owned());
            return stories;
        };
        for (id, state) in expected {
            match (keys.get(&id), state) {
                (None, _) => stories.push(format!("key {id} is not in the database")),
                (Some(found), Some(state)) if *found != state => {
                    stories.push(format!("key {id} is {found:?} and should be {state:?}"));
                }
                _ => {}
            }
        }
        stories
    }

    /// The entries after one revision, read until they reach another. A replica whose primary was replaced, and which has
    /// not heard of it yet, reads less than the new one has acknowledged.
    async fn entries_up_to(
        &mut self,
        field: &SharedState,
        after: u64,
        newest: Option<u64>,
    ) -> Option<BTreeMap<u64, LogEntry>> {
        let end = Instant::now() + RECOVERY_TIMEOUT;
        loop {
            let entries = self.entries(field, after).await?;
            let reached = entries.last_key_value().map_or(after, |(revision, _)| *revision);
            if newest.is_none_or(|newest| reached >= newest) || Instant::now() > end {
                return Some(entries);
            }
            self.callers.rotate_left(1);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The entries after this revision, and the page that it stands on.
    async fn entries(&mut self, field: &SharedState, after: u64) -> Option<BTreeMap<u64, LogEntry>> {
        let mut entries = BTreeMap::new();
        let mut page_token = String::new();
        loop {
            let request = pb::ListAuditEntriesRequest {
                page_size: Some(PAGE),
                page_token: std::mem::take(&mut page_token),
                ..Default::default()
            };
            let page = self
                .ask(field, async |mut caller: AuthorizedClients| {
                    caller.audit.list(timed(request.clone())).await
                })
                .await?;
            for entry in page.entries {
                let pb::AuditEntry { revision, action, key_id: key, account, user, .. } = entry;
                entries.insert(revision, LogEntry { action, key, account, user });
            }
            let reached = entries.first_key_value().is_none_or(|(revision, _)| *revision <= after);
            if reached || page.next_page_token.is_empty() {
                return Some(entries);
            }
            page_token = page.next_page_token;
        }
    }

    /// The account's keys and their states.
    async fn keys(&mut self, field: &SharedState) -> Option<BTreeMap<String, pb::KeyState>> {
        let mut keys = BTreeMap::new();
        let mut page_token = String::new();
        loop {
            let request = pb::ListKeysRequest {
                account: ACCOUNT.to_owned(),
                page_size: Some(PAGE),
                page_token: std::mem::take(&mut page_token),
                ..Default::default()
            };
            let page = self
                .ask(field, async |mut caller: AuthorizedClients| {
                    caller.keys.list(timed(request.clone())).await
                })
                .await?;
            keys.extend(page.keys.iter().map(|key| (key.id.clone(), key.state())));
            if page.next_page_token.is_empty() {
                return Some(keys);
            }
            page_token = page.next_page_token;
        }
    }

    /// Asks one replica after the other until one answers.
    async fn ask<T>(
        &mut self,
        field: &SharedState,
        call: impl AsyncFn(AuthorizedClients) -> Result<tonic::Response<T>, Status>,
    ) -> Option<T> {
        if self.callers.is_empty() {
            self.callers = field.operator();
        }
        let asking = async {
            for at in (0..self.callers.len()).cycle() {
                match call(self.callers[at].clone()).await {
                    Ok(response) => return Some(response.into_inner()),
                    Err(status) => field.records().record_failure("List", &status),
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            None
        };
        tokio::time::timeout(RECOVERY_TIMEOUT, asking).await.ok().flatten()
    }
}

fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(Duration::from_secs(5));
    request
}
