//! AccountService: reads requests, calls the use cases, writes answers.

use std::sync::Arc;

use prost::Message as _;
use tonic::{Request, Response, Status};

use crate::{
    access::Caller,
    accounts::Accounts,
    domain::{
        account::{Account, Member, Role},
        name::{AccountId, DisplayName, RoleName, UserId},
        scope::Scope,
        time::Revision,
    },
    pb,
    people::{People, Removed},
    refusal::{Refusal, Thing, Violations},
    replication::propagation::{Propagation, Reach},
    store::page::PageBudget,
};

use super::{
    convert,
    gate::{Patience, shown},
    keys_read::filled,
    outgoing::ListPermits,
    page,
    permits::exchange_permit_for_waiting,
};

const MAX_SCOPES: usize = 256;

/// The service over its use cases.
#[derive(Clone)]
pub(super) struct AccountService {
    /// The use cases.
    pub accounts: Arc<Accounts>,
    /// The use cases of roles and members.
    pub people: Arc<People>,
    /// Waits until a change is in force everywhere.
    pub propagation: Propagation,
    /// The places for lists.
    pub lists: ListPermits,
}

impl std::fmt::Debug for AccountService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.accounts.fmt(f)
    }
}

fn read_id(id: &str) -> Result<AccountId, Refusal> {
    AccountId::parse(id).map_err(|error| Refusal::field("id", error.to_string()))
}

fn shape(account: &Account) -> (Option<pb::Account>, u64) {
    (Some(convert::account(account)), account.revision.0)
}

impl AccountService {
    /// How far a change has reached, which is everywhere where it takes anything away.
    async fn reached(
        &self,
        revision: Revision,
        reach: Reach,
        patience: Patience,
    ) -> Result<Option<pb::Propagation>, Refusal> {
        exchange_permit_for_waiting();
        let report = self.propagation.reached(revision, reach, patience.until).await?;
        Ok(Some(convert::propagation(report)))
    }

    async fn narrowed(
        &self,
        revision: Revision,
        patience: Patience,
    ) -> Result<Option<pb::Propagation>, Refusal> {
        self.reached(revision, Reach::Narrows { again: false }, patience).await
    }
}

