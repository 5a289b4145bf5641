//! AuditService: the log as its readers may see it, and whether it is whole. Digests stay out unless an operator asks for
//! entries as they were hashed: nobody else needs them to read what happened.

use std::{collections::HashMap, sync::Arc};

use prost::Message as _;
use tokio::sync::Mutex;
use tonic::{Request, Response, Status};

use crate::{
    access::Caller,
    audit::verify::{self, Expected, Question, Verified},
    domain::{
        entry::Told,
        lease::Position,
        log::LogRow,
        name::{AccountId, UserId},
        time::Revision,
    },
    engine::Engine,
    pb,
    refusal::{Refusal, Violations},
    store::{Checkpoint, LogFilter, Store, StoreError, page::PageBudget},
};

use super::{convert, gate::shown, outgoing::ListPermits, page};

/// The service over the store.
#[derive(Clone)]
pub(super) struct AuditService {
    store: Arc<dyn Store>,
    engine: Arc<Engine>,
    /// Whoever verifies; the others wait, since it reads all there is.
    verifying: Arc<Mutex<()>>,
    lists: ListPermits,
}

impl AuditService {
    pub(super) fn over(store: Arc<dyn Store>, engine: Arc<Engine>, lists: ListPermits) -> AuditService {
        AuditService { store, engine, verifying: Arc::default(), lists }
    }

    /// The entries of a page, as many as one answer can hold, and whether there are more.
    async fn page(
        &self,
        caller: &Caller,
        listing: &Listing,
    ) -> Result<(Vec<pb::AuditEntry>, bool), StoreError> {
        let (mut budget, mut entries) = (PageBudget::new(listing.size), Vec::<pb::AuditEntry>::new());
        loop {
            let last = entries.last().map(|entry| Revision(entry.revision)).or(listing.cursor);
            let step = budget.step();
            let mut rows = self.store.log(&listing.filter, last, step + 1).await?;
            let more = rows.len() > step as usize;
            rows.truncate(step as usize);
            for entry in Page::read(&*self.store, rows).await?.entries(caller, listing.full) {
                if !budget.take(entry.encoded_len()) {
                    return Ok((entries, true));
                }
                entries.push(entry);
            }
            if !more || budget.step() == 0 {
                return Ok((entries, more));
            }
        }
    }
}

impl std::fmt::Debug for AuditService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuditService")
    }
}

/// A List, read.
struct Listing {
    filter: LogFilter,
    /// The filters, to which a page token is bound.
    bound: Vec<u8>,
    cursor: Option<Revision>,
    size: u32,
    full: bool,
}

fn read(caller: &Caller, engine: &Engine, request: &pb::ListAuditEntriesRequest) -> Result<Listing, Refusal> {
    let mut violations = Violations::default();
    let v = &mut violations;
    let unpaged =
        pb::ListAuditEntriesRequest { page_size: None, page_token: String::new(), ..request.clone() };
    let pb::ListAuditEntriesRequest {
        account,
        key_id,
        actor,
        from,
        to,
        page_size,
        page_token,
        acting_user,
        action,
        oldest_first,
        full,
        after_revision,
    } = request;
    let bound = unpaged.encode_to_vec();
    let size = page::size(*page_size, v);
    let cursor = page::decode(&bound, page_token, v).and_then(|cursor| {
        let revision = cursor.try_into().ok().map(|bytes| Revision(u64::from_be_bytes(bytes)));
        if revision.is_none() {
            page::not_ours(v);
        }
        revision
    });
    let account = convert::read_account("account", account, v);
    let key_id = (!key_id.is_empty()).then(|| convert::read_key_id("key_id", key_id, v)).flatten();
    let from = convert::read_timestamp("from", *from, v);
    let to = convert::read_timestamp("to", *to, v);
    convert::note_controls("actor", actor, v);
    let acting_user =
        (!acting_user.is_empty()).then(|| v.take("acting_user", UserId::parse(acting_user))).flatten();
    convert::note_controls("action", action, v);
    violations.finish()?;
    if *full {
        caller.must_be_operator()?;
    }
    // An operator reads all accounts unless it names one; an account's caller reads its own.
    let account = match account {
        None if caller.is_operator() => {
            caller.must_act_for_itself()?;
            None
        }
        named => Some(caller.account_meant(named)?),
    };
    if let Some(account) = &account {
        caller.authorize(engine)?.may_know(account)?;
    }
    let given = |text: &String| (!text.is_empty()).then(|| text.clone());
    let filter = LogFilter {
        account,
        key_id,
        actor: given(actor),
        from,
        to,
        acting_user,
        action: given(action),
        after: Revision(*after_revision),
        oldest_first: *oldest_first,
    };
    Ok(Listing { filter, bound, cursor, size, full: *full })
}

