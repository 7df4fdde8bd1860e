//! What a statement does: parse, catalog, classify, pin. Pure: no I/O, no clock.
//!
//! The way of a text: [`shape::mask`] gives the key under which its [`plan::Plan`] is looked up. Only if there is none:
//! [`parse::parse`], [`needs::Needs::of`], [`catalog::query`] run on the leader, [`facts::Facts::parse`] of the answer,
//! [`classify::classify`] (or [`classify::unparsable`]). The texts for leader and followers come from the plan's methods.

mod carry;
pub mod catalog;
pub mod classify;
pub mod conditional;
pub mod copied_rows;
pub mod copy;
pub mod copy_dates;
pub mod copy_fill;
pub mod copy_rows;
pub mod dates;
mod ddl;
pub mod encoding;
mod expressions;
pub mod facts;
mod first_rows;
mod functions;
mod insert;
pub mod large_objects;
pub mod lex;
pub mod matches;
mod merge;
mod modify;
pub mod named;
pub mod needs;
pub mod nodewise;
mod once;
pub mod parse;
mod pinned;
pub mod plan;
pub mod reach;
mod reach_answer;
mod reach_keys;
mod reach_lists;
mod reach_query;
mod reach_text;
pub mod refuse;
mod roles;
pub mod rows;
mod scan;
mod scan_lists;
pub mod sequences;
pub mod set_config;
pub mod shape;
pub mod shared;
pub mod stays;
mod target;
pub mod text;
