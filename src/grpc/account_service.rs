//! Implements AccountService: validates requests, calls the use cases and converts their results.
//!
//! No product rule belongs here.

use std::sync::Arc;

use prost::Message as _;
use tonic::{Request, Response, Status};

use crate::{
    accounts::AccountOperations,
    caller::Caller,
    domain::{
        account::{Account, AccountMember, Role},
        name::{AccountId, DisplayName, RoleName, UserId},
        scope::Scope,
        time::Revision,
    },
    membership::{MembershipEnd, MembershipOperations},
    pb,
    replication::propagation::{ChangeEffect, PropagationWaiter},
    service_error::{InvalidFields, ResourceKind, ServiceError},
    store::page_budget::PageBudget,
};

use super::{
    call_extensions::take_extension, concurrency::exchange_permit_for_waiting, convert,
    deadline::PropagationDeadline, key_requests::require_read, list_permits::ListPermits, page_token,
};

const MAX_ROLE_SCOPES: usize = 256;

/// AccountService over the use cases of accounts, roles and members.
#[derive(Clone)]
pub(super) struct AccountService {
    pub(super) accounts: Arc<AccountOperations>,
    pub(super) membership: Arc<MembershipOperations>,
    /// Waits until a change is in force on every replica.
    pub(super) propagation: PropagationWaiter,
    pub(super) list_permits: ListPermits,
}

impl std::fmt::Debug for AccountService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.accounts.fmt(f)
    }
}

fn parse_account_id(id: &str) -> Result<AccountId, ServiceError> {
    AccountId::parse(id).map_err(|error| ServiceError::invalid_field("id", error.to_string()))
}

fn account_with_revision(account: &Account) -> (Option<pb::Account>, u64) {
    (Some(convert::account_to_proto(account)), account.revision.0)
}

impl AccountService {
    /// Waits for propagation if the change restricts rights, and returns the report.
    async fn wait_for_propagation(
        &self,
        revision: Revision,
        effect: ChangeEffect,
        deadline: PropagationDeadline,
    ) -> Result<Option<pb::Propagation>, ServiceError> {
        exchange_permit_for_waiting();
        let report = self.propagation.wait_if_restricting(revision, effect, deadline.deadline).await?;
        Ok(Some(convert::propagation_to_proto(report)))
    }

    async fn wait_for_restriction(
        &self,
        revision: Revision,
        deadline: PropagationDeadline,
    ) -> Result<Option<pb::Propagation>, ServiceError> {
        self.wait_for_propagation(revision, ChangeEffect::Restricts { is_repeat: false }, deadline).await
    }
}

