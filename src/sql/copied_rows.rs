//! COPY FROM whose rows become something that is not in its data: triggers change them, defaults or a condition vary, the data are where
//! only the leader can read them. The leader does what the client says, behind a savepoint, and followers get the rows that it stored.
//!
//! COPY has no RETURNING. What a savepoint's transaction has inserted has its number as `xmin`, and no other row has; that the count
//! is the one of the COPY is compared.

use super::conditional::Depends;
use super::facts::{Column, Relation, quote_identifier};
use super::plan::{EffectPlan, Refusal, Role, Write};
use super::refuse::refusal;
use super::text::Edits;

/// How the rows of a COPY are found, and what followers do with them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopiedRows {
    /// Object identifier of the leader.
    pub table: u32,
    pub owner: Role,
    /// A table has blocks, and new rows are mostly in the last ones; a partitioned one has none of its own.
    pub has_blocks: bool,
    /// Triggers do not fire again on followers.
    pub after_triggers: bool,
    /// `COPY s.t (a, b) FROM STDIN`
    pub write: String,
    /// `SELECT a, b FROM ONLY s.t`
    select: String,
}

/// The number of the newest transaction among this one and its savepoints: they hold locks on their numbers, and a savepoint gets
/// its after the transaction's own.
const NEWEST: &str = "(SELECT l.transactionid FROM pg_catalog.pg_locks l WHERE l.locktype = 'transactionid' AND l.granted \
     AND l.mode = 'ExclusiveLock' AND l.pid = pg_catalog.pg_backend_pid() ORDER BY pg_catalog.age(l.transactionid) LIMIT 1)";

impl CopiedRows {
    /// The query for the rows, under a search_path of pg_catalog alone, as a COPY. `from`: only blocks from there on.
    #[must_use]
    pub fn read(&self, from: Option<u64>) -> String {
        let blocks = from.map(|block| format!(" AND ctid >= '({block},0)'::tid")).unwrap_or_default();
        format!("COPY ({} WHERE xmin = {NEWEST}{blocks}) TO STDOUT", self.select)
    }

    /// Asks where the table ends now.
    #[must_use]
    pub fn blocks(&self) -> String {
        format!(
            "SELECT (pg_catalog.pg_relation_size({}::pg_catalog.oid) OPERATOR(pg_catalog./) \
             pg_catalog.current_setting('block_size')::pg_catalog.int8)::pg_catalog.text",
            self.table
        )
    }
}

/// The COPY as the rows that the leader stored.
///
/// # Errors
/// Why it can not be.
pub(super) fn write(relation: &Relation, freeze: bool) -> Result<Write, Refusal> {
    let unreadable = relation.columns.iter().find(|column| !column.generated && !column.may_select);
    if let Some(column) = unreadable {
        return Err(refusal(
            format!(
                "COPY whose rows the leader makes is not replicated by this version of pgtandem: the role may not SELECT {}.{}, to read them",
                relation.qualified(),
                column.name
            ),
            "GRANT SELECT on the table to the role.",
        ));
    }
    if freeze {
        return Err(refusal(
            "COPY with FREEZE whose rows the leader makes is not replicated by this version of pgtandem",
            "Leave FREEZE out.",
        ));
    }
    let columns: Vec<&Column> = relation.columns.iter().filter(|column| !column.generated).collect();
    if columns.is_empty() {
        return Err(refusal("COPY into a table without columns of its own is not replicated", "Use INSERT."));
    }
    let list = columns.iter().map(|column| quote_identifier(&column.name)).collect::<Vec<_>>().join(", ");
    let table = relation.qualified();
    let is_partitioned = relation.kind == "p";
    let only = if is_partitioned { "" } else { "ONLY " };
    let rows = CopiedRows {
        table: relation.oid,
        owner: relation.owner_role(),
        has_blocks: !is_partitioned,
        after_triggers: false,
        write: format!("COPY {table} ({list}) FROM STDIN"),
        select: format!("SELECT {list} FROM {only}{table}"),
    };
    Ok(Write {
        effect: EffectPlan::CopiedRows(Box::new(rows)),
        hidden_returning: Vec::new(),
        client_returning: false,
        ddl: false,
        depends: Depends::No,
        barrier: false,
        deferrable_constraints: relation.deferrable,
        edits: Edits::default(),
    })
}