/// Entries with the ones before about the same records, as far as the log still has those.
struct Page {
    rows: Vec<(LogRow, Option<Told>)>,
    before: HashMap<Revision, Told>,
}

impl Page {
    async fn read(store: &dyn Store, rows: Vec<LogRow>) -> Result<Page, StoreError> {
        let rows: Vec<_> = rows
            .into_iter()
            .map(|row| {
                let told = Told::read(&row.payload);
                (row, told)
            })
            .collect();
        let previous = |told: &Told| told.via.previous.filter(|revision| *revision != Revision(0));
        let wanted: Vec<_> = rows.iter().filter_map(|(_, told)| previous(told.as_ref()?)).collect();
        let before = store.log_at(&wanted).await?;
        let before = before.iter().filter_map(|row| Some((row.revision, Told::read(&row.payload)?)));
        Ok(Page { before: before.collect(), rows })
    }

    fn entries(self, caller: &Caller, full: bool) -> Vec<pb::AuditEntry> {
        let before = self.before;
        self.rows.into_iter().map(|(row, told)| entry(caller, full, row, told, &before)).collect()
    }
}

fn changes(told: &Told, before: &HashMap<Revision, Told>) -> Vec<pb::AuditFieldChange> {
    let changes = match told.via.previous {
        None => Vec::new(),
        Some(Revision(0)) => told.changes(None),
        Some(previous) => match before.get(&previous) {
            Some(before) => told.changes(Some(before)),
            None => Vec::new(),
        },
    };
    let message = |change: crate::domain::entry::FieldChange| pb::AuditFieldChange {
        field: change.field,
        before: change.before.unwrap_or_default(),
        after: change.after.unwrap_or_default(),
    };
    let archived = told.via.archived.as_ref().map(|archived| pb::AuditFieldChange {
        field: "archived".to_owned(),
        // Text and numbers: there is nothing that JSON cannot say.
        after: serde_json::to_string(archived).unwrap_or_default(),
        before: String::new(),
    });
    changes.into_iter().map(message).chain(archived).collect()
}

fn entry(
    caller: &Caller,
    full: bool,
    row: LogRow,
    told: Option<Told>,
    before: &HashMap<Revision, Told>,
) -> pb::AuditEntry {
    let LogRow { revision, at, action, account, key_id, user, actor, actor_account, acting_user, .. } = row;
    let (method, payload, hash, prev_hash) = (row.method, row.payload, row.hash, row.prev_hash);
    let text = |account: Option<AccountId>| account.map(String::from).unwrap_or_default();
    // An account does not learn from where its operator works.
    let may_see_call = caller.is_operator() || actor_account.as_ref() == Some(&caller.account);
    let via = told.as_ref().filter(|_| may_see_call).map(|told| told.via.clone()).unwrap_or_default();
    pb::AuditEntry {
        revision: revision.0,
        at: Some(convert::timestamp(at)),
        action,
        account: text(account),
        key_id: key_id.map(|id| id.to_string()).unwrap_or_default(),
        actor,
        actor_account: text(actor_account),
        method,
        detail: told.as_ref().map(Told::detail).unwrap_or_default(),
        hash: hash.to_vec(),
        user: user.map(String::from).unwrap_or_default(),
        acting_user: acting_user.map(String::from).unwrap_or_default(),
        changes: told.as_ref().map(|told| changes(told, before)).unwrap_or_default(),
        previous_revision: told.and_then(|told| told.via.previous).map(|revision| revision.0),
        request_id: via.request_id.unwrap_or_default(),
        peer: via.peer.unwrap_or_default(),
        prev_hash: prev_hash.to_vec(),
        payload: if full { payload } else { String::new() },
    }
}

