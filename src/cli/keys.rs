//! `keyward keys`: the life of a key, from create to revoke.

mod bulk;
mod change;
mod create;
mod list;
mod policy;
mod update;
mod usage;

use clap::{Args, Subcommand};

use super::{
    check::SubjectArgs, client::Patience, context::Context, failure::Failure, import, output, table::Record,
};
use crate::pb;

/// `keyward keys ...`.
#[derive(Debug, Subcommand)]
pub(super) enum KeysCommand {
    /// Create a key; its token is shown once
    Create(create::CreateArgs),
    /// Show one key
    Get(OneArgs),
    /// List the keys of an account or user, newest first
    List(list::ListArgs),
    /// Change what a key is called, may do and is limited to
    Update(update::UpdateArgs),
    /// Refuse a key until it is enabled again
    Disable(OneArgs),
    /// End what disable began
    Enable(OneArgs),
    /// Give a key a new token, shown once; the old one stops at once (--now) or after an overlap (--overlap)
    Rotate(change::RotateArgs),
    /// End a rotation's overlap now: the old token stops
    FinishRotation(change::FinishRotationArgs),
    /// Refuse a key for ever
    Revoke(change::RevokeArgs),
    /// Refuse many keys for ever: those of an account, a user, or everyone
    BulkRevoke(bulk::BulkRevokeArgs),
    /// Take in keys made elsewhere, by the SHA-256 of their tokens, from a file of any size
    Import(import::ImportArgs),
    /// Draw how often a key was allowed and denied, step by step
    Usage(usage::UsageArgs),
    /// Show the key that a token belongs to
    Lookup(LookupArgs),
}

/// Which key.
#[derive(Debug, Args)]
pub(super) struct OneArgs {
    /// The key's id
    #[arg(value_name = "ID")]
    id: String,
}

/// Flags of `keyward keys lookup`.
#[derive(Debug, Args)]
pub(super) struct LookupArgs {
    #[command(flatten)]
    subject: SubjectArgs,
}

impl KeysCommand {
    pub(super) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        match self {
            KeysCommand::Create(args) => args.run(cx).await,
            KeysCommand::Get(one) => get(cx, one.id).await,
            KeysCommand::List(args) => args.run(cx).await,
            KeysCommand::Update(args) => args.run(cx).await,
            KeysCommand::Disable(one) => change::disable(cx, one.id).await,
            KeysCommand::Enable(one) => change::enable(cx, one.id).await,
            KeysCommand::Rotate(args) => args.run(cx).await,
            KeysCommand::FinishRotation(args) => args.run(cx).await,
            KeysCommand::Revoke(args) => args.run(cx).await,
            KeysCommand::BulkRevoke(args) => args.run(cx).await,
            KeysCommand::Import(args) => args.run(cx).await,
            KeysCommand::Usage(args) => args.run(cx).await,
            KeysCommand::Lookup(args) => lookup(cx, &args.subject).await,
        }
    }
}

async fn get(cx: &mut Context<'_>, id: String) -> Result<u8, Failure> {
    let question = pb::GetKeyRequest { id };
    let answer = cx
        .session()?
        .keys(Patience::Short, question, async |mut client, request| client.get(request).await)
        .await?;
    cx.show(&answer, |colours| details(answer.key.as_ref()).show(colours))?;
    Ok(0)
}

async fn lookup(cx: &mut Context<'_>, subject: &SubjectArgs) -> Result<u8, Failure> {
    let question = pb::LookupKeyRequest { token: subject.read(cx)?.reveal().to_owned() };
    let answer = cx
        .session()?
        .keys(Patience::Short, question, async |mut client, request| client.lookup(request).await)
        .await?;
    cx.show(&answer, |colours| {
        details(answer.key.as_ref()).field("secret version", answer.secret_version.to_string()).show(colours)
    })?;
    Ok(0)
}

fn details(key: Option<&pb::Key>) -> Record {
    key.map_or_else(Record::new, output::key)
}
