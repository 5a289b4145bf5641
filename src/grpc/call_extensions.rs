//! Passes what the router knows about a call to its handler, by the request's extensions.
//!
//! Only the types and their extraction belong here. `auth.rs` and `router.rs` insert them.

use tonic::Status;

use crate::{caller::Caller, domain::name::AccountId};

use super::{
    check_session::CheckSession, deadline::PropagationDeadline, management_session::ManagementSession,
    status::internal_error,
};

/// A proxy that asks about a client's request.
#[derive(Clone, Debug)]
pub(super) struct ProxyCaller {
    /// The account whose tokens it may ask about. The operator account may ask about all.
    pub(super) account: AccountId,
    /// Whether responses explain a denial. True on a listener for Envoy alone, and for callers with `keyward:check`.
    /// Others get only what the client would see.
    pub(super) trusted: bool,
    /// Evaluates its credential again; `None` for an anonymous proxy.
    pub(super) session: Option<CheckSession>,
}

/// A value that the router may attach to a call.
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

/// The caller of a management call is evaluated again: handlers run only once the whole request has arrived.
impl FromExtensions for Caller {
    fn from_extensions(extensions: &mut tonic::Extensions) -> Result<Option<Self>, Status> {
        match extensions.get::<ManagementSession>() {
            Some(session) => Ok(Some(session.reauthorize()?)),
            None => Ok(extensions.remove()),
        }
    }
}

/// Takes a value that the router has attached to the call.
pub(super) fn take_extension<T: FromExtensions>(
    request: &mut tonic::Request<impl Sized>,
) -> Result<T, Status> {
    // The RPC table determines what each handler gets, so a mismatch is a bug.
    T::from_extensions(request.extensions_mut())?.ok_or_else(internal_error)
}
