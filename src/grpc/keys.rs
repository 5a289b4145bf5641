//! KeyService: reads requests, calls the use cases, writes answers. No rule of the product stands here.

use std::{sync::Arc, time::Duration};

use prost::Message;
use sha2::{Digest as _, Sha256};
use tonic::{Request, Response, Status};

use crate::{
    access::Caller,
    domain::{
        name::{IdempotencyKey, KeyId, TokenPrefix, UserId},
        time::Revision,
        token,
    },
    engine::Holder,
    keys::{Field, Issued, Keys, NewKey, Once, Patch, View},
    pb,
    refusal::{Refusal, Thing, Violations},
    store::{KeyFilter, OwnerFilter},
};

use super::{convert, gate::shown, page, status::unimplemented};

const MAX_OVERLAP: Duration = Duration::from_secs(7 * 24 * 60 * 60);
const MAX_COMMENT: usize = 1024;
const USER_KEYS: &str = "user keys are not served by this version yet";

/// The service over its use cases.
#[derive(Clone, Debug)]
pub(super) struct KeyService(pub Arc<Keys>);

/// The request's name for itself, with a digest of all that it asks.
fn read_once(
    method: &str,
    key: Option<&str>,
    request: &impl Message,
    violations: &mut Violations,
) -> Option<Once> {
    let key = violations.take("idempotency_key", IdempotencyKey::parse(key?))?;
    let mut sha = Sha256::new();
    sha.update(method);
    sha.update([0]);
    sha.update(request.encode_to_vec());
    Some(Once {
        key,
        fingerprint: sha.finalize().into(),
    })
}

/// A field that every finished reading has filled; what is missing was noted as a violation.
fn filled<T>(value: Option<T>) -> Result<T, Refusal> {
    value.ok_or_else(|| Refusal::field("(message)", "could not be read"))
}

impl KeyService {
    fn read_create(
        &self,
        caller: &Caller,
        request: &pb::CreateKeyRequest,
    ) -> Result<(NewKey, Option<Once>), Refusal> {
        let mut violations = Violations::default();
        let v = &mut violations;
        let pb::CreateKeyRequest {
            account,
            user,
            environment,
            name,
            scopes,
            roles,
            expires_at,
            ttl,
            prefix,
            customers,
            allowed_cidrs,
            rate_limits,
            quota,
            metadata,
            idempotency_key,
        } = request;
        v.note_if(
            !user.is_empty() && !account.is_empty(),
            "user",
            "must not be given together with account",
        );
        v.note_if(!user.is_empty(), "user", USER_KEYS);
        let unowned = account.is_empty() && user.is_empty() && caller.is_operator();
        v.note_if(
            unowned,
            "account",
            "is required from the operator account's callers",
        );
        let account = convert::read_account("account", account, v);
        let environment =
            convert::read_environment("environment", environment, self.0.environments(), v).cloned();
        let expires_at = convert::read_expiry(*expires_at, *ttl, self.0.now(), v);
        v.note_if(
            scopes.is_empty() && roles.is_empty(),
            "scopes",
            "at least one scope or role is required",
        );
        let raw = convert::RawTerms {
            prefix: "",
            name: name.as_deref(),
            scopes,
            roles,
            customers,
            allowed_cidrs,
            rate_limits,
            quota: quota.as_ref(),
            metadata,
            expires_at,
        };
        let terms = raw.read(v);
        let prefix = prefix
            .as_deref()
            .and_then(|prefix| v.take("prefix", TokenPrefix::parse(prefix)));
        let once = read_once(caller.method, idempotency_key.as_deref(), request, v);
        violations.finish()?;
        Ok((
            NewKey {
                account,
                environment: filled(environment)?,
                terms,
                prefix,
            },
            once,
        ))
    }

