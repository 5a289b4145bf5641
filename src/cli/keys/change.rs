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
        table::clean,
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

/// Flags of `keyward keys rotate`.
#[derive(Debug, Args)]
pub(in crate::cli) struct RotateArgs {
    #[command(flatten)]
    one: OneArgs,
    /// How long the old token keeps working, up to 7d [default: not at all]
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    overlap: Option<Duration>,
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
            overlap: self.overlap.map(proto_duration),
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
        cx.console.confirm(&format!("Revoke key {} for ever?", clean(&self.one.id)), self.yes)?;
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

    #[test]
    fn a_changed_key_is_followed_by_how_far_the_change_has_reached() {
        let done = pb::Propagation { complete: true, ..Default::default() };
        let text = changed(Some(&pb::Key { id: "0197".into(), ..Default::default() }), 7, Some(&done), false);
        assert!(text.starts_with("id") && text.ends_with("\n\nRevision 7: in force everywhere.\n"), "{text}");
    }
}
