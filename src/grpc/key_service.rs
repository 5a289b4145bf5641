//! Implements KeyService: calls the use cases of keys and converts their results.
//!
//! Requests are validated in `key_requests.rs`. No product rule belongs here.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use futures_util::stream::BoxStream;
use prost::Message as _;
use tonic::{Request, Response, Status};

use crate::{
    caller::Caller,
    domain::{
        name::KeyId,
        policy_decision::Reason,
        time::{Revision, Timestamp},
        token,
    },
    engine::Engine,
    keys::{
        IssuedKey, KeyDetails, KeyOperations,
        bulk::{BulkRevocationResult, KeyImportResult, KeyRevocationResult},
    },
    pb,
    replication::propagation::PropagationWaiter,
    service_error::{InvalidFields, ResourceKind, ServiceError},
    store::page_budget::PageBudget,
};

use super::{
    call_extensions::take_extension,
    concurrency::exchange_permit_for_waiting,
    convert,
    deadline::PropagationDeadline,
    key_requests::{
        KeyPageRequest, read_bulk_revoke, read_create, read_create_idempotency, read_idempotency,
        read_import, read_list, read_update, read_usage, require_read,
    },
    list_permits::ListPermits,
    management_session::ManagementSession,
    page_token,
    propagation_stream::stream_reports,
    status,
};

const MAX_OVERLAP: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// KeyService over the use cases of keys.
#[derive(Clone, Debug)]
pub(super) struct KeyService {
    pub(super) keys: Arc<KeyOperations>,
    pub(super) engine: Arc<Engine>,
    /// Waits until a change is in force on every replica.
    pub(super) propagation: PropagationWaiter,
    pub(super) list_permits: ListPermits,
}

fn parse_key_id(id: &str) -> Result<KeyId, ServiceError> {
    KeyId::parse(id).map_err(|error| ServiceError::invalid_field("id", error.to_string()))
}

impl KeyService {
    /// Waits for propagation; returns the key, its revision and the report.
    async fn change_response(
        &self,
        details: KeyDetails,
        deadline: PropagationDeadline,
    ) -> Result<(Option<pb::Key>, u64, Option<pb::Propagation>), ServiceError> {
        let revision = details.key.revision;
        exchange_permit_for_waiting();
        let report =
            self.propagation.wait_if_restricting(revision, details.effect, deadline.deadline).await?;
        Ok((Some(convert::key_to_proto(details)), revision.0, Some(convert::propagation_to_proto(report))))
    }
}