    fn read_filter(
        &self,
        caller: &Caller,
        request: &pb::ListKeysRequest,
    ) -> Result<(KeyFilter, Page), Refusal> {
        let mut violations = Violations::default();
        let v = &mut violations;
        let unpaged = pb::ListKeysRequest {
            page_size: None,
            page_token: String::new(),
            ..request.clone()
        };
        let pb::ListKeysRequest {
            account,
            user,
            environment,
            states,
            name_prefix,
            unused_since,
            expires_before,
            page_size,
            page_token,
        } = request;
        let filters = unpaged.encode_to_vec();
        let size = page::size(*page_size, v);
        let before = page::decode(&filters, page_token, v).and_then(|cursor| read_cursor(&cursor, v));
        v.note_if(
            !user.is_empty() && !account.is_empty(),
            "user",
            "must not be given together with account",
        );
        let environment = (!environment.is_empty())
            .then(|| convert::read_environment("environment", environment, self.0.environments(), v))
            .flatten();
        let account = convert::read_account("account", account, v);
        let user = (!user.is_empty())
            .then(|| v.take("user", UserId::parse(user)))
            .flatten();
        let states = convert::read_states(states, v);
        let unused_since = convert::read_timestamp("unused_since", *unused_since, v);
        let expires_before = convert::read_timestamp("expires_before", *expires_before, v);
        violations.finish()?;
        let owner = match user {
            // To an account's callers user keys do not exist.
            Some(_) if !caller.is_operator() => return Err(Refusal::NotFound(Thing::Key)),
            Some(user) => OwnerFilter::User(user),
            None => OwnerFilter::Account(caller.account_meant(account)?),
        };
        let filter = KeyFilter {
            owner,
            environment: environment.map(|environment| environment.name.clone()),
            states,
            name_prefix: name_prefix.clone(),
            unused_since,
            expires_before,
            now: self.0.now(),
        };
        Ok((
            filter,
            Page {
                filters,
                before,
                size,
            },
        ))
    }

    fn read_update(&self, request: &pb::UpdateKeyRequest) -> Result<(KeyId, Patch), Refusal> {
        let mut violations = Violations::default();
        let v = &mut violations;
        let pb::UpdateKeyRequest { key, update_mask } = request;
        let Some(key) = key else {
            return Err(Refusal::field("key", "is required"));
        };
        let paths = update_mask
            .as_ref()
            .map(|mask| mask.paths.as_slice())
            .unwrap_or_default();
        v.note_if(paths.is_empty(), "update_mask", "must name at least one field");
        let fields = read_fields(paths, v);
        let id = convert::read_key_id("key.id", &key.id, v);
        let has = |field| fields.contains(&field);
        let expires_at = has(Field::ExpiresAt).then(|| {
            let at = convert::read_timestamp("key.expires_at", key.expires_at, v);
            v.note_if(
                at.is_some_and(|at| at <= self.0.now()),
                "key.expires_at",
                "must be in the future",
            );
            at
        });
        let nothing = std::collections::BTreeMap::new();
        fn given<'a, T>(has: bool, list: &'a [T]) -> &'a [T] {
            if has { list } else { &[] }
        }
        let raw = convert::RawTerms {
            prefix: "key.",
            name: Some(key.name.as_str()).filter(|name| has(Field::Name) && !name.is_empty()),
            scopes: given(has(Field::Scopes), &key.scopes),
            roles: given(has(Field::Roles), &key.roles),
            customers: given(has(Field::Customers), &key.customers),
            allowed_cidrs: given(has(Field::AllowedCidrs), &key.allowed_cidrs),
            rate_limits: given(has(Field::RateLimits), &key.rate_limits),
            quota: key.quota.as_ref().filter(|_| has(Field::Quota)),
            metadata: if has(Field::Metadata) {
                &key.metadata
            } else {
                &nothing
            },
            expires_at: expires_at.flatten(),
        };
        let terms = raw.read(v);
        violations.finish()?;
        Ok((filled(id)?, Patch { fields, terms }))
    }
}

/// A page that was asked for.
struct Page {
    filters: Vec<u8>,
    before: Option<KeyId>,
    size: u32,
}

fn read_cursor(cursor: &[u8], violations: &mut Violations) -> Option<KeyId> {
    let id = cursor.try_into().ok().map(KeyId::from_bytes);
    if id.is_none() {
        page::not_ours(violations);
    }
    id
}

