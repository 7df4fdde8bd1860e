//! `control.sock`: how the commands on the proxy's host reach the running proxy.
//!
//! `message` is what crosses it, `server` the socket and its limits, `operations` what the commands do,
//! `client` the commands' end; `daemon` puts it together for the running proxy.

pub mod client;
pub mod daemon;
pub mod message;
pub mod operations;
pub mod server;

pub use operations::Operations;
pub use server::{Answers, ControlError, Handler, serve};

/// Name of the socket in the proxy's state folder.
pub const SOCKET_NAME: &str = "control.sock";
