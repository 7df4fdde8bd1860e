//! The member set and the durable record: pure.
