//! The agent protocol of pgtandem: frames, codec, handshake, messages. No I/O; `SPEC.md` is its text.
//!
//! One TLS connection carries one [`hello::Channel`]: control (requests and answers), a tunnel to the local
//! PostgreSQL, the files of a fill, or WAL. Both ends start with HELLO; see `SPEC.md` for the order of frames.
#![forbid(unsafe_code)]

pub mod codec;
pub mod frame;
pub mod hello;
pub mod membership;
pub mod message;
