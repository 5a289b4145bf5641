//! `keyward whoami` and `keyward revoke-self`: show and revoke the caller's own key. They need the token, but no scope.

use clap::Args;

use super::{
    api_client::DefaultTimeout, context::CommandContext, error::CliError, table::DetailTable, text_output,
};
use crate::pb;

pub(super) async fn whoami(cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
    let response = cx
        .connect()?
        .call_keys(DefaultTimeout::Quick, pb::WhoAmIRequest {}, async |mut client, request| {
            client.who_am_i(request).await
        })
        .await?;
    cx.print_response(&response, |colors| {
        let account =
            response.account.as_ref().map(|account| DetailTable::new().field("account name", &account.name));
        let key = match &response.key {
            Some(key) => text_output::describe_key(key),
            None => DetailTable::new().field("caller", &response.actor),
        };
        std::iter::once(key).chain(account).fold(DetailTable::new(), DetailTable::merge).render(colors)
    })?;
    Ok(0)
}

#[derive(Debug, Args)]
pub(super) struct RevokeSelfArgs {
    /// Do not ask for confirmation
    #[arg(long, short)]
    yes: bool,
}

impl RevokeSelfArgs {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        cx.console.confirm("Permanently revoke the key of your own token?", self.yes)?;
        let response = cx
            .connect()?
            .call_keys(DefaultTimeout::Propagation, pb::RevokeSelfRequest {}, async |mut client, request| {
                client.revoke_self(request).await
            })
            .await?;
        cx.print_response(&response, |_| {
            text_output::format_propagation(response.revision, response.propagation.as_ref())
        })?;
        Ok(0)
    }
}
