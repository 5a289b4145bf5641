//! `keyward accounts`: creates, lists and changes accounts, the organizations that own keys.

use clap::{Args, Subcommand};

use super::{
    api_client::{ApiClient, DefaultTimeout},
    context::CommandContext,
    error::CliError,
    paging::PageArgs,
    table::{ListTable, plain_cell, shown_value},
    text_output,
    value_format::{LifetimeArg, format_rfc3339},
};
use crate::pb;

#[derive(Debug, Subcommand)]
pub(super) enum AccountsCommand {
    /// Create an account that can own keys
    Create {
        /// 1-64 characters of [A-Za-z0-9_-] [default: generated]
        #[arg(long)]
        id: Option<String>,
        /// Name for people [default: the id]
        #[arg(long)]
        name: Option<String>,
        /// The longest lifetime of its keys: a duration (90d, 1y), or never for no limit [default: never]
        #[arg(long, value_name = "DURATION", value_parser = LifetimeArg::parse)]
        longest_life: Option<LifetimeArg>,
    },
    /// Show one account with all its fields
    Get(AccountIdArgs),
    /// List accounts in the order of their ids
    List {
        #[command(flatten)]
        page: PageArgs,
    },
    /// Change an account's name, or the longest lifetime of its keys
    Update {
        #[command(flatten)]
        account: AccountIdArgs,
        #[command(flatten)]
        change: AccountChangeArgs,
    },
    /// Refuse every key of an account until it is resumed
    Suspend {
        #[command(flatten)]
        account: AccountIdArgs,
        /// Do not ask for confirmation
        #[arg(long, short)]
        yes: bool,
    },
    /// Accept the keys of a suspended account again
    Resume(AccountIdArgs),
}

#[derive(Debug, Args)]
pub(super) struct AccountIdArgs {
    /// The account's id
    #[arg(value_name = "ID")]
    id: String,
}

/// The changes of an account; at least one is required.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub(super) struct AccountChangeArgs {
    /// The account's new name, for people
    #[arg(long)]
    name: Option<String>,
    /// The longest lifetime of keys that are created, or given another expiry, from now on: a duration (90d, 1y), or
    /// never for no limit
    #[arg(long, value_name = "DURATION", value_parser = LifetimeArg::parse)]
    longest_life: Option<LifetimeArg>,
}

impl AccountsCommand {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        if let AccountsCommand::Suspend { account, yes } = &self {
            cx.console
                .confirm(&format!("Refuse every key of account {}?", shown_value(&account.id)), *yes)?;
        }
        let session = cx.connect()?;
        match self {
            AccountsCommand::Create { id, name, longest_life } => {
                let request = pb::CreateAccountRequest {
                    id: id.unwrap_or_default(),
                    name: name.unwrap_or_default(),
                    longest_life: longest_life.and_then(LifetimeArg::to_proto_limit),
                };
                create_account(cx, &session, request).await
            }
            AccountsCommand::Get(account) => get_account(cx, &session, account.id).await,
            AccountsCommand::List { page } => list_accounts(cx, &session, &page).await,
            AccountsCommand::Update { account, change } => {
                update_account(cx, &session, change.into_request(account.id)).await
            }
            AccountsCommand::Suspend { account, .. } => suspend_account(cx, &session, account.id).await,
            AccountsCommand::Resume(account) => resume_account(cx, &session, account.id).await,
        }
        .map(|()| 0)
    }
}

impl AccountChangeArgs {
    fn into_request(self, id: String) -> pb::UpdateAccountRequest {
        pb::UpdateAccountRequest {
            id,
            name: self.name,
            longest_life: self.longest_life.and_then(LifetimeArg::to_proto_limit),
            no_longest_life: self.longest_life == Some(LifetimeArg::Unlimited),
        }
    }
}

async fn create_account(
    cx: &mut CommandContext<'_>,
    session: &ApiClient,
    request: pb::CreateAccountRequest,
) -> Result<(), CliError> {
    let response = session
        .call_accounts(DefaultTimeout::Quick, request, async |mut client, request| {
            client.create(request).await
        })
        .await?;
    cx.print_response(&response, |colors| render_account(response.account.as_ref(), colors))
}

