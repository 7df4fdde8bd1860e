//! PostgreSQL's wire protocol, as far as a proxy needs it: frames as bytes, startup, errors, building messages.
//!
//! Client traffic is never decoded into owned values and written again: frames are looked at by slices and forwarded.

pub mod build;
pub mod frame;
pub mod message;
pub mod scram;
pub mod startup;