fn read_fields(paths: &[String], violations: &mut Violations) -> Vec<Field> {
    let mut fields = Vec::new();
    for (at, path) in paths.iter().enumerate() {
        fields.push(match path.as_str() {
            "name" => Field::Name,
            "scopes" => Field::Scopes,
            "roles" => Field::Roles,
            "expires_at" => Field::ExpiresAt,
            "customers" => Field::Customers,
            "allowed_cidrs" => Field::AllowedCidrs,
            "rate_limits" => Field::RateLimits,
            "quota" => Field::Quota,
            "metadata" => Field::Metadata,
            _ => {
                violations.note(
                    format!("update_mask.paths[{at}]"),
                    format!(
                        "{path:?} cannot be changed; name, scopes, roles, expires_at, customers, allowed_cidrs, \
                         rate_limits, quota and metadata can"
                    ),
                );
                continue;
            }
        });
    }
    fields
}

fn read_id(id: &str) -> Result<KeyId, Refusal> {
    KeyId::parse(id).map_err(|error| Refusal::field("id", error.to_string()))
}

/// A changed key's answer: the key, its revision, and how far the change has reached.
fn changed(view: View) -> (Option<pb::Key>, u64, Option<pb::Propagation>) {
    let (revision, now) = (view.key.revision, view.now);
    (Some(convert::key(view)), revision.0, Some(convert::in_force(now)))
}

