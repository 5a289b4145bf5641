//! AccountService: reads requests, calls the use cases, writes answers.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::{
    access::Caller,
    accounts::Accounts,
    clock::Clock,
    domain::{
        account::Account,
        name::{AccountId, DisplayName},
    },
    pb,
    refusal::{Refusal, Violations},
};

use super::{convert, gate::shown, page, status::unimplemented};

/// The service over its use cases.
#[derive(Clone)]
pub(super) struct AccountService {
    /// The use cases.
    pub accounts: Arc<Accounts>,
    /// Tells from when on a change is in force.
    pub clock: Arc<dyn Clock>,
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

#[tonic::async_trait]
impl pb::account_service_server::AccountService for AccountService {
    async fn create(
        &self,
        mut request: Request<pb::CreateAccountRequest>,
    ) -> Result<Response<pb::CreateAccountResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let pb::CreateAccountRequest { id, name } = request.get_ref();
        let mut violations = Violations::default();
        let id = convert::read_account("id", id, &mut violations);
        let name = (!name.is_empty())
            .then(|| violations.take("name", DisplayName::parse(name)))
            .flatten();
        violations.finish()?;
        let (account, revision) = shape(&self.accounts.create(&caller, id, name).await?);
        Ok(Response::new(pb::CreateAccountResponse { account, revision }))
    }

    async fn get(
        &self,
        mut request: Request<pb::GetAccountRequest>,
    ) -> Result<Response<pb::GetAccountResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let account = self
            .accounts
            .get(&caller, &read_id(&request.get_ref().id)?)
            .await?;
        Ok(Response::new(pb::GetAccountResponse {
            account: Some(convert::account(&account)),
        }))
    }

    async fn list(
        &self,
        mut request: Request<pb::ListAccountsRequest>,
    ) -> Result<Response<pb::ListAccountsResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let pb::ListAccountsRequest {
            page_size,
            page_token,
        } = request.get_ref();
        let mut violations = Violations::default();
        let size = page::size(*page_size, &mut violations);
        let after = page::decode(b"accounts", page_token, &mut violations).and_then(|cursor| {
            let id = std::str::from_utf8(&cursor)
                .ok()
                .and_then(|id| AccountId::parse(id).ok());
            if id.is_none() {
                page::not_ours(&mut violations);
            }
            id
        });
        violations.finish()?;
        let (accounts, next) = self.accounts.list(&caller, after.as_ref(), size).await?;
        Ok(Response::new(pb::ListAccountsResponse {
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
        let pb::UpdateAccountRequest { id, name } = request.get_ref();
        let mut violations = Violations::default();
        let id = violations.take("id", AccountId::parse(id));
        violations.note_if(
            name.is_none(),
            "name",
            "is required: nothing else of an account can be changed",
        );
        let name = name
            .as_deref()
            .and_then(|name| violations.take("name", DisplayName::parse(name)));
        violations.finish()?;
        let (Some(id), Some(name)) = (id, name) else {
            return Err(Refusal::field("name", "is required").into());
        };
        let (account, revision) = shape(&self.accounts.rename(&caller, &id, name).await?);
        Ok(Response::new(pb::UpdateAccountResponse { account, revision }))
    }

    async fn suspend(
        &self,
        mut request: Request<pb::SuspendAccountRequest>,
    ) -> Result<Response<pb::SuspendAccountResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let account = self
            .accounts
            .suspend(&caller, &read_id(&request.get_ref().id)?)
            .await?;
        let (account, revision) = shape(&account);
        let propagation = Some(convert::in_force(self.clock.now()));
        Ok(Response::new(pb::SuspendAccountResponse {
            account,
            revision,
            propagation,
        }))
    }

    async fn resume(
        &self,
        mut request: Request<pb::ResumeAccountRequest>,
    ) -> Result<Response<pb::ResumeAccountResponse>, Status> {
        let caller = shown::<Caller>(&mut request)?;
        let account = self
            .accounts
            .resume(&caller, &read_id(&request.get_ref().id)?)
            .await?;
        let (account, revision) = shape(&account);
        Ok(Response::new(pb::ResumeAccountResponse { account, revision }))
    }

    async fn put_member(
        &self,
        _: Request<pb::PutMemberRequest>,
    ) -> Result<Response<pb::PutMemberResponse>, Status> {
        Err(unimplemented())
    }

    async fn remove_member(
        &self,
        _: Request<pb::RemoveMemberRequest>,
    ) -> Result<Response<pb::RemoveMemberResponse>, Status> {
        Err(unimplemented())
    }

    async fn list_members(
        &self,
        _: Request<pb::ListMembersRequest>,
    ) -> Result<Response<pb::ListMembersResponse>, Status> {
        Err(unimplemented())
    }

    async fn put_role(
        &self,
        _: Request<pb::PutRoleRequest>,
    ) -> Result<Response<pb::PutRoleResponse>, Status> {
        Err(unimplemented())
    }

    async fn delete_role(
        &self,
        _: Request<pb::DeleteRoleRequest>,
    ) -> Result<Response<pb::DeleteRoleResponse>, Status> {
        Err(unimplemented())
    }

    async fn list_roles(
        &self,
        _: Request<pb::ListRolesRequest>,
    ) -> Result<Response<pb::ListRolesResponse>, Status> {
        Err(unimplemented())
    }
}
