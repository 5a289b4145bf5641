//! AuditService: the log as its readers may see it. Digests stay out: nobody needs them to read what happened.

use std::sync::Arc;

use prost::Message as _;
use serde_json::Value;
use tonic::{Request, Response, Status};

use crate::{
    access::Caller,
    domain::{log::LogRow, time::Revision},
    pb,
    refusal::{Refusal, Violations},
    store::{LogFilter, Store},
};

use super::{convert, gate::shown, page, status::unimplemented};

/// The service over the store.
#[derive(Clone)]
pub(super) struct AuditService(pub Arc<dyn Store>);

impl std::fmt::Debug for AuditService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuditService")
    }
}

fn read(
    caller: &Caller,
    request: &pb::ListAuditEntriesRequest,
) -> Result<(LogFilter, Vec<u8>, Option<Revision>, u32), Refusal> {
    let mut violations = Violations::default();
    let v = &mut violations;
    let unpaged =
        pb::ListAuditEntriesRequest { page_size: None, page_token: String::new(), ..request.clone() };
    let pb::ListAuditEntriesRequest { account, key_id, actor, from, to, page_size, page_token } = request;
    let filters = unpaged.encode_to_vec();
    let size = page::size(*page_size, v);
    let before = page::decode(&filters, page_token, v).and_then(|cursor| {
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
    violations.finish()?;
    // An operator reads all accounts unless it names one; an account's caller reads its own.
    let account = match account {
        None if caller.is_operator() => None,
        named => Some(caller.account_meant(named)?),
    };
    let actor = (!actor.is_empty()).then(|| actor.clone());
    Ok((LogFilter { account, key_id, actor, from, to }, filters, before, size))
}

/// The payload without digests.
fn detail(payload: &str) -> String {
    fn without_digests(value: &mut Value) {
        match value {
            Value::Object(fields) => {
                fields.remove("digest");
                fields.values_mut().for_each(without_digests);
            }
            Value::Array(items) => items.iter_mut().for_each(without_digests),
            _ => {}
        }
    }
    let Ok(mut value) = serde_json::from_str::<Value>(payload) else {
        return String::new();
    };
    without_digests(&mut value);
    value.to_string()
}

fn entry(row: LogRow) -> pb::AuditEntry {
    let LogRow { revision, at, action, account, key_id, user, actor, actor_account, acting_user, .. } = row;
    let (method, payload, hash) = (row.method, row.payload, row.hash);
    let text =
        |account: Option<crate::domain::name::AccountId>| account.map(String::from).unwrap_or_default();
    pb::AuditEntry {
        revision: revision.0,
        at: Some(convert::timestamp(at)),
        action,
        account: text(account),
        key_id: key_id.map(|id| id.to_string()).unwrap_or_default(),
        actor,
        actor_account: text(actor_account),
        method,
        detail: detail(&payload),
        hash: hash.to_vec(),
        user: user.map(String::from).unwrap_or_default(),
        acting_user: acting_user.map(String::from).unwrap_or_default(),
    }
}

#[tonic::async_trait]
impl pb::audit_service_server::AuditService for AuditService {
    async fn list(
        &self,
        mut request: Request<pb::ListAuditEntriesRequest>,
    ) -> Result<Response<pb::ListAuditEntriesResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let (filter, filters, before, size) = read(&caller, request.get_ref())?;
        let mut rows = self.0.log(&filter, before, size + 1).await.map_err(Refusal::from)?;
        let more = rows.len() > size as usize;
        rows.truncate(size as usize);
        let next =
            rows.last().filter(|_| more).map(|last| page::encode(&filters, &last.revision.0.to_be_bytes()));
        Ok(Response::new(pb::ListAuditEntriesResponse {
            entries: rows.into_iter().map(entry).collect(),
            next_page_token: next.unwrap_or_default(),
        }))
    }

    async fn verify(
        &self,
        _: Request<pb::VerifyAuditLogRequest>,
    ) -> Result<Response<pb::VerifyAuditLogResponse>, Status> {
        Err(unimplemented())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_digest_leaves_with_an_entry() {
        let payload = r#"{"key":{"id":"x","secrets":[{"version":1,"digest":"ab"},{"digest":"cd"}]}}"#;
        assert_eq!(detail(payload), r#"{"key":{"id":"x","secrets":[{"version":1},{}]}}"#);
    }
}
