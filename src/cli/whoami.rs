//! `keyward whoami` and `keyward revoke-self`: a token about itself. They need no permission, only the token.

use clap::Args;

use super::{client::Patience, context::Context, failure::Failure, output, table::Record};
use crate::pb;

/// Shows what the caller's own token is.
pub(super) async fn whoami(cx: &mut Context<'_>) -> Result<u8, Failure> {
    let answer = cx
        .session()?
        .keys(Patience::Short, pb::WhoAmIRequest {}, async |mut client, request| {
            client.who_am_i(request).await
        })
        .await?;
    cx.show(&answer, |colours| {
        let account =
            answer.account.as_ref().map(|account| Record::new().field("account name", &account.name));
        let key = match &answer.key {
            Some(key) => output::key(key),
            None => Record::new().field("caller", &answer.actor),
        };
        std::iter::once(key).chain(account).fold(Record::new(), Record::and).show(colours)
    })?;
    Ok(0)
}

/// Flags of `keyward revoke-self`.
#[derive(Debug, Args)]
pub(super) struct RevokeSelfArgs {
    /// Do not ask first
    #[arg(long, short)]
    yes: bool,
}

impl RevokeSelfArgs {
    /// Revokes the caller's own key.
    pub(super) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        cx.console.confirm("Revoke the key of the token you call with, for ever?", self.yes)?;
        let answer = cx
            .session()?
            .keys(Patience::Propagation, pb::RevokeSelfRequest {}, async |mut client, request| {
                client.revoke_self(request).await
            })
            .await?;
        cx.show(&answer, |_| output::propagation(answer.revision, answer.propagation.as_ref()))?;
        Ok(0)
    }
}