#[tonic::async_trait]
impl pb::key_service_server::KeyService for KeyService {
    async fn create(
        &self,
        mut request: Request<pb::CreateKeyRequest>,
    ) -> Result<Response<pb::CreateKeyResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        // A replay is answered before validation: its expiry may be in the past by now.
        let replay_key = read_create_idempotency(&caller, request.get_ref());
        let replay = self.keys.find_replay(&caller, replay_key.as_ref()).await?;
        let (issued, Revision(revision)) = match replay {
            Some(replay) => replay,
            None => {
                let (new, replay_key) = read_create(&self.keys, &caller, request.get_ref())?;
                self.keys.create(&caller, new, replay_key).await?
            }
        };
        let replayed = issued.token.is_none();
        Ok(Response::new(pb::CreateKeyResponse {
            key: Some(convert::key_to_proto(issued.details)),
            token: issued.token.map(|token| token.reveal().to_owned()).unwrap_or_default(),
            revision,
            replayed,
        }))
    }

    async fn get(
        &self,
        mut request: Request<pb::GetKeyRequest>,
    ) -> Result<Response<pb::GetKeyResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let details = self.keys.get(&caller, parse_key_id(&request.get_ref().id)?).await?;
        Ok(Response::new(pb::GetKeyResponse { key: Some(convert::key_to_proto(details)) }))
    }

    async fn list(
        &self,
        mut request: Request<pb::ListKeysRequest>,
    ) -> Result<Response<pb::ListKeysResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let (filter, KeyPageRequest { filters, before, size }) =
            read_list(&self.keys, &caller, request.get_ref())?;
        let list_permit = self.list_permits.acquire(&caller.account).await?;
        let (views, next) = self.keys.list(&caller, &filter, before, size).await?;
        Ok(list_permit.attach(pb::ListKeysResponse {
            keys: views.into_iter().map(convert::key_to_proto).collect(),
            next_page_token: next.map(|id| page_token::encode(&filters, id.as_bytes())).unwrap_or_default(),
        }))
    }

    async fn update(
        &self,
        mut request: Request<pb::UpdateKeyRequest>,
    ) -> Result<Response<pb::UpdateKeyResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let (id, patch) = read_update(&self.keys, request.get_ref())?;
        let (key, revision, propagation) =
            self.change_response(self.keys.update(&caller, id, &patch).await?, deadline).await?;
        Ok(Response::new(pb::UpdateKeyResponse { key, revision, propagation }))
    }

    async fn disable(
        &self,
        mut request: Request<pb::DisableKeyRequest>,
    ) -> Result<Response<pb::DisableKeyResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let details = self.keys.disable(&caller, parse_key_id(&request.get_ref().id)?).await?;
        let (key, revision, propagation) = self.change_response(details, deadline).await?;
        Ok(Response::new(pb::DisableKeyResponse { key, revision, propagation }))
    }

    async fn enable(
        &self,
        mut request: Request<pb::EnableKeyRequest>,
    ) -> Result<Response<pb::EnableKeyResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let details = self.keys.enable(&caller, parse_key_id(&request.get_ref().id)?).await?;
        let (key, revision, propagation) = self.change_response(details, deadline).await?;
        Ok(Response::new(pb::EnableKeyResponse { key, revision, propagation }))
    }

    async fn revoke(
        &self,
        mut request: Request<pb::RevokeKeyRequest>,
    ) -> Result<Response<pb::RevokeKeyResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let pb::RevokeKeyRequest { id, reason, comment } = request.into_inner();
        let mut violations = InvalidFields::default();
        let id = convert::read_key_id("id", &id, &mut violations);
        let reason = convert::read_revoke_reason(reason, &mut violations);
        convert::check_comment(&comment, &mut violations);
        violations.into_result()?;
        let details = self.keys.revoke(&caller, require_read(id)?, reason, comment).await?;
        let (key, revision, propagation) = self.change_response(details, deadline).await?;
        Ok(Response::new(pb::RevokeKeyResponse { key, revision, propagation }))
    }

    async fn bulk_revoke(
        &self,
        mut request: Request<pb::BulkRevokeKeysRequest>,
    ) -> Result<Response<pb::BulkRevokeKeysResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let bulk = read_bulk_revoke(&self.keys, &caller, request.get_ref())?;
        let dry_run = bulk.dry_run;
        // A dry run is a list. A call that restricts rights does not wait for a list permit.
        let list_permit =
            if dry_run { Some(self.list_permits.acquire(&caller.account).await?) } else { None };
        let BulkRevocationResult { keys: revoked, has_more, wait_revision } =
            self.keys.bulk_revoke(&caller, bulk).await?;
        let revision = crate::keys::bulk::newest_revision(revoked.iter().map(|key| &key.details.key));
        let keys = revoked.into_iter().map(|KeyRevocationResult { details, failure }| pb::BulkRevokeResult {
            key: Some(convert::key_to_proto(details)),
            revoked: failure.is_none(),
            error: failure.map(|failure| status::reason_and_message(failure).0).unwrap_or_default(),
        });
        let keys = keys.collect();
        // Keys that an earlier call revoked are not listed again, but their propagation is awaited too.
        let report = match dry_run {
            true => self.propagation.complete_report(revision),
            false => {
                exchange_permit_for_waiting();
                self.propagation
                    .wait(wait_revision, true, deadline.deadline)
                    .await
                    .map_err(ServiceError::from)?
            }
        };
        let (revision, propagation) = (revision.0, Some(convert::propagation_to_proto(report)));
        let response = pb::BulkRevokeKeysResponse { keys, revision, propagation, more: has_more };
        Ok(match list_permit {
            Some(list_permit) => list_permit.attach(response),
            None => Response::new(response),
        })
    }

    async fn rotate(
        &self,
        mut request: Request<pb::RotateKeyRequest>,
    ) -> Result<Response<pb::RotateKeyResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let request = request.get_ref();
        let mut violations = InvalidFields::default();
        let id = convert::read_key_id("id", &request.id, &mut violations);
        let overlap = convert::read_duration("overlap", request.overlap, &mut violations).unwrap_or_default();
        violations.add_if(overlap > MAX_OVERLAP, "overlap", "must be 0 to 7 days");
        let replay_key =
            read_idempotency(caller.method, request.idempotency_key.as_deref(), request, &mut violations);
        violations.into_result()?;
        let IssuedKey { details, token } =
            self.keys.rotate(&caller, require_read(id)?, overlap, replay_key).await?;
        let previous_expires_at =
            details.key.secrets.get(1).and_then(|secret| secret.expires_at).map(convert::timestamp_to_proto);
        let replayed = token.is_none();
        let (key, revision, propagation) = self.change_response(details, deadline).await?;
        Ok(Response::new(pb::RotateKeyResponse {
            key,
            token: token.map(|token| token.reveal().to_owned()).unwrap_or_default(),
            replayed,
            revision,
            previous_expires_at,
            propagation,
        }))
    }

    async fn finish_rotation(
        &self,
        mut request: Request<pb::FinishRotationRequest>,
    ) -> Result<Response<pb::FinishRotationResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let details = self.keys.finish_rotation(&caller, parse_key_id(&request.get_ref().id)?).await?;
        let (key, revision, propagation) = self.change_response(details, deadline).await?;
        Ok(Response::new(pb::FinishRotationResponse { key, revision, propagation }))
    }

    async fn import(
        &self,
        mut request: Request<pb::ImportKeysRequest>,
    ) -> Result<Response<pb::ImportKeysResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let keys = read_import(&self.keys, &caller, request.into_inner())?;
        let results = self.keys.import(&caller, keys).await?;
        let mut budget = PageBudget::new(u32::MAX);
        let results = results.into_iter().map(|result| match result {
            Ok(KeyImportResult { details, is_replay: replayed }) => {
                // The client has the metadata, and a thousand of them would make the response too large.
                let mut key = pb::Key { metadata: BTreeMap::new(), ..convert::key_to_proto(details) };
                if !budget.try_add(key.encoded_len()) {
                    key = pb::Key { id: key.id, revision: key.revision, ..pb::Key::default() };
                }
                pb::ImportResult { key: Some(key), replayed, ..pb::ImportResult::default() }
            }
            Err(error) => {
                let (error, message) = status::reason_and_message(error);
                pb::ImportResult { error, message, ..pb::ImportResult::default() }
            }
        });
        Ok(Response::new(pb::ImportKeysResponse { results: results.collect() }))
    }

    async fn usage(
        &self,
        mut request: Request<pb::KeyUsageRequest>,
    ) -> Result<Response<pb::KeyUsageResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let (id, from, to, hours) = read_usage(&self.keys, request.get_ref())?;
        let buckets = self.keys.usage_by_interval(&caller, id, from, to, hours).await?;
        let buckets: Vec<_> =
            buckets.into_iter().map(|(start, counts)| usage_bucket_to_proto(start, &counts)).collect();
        let allowed = buckets.iter().map(|bucket| bucket.allowed).sum();
        let denied = buckets.iter().map(|bucket| bucket.denied).sum();
        Ok(Response::new(pb::KeyUsageResponse { buckets, allowed, denied }))
    }

    async fn lookup(
        &self,
        mut request: Request<pb::LookupKeyRequest>,
    ) -> Result<Response<pb::LookupKeyResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let token = &request.get_ref().token;
        check_token_length("token", token)?;
        let (details, secret_version) = self.keys.find_by_token(&caller, token).await?;
        Ok(Response::new(pb::LookupKeyResponse { key: Some(convert::key_to_proto(details)), secret_version }))
    }

    async fn who_am_i(
        &self,
        mut request: Request<pb::WhoAmIRequest>,
    ) -> Result<Response<pb::WhoAmIResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let (details, account) = self.keys.whoami(&caller).await?;
        let account = account
            .map(|account| pb::AccountName { id: account.id.to_string(), name: account.name.to_string() });
        let (key, actor) = (details.map(convert::key_to_proto), caller.actor().to_string());
        Ok(Response::new(pb::WhoAmIResponse { account, key, actor }))
    }

    type WatchPropagationStream = BoxStream<'static, Result<pb::WatchPropagationResponse, Status>>;

    async fn watch_propagation(
        &self,
        mut request: Request<pb::WatchPropagationRequest>,
    ) -> Result<Response<Self::WatchPropagationStream>, Status> {
        let session = take_extension::<ManagementSession>(&mut request)?;
        let revision = Revision(request.get_ref().revision);
        if revision == Revision::default() {
            return Err(ServiceError::invalid_field(
                "revision",
                "must be the revision that a change returned",
            )
            .into());
        }
        let newest = self.engine.require_revision(None).map_err(ServiceError::from)?;
        if !self.propagation.is_recorded(revision, newest).await.map_err(ServiceError::from)? {
            return Err(ServiceError::NotFound(ResourceKind::Revision).into());
        }
        Ok(Response::new(stream_reports(self.propagation.clone(), revision, session)))
    }

    async fn revoke_self(
        &self,
        mut request: Request<pb::RevokeSelfRequest>,
    ) -> Result<Response<pb::RevokeSelfResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let details = self.keys.revoke_self(&caller).await?;
        let (_, revision, propagation) = self.change_response(details, deadline).await?;
        Ok(Response::new(pb::RevokeSelfResponse { revision, propagation }))
    }
}

fn usage_bucket_to_proto(start: Timestamp, counts: &HashMap<Reason, u64>) -> pb::UsageBucket {
    let denied_by_reason: Vec<_> = Reason::ALL
        .into_iter()
        .filter(|reason| *reason != Reason::Ok)
        .filter_map(|reason| {
            let count = *counts.get(&reason)?;
            Some(pb::ReasonCount { reason: convert::reason_to_proto(reason), count })
        })
        .collect();
    pb::UsageBucket {
        start: Some(convert::timestamp_to_proto(start)),
        allowed: counts.get(&Reason::Ok).copied().unwrap_or(0),
        denied: denied_by_reason.iter().map(|count| count.count).sum(),
        denied_by_reason,
    }
}

/// Checks the length of a token to look up.
fn check_token_length(field: &str, token: &str) -> Result<(), ServiceError> {
    if token.is_empty() || token.len() > token::MAX_TOKEN_LEN {
        return Err(ServiceError::invalid_field(
            field,
            format!("must be 1 to {} bytes", token::MAX_TOKEN_LEN),
        ));
    }
    Ok(())
}
