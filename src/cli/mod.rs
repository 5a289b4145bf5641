//! x
pub mod root_key;
pub mod serve;