#[tonic::async_trait]
impl pb::account_service_server::AccountService for AccountService {
    async fn create(
        &self,
        mut request: Request<pb::CreateAccountRequest>,
    ) -> Result<Response<pb::CreateAccountResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let pb::CreateAccountRequest { id, name, longest_life } = request.get_ref();
        let mut violations = InvalidFields::default();
        let id = convert::read_account("id", id, &mut violations);
        let name =
            (!name.is_empty()).then(|| violations.ok_or_add("name", DisplayName::parse(name))).flatten();
        let lifetime = convert::read_max_lifetime("longest_life", *longest_life, &mut violations);
        violations.into_result()?;
        let (account, revision) =
            account_with_revision(&self.accounts.create(&caller, id, name, lifetime).await?);
        Ok(Response::new(pb::CreateAccountResponse { account, revision }))
    }

    async fn get(
        &self,
        mut request: Request<pb::GetAccountRequest>,
    ) -> Result<Response<pb::GetAccountResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let account = self.accounts.get(&caller, &parse_account_id(&request.get_ref().id)?).await?;
        Ok(Response::new(pb::GetAccountResponse { account: Some(convert::account_to_proto(&account)) }))
    }

    async fn list(
        &self,
        mut request: Request<pb::ListAccountsRequest>,
    ) -> Result<Response<pb::ListAccountsResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let pb::ListAccountsRequest { page_size, page_token } = request.get_ref();
        let mut violations = InvalidFields::default();
        let size = page_token::read_page_size(*page_size, &mut violations);
        let after = page_token::decode(b"accounts", page_token, &mut violations)
            .and_then(|cursor| page_token::parse_cursor(&cursor, AccountId::parse, &mut violations));
        violations.into_result()?;
        let list_permit = self.list_permits.acquire(&caller.account).await?;
        let (accounts, next) = self.accounts.list(&caller, after.as_ref(), size).await?;
        Ok(list_permit.attach(pb::ListAccountsResponse {
            accounts: accounts.iter().map(convert::account_to_proto).collect(),
            next_page_token: next
                .map(|id| page_token::encode(b"accounts", id.as_str().as_bytes()))
                .unwrap_or_default(),
        }))
    }

    async fn update(
        &self,
        mut request: Request<pb::UpdateAccountRequest>,
    ) -> Result<Response<pb::UpdateAccountResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let pb::UpdateAccountRequest { id, name, longest_life, no_longest_life } = request.get_ref();
        let mut violations = InvalidFields::default();
        let v = &mut violations;
        let id = v.ok_or_add("id", AccountId::parse(id));
        let nothing = name.is_none() && longest_life.is_none() && !no_longest_life;
        v.add_if(nothing, "name", "or longest_life or no_longest_life is required");
        let both = longest_life.is_some() && *no_longest_life;
        v.add_if(both, "no_longest_life", "must not be given together with longest_life");
        let name = name.as_deref().and_then(|name| v.ok_or_add("name", DisplayName::parse(name)));
        let lifetime = convert::read_max_lifetime("longest_life", *longest_life, v);
        violations.into_result()?;
        let id = require_read(id)?;
        let lifetime = if *no_longest_life { Some(None) } else { lifetime.map(Some) };
        let (account, revision) =
            account_with_revision(&self.accounts.update(&caller, &id, name, lifetime).await?);
        Ok(Response::new(pb::UpdateAccountResponse { account, revision }))
    }

    async fn suspend(
        &self,
        mut request: Request<pb::SuspendAccountRequest>,
    ) -> Result<Response<pb::SuspendAccountResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let account = self.accounts.suspend(&caller, &parse_account_id(&request.get_ref().id)?).await?;
        let (account, revision) = account_with_revision(&account);
        let propagation = self.wait_for_restriction(Revision(revision), deadline).await?;
        Ok(Response::new(pb::SuspendAccountResponse { account, revision, propagation }))
    }

    async fn resume(
        &self,
        mut request: Request<pb::ResumeAccountRequest>,
    ) -> Result<Response<pb::ResumeAccountResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let account = self.accounts.resume(&caller, &parse_account_id(&request.get_ref().id)?).await?;
        let (account, revision) = account_with_revision(&account);
        Ok(Response::new(pb::ResumeAccountResponse { account, revision }))
    }

    async fn put_member(
        &self,
        mut request: Request<pb::PutMemberRequest>,
    ) -> Result<Response<pb::PutMemberResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let pb::PutMemberRequest { account, user, role } = request.get_ref();
        let mut violations = InvalidFields::default();
        let account = violations.ok_or_add("account", AccountId::parse(account));
        let user = violations.ok_or_add("user", UserId::parse(user));
        let role = violations.ok_or_add("role", RoleName::parse(role));
        violations.into_result()?;
        let (account, user, role) = (require_read(account)?, require_read(user)?, require_read(role)?);
        let (member, effect) = self.membership.put_member(&caller, account, user, role).await?;
        let revision = member.revision.0;
        let propagation = self.wait_for_propagation(member.revision, effect, deadline).await?;
        Ok(Response::new(pb::PutMemberResponse {
            member: Some(member_to_proto(&member)),
            revision,
            propagation,
        }))
    }

    async fn remove_member(
        &self,
        mut request: Request<pb::RemoveMemberRequest>,
    ) -> Result<Response<pb::RemoveMemberResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let pb::RemoveMemberRequest { account, user } = request.get_ref();
        let mut violations = InvalidFields::default();
        let account = violations.ok_or_add("account", AccountId::parse(account));
        let user = violations.ok_or_add("user", UserId::parse(user));
        violations.into_result()?;
        let MembershipEnd { revision, was_member } =
            self.membership.remove_member(&caller, require_read(account)?, require_read(user)?).await?;
        let effect = ChangeEffect::Restricts { is_repeat: !was_member };
        let propagation = self.wait_for_propagation(revision, effect, deadline).await?;
        if !was_member {
            return Err(ServiceError::NotFound(ResourceKind::Member).into());
        }
        Ok(Response::new(pb::RemoveMemberResponse { revision: revision.0, propagation }))
    }

    async fn list_members(
        &self,
        mut request: Request<pb::ListMembersRequest>,
    ) -> Result<Response<pb::ListMembersResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let pb::ListMembersRequest { account, page_size, page_token } = request.get_ref();
        let filters = format!("members {account}").into_bytes();
        let mut violations = InvalidFields::default();
        let account = violations.ok_or_add("account", AccountId::parse(account));
        let size = page_token::read_page_size(*page_size, &mut violations);
        let after = page_token::decode(&filters, page_token, &mut violations)
            .and_then(|cursor| page_token::parse_cursor(&cursor, UserId::parse, &mut violations));
        violations.into_result()?;
        let list_permit = self.list_permits.acquire(&caller.account).await?;
        let (members, next) =
            self.membership.list_members(&caller, &require_read(account)?, after.as_ref(), size).await?;
        Ok(list_permit.attach(pb::ListMembersResponse {
            members: members.iter().map(member_to_proto).collect(),
            next_page_token: next
                .map(|user| page_token::encode(&filters, user.as_str().as_bytes()))
                .unwrap_or_default(),
        }))
    }

    async fn put_role(
        &self,
        mut request: Request<pb::PutRoleRequest>,
    ) -> Result<Response<pb::PutRoleResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let pb::PutRoleRequest { account, name, scopes } = request.get_ref();
        let mut violations = InvalidFields::default();
        let account = convert::read_account("account", account, &mut violations);
        let name = violations.ok_or_add("name", RoleName::parse(name));
        violations.add_if(scopes.is_empty(), "scopes", "at least one is required");
        let scopes = violations.parse_list("scopes", scopes, MAX_ROLE_SCOPES, Scope::parse_grant);
        violations.into_result()?;
        let (role, effect) =
            self.membership.put_role(&caller, account, require_read(name)?, scopes.into()).await?;
        let revision = role.revision.0;
        let propagation = self.wait_for_propagation(role.revision, effect, deadline).await?;
        Ok(Response::new(pb::PutRoleResponse { role: Some(role_to_proto(&role)), revision, propagation }))
    }

    async fn delete_role(
        &self,
        mut request: Request<pb::DeleteRoleRequest>,
    ) -> Result<Response<pb::DeleteRoleResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let deadline = take_extension::<PropagationDeadline>(&mut request)?;
        let pb::DeleteRoleRequest { account, name } = request.get_ref();
        let mut violations = InvalidFields::default();
        let account = convert::read_account("account", account, &mut violations);
        let name = violations.ok_or_add("name", RoleName::parse(name));
        violations.into_result()?;
        let revision = self.membership.delete_role(&caller, account, require_read(name)?).await?.0;
        let propagation = self.wait_for_restriction(Revision(revision), deadline).await?;
        Ok(Response::new(pb::DeleteRoleResponse { revision, propagation }))
    }

    async fn list_roles(
        &self,
        mut request: Request<pb::ListRolesRequest>,
    ) -> Result<Response<pb::ListRolesResponse>, Status> {
        let caller = take_extension::<Caller>(&mut request)?;
        let pb::ListRolesRequest { account, page_size, page_token } = request.get_ref();
        let filters = format!("roles {account}").into_bytes();
        let mut violations = InvalidFields::default();
        let account = convert::read_account("account", account, &mut violations);
        let size = page_size.map_or(u32::MAX, |size| page_token::read_page_size(Some(size), &mut violations));
        let after = page_token::decode(&filters, page_token, &mut violations);
        violations.into_result()?;
        let list_permit = self.list_permits.acquire(&caller.account).await?;
        let roles = self.membership.list_roles(&caller, account).await?;
        let begin = after.map_or(0, |after| roles.partition_point(|role| role_cursor(role) <= after));
        let mut budget = PageBudget::new(size);
        let listed: Vec<pb::Role> = roles[begin..]
            .iter()
            .map(role_to_proto)
            .take_while(|role| budget.next_step_size() > 0 && budget.try_add(role.encoded_len()))
            .collect();
        let end = begin + listed.len();
        let next = roles[..end].last().filter(|_| end < roles.len());
        Ok(list_permit.attach(pb::ListRolesResponse {
            roles: listed,
            next_page_token: next
                .map(|last| page_token::encode(&filters, &role_cursor(last)))
                .unwrap_or_default(),
        }))
    }
}

/// The position of a role in a list: by name, a global role before an account's role of the same name.
fn role_cursor(Role { account, name, .. }: &Role) -> Vec<u8> {
    let account = account.as_ref().map(AccountId::as_str).unwrap_or_default();
    [name.as_str(), account].join("\0").into_bytes()
}

fn member_to_proto(AccountMember { account, user, role, revision }: &AccountMember) -> pb::Member {
    pb::Member {
        account: account.to_string(),
        user: user.to_string(),
        role: role.to_string(),
        revision: revision.0,
    }
}

fn role_to_proto(Role { account, name, scopes, revision }: &Role) -> pb::Role {
    pb::Role {
        account: account.as_ref().map(ToString::to_string).unwrap_or_default(),
        name: name.to_string(),
        scopes: convert::to_strings(scopes),
        revision: revision.0,
    }
}
