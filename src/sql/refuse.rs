//! The sentences with which statements are refused: what it is, and what to do instead.

use super::plan::{Lane, Refusal};

/// A refusal with what the person can do.
#[must_use]
pub fn refusal(message: impl Into<String>, hint: impl Into<String>) -> Refusal {
    Refusal { message: message.into(), hint: hint.into() }
}

/// A refusal as a lane.
#[must_use]
pub fn refused(message: impl Into<String>, hint: impl Into<String>) -> Lane {
    Lane::Refused(refusal(message, hint))
}

/// A kind of statement that no lane carries yet.
#[must_use]
pub fn not_yet(what: &str) -> Lane {
    refused(
        format!("{what} is not replicated by this version of pgtandem"),
        "Nothing was changed. Run it when a later version supports it, or on every server while the cluster is down.",
    )
}

/// A literal or parameter such as `'now'` that goes to a date or time type of an UPDATE or the like.
#[must_use]
pub fn clock_literal() -> Refusal {
    refusal(
        "a date or time value such as 'now' or 'today' would be another one on another server",
        "Use now() or CURRENT_DATE, which get the same value everywhere, or a fixed date.",
    )
}

/// Code that does something else on another server.
#[must_use]
pub fn varying_code(why: &str) -> Refusal {
    refusal(
        format!("the statement calls or fires code that can not run on every server alike: {why}"),
        "Nothing was changed. Give such values to the code as parameters or in the statement, or write without this code.",
    )
}

/// Code that is not known to do the same on another server.
#[must_use]
pub fn unproven_code(why: &str) -> Refusal {
    refusal(
        format!("the statement calls or fires code that is not proven to do the same on every server: {why}"),
        "Nothing was changed. If you know that it does, write unproven = \"allow\" below [proxy] in the configuration.",
    )
}

/// A function was let run under the read-only guard and tried to write (SQLSTATE 25006).
#[must_use]
pub fn guarded_write() -> Refusal {
    refusal(
        "a function in this statement writes, and pgtandem can not replicate what functions write yet",
        "Nothing was changed. Send the statements of the function themselves.",
    )
}

/// Names of prepared statements and portals that are the proxy's own.
pub const OWN_PREFIX: &str = "pgtandem_";

pub(super) fn own_statements() -> Lane {
    let refusal = own_name();
    refused(refusal.message, refusal.hint)
}

/// A client named a prepared statement or portal of ours.
#[must_use]
pub fn own_name() -> Refusal {
    Refusal {
        message: format!(
            "names of prepared statements and portals that begin with {OWN_PREFIX} belong to pgtandem itself"
        ),
        hint: "Use other names.".to_owned(),
    }
}

pub(super) fn own_schema() -> Lane {
    refused("the schema pgtandem belongs to pgtandem itself", "Use other names.")
}

pub(super) fn data_modifying_with(what: &str) -> Lane {
    refused(
        format!("{what} inside another statement is not replicated by this version of pgtandem"),
        "Send it as a statement of its own, in the same transaction.",
    )
}

/// UPDATE ... FROM on a table whose rows can not be named, where a row is joined with several others.
#[must_use]
pub fn several_matches() -> Refusal {
    refusal(
        "UPDATE ... FROM is not replicated by this version of pgtandem on a table without a primary key if a row is joined with several \
         others: each server takes the values of the one that it finds first",
        "Join each row with one, or give the table a primary key.",
    )
}
