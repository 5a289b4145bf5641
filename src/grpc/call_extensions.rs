//! What the router hands to the handler of a call, by the call's extensions.

use tonic::Status;

use crate::{caller::Caller, domain::name::AccountId};

use super::{
    check_session::CheckSession, deadline::PropagationDeadline, management_session::ManagementSession,
    status::internal_error,
};

/// Who asks.
#[derive(Clone, Debug)]
pub(super) struct ProxyCaller {
    /// Whose tokens it may ask about; the operator account's caller, about all.
    pub account: AccountId,
    /// Whether it hears why: who came by Envoy's own listener, or showed a key with `keyward:check`. A stranger
    /// hears what a client would.
    pub trusted: bool,
    /// What it has shown, if anything.
    pub session: Option<CheckSession>,
}

/// What the gate hands to the handler of a call, by the call's extensions.
pub(super) trait FromExtensions: Sized {
    fn from_extensions(extensions: &mut tonic::Extensions) -> Result<Option<Self>, Status>;
}

macro_rules! impl_from_extensions {
    ($($found:ty),*) => {
        $(
            impl FromExtensions for $found {
                fn from_extensions(extensions: &mut tonic::Extensions) -> Result<Option<Self>, Status> {
                    Ok(extensions.remove())
                }
            }
        )*
    };
}

impl_from_extensions!(PropagationDeadline, CheckSession, ProxyCaller, ManagementSession);

/// The caller of a management call is judged again: handlers run when the whole request has arrived.
impl FromExtensions for Caller {
    fn from_extensions(extensions: &mut tonic::Extensions) -> Result<Option<Self>, Status> {
        match extensions.get::<ManagementSession>() {
            Some(session) => Ok(Some(session.reauthorize()?)),
            None => Ok(extensions.remove()),
        }
    }
}

/// What the gate has found out about a call, for its handler.
pub(super) fn take_extension<T: FromExtensions>(
    request: &mut tonic::Request<impl Sized>,
) -> Result<T, Status> {
    // Every row of the table says what its handler takes; a mismatch is a bug.
    T::from_extensions(request.extensions_mut())?.ok_or_else(internal_error)
}
