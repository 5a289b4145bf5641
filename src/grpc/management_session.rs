//! Evaluates the caller of a management call again while the call runs. Its headers are authenticated before the body
//! arrives; the body, the write queue and other replicas can take seconds. The caller is evaluated when the handler
//! takes it, and before an answer leaves. Changes are judged once more in their transaction, see
//! `caller/authorization.rs`. The callers of Checks are in `vigil.rs`.

use std::sync::Arc;

use tonic::Code;

use crate::{caller::Caller, engine::Engine, service_error::ServiceError, store::group_commit::CallWrites};

/// A caller that was authenticated, and the engine that knows what became of it.
#[derive(Clone, Debug)]
pub(super) struct ManagementSession {
    engine: Arc<Engine>,
    caller: Caller,
}

impl ManagementSession {
    pub(super) fn new(engine: Arc<Engine>, caller: Caller) -> ManagementSession {
        ManagementSession { engine, caller }
    }

    /// The caller as its headers proved it.
    pub(super) fn authenticated_caller(&self) -> &Caller {
        &self.caller
    }

    /// The caller with its rights as they are now. Nothing is charged.
    ///
    /// # Errors
    /// When it was revoked, disabled, suspended, removed or narrowed below its call, or has expired.
    pub(super) fn reauthorize(&self) -> Result<Caller, ServiceError> {
        Ok(self.caller.authorize(&self.engine)?.caller)
    }

    /// The refusal that takes the place of an answer with this code, if the caller may not have the answer any more.
    /// The answer to a change stays: the caller was authorized when it was committed. So does a fault, which says
    /// nothing of what is stored.
    pub(super) fn refuse_response(&self, code: Option<Code>, writes: CallWrites) -> Option<ServiceError> {
        use Code::{AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Ok, PermissionDenied};
        let reveals_state = matches!(
            code,
            None | Some(
                Ok | NotFound | AlreadyExists | FailedPrecondition | InvalidArgument | PermissionDenied
            )
        );
        if writes.has_committed || !reveals_state { None } else { self.reauthorize().err() }
    }
}
