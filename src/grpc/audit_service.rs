//! Implements AuditService: lists the audit log as the caller may see it, and verifies its integrity.
//!
//! Digests are left out unless an operator asks for complete entries, since no other reader needs them.
//! Verification itself belongs in `audit/verify.rs`.

use std::{collections::HashMap, sync::Arc};

use prost::Message as _;
use tokio::sync::Mutex;
use tonic::{Request, Response, Status};

use crate::{
    audit::verify::{self, ExpectedEntryStatus, VerificationReport, VerifyOptions},
    caller::Caller,
    domain::{
        lease::LogPosition,
        log::LogEntry,
        log_payload::RedactedPayload,
        name::{AccountId, UserId},
        time::Revision,
    },
    engine::Engine,
    pb,
    service_error::{InvalidFields, ServiceError},
    store::{ArchiveCheckpoint, LogFilter, Store, StoreError, page_budget::PageBudget},
};

use super::{call_extensions::take_extension, convert, list_permits::ListPermits, page_token};

#[derive(Clone)]
pub(super) struct AuditService {
    store: Arc<dyn Store>,
    engine: Arc<Engine>,
    /// Held by the running verification. Others wait, since each reads the whole log.
    verify_lock: Arc<Mutex<()>>,
    list_permits: ListPermits,
}

impl AuditService {
    pub(super) fn new(store: Arc<dyn Store>, engine: Arc<Engine>, list_permits: ListPermits) -> AuditService {
        AuditService { store, engine, verify_lock: Arc::default(), list_permits }
    }

    /// Loads the entries of a page, as many as fit into a response, and whether more follow.
    async fn load_page(
        &self,
        caller: &Caller,
        listing: &AuditListRequest,
    ) -> Result<(Vec<pb::AuditEntry>, bool), StoreError> {
        let (mut budget, mut entries) = (PageBudget::new(listing.page_size), Vec::<pb::AuditEntry>::new());
        loop {
            let last = entries.last().map(|entry| Revision(entry.revision)).or(listing.cursor);
            let limit = budget.next_step_size();
            let mut rows = self.store.list_log(&listing.filter, last, limit + 1).await?;
            let has_more = rows.len() > limit as usize;
            rows.truncate(limit as usize);
            for entry in
                AuditPage::load(&*self.store, rows).await?.into_entries(caller, listing.include_payload)
            {
                if !budget.try_add(entry.encoded_len()) {
                    return Ok((entries, true));
                }
                entries.push(entry);
            }
            if !has_more || budget.next_step_size() == 0 {
                return Ok((entries, has_more));
            }
        }
    }
}

impl std::fmt::Debug for AuditService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuditService")
    }
}

struct AuditListRequest {
    filter: LogFilter,
    /// The encoded filters, which page tokens are bound to.
    filter_bytes: Vec<u8>,
    cursor: Option<Revision>,
    page_size: u32,
    include_payload: bool,
}

