//! `keyward keys`: creates, shows, changes, revokes and imports keys.

mod args;
mod bulk_revoke;
mod create;
mod list;
mod state_change;
mod update;
mod usage;

use clap::{Args, Subcommand};

use self::args::{KeyIdArgs, describe_key_or_empty};
use super::{
    api_client::DefaultTimeout, check::SubjectTokenArgs, context::CommandContext, error::CliError, import,
};
use crate::pb;

#[derive(Debug, Subcommand)]
pub(super) enum KeysCommand {
    /// Create a key; its token is shown once
    Create(create::KeyCreateArgs),
    /// Show one key with all its fields
    Get(KeyIdArgs),
    /// List the keys of an account or user, newest first
    List(list::KeyListArgs),
    /// Change a key's name, scopes, restrictions or limits
    Update(update::KeyUpdateArgs),
    /// Refuse a key until it is enabled again
    Disable(KeyIdArgs),
    /// Accept a disabled key again
    Enable(KeyIdArgs),
    /// Give a key a new token, shown once; the old one stops at once (--now) or after an overlap (--overlap)
    Rotate(state_change::KeyRotateArgs),
    /// End a rotation's overlap now: the old token stops
    FinishRotation(state_change::FinishRotationArgs),
    /// Revoke a key permanently
    Revoke(state_change::KeyRevokeArgs),
    /// Revoke many keys permanently: those of an account, of a user, or of all accounts
    BulkRevoke(bulk_revoke::BulkRevokeArgs),
    /// Import keys that another system issued, by the SHA-256 of their tokens, from a file of any size
    Import(import::KeyImportArgs),
    /// Show as a chart how often a key was allowed and denied
    Usage(usage::KeyUsageArgs),
    /// Show the key that a token belongs to
    Lookup(KeyLookupArgs),
}

#[derive(Debug, Args)]
pub(super) struct KeyLookupArgs {
    #[command(flatten)]
    subject_token: SubjectTokenArgs,
}

impl KeysCommand {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        match self {
            KeysCommand::Create(args) => args.run(cx).await,
            KeysCommand::Get(key) => get_key(cx, key.id).await,
            KeysCommand::List(args) => args.run(cx).await,
            KeysCommand::Update(args) => args.run(cx).await,
            KeysCommand::Disable(key) => state_change::disable(cx, key.id).await,
            KeysCommand::Enable(key) => state_change::enable(cx, key.id).await,
            KeysCommand::Rotate(args) => args.run(cx).await,
            KeysCommand::FinishRotation(args) => args.run(cx).await,
            KeysCommand::Revoke(args) => args.run(cx).await,
            KeysCommand::BulkRevoke(args) => args.run(cx).await,
            KeysCommand::Import(args) => args.run(cx).await,
            KeysCommand::Usage(args) => args.run(cx).await,
            KeysCommand::Lookup(args) => lookup_key(cx, &args.subject_token).await,
        }
    }
}

async fn get_key(cx: &mut CommandContext<'_>, id: String) -> Result<u8, CliError> {
    let request = pb::GetKeyRequest { id };
    let response = cx
        .connect()?
        .call_keys(DefaultTimeout::Quick, request, async |mut client, request| client.get(request).await)
        .await?;
    cx.print_response(&response, |colors| describe_key_or_empty(response.key.as_ref()).render(colors))?;
    Ok(0)
}

async fn lookup_key(cx: &mut CommandContext<'_>, subject: &SubjectTokenArgs) -> Result<u8, CliError> {
    let request = pb::LookupKeyRequest { token: subject.read_token(cx)?.reveal().to_owned() };
    let response = cx
        .connect()?
        .call_keys(DefaultTimeout::Quick, request, async |mut client, request| client.lookup(request).await)
        .await?;
    cx.print_response(&response, |colors| {
        describe_key_or_empty(response.key.as_ref())
            .field("secret version", response.secret_version.to_string())
            .render(colors)
    })?;
    Ok(0)
}
