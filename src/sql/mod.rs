//! What a statement does: parse, catalog, classify, pin. Pure: no I/O, no clock.

pub mod plan;
