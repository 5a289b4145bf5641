//! `keyward keys disable`, `enable`, `rotate`, `finish-rotation` and `revoke`: changes of one key's state.

use std::time::Duration;

use clap::Args;

use super::args::{KeyIdArgs, RevokeReasonArg, describe_key_or_empty};
use crate::{
    cli::{
        api_client::DefaultTimeout,
        context::CommandContext,
        error::CliError,
        table::shown_value,
        text_output,
        token_output::{TokenDestination, TokenOutputArgs},
        value_format::duration_to_proto,
    },
    config::duration,
    pb,
};

/// Renders a changed key and how far the change has propagated.
pub(super) fn render_changed_key(
    key: Option<&pb::Key>,
    revision: u64,
    propagation: Option<&pb::Propagation>,
    colors: bool,
) -> String {
    format!(
        "{}\n{}",
        describe_key_or_empty(key).render(colors),
        text_output::format_propagation(revision, propagation)
    )
}

/// Defines a function that requests one change of a key and shows the changed key.
macro_rules! define_key_change {
    ($name:ident, $request:ident) => {
        pub(super) async fn $name(cx: &mut CommandContext<'_>, id: String) -> Result<u8, CliError> {
            let response = cx
                .connect()?
                .call_keys(DefaultTimeout::Propagation, pb::$request { id }, async |mut client, request| {
                    client.$name(request).await
                })
                .await?;
            cx.print_response(&response, |colors| {
                render_changed_key(
                    response.key.as_ref(),
                    response.revision,
                    response.propagation.as_ref(),
                    colors,
                )
            })?;
            Ok(0)
        }
    };
}

define_key_change!(disable, DisableKeyRequest);
define_key_change!(enable, EnableKeyRequest);
define_key_change!(finish_rotation, FinishRotationRequest);

#[derive(Debug, Args)]
pub(in crate::cli) struct FinishRotationArgs {
    #[command(flatten)]
    key: KeyIdArgs,
    /// Do not ask for confirmation
    #[arg(long, short)]
    yes: bool,
}

impl FinishRotationArgs {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        let question = format!("Permanently stop the old token of key {} now?", shown_value(&self.key.id));
        cx.console.confirm(&question, self.yes)?;
        finish_rotation(cx, self.key.id).await
    }
}

/// When the old token of a rotation stops. There is no default: `--now` breaks programs that still use it, `--overlap`
/// leaves a stolen token working.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct OldTokenArgs {
    /// How long the old token keeps working, up to 7d
    #[arg(long, value_name = "DURATION", value_parser = duration::parse_duration)]
    overlap: Option<Duration>,
    /// Stop the old token at once
    #[arg(long)]
    now: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct KeyRotateArgs {
    #[command(flatten)]
    key: KeyIdArgs,
    #[command(flatten)]
    old_token: OldTokenArgs,
    /// Makes the request safe to repeat: the key is rotated only once
    #[arg(long, value_name = "TEXT")]
    idempotency_key: Option<String>,
    #[command(flatten)]
    token_output: TokenOutputArgs,
}

impl KeyRotateArgs {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        let session = cx.connect()?;
        let destination = TokenDestination::prepare(&self.token_output)?;
        let request = pb::RotateKeyRequest {
            id: self.key.id,
            overlap: self.old_token.overlap.map(duration_to_proto),
            idempotency_key: self.idempotency_key,
        };
        let response = session
            .call_keys(DefaultTimeout::Propagation, request, async |mut client, request| {
                client.rotate(request).await
            })
            .await?;
        destination.deliver(cx, response)
    }
}

#[derive(Debug, Args)]
#[command(
    after_help = "When the command succeeds, every later check of the key is denied on every replica. \
    The command waits for that, by default up to 90s."
)]
pub(in crate::cli) struct KeyRevokeArgs {
    #[command(flatten)]
    key: KeyIdArgs,
    /// Why the key is revoked, for the audit log
    #[arg(long, value_enum, value_name = "REASON")]
    reason: Option<RevokeReasonArg>,
    /// Text for the audit log
    #[arg(long, value_name = "TEXT")]
    comment: Option<String>,
    /// Do not ask for confirmation
    #[arg(long, short)]
    yes: bool,
}

impl KeyRevokeArgs {
    pub(super) async fn run(self, cx: &mut CommandContext<'_>) -> Result<u8, CliError> {
        cx.console.confirm(&format!("Permanently revoke key {}?", shown_value(&self.key.id)), self.yes)?;
        let request = pb::RevokeKeyRequest {
            id: self.key.id,
            reason: self.reason.map_or(pb::RevokeReason::Unspecified, Into::into).into(),
            comment: self.comment.unwrap_or_default(),
        };
        let response = cx
            .connect()?
            .call_keys(DefaultTimeout::Propagation, request, async |mut client, request| {
                client.revoke(request).await
            })
            .await?;
        cx.print_response(&response, |colors| {
            render_changed_key(
                response.key.as_ref(),
                response.revision,
                response.propagation.as_ref(),
                colors,
            )
        })?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Revoke {
        #[command(flatten)]
        args: KeyRevokeArgs,
    }

    #[test]
    fn every_reason_of_the_protocol_can_be_said() {
        for (word, reason) in [
            ("compromised", pb::RevokeReason::Compromised),
            ("superseded", pb::RevokeReason::Superseded),
            ("no-longer-needed", pb::RevokeReason::NoLongerNeeded),
            ("owner-left", pb::RevokeReason::OwnerLeft),
        ] {
            let args = Revoke::try_parse_from(["revoke", "0197", "--reason", word]).unwrap().args;
            assert_eq!(args.reason.map(pb::RevokeReason::from), Some(reason));
        }
        assert!(Revoke::try_parse_from(["revoke", "0197", "--reason", "bored"]).is_err());
    }

    #[derive(Debug, Parser)]
    struct Rotate {
        #[command(flatten)]
        args: KeyRotateArgs,
    }

    #[test]
    fn a_rotation_says_when_the_old_token_stops() {
        let read = |line: &str| Rotate::try_parse_from(format!("rotate 0197 {line}").split_whitespace());
        assert_eq!(read("--overlap 1d").unwrap().args.old_token.overlap, Some(Duration::from_secs(86_400)));
        assert!(read("--now").unwrap().args.old_token.now);
        for bad in ["", "--now --overlap 1d"] {
            assert_eq!(read(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn a_changed_key_is_followed_by_how_far_the_change_has_reached() {
        let done = pb::Propagation { complete: true, ..Default::default() };
        let text = render_changed_key(
            Some(&pb::Key { id: "0197".into(), ..Default::default() }),
            7,
            Some(&done),
            false,
        );
        assert!(text.starts_with("id") && text.ends_with("\n\nRevision 7: in force everywhere.\n"), "{text}");
    }
}
