//! Serves the gRPC API: connections, the call router and the services behind it.
//!
//! Handlers read messages, call the use cases and write responses. No product rule belongs here.
//! Only `status.rs` builds a `tonic::Status`.

mod account_service;
mod assembly;
mod audit_service;
mod auth;
mod authz_service;
mod call_extensions;
mod check_decoder;
mod check_encoder;
mod check_evaluator;
mod check_fast_path;
mod check_session;
mod check_stream;
mod concurrency;
mod connection;
mod connection_io;
mod convert;
mod deadline;
mod descriptor_index;
mod early_shed;
mod ext_authz;
mod gzip;
mod health;
mod hpack;
mod key_requests;
mod key_service;
mod list_permits;
mod load_shed;
mod long_calls;
mod management_session;
mod page_token;
mod propagation_stream;
mod raw_codec;
mod reflection;
mod request_body;
mod response_body;
mod response_sender;
mod router;
pub mod rpc;
pub mod rpc_metrics;
mod send_budget;
pub mod serve;
mod shutdown;
mod status;
mod status_details;

pub use assembly::{ServiceParts, build_router};
pub use health::HEALTH_SERVICE_NAMES;
pub(crate) use health::report_health;
pub use router::Router;