async fn get_account(cx: &mut CommandContext<'_>, session: &ApiClient, id: String) -> Result<(), CliError> {
    let request = pb::GetAccountRequest { id };
    let response = session
        .call_accounts(DefaultTimeout::Quick, request, async |mut client, request| client.get(request).await)
        .await?;
    cx.print_response(&response, |colors| render_account(response.account.as_ref(), colors))
}

async fn list_accounts(
    cx: &mut CommandContext<'_>,
    session: &ApiClient,
    page: &PageArgs,
) -> Result<(), CliError> {
    let fetched = page
        .fetch_pages(async |size, page_token| {
            let request = pb::ListAccountsRequest { page_size: Some(size), page_token };
            let response = session
                .call_accounts(DefaultTimeout::Quick, request, async |mut client, request| {
                    client.list(request).await
                })
                .await?;
            Ok((response.accounts, response.next_page_token))
        })
        .await?;
    let note = fetched.truncation_note();
    let response =
        pb::ListAccountsResponse { accounts: fetched.items, next_page_token: fetched.next_page_token };
    cx.print_response(&response, |colors| render_accounts(&response.accounts, colors))?;
    cx.console.eprint(&note.unwrap_or_default());
    Ok(())
}

async fn update_account(
    cx: &mut CommandContext<'_>,
    session: &ApiClient,
    request: pb::UpdateAccountRequest,
) -> Result<(), CliError> {
    let response = session
        .call_accounts(DefaultTimeout::Quick, request, async |mut client, request| {
            client.update(request).await
        })
        .await?;
    cx.print_response(&response, |colors| render_account(response.account.as_ref(), colors))
}

async fn suspend_account(
    cx: &mut CommandContext<'_>,
    session: &ApiClient,
    id: String,
) -> Result<(), CliError> {
    let request = pb::SuspendAccountRequest { id };
    let response = session
        .call_accounts(DefaultTimeout::Propagation, request, async |mut client, request| {
            client.suspend(request).await
        })
        .await?;
    cx.print_response(&response, |colors| {
        render_account(response.account.as_ref(), colors)
            + "\n"
            + &text_output::format_propagation(response.revision, response.propagation.as_ref())
    })
}

async fn resume_account(
    cx: &mut CommandContext<'_>,
    session: &ApiClient,
    id: String,
) -> Result<(), CliError> {
    let request = pb::ResumeAccountRequest { id };
    let response = session
        .call_accounts(DefaultTimeout::Quick, request, async |mut client, request| {
            client.resume(request).await
        })
        .await?;
    cx.print_response(&response, |colors| render_account(response.account.as_ref(), colors))
}

fn render_account(account: Option<&pb::Account>, colors: bool) -> String {
    account.map(|account| text_output::describe_account(account).render(colors)).unwrap_or_default()
}

fn render_accounts(accounts: &[pb::Account], colors: bool) -> String {
    let mut rows = ListTable::new(&["ID", "NAME", "STATE", "LONGEST LIFE", "CREATED"], colors);
    for account in accounts {
        rows.add_row([
            plain_cell(&account.id),
            plain_cell(&account.name),
            text_output::format_account_state(account),
            plain_cell(text_output::format_longest_life(account)),
            plain_cell(account.created_at.as_ref().map(format_rfc3339).unwrap_or_default()),
        ]);
    }
    rows.render("No accounts.")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Only {
        #[command(flatten)]
        change: AccountChangeArgs,
    }

    #[test]
    fn a_longest_life_is_set_taken_away_or_left_as_it_is() {
        let change = |line: &str| {
            let only = Only::try_parse_from(format!("update {line}").split_whitespace()).unwrap();
            let request = only.change.into_request("acme".into());
            (request.longest_life.map(|life| life.seconds), request.no_longest_life, request.name)
        };
        assert_eq!(change("--longest-life 90d"), (Some(90 * 86_400), false, None));
        assert_eq!(change("--longest-life never"), (None, true, None));
        assert_eq!(change("--name Acme"), (None, false, Some("Acme".to_owned())));
        assert!(Only::try_parse_from(["update"]).is_err(), "an update changes something");
    }

    #[test]
    fn a_suspended_account_is_seen_in_the_list() {
        let accounts =
            [pb::Account { id: "acme".into(), name: "Acme".into(), suspended: true, ..Default::default() }];
        let text = render_accounts(&accounts, false);
        assert!(
            text.lines().nth(1).is_some_and(|line| line.starts_with("acme") && line.contains("suspended"))
        );
    }
}
