//! A whole cluster on one machine, for trying out, tests and benchmarks.
//!
//! Same binary, same daemons and same configuration as in production; only the way they are started differs. A
//! sandbox is a folder D (see [`layout`]); [`up`] makes it or starts it again, [`down`] ends every process of it,
//! [`report`] says what runs. When root calls, [`user`] first steps down to an unprivileged user, because
//! PostgreSQL refuses to run as root; everything else here runs as that user and needs no rights.

pub mod compare;
pub mod control;
pub mod demo;
mod error;
mod first;
mod initdb;
pub mod layout;
mod ports;
pub mod probe;
mod process;
mod report;
pub mod slow;
mod stop;
mod up;
pub mod user;

pub use error::SandboxError;
pub use initdb::{SETTINGS, find_bin_dir};
pub use layout::Layout;
pub use process::is_alive;
pub use report::{Report, report};
pub use stop::{down, remove_folder};
pub use up::{Options, refuse_unless_empty, up};
