//! One client's life: its connection, its own connection to the leader, and what it does in between.
//!
//! A session lives on one thread. [`wire`] moves frames both ways and knows which answers are the client's and which
//! are hidden; [`simple`] and [`extended`] are the two protocols; [`commit`] is how a transaction with effects ends; `moving` is how it goes
//! on when the leader is lost.

mod begin;
pub mod cancel;
mod carried;
pub mod carry;
mod closing;
pub mod commit;
mod conditional;
mod copied_rows;
pub mod copy;
mod copy_file;
pub mod copy_fill;
mod cycle;
pub mod effect;
pub mod execute;
pub mod expect;
pub mod extended;
pub mod greet;
pub mod guard;
pub mod large_objects;
mod limits;
mod moving;
pub mod named;
pub mod nodewise;
pub mod once;
mod once_leader;
pub mod parameters;
pub mod password;
pub mod planning;
pub mod renew;
mod reused;
pub mod rewrite;
pub mod run;
pub mod sequences;
pub mod serializable;
mod several;
pub mod simple;
pub mod start;
pub mod statements;
pub mod texts;
pub mod tls;
pub mod transport;
pub mod two_phase;
pub mod wire;
mod wire_io;