fn read_list_request(
    caller: &Caller,
    engine: &Engine,
    request: &pb::ListAuditEntriesRequest,
) -> Result<AuditListRequest, ServiceError> {
    let mut violations = InvalidFields::default();
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
    let filter_bytes = unpaged.encode_to_vec();
    let size = page_token::read_page_size(*page_size, v);
    let cursor = page_token::decode(&filter_bytes, page_token, v).and_then(|cursor| {
        let revision = cursor.try_into().ok().map(|bytes| Revision(u64::from_be_bytes(bytes)));
        if revision.is_none() {
            page_token::reject_token(v);
        }
        revision
    });
    let account = convert::read_account("account", account, v);
    let key_id = (!key_id.is_empty()).then(|| convert::read_key_id("key_id", key_id, v)).flatten();
    let from = convert::read_timestamp("from", *from, v);
    let to = convert::read_timestamp("to", *to, v);
    convert::check_no_controls("actor", actor, v);
    let acting_user =
        (!acting_user.is_empty()).then(|| v.ok_or_add("acting_user", UserId::parse(acting_user))).flatten();
    convert::check_no_controls("action", action, v);
    violations.into_result()?;
    if *full {
        caller.require_operator()?;
    }
    // An operator reads all accounts unless it names one. An account's caller reads its own.
    let account = match account {
        None if caller.is_operator() => {
            caller.require_no_acting_user()?;
            None
        }
        named => Some(caller.resolve_account(named)?),
    };
    if let Some(account) = &account {
        caller.authorize(engine)?.check_account_visible(account)?;
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
    Ok(AuditListRequest { filter, filter_bytes, cursor, page_size: size, include_payload: *full })
}

/// Entries, with their predecessors about the same records, as far as the log still has them.
struct AuditPage {
    rows: Vec<(LogEntry, Option<RedactedPayload>)>,
    previous_entries: HashMap<Revision, RedactedPayload>,
}

impl AuditPage {
    async fn load(store: &dyn Store, rows: Vec<LogEntry>) -> Result<AuditPage, StoreError> {
        let rows: Vec<_> = rows
            .into_iter()
            .map(|row| {
                let redacted = RedactedPayload::parse(&row.payload);
                (row, redacted)
            })
            .collect();
        let previous =
            |redacted: &RedactedPayload| redacted.origin.previous.filter(|revision| *revision != Revision(0));
        let wanted: Vec<_> = rows.iter().filter_map(|(_, redacted)| previous(redacted.as_ref()?)).collect();
        let previous_entries = store.get_log_entries(&wanted).await?;
        let previous_entries = previous_entries
            .iter()
            .filter_map(|row| Some((row.revision, RedactedPayload::parse(&row.payload)?)));
        Ok(AuditPage { previous_entries: previous_entries.collect(), rows })
    }

    fn into_entries(self, caller: &Caller, full: bool) -> Vec<pb::AuditEntry> {
        let previous_entries = self.previous_entries;
        self.rows
            .into_iter()
            .map(|(row, redacted)| entry_to_proto(caller, full, row, redacted, &previous_entries))
            .collect()
    }
}

fn field_changes_to_proto(
    redacted: &RedactedPayload,
    previous_entries: &HashMap<Revision, RedactedPayload>,
) -> Vec<pb::AuditFieldChange> {
    let changes = match redacted.origin.previous {
        None => Vec::new(),
        Some(Revision(0)) => redacted.changes_since(None),
        Some(previous) => match previous_entries.get(&previous) {
            Some(entry) => redacted.changes_since(Some(entry)),
            None => Vec::new(),
        },
    };
    let message = |change: crate::domain::log_payload::FieldChange| pb::AuditFieldChange {
        field: change.field,
        before: change.before.unwrap_or_default(),
        after: change.after.unwrap_or_default(),
    };
    let archived = redacted.origin.archived.as_ref().map(|archived| pb::AuditFieldChange {
        field: "archived".to_owned(),
        // Strings and numbers always encode to JSON.
        after: serde_json::to_string(archived).unwrap_or_default(),
        before: String::new(),
    });
    changes.into_iter().map(message).chain(archived).collect()
}

fn entry_to_proto(
    caller: &Caller,
    full: bool,
    row: LogEntry,
    redacted: Option<RedactedPayload>,
    previous_entries: &HashMap<Revision, RedactedPayload>,
) -> pb::AuditEntry {
    let LogEntry { revision, at, action, account, key_id, user, actor, actor_account, acting_user, .. } = row;
    let (method, payload, hash, prev_hash) = (row.method, row.payload, row.hash, row.prev_hash);
    let text = |account: Option<AccountId>| account.map(String::from).unwrap_or_default();
    // An account does not see from where its operator works.
    let may_see_call = caller.is_operator() || actor_account.as_ref() == Some(&caller.account);
    let origin = redacted
        .as_ref()
        .filter(|_| may_see_call)
        .map(|redacted| redacted.origin.clone())
        .unwrap_or_default();
    pb::AuditEntry {
        revision: revision.0,
        at: Some(convert::timestamp_to_proto(at)),
        action,
        account: text(account),
        key_id: key_id.map(|id| id.to_string()).unwrap_or_default(),
        actor,
        actor_account: text(actor_account),
        method,
        detail: redacted.as_ref().map(RedactedPayload::to_json).unwrap_or_default(),
        hash: hash.to_vec(),
        user: user.map(String::from).unwrap_or_default(),
        acting_user: acting_user.map(String::from).unwrap_or_default(),
        changes: redacted
            .as_ref()
            .map(|redacted| field_changes_to_proto(redacted, previous_entries))
            .unwrap_or_default(),
        previous_revision: redacted.and_then(|redacted| redacted.origin.previous).map(|revision| revision.0),
        request_id: origin.request_id.unwrap_or_default(),
        peer: origin.peer.unwrap_or_default(),
        prev_hash: prev_hash.to_vec(),
        payload: if full { payload } else { String::new() },
    }
}

fn read_verify_request(request: &pb::VerifyAuditLogRequest) -> Result<VerifyOptions, ServiceError> {
    let mut violations = InvalidFields::default();
    let pb::VerifyAuditLogRequest { from_revision, to_revision, expect_revision, expect_hash, chain_only } =
        request;
    let expect = match (expect_revision, <[u8; 32]>::try_from(expect_hash.as_slice())) {
        (None, _) => {
            violations.add_if(!expect_hash.is_empty(), "expect_revision", "must be given with expect_hash");
            None
        }
        (Some(revision), Ok(hash)) => Some(LogPosition { revision: Revision(*revision), hash }),
        (Some(_), Err(_)) => {
            violations.add("expect_hash", "must be 32 bytes");
            None
        }
    };
    violations.into_result()?;
    let from = (*from_revision != 0).then_some(Revision(*from_revision));
    Ok(VerifyOptions {
        from,
        to: to_revision.map(Revision),
        expected_entry: expect,
        is_chain_only: *chain_only,
    })
}

fn checkpoint_to_proto(checkpoint: ArchiveCheckpoint) -> pb::AuditCheckpoint {
    pb::AuditCheckpoint {
        revision: checkpoint.head.revision.0,
        hash: checkpoint.head.hash.to_vec(),
        entries: checkpoint.entry_count,
        made_at: Some(convert::timestamp_to_proto(checkpoint.made_at)),
    }
}

fn expected_entry_to_proto(expected: Option<ExpectedEntryStatus>) -> pb::ExpectedEntry {
    match expected {
        None => pb::ExpectedEntry::Unspecified,
        Some(ExpectedEntryStatus::Found) => pb::ExpectedEntry::Found,
        Some(ExpectedEntryStatus::Differs) => pb::ExpectedEntry::Differs,
        Some(ExpectedEntryStatus::Archived) => pb::ExpectedEntry::Archived,
        Some(ExpectedEntryStatus::Lost) => pb::ExpectedEntry::Lost,
        Some(ExpectedEntryStatus::OutOfRange) => pb::ExpectedEntry::Outside,
    }
}

fn verify_response(report: VerificationReport) -> pb::VerifyAuditLogResponse {
    let valid = report.is_valid();
    let (broken_at, problem) = report.first_fault.unwrap_or_default();
    let mismatch = |mismatch: crate::audit::verify::RecordMismatch| pb::AuditMismatch {
        record: mismatch.record,
        revision: mismatch.revision.0,
        problem: mismatch.problem,
    };
    pb::VerifyAuditLogResponse {
        valid,
        head: report.head.revision.0,
        head_hash: report.head.hash.to_vec(),
        broken_at: broken_at.0,
        problem,
        entries: report.entries,
        first_revision: report.first.0,
        last_revision: report.last.revision.0,
        last_hash: report.last.hash.to_vec(),
        checkpoint: report.checkpoint.map(checkpoint_to_proto),
        records: report.compared_records,
        mismatches: report.mismatches.into_iter().map(mismatch).collect(),
        expected: expected_entry_to_proto(report.expected_status).into(),
    }
}

#[tonic::async_trait]
impl pb::audit_service_server::AuditService for AuditService {
    async fn list(
        &self,
        mut request: Request<pb::ListAuditEntriesRequest>,
    ) -> Result<Response<pb::ListAuditEntriesResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let listing = read_list_request(&caller, &self.engine, request.get_ref())?;
        let list_permit = self.list_permits.acquire(&caller.account).await?;
        let (entries, has_more) = self.load_page(&caller, &listing).await.map_err(ServiceError::from)?;
        if let Some(account) = &listing.filter.account {
            // The acting user may have left the account meanwhile.
            caller.authorize(&self.engine)?.check_account_visible(account)?;
        }
        let next = entries
            .last()
            .filter(|_| has_more)
            .map(|last| page_token::encode(&listing.filter_bytes, &last.revision.to_be_bytes()));
        Ok(list_permit
            .attach(pb::ListAuditEntriesResponse { entries, next_page_token: next.unwrap_or_default() }))
    }

    async fn verify(
        &self,
        mut request: Request<pb::VerifyAuditLogRequest>,
    ) -> Result<Response<pb::VerifyAuditLogResponse>, Status> {
        take_extension::<Caller>(&mut request)?.require_operator()?;
        let options = read_verify_request(request.get_ref())?;
        let _guard = self.verify_lock.lock().await;
        let report = verify::verify_log(&*self.store, options).await?;
        Ok(Response::new(verify_response(report)))
    }
}
