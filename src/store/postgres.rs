//! The backend on a PostgreSQL server: tables in their own schema, which any number of processes write.
//!
//! Everything is a transaction, even a single read, and a transaction leaves nothing behind in its session. So it works
//! through pgbouncer in transaction mode, where the next transaction may get another session.
//!
//! A read is one message: its transaction around it, its values written as literals ([`sql_literal`]). If sqlx binds
//! values, it sends a statement in two steps (parse, then execute), which only a transaction keeps in one session. A named
//! statement would stay in a session, so statements have no names.
//!
//! | file | contents |
//! |---|---|
//! | [`store`], [`open`], [`backend`] | the store, opening it, its operations |
//! | [`transaction`], [`timeouts`], [`errors`] | how a transaction begins and how long it may take; errors |
//! | [`replica_registry`], [`replica_connections`] | what makes many processes one service, on dedicated connections |
//! | [`server_check`], [`server_identity`] | what the server must be; which servers have answered |
//! | [`pre_state`], `write` | what a batch reads and writes |
//! | [`snapshot`], [`snapshot_view`], [`bulk`], [`copy_reader`] | reads of all keys and of the log |

mod backend;
mod bulk;
mod copy_reader;
mod dedicated_connection;
mod errors;
mod inspect;
mod migrate;
mod open;
mod pre_state;
mod replica_connections;
mod replica_registry;
mod server_check;
mod server_identity;
mod snapshot;
mod snapshot_view;
mod sql_literal;
mod store;
mod target;
mod text_row;
mod timeouts;
mod transaction;
mod write;

pub(super) use self::{inspect::inspect, open::check_url, store::PostgresStore};
