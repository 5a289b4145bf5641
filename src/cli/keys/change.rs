//! `keyward keys disable`, `enable`, `rotate`, `finish-rotation` and `revoke`.

use std::time::Duration;

use clap::{Args, ValueEnum};

use super::{OneArgs, details};
use crate::{
    cli::{
        client::Patience,
        context::Context,
        failure::Failure,
        issue::{Delivery, IssueArgs},
        output,
        table::shown_value,
        values::proto_duration,
    },
    config::duration,
    pb,
};

/// A changed key, and how far the change has reached.
pub(super) fn changed(
    key: Option<&pb::Key>,
    revision: u64,
    propagation: Option<&pb::Propagation>,
    colours: bool,
) -> String {
    format!("{}\n{}", details(key).show(colours), output::propagation(revision, propagation))
}

/// Asks for one change of one key, and shows the key after it.
macro_rules! change_one {
    ($(#[$doc:meta])* $name:ident, $request:ident) => {
        $(#[$doc])*
        pub(super) async fn $name(cx: &mut Context<'_>, id: String) -> Result<u8, Failure> {
            let answer = cx
                .session()?
                .keys(Patience::Propagation, pb::$request { id }, async |mut client, request| {
                    client.$name(request).await
                })
                .await?;
            cx.show(&answer, |colours| {
                changed(answer.key.as_ref(), answer.revision, answer.propagation.as_ref(), colours)
            })?;
            Ok(0)
        }
    };
}

change_one!(
    /// Refuses a key until it is enabled again.
    disable, DisableKeyRequest
);
change_one!(
    /// Ends what disable began.
    enable, EnableKeyRequest
);
change_one!(
    /// Ends a rotation's overlap.
    finish_rotation, FinishRotationRequest
);

/// Flags of `keyward keys finish-rotation`.
#[derive(Debug, Args)]
pub(in crate::cli) struct FinishRotationArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Do not ask first
    #[arg(long, short)]
    yes: bool,
}

impl FinishRotationArgs {
    pub(super) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        let question = format!("Stop the old token of key {} now, for ever?", shown_value(&self.one.id));
        cx.console.confirm(&question, self.yes)?;
        finish_rotation(cx, self.one.id).await
    }
}

/// When the old token of a rotation stops. There is no default: one breaks what still uses it, the other leaves a stolen
/// token working.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct StopArgs {
    /// How long the old token keeps working, up to 7d
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    overlap: Option<Duration>,
    /// Stop the old token at once
    #[arg(long)]
    now: bool,
}

/// Flags of `keyward keys rotate`.
#[derive(Debug, Args)]
pub(in crate::cli) struct RotateArgs {
    #[command(flatten)]
    one: OneArgs,
    #[command(flatten)]
    stop: StopArgs,
    /// Makes it safe to send the request again: the key is rotated once
    #[arg(long, value_name = "TEXT")]
    idempotency_key: Option<String>,
    #[command(flatten)]
    issue: IssueArgs,
}

impl RotateArgs {
    pub(super) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        let session = cx.session()?;
        let delivery = Delivery::prepare(&self.issue)?;
        let question = pb::RotateKeyRequest {
            id: self.one.id,
            overlap: self.stop.overlap.map(proto_duration),
            idempotency_key: self.idempotency_key,
        };
        let answer = session
            .keys(Patience::Propagation, question, async |mut client, request| client.rotate(request).await)
            .await?;
        delivery.hand_over(cx, answer)
    }
}

/// Why a key is revoked.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Why {
    /// The token is known to somebody who should not know it
    Compromised,
    /// Another key has taken its place
    Superseded,
    /// Whatever used it is gone
    NoLongerNeeded,
    /// The person or team behind it has left
    OwnerLeft,
}

impl From<Why> for pb::RevokeReason {
    fn from(why: Why) -> pb::RevokeReason {
        match why {
            Why::Compromised => pb::RevokeReason::Compromised,
            Why::Superseded => pb::RevokeReason::Superseded,
            Why::NoLongerNeeded => pb::RevokeReason::NoLongerNeeded,
            Why::OwnerLeft => pb::RevokeReason::OwnerLeft,
        }
    }
}

/// Flags of `keyward keys revoke`.
#[derive(Debug, Args)]
#[command(
    after_help = "Once this is done, every check that starts afterwards is refused, on every replica. \
    It waits for that, by default up to 90s."
)]
pub(in crate::cli) struct RevokeArgs {
    #[command(flatten)]
    one: OneArgs,
    /// Why
    #[arg(long, value_enum, value_name = "REASON")]
    reason: Option<Why>,
    /// Text for the audit log
    #[arg(long, value_name = "TEXT")]
    comment: Option<String>,
    /// Do not ask first
    #[arg(long, short)]
    yes: bool,
}

impl RevokeArgs {
    pub(super) async fn run(self, cx: &mut Context<'_>) -> Result<u8, Failure> {
        cx.console.confirm(&format!("Revoke key {} for ever?", shown_value(&self.one.id)), self.yes)?;
        let question = pb::RevokeKeyRequest {
            id: self.one.id,
            reason: self.reason.map_or(pb::RevokeReason::Unspecified, Into::into).into(),
            comment: self.comment.unwrap_or_default(),
        };
        let answer = cx
            .session()?
            .keys(Patience::Propagation, question, async |mut client, request| client.revoke(request).await)
            .await?;
        cx.show(&answer, |colours| {
            changed(answer.key.as_ref(), answer.revision, answer.propagation.as_ref(), colours)
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
        args: RevokeArgs,
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
        args: RotateArgs,
    }

    #[test]
    fn a_rotation_says_when_the_old_token_stops() {
        let read = |line: &str| Rotate::try_parse_from(format!("rotate 0197 {line}").split_whitespace());
        assert_eq!(read("--overlap 1d").unwrap().args.stop.overlap, Some(Duration::from_secs(86_400)));
        assert!(read("--now").unwrap().args.stop.now);
        for bad in ["", "--now --overlap 1d"] {
            assert_eq!(read(bad).unwrap_err().exit_code(), 2, "{bad}");
        }
    }

    #[test]
    fn a_changed_key_is_followed_by_how_far_the_change_has_reached() {
        let done = pb::Propagation { complete: true, ..Default::default() };
        let text = changed(Some(&pb::Key { id: "0197".into(), ..Default::default() }), 7, Some(&done), false);
        assert!(text.starts_with("id") && text.ends_with("\n\nRevision 7: in force everywhere.\n"), "{text}");
    }
}
