//! Effects, transactions, commit, gate, followers, backlog, in-doubt resolution.
//!
//! A session collects the effects of its transaction in an [`effects::EffectLog`]. At COMMIT a [`flight`] applies
//! them on each follower and prepares; the [`gate`] lets the leader's COMMIT through; followers finish.
//! [`hub::Hub`] is what all sessions share.

mod admit;
mod applier;
pub mod away;
pub mod backlog;
pub mod cancels;
pub mod chain;
pub mod commit;
pub mod cuts;
pub mod deltas;
pub mod effects;
pub mod exclusion;
pub mod flapping;
pub mod flight;
pub mod follower;
pub mod gate;
pub mod hub;
pub mod join;
mod latency;
pub mod leader;
pub mod maintain;
pub mod marks;
pub mod nodewise;
pub mod once;
pub mod protection;
pub mod rejoin;
pub mod resolve;
pub mod rows;
pub mod schema;
pub mod sequences;
pub mod shapes;
mod shrink;
pub mod switch;
pub mod two_phase;
mod watched;