#[tonic::async_trait]
impl pb::account_service_server::AccountService for AccountService {
    async fn create(
        &self,
        mut request: Request<pb::CreateAccountRequest>,
    ) -> Result<Response<pb::CreateAccountResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let pb::CreateAccountRequest { id, name, longest_life } = request.get_ref();
        let mut violations = Violations::default();
        let id = convert::read_account("id", id, &mut violations);
        let name = (!name.is_empty()).then(|| violations.take("name", DisplayName::parse(name))).flatten();
        let life = convert::read_life("longest_life", *longest_life, &mut violations);
        violations.finish()?;
        let (account, revision) = shape(&self.accounts.create(&caller, id, name, life).await?);
        Ok(Response::new(pb::CreateAccountResponse { account, revision }))
    }

    async fn get(
        &self,
        mut request: Request<pb::GetAccountRequest>,
    ) -> Result<Response<pb::GetAccountResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let account = self.accounts.get(&caller, &read_id(&request.get_ref().id)?).await?;
        Ok(Response::new(pb::GetAccountResponse { account: Some(convert::account(&account)) }))
    }

    async fn list(
        &self,
        mut request: Request<pb::ListAccountsRequest>,
    ) -> Result<Response<pb::ListAccountsResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let pb::ListAccountsRequest { page_size, page_token } = request.get_ref();
        let mut violations = Violations::default();
        let size = page::size(*page_size, &mut violations);
        let after = page::decode(b"accounts", page_token, &mut violations)
            .and_then(|cursor| page::read(&cursor, AccountId::parse, &mut violations));
        violations.finish()?;
        let place = self.lists.take(&caller.account).await?;
        let (accounts, next) = self.accounts.list(&caller, after.as_ref(), size).await?;
        Ok(place.hold(pb::ListAccountsResponse {
            accounts: accounts.iter().map(convert::account).collect(),
            next_page_token: next
                .map(|id| page::encode(b"accounts", id.as_str().as_bytes()))
                .unwrap_or_default(),
        }))
    }

    async fn update(
        &self,
        mut request: Request<pb::UpdateAccountRequest>,
    ) -> Result<Response<pb::UpdateAccountResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let pb::UpdateAccountRequest { id, name, longest_life, no_longest_life } = request.get_ref();
        let mut violations = Violations::default();
        let v = &mut violations;
        let id = v.take("id", AccountId::parse(id));
        let nothing = name.is_none() && longest_life.is_none() && !no_longest_life;
        v.note_if(
            nothing,
            "name",
            "or longest_life or no_longest_life is required: nothing is to be changed",
        );
        let both = longest_life.is_some() && *no_longest_life;
        v.note_if(both, "no_longest_life", "must not be given together with longest_life");
        let name = name.as_deref().and_then(|name| v.take("name", DisplayName::parse(name)));
        let life = convert::read_life("longest_life", *longest_life, v);
        violations.finish()?;
        let id = filled(id)?;
        let life = if *no_longest_life { Some(None) } else { life.map(Some) };
        let (account, revision) = shape(&self.accounts.update(&caller, &id, name, life).await?);
        Ok(Response::new(pb::UpdateAccountResponse { account, revision }))
    }

    async fn suspend(
        &self,
        mut request: Request<pb::SuspendAccountRequest>,
    ) -> Result<Response<pb::SuspendAccountResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let patience = shown::<Patience>(&mut request)?;
        let account = self.accounts.suspend(&caller, &read_id(&request.get_ref().id)?).await?;
        let (account, revision) = shape(&account);
        let propagation = self.narrowed(Revision(revision), patience).await?;
        Ok(Response::new(pb::SuspendAccountResponse { account, revision, propagation }))
    }

    async fn resume(
        &self,
        mut request: Request<pb::ResumeAccountRequest>,
    ) -> Result<Response<pb::ResumeAccountResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let account = self.accounts.resume(&caller, &read_id(&request.get_ref().id)?).await?;
        let (account, revision) = shape(&account);
        Ok(Response::new(pb::ResumeAccountResponse { account, revision }))
    }

    async fn put_member(
        &self,
        mut request: Request<pb::PutMemberRequest>,
    ) -> Result<Response<pb::PutMemberResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let patience = shown::<Patience>(&mut request)?;
        let pb::PutMemberRequest { account, user, role } = request.get_ref();
        let mut violations = Violations::default();
        let account = violations.take("account", AccountId::parse(account));
        let user = violations.take("user", UserId::parse(user));
        let role = violations.take("role", RoleName::parse(role));
        violations.finish()?;
        let (account, user, role) = (filled(account)?, filled(user)?, filled(role)?);
        let (member, reach) = self.people.put_member(&caller, account, user, role).await?;
        let revision = member.revision.0;
        let propagation = self.reached(member.revision, reach, patience).await?;
        Ok(Response::new(pb::PutMemberResponse {
            member: Some(member_message(&member)),
            revision,
            propagation,
        }))
    }

    async fn remove_member(
        &self,
        mut request: Request<pb::RemoveMemberRequest>,
    ) -> Result<Response<pb::RemoveMemberResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let patience = shown::<Patience>(&mut request)?;
        let pb::RemoveMemberRequest { account, user } = request.get_ref();
        let mut violations = Violations::default();
        let account = violations.take("account", AccountId::parse(account));
        let user = violations.take("user", UserId::parse(user));
        violations.finish()?;
        let Removed { revision, was_member } =
            self.people.remove_member(&caller, filled(account)?, filled(user)?).await?;
        let reach = Reach::Narrows { again: !was_member };
        let propagation = self.reached(revision, reach, patience).await?;
        if !was_member {
            return Err(Refusal::NotFound(Thing::Member).into());
        }
        Ok(Response::new(pb::RemoveMemberResponse { revision: revision.0, propagation }))
    }

    async fn list_members(
        &self,
        mut request: Request<pb::ListMembersRequest>,
    ) -> Result<Response<pb::ListMembersResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let pb::ListMembersRequest { account, page_size, page_token } = request.get_ref();
        let filters = format!("members {account}").into_bytes();
        let mut violations = Violations::default();
        let account = violations.take("account", AccountId::parse(account));
        let size = page::size(*page_size, &mut violations);
        let after = page::decode(&filters, page_token, &mut violations)
            .and_then(|cursor| page::read(&cursor, UserId::parse, &mut violations));
        violations.finish()?;
        let place = self.lists.take(&caller.account).await?;
        let (members, next) =
            self.people.list_members(&caller, &filled(account)?, after.as_ref(), size).await?;
        Ok(place.hold(pb::ListMembersResponse {
            members: members.iter().map(member_message).collect(),
            next_page_token: next
                .map(|user| page::encode(&filters, user.as_str().as_bytes()))
                .unwrap_or_default(),
        }))
    }

    async fn put_role(
        &self,
        mut request: Request<pb::PutRoleRequest>,
    ) -> Result<Response<pb::PutRoleResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let patience = shown::<Patience>(&mut request)?;
        let pb::PutRoleRequest { account, name, scopes } = request.get_ref();
        let mut violations = Violations::default();
        let account = convert::read_account("account", account, &mut violations);
        let name = violations.take("name", RoleName::parse(name));
        violations.note_if(scopes.is_empty(), "scopes", "at least one is required");
        let scopes = violations.take_each("scopes", scopes, MAX_SCOPES, Scope::parse_grant);
        violations.finish()?;
        let (role, reach) = self.people.put_role(&caller, account, filled(name)?, scopes.into()).await?;
        let revision = role.revision.0;
        let propagation = self.reached(role.revision, reach, patience).await?;
        Ok(Response::new(pb::PutRoleResponse { role: Some(role_message(&role)), revision, propagation }))
    }

    async fn delete_role(
        &self,
        mut request: Request<pb::DeleteRoleRequest>,
    ) -> Result<Response<pb::DeleteRoleResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let patience = shown::<Patience>(&mut request)?;
        let pb::DeleteRoleRequest { account, name } = request.get_ref();
        let mut violations = Violations::default();
        let account = convert::read_account("account", account, &mut violations);
        let name = violations.take("name", RoleName::parse(name));
        violations.finish()?;
        let revision = self.people.delete_role(&caller, account, filled(name)?).await?.0;
        let propagation = self.narrowed(Revision(revision), patience).await?;
        Ok(Response::new(pb::DeleteRoleResponse { revision, propagation }))
    }

    async fn list_roles(
        &self,
        mut request: Request<pb::ListRolesRequest>,
    ) -> Result<Response<pb::ListRolesResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let pb::ListRolesRequest { account, page_size, page_token } = request.get_ref();
        let filters = format!("roles {account}").into_bytes();
        let mut violations = Violations::default();
        let account = convert::read_account("account", account, &mut violations);
        let size = page_size.map_or(u32::MAX, |size| page::size(Some(size), &mut violations));
        let after = page::decode(&filters, page_token, &mut violations);
        violations.finish()?;
        let place = self.lists.take(&caller.account).await?;
        let roles = self.people.list_roles(&caller, account).await?;
        let begin = after.map_or(0, |after| roles.partition_point(|role| cursor(role) <= after));
        let mut budget = PageBudget::new(size);
        let listed: Vec<pb::Role> = roles[begin..]
            .iter()
            .map(role_message)
            .take_while(|role| budget.step() > 0 && budget.take(role.encoded_len()))
            .collect();
        let end = begin + listed.len();
        let next = roles[..end].last().filter(|_| end < roles.len());
        Ok(place.hold(pb::ListRolesResponse {
            roles: listed,
            next_page_token: next.map(|last| page::encode(&filters, &cursor(last))).unwrap_or_default(),
        }))
    }
}

/// The place of a role in a list: by its name, and a global one before an account's of the same name.
fn cursor(Role { account, name, .. }: &Role) -> Vec<u8> {
    let account = account.as_ref().map(AccountId::as_str).unwrap_or_default();
    [name.as_str(), account].join("\0").into_bytes()
}

fn member_message(Member { account, user, role, revision }: &Member) -> pb::Member {
    pb::Member {
        account: account.to_string(),
        user: user.to_string(),
        role: role.to_string(),
        revision: revision.0,
    }
}

fn role_message(Role { account, name, scopes, revision }: &Role) -> pb::Role {
    pb::Role {
        account: account.as_ref().map(ToString::to_string).unwrap_or_default(),
        name: name.to_string(),
        scopes: convert::texts(scopes),
        revision: revision.0,
    }
}
