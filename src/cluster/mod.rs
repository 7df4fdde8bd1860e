//! The member set, the durable record, and who may serve: pure. No I/O, no clock.

pub mod lease;
pub mod members;
pub mod promote;
pub mod record;
pub mod rejoin;
pub mod start;