fn question(request: &pb::VerifyAuditLogRequest) -> Result<Question, Refusal> {
    let mut violations = Violations::default();
    let pb::VerifyAuditLogRequest { from_revision, to_revision, expect_revision, expect_hash, chain_only } =
        request;
    let expect = match (expect_revision, <[u8; 32]>::try_from(expect_hash.as_slice())) {
        (None, _) => {
            violations.note_if(!expect_hash.is_empty(), "expect_revision", "must be given with expect_hash");
            None
        }
        (Some(revision), Ok(hash)) => Some(Position { revision: Revision(*revision), hash }),
        (Some(_), Err(_)) => {
            violations.note("expect_hash", "must be 32 bytes");
            None
        }
    };
    violations.finish()?;
    let from = (*from_revision != 0).then_some(Revision(*from_revision));
    Ok(Question { from, to: to_revision.map(Revision), expect, chain_only: *chain_only })
}

fn checkpoint(made: Checkpoint) -> pb::AuditCheckpoint {
    pb::AuditCheckpoint {
        revision: made.at.revision.0,
        hash: made.at.hash.to_vec(),
        entries: made.entries,
        made_at: Some(convert::timestamp(made.made_at)),
    }
}

fn expected(expected: Option<Expected>) -> pb::ExpectedEntry {
    match expected {
        None => pb::ExpectedEntry::Unspecified,
        Some(Expected::Found) => pb::ExpectedEntry::Found,
        Some(Expected::Differs) => pb::ExpectedEntry::Differs,
        Some(Expected::Archived) => pb::ExpectedEntry::Archived,
        Some(Expected::Lost) => pb::ExpectedEntry::Lost,
        Some(Expected::Outside) => pb::ExpectedEntry::Outside,
    }
}

fn answer(verified: Verified) -> pb::VerifyAuditLogResponse {
    let valid = verified.is_valid();
    let (broken_at, problem) = verified.broken.unwrap_or_default();
    let mismatch = |one: crate::audit::verify::Mismatch| pb::AuditMismatch {
        record: one.record,
        revision: one.revision.0,
        problem: one.problem,
    };
    pb::VerifyAuditLogResponse {
        valid,
        head: verified.head.revision.0,
        head_hash: verified.head.hash.to_vec(),
        broken_at: broken_at.0,
        problem,
        entries: verified.entries,
        first_revision: verified.first.0,
        last_revision: verified.last.revision.0,
        last_hash: verified.last.hash.to_vec(),
        checkpoint: verified.checkpoint.map(checkpoint),
        records: verified.records,
        mismatches: verified.mismatches.into_iter().map(mismatch).collect(),
        expected: expected(verified.expected).into(),
    }
}

#[tonic::async_trait]
impl pb::audit_service_server::AuditService for AuditService {
    async fn list(
        &self,
        mut request: Request<pb::ListAuditEntriesRequest>,
    ) -> Result<Response<pb::ListAuditEntriesResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let listing = read(&caller, &self.engine, request.get_ref())?;
        let place = self.lists.take(&caller.account).await?;
        let (entries, more) = self.page(&caller, &listing).await.map_err(Refusal::from)?;
        if let Some(account) = &listing.filter.account {
            // A person who left meanwhile reads nothing.
            caller.authorize(&self.engine)?.may_know(account)?;
        }
        let next = entries
            .last()
            .filter(|_| more)
            .map(|last| page::encode(&listing.bound, &last.revision.to_be_bytes()));
        Ok(place.hold(pb::ListAuditEntriesResponse { entries, next_page_token: next.unwrap_or_default() }))
    }

    async fn verify(
        &self,
        mut request: Request<pb::VerifyAuditLogRequest>,
    ) -> Result<Response<pb::VerifyAuditLogResponse>, Status> {
        shown::<Caller>(&mut request)?.must_be_operator()?;
        let question = question(request.get_ref())?;
        let _turn = self.verifying.lock().await;
        let verified = verify::verify(&*self.store, question).await?;
        Ok(Response::new(answer(verified)))
    }
}