#[tonic::async_trait]
impl pb::key_service_server::KeyService for KeyService {
    async fn create(
        &self,
        mut request: Request<pb::CreateKeyRequest>,
    ) -> Result<Response<pb::CreateKeyResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let (new, once) = self.read_create(&caller, request.get_ref())?;
        let (issued, Revision(revision)) = self.0.create(&caller, new, once).await?;
        let replayed = issued.token.is_none();
        Ok(Response::new(pb::CreateKeyResponse {
            key: Some(convert::key(issued.view)),
            token: issued
                .token
                .map(|token| token.reveal().to_owned())
                .unwrap_or_default(),
            revision,
            replayed,
        }))
    }

    async fn get(
        &self,
        mut request: Request<pb::GetKeyRequest>,
    ) -> Result<Response<pb::GetKeyResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let view = self.0.get(&caller, read_id(&request.get_ref().id)?).await?;
        Ok(Response::new(pb::GetKeyResponse {
            key: Some(convert::key(view)),
        }))
    }

    async fn list(
        &self,
        mut request: Request<pb::ListKeysRequest>,
    ) -> Result<Response<pb::ListKeysResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let (
            filter,
            Page {
                filters,
                before,
                size,
            },
        ) = self.read_filter(&caller, request.get_ref())?;
        let (views, next) = self.0.list(&filter, before, size).await?;
        Ok(Response::new(pb::ListKeysResponse {
            keys: views.into_iter().map(convert::key).collect(),
            next_page_token: next
                .map(|id| page::encode(&filters, id.as_bytes()))
                .unwrap_or_default(),
        }))
    }

    async fn update(
        &self,
        mut request: Request<pb::UpdateKeyRequest>,
    ) -> Result<Response<pb::UpdateKeyResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let (id, patch) = self.read_update(request.get_ref())?;
        let (key, revision, propagation) = changed(self.0.update(&caller, id, &patch).await?);
        Ok(Response::new(pb::UpdateKeyResponse {
            key,
            revision,
            propagation,
        }))
    }

    async fn disable(
        &self,
        mut request: Request<pb::DisableKeyRequest>,
    ) -> Result<Response<pb::DisableKeyResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let view = self.0.disable(&caller, read_id(&request.get_ref().id)?).await?;
        let (key, revision, propagation) = changed(view);
        Ok(Response::new(pb::DisableKeyResponse {
            key,
            revision,
            propagation,
        }))
    }

    async fn enable(
        &self,
        mut request: Request<pb::EnableKeyRequest>,
    ) -> Result<Response<pb::EnableKeyResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let view = self.0.enable(&caller, read_id(&request.get_ref().id)?).await?;
        let (key, revision, propagation) = changed(view);
        Ok(Response::new(pb::EnableKeyResponse {
            key,
            revision,
            propagation,
        }))
    }

    async fn revoke(
        &self,
        mut request: Request<pb::RevokeKeyRequest>,
    ) -> Result<Response<pb::RevokeKeyResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let pb::RevokeKeyRequest { id, reason, comment } = request.into_inner();
        let mut violations = Violations::default();
        let id = convert::read_key_id("id", &id, &mut violations);
        let reason = convert::read_revoke_reason(reason, &mut violations);
        let long = comment.chars().count() > MAX_COMMENT;
        violations.note_if(
            long,
            "comment",
            format!("must be at most {MAX_COMMENT} characters"),
        );
        violations.finish()?;
        let view = self.0.revoke(&caller, filled(id)?, reason, comment).await?;
        let (key, revision, propagation) = changed(view);
        Ok(Response::new(pb::RevokeKeyResponse {
            key,
            revision,
            propagation,
        }))
    }

    async fn bulk_revoke(
        &self,
        _: Request<pb::BulkRevokeKeysRequest>,
    ) -> Result<Response<pb::BulkRevokeKeysResponse>, Status> {
        Err(unimplemented())
    }

    async fn rotate(
        &self,
        mut request: Request<pb::RotateKeyRequest>,
    ) -> Result<Response<pb::RotateKeyResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let request = request.get_ref();
        let mut violations = Violations::default();
        let id = convert::read_key_id("id", &request.id, &mut violations);
        let overlap = convert::read_duration("overlap", request.overlap, &mut violations).unwrap_or_default();
        violations.note_if(overlap > MAX_OVERLAP, "overlap", "must be 0 to 7 days");
        let once = read_once(
            caller.method,
            request.idempotency_key.as_deref(),
            request,
            &mut violations,
        );
        violations.finish()?;
        let Issued { view, token } = self.0.rotate(&caller, filled(id)?, overlap, once).await?;
        let previous_expires_at = view
            .key
            .secrets
            .get(1)
            .and_then(|secret| secret.expires_at)
            .map(convert::timestamp);
        let replayed = token.is_none();
        let (key, revision, propagation) = changed(view);
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
        let caller = shown::<Caller>(&mut request)?;
        let view = self
            .0
            .finish_rotation(&caller, read_id(&request.get_ref().id)?)
            .await?;
        let (key, revision, propagation) = changed(view);
        Ok(Response::new(pb::FinishRotationResponse {
            key,
            revision,
            propagation,
        }))
    }

    async fn import(
        &self,
        _: Request<pb::ImportKeysRequest>,
    ) -> Result<Response<pb::ImportKeysResponse>, Status> {
        Err(unimplemented())
    }

    async fn lookup(
        &self,
        mut request: Request<pb::LookupKeyRequest>,
    ) -> Result<Response<pb::LookupKeyResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let presented = &request.get_ref().token;
        read_token("token", presented)?;
        let (view, secret_version) = self.0.lookup(&caller, presented).await?;
        Ok(Response::new(pb::LookupKeyResponse {
            key: Some(convert::key(view)),
            secret_version,
        }))
    }

    async fn who_am_i(
        &self,
        mut request: Request<pb::WhoAmIRequest>,
    ) -> Result<Response<pb::WhoAmIResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let (view, account) = self.0.who_am_i(&caller).await?;
        let account = pb::AccountName {
            id: account.id.to_string(),
            name: account.name.to_string(),
        };
        Ok(Response::new(pb::WhoAmIResponse {
            account: Some(account),
            key: Some(convert::key(view)),
        }))
    }

    async fn revoke_self(
        &self,
        mut request: Request<pb::RevokeSelfRequest>,
    ) -> Result<Response<pb::RevokeSelfResponse>, Status> {
        let holder = shown::<Holder>(&mut request)?;
        let view = self
            .0
            .revoke_self(&holder, "keyward.v1.KeyService/RevokeSelf")
            .await?;
        let (_, revision, propagation) = changed(view);
        Ok(Response::new(pb::RevokeSelfResponse {
            revision,
            propagation,
        }))
    }
}

/// A token to look up: not empty, and no longer than one may be.
fn read_token(field: &str, presented: &str) -> Result<(), Refusal> {
    if presented.is_empty() || presented.len() > token::MAX_LEN {
        return Err(Refusal::field(
            field,
            format!("must be 1 to {} bytes", token::MAX_LEN),
        ));
    }
    Ok(())
}
