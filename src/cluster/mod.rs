//! The member set and the durable record: pure. No I/O, no clock.

pub mod members;
pub mod record;
