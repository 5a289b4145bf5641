//! Calls and formats that several `keyward roles` commands share.

use crate::{
    cli::{
        api_client::{ApiClient, DefaultTimeout},
        error::CliError,
    },
    pb,
};

pub(super) async fn put_role(
    session: &ApiClient,
    request: pb::PutRoleRequest,
) -> Result<pb::PutRoleResponse, CliError> {
    session
        .call_accounts(DefaultTimeout::Propagation, request, async |mut client, request| {
            client.put_role(request).await
        })
        .await
}

/// Fetches the roles of an account and the global ones, page by page.
pub(super) async fn fetch_all_roles(
    session: &ApiClient,
    account: String,
) -> Result<pb::ListRolesResponse, CliError> {
    let mut all = pb::ListRolesResponse::default();
    let mut request = pb::ListRolesRequest { account, ..Default::default() };
    loop {
        let page = session
            .call_accounts(DefaultTimeout::Quick, request.clone(), async |mut client, request| {
                client.list_roles(request).await
            })
            .await?;
        all.roles.extend(page.roles);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        request.page_token = page.next_page_token;
    }
}

/// Formats a role's account for people; an empty one is "global".
pub(super) fn format_role_owner(account: &str) -> String {
    if account.is_empty() { "global".to_owned() } else { account.to_owned() }
}
