//! Statements that PostgreSQL runs only outside transactions, and that change something: databases, indexes built beside the
//! clients' work, settings of the server.
//!
//! A plan says only that a statement is one of these; what it does is read from its own text when it is run, because names may
//! be literals, which plans do not hold.

use pg_query::NodeEnum;
use pg_query::protobuf::{CreatedbStmt, DefElem, Node, ObjectType, ReindexStmt, VariableSetKind};

use super::classify::refused_setting;
use super::ddl::is_on;
use super::parse::{ParseError, parse_one};
use super::plan::{Lane, Refusal};
use super::refuse::refusal;

/// The database in which pgtandem keeps its own notes and connections.
pub const HOME: &str = "postgres";

/// Settings that belong to one server, or to pgtandem: no statement carries them to all.
const SETTINGS_OF_A_NODE: [&str; 29] = [
    "port",
    "listen_addresses",
    "unix_socket_directories",
    "unix_socket_group",
    "unix_socket_permissions",
    "data_directory",
    "hba_file",
    "ident_file",
    "config_file",
    "external_pid_file",
    "primary_conninfo",
    "primary_slot_name",
    "promote_trigger_file",
    "restore_command",
    "archive_cleanup_command",
    "recovery_end_command",
    "recovery_target",
    "recovery_target_action",
    "recovery_target_inclusive",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "recovery_min_apply_delay",
    "hot_standby",
    "max_prepared_transactions",
    "max_logical_replication_workers",
    "synchronous_standby_names",
];

/// What one statement does, with the names that it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    CreateDatabase {
        name: String,
        template: String,
    },
    DropDatabase {
        name: String,
    },
    RenameDatabase {
        from: String,
        to: String,
    },
    /// CREATE and DROP INDEX CONCURRENTLY.
    Index,
    /// REINDEX CONCURRENTLY: definitions stay, but what fails leaves an invalid index.
    Reindex,
    /// ALTER SYSTEM. `None`: RESET ALL.
    Setting {
        name: Option<String>,
    },
}

impl Work {
    /// Databases to which nobody may be connected meanwhile.
    #[must_use]
    pub fn databases(&self) -> Vec<&str> {
        match self {
            Self::CreateDatabase { name, template } => vec![name, template],
            Self::DropDatabase { name } => vec![name],
            Self::RenameDatabase { from, to } => vec![from, to],
            Self::Index | Self::Reindex | Self::Setting { .. } => Vec::new(),
        }
    }

    /// Whether a failure leaves an invalid index behind.
    #[must_use]
    pub fn is_index(&self) -> bool {
        matches!(self, Self::Index | Self::Reindex)
    }
}

/// What a text does that was planned for this lane.
///
/// # Errors
/// Why it is refused.
pub fn read(text: &str) -> Result<Work, Refusal> {
    let known = match parse_one(text) {
        Ok(statement) => work(&statement.node),
        Err(ParseError::Tree | ParseError::Syntax(_) | ParseError::NotOne(_)) => None,
    };
    known.unwrap_or_else(|| Err(refusal("this statement can not be read", "Report this as a bug of pgtandem.")))
}

/// The lane of a statement of this kind; `None`: it is none.
pub(super) fn lane(node: &NodeEnum) -> Option<Lane> {
    work(node).map(|_| Lane::Nodewise)
}

fn work(node: &NodeEnum) -> Option<Result<Work, Refusal>> {
    match node {
        NodeEnum::CreatedbStmt(statement) => Some(create_database(statement)),
        NodeEnum::DropdbStmt(statement) => {
            Some(not_home(&statement.dbname).map(|()| Work::DropDatabase { name: statement.dbname.clone() }))
        }
        NodeEnum::RenameStmt(statement) if statement.rename_type == ObjectType::ObjectDatabase as i32 => {
            let (from, to) = (statement.subname.clone(), statement.newname.clone());
            Some(not_home(&from).map(|()| Work::RenameDatabase { from, to }))
        }
        NodeEnum::IndexStmt(index) if index.concurrent => Some(Ok(Work::Index)),
        NodeEnum::DropStmt(drop) if drop.concurrent => Some(Ok(Work::Index)),
        NodeEnum::ReindexStmt(statement) if is_concurrent(statement) => Some(Ok(Work::Reindex)),
        NodeEnum::AlterSystemStmt(statement) => {
            let set = statement.setstmt.as_ref()?;
            if let Some(Lane::Refused(refusal)) = refused_setting(set) {
                return Some(Err(refusal));
            }
            let name = set.name.to_ascii_lowercase();
            let all = set.kind == VariableSetKind::VarResetAll as i32;
            if SETTINGS_OF_A_NODE.contains(&name.as_str()) {
                return Some(Err(refusal(
                    format!("{name} belongs to one server, or to pgtandem: ALTER SYSTEM would set it on all of them"),
                    "Set it in postgresql.conf of the server that it is for.",
                )));
            }
            Some(Ok(Work::Setting { name: (!all).then_some(name) }))
        }
        _ => None,
    }
}

pub(super) fn is_concurrent(statement: &ReindexStmt) -> bool {
    options(&statement.params).any(|option| option.defname == "concurrently" && is_on(option))
}

fn options(nodes: &[Node]) -> impl Iterator<Item = &DefElem> {
    nodes.iter().filter_map(|node| match node.node.as_ref() {
        Some(NodeEnum::DefElem(option)) => Some(option.as_ref()),
        _ => None,
    })
}

fn not_home(name: &str) -> Result<(), Refusal> {
    if name == HOME {
        return Err(refusal(
            format!("the database {HOME} can not be dropped or renamed: pgtandem keeps its own connections there"),
            "Leave it; it need not hold anything of yours.",
        ));
    }
    Ok(())
}

fn create_database(statement: &CreatedbStmt) -> Result<Work, Refusal> {
    let mut template = "template1".to_owned();
    for option in options(&statement.options) {
        let value = option.arg.as_ref().and_then(|value| match value.node.as_ref() {
            Some(NodeEnum::String(text)) => Some(text.sval.as_str()),
            _ => None,
        });
        match option.defname.as_str() {
            "template" => template = value.unwrap_or(&template).to_owned(),
            "tablespace" if value.is_some_and(|name| name != "pg_default") => {
                return Err(refusal(TABLESPACES, "Leave out TABLESPACE."));
            }
            "allow_connections" if !is_on(option) => return Err(no_connections()),
            _ => {}
        }
    }
    if template == HOME {
        return Err(refusal(
            format!("{HOME} can not be a template: pgtandem keeps its own connections there"),
            "Put what new databases shall have into template1 or a database of its own.",
        ));
    }
    Ok(Work::CreateDatabase { name: statement.dbname.clone(), template })
}

/// Why there are no tablespaces.
pub(super) const TABLESPACES: &str = "tablespaces are not supported: their folder would have to be there on every server, and a recovery does not fill it";

/// A database that pgtandem can not connect to either.
pub(super) fn no_connections() -> Refusal {
    refusal(
        "a database without ALLOW_CONNECTIONS can not be replicated: pgtandem could not connect to it either",
        "REVOKE CONNECT ON DATABASE, or CONNECTION LIMIT 0, which hold for all but superusers.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_statement_does_is_read_from_its_own_text() {
        let create = |name: &str, template: &str| {
            Ok(Work::CreateDatabase { name: name.to_owned(), template: template.to_owned() })
        };
        assert_eq!(read("CREATE DATABASE x"), create("x", "template1"));
        assert_eq!(read("create database \"X y\" with template = 'shop' owner bob"), create("X y", "shop"));
        assert_eq!(read("CREATE DATABASE x TEMPLATE DEFAULT"), create("x", "template1"));
        assert_eq!(read("DROP DATABASE IF EXISTS x WITH (FORCE)"), Ok(Work::DropDatabase { name: "x".to_owned() }));
        let rename = Work::RenameDatabase { from: "x".to_owned(), to: "y".to_owned() };
        assert_eq!(read("ALTER DATABASE x RENAME TO y"), Ok(rename));
        assert_eq!(read("CREATE UNIQUE INDEX CONCURRENTLY i ON t (a)"), Ok(Work::Index));
        assert_eq!(read("DROP INDEX CONCURRENTLY i"), Ok(Work::Index));
        assert_eq!(read("REINDEX (CONCURRENTLY TRUE) TABLE t"), Ok(Work::Reindex));
        assert_eq!(read("REINDEX DATABASE CONCURRENTLY x"), Ok(Work::Reindex));
        let setting = |name: Option<&str>| Ok(Work::Setting { name: name.map(str::to_owned) });
        assert_eq!(read("ALTER SYSTEM SET Work_Mem = '1MB'"), setting(Some("work_mem")));
        assert_eq!(read("ALTER SYSTEM RESET work_mem"), setting(Some("work_mem")));
        assert_eq!(read("ALTER SYSTEM RESET ALL"), setting(None));
    }

    #[test]
    fn what_can_not_be_the_same_on_all_servers_is_refused() {
        for text in [
            "CREATE DATABASE x TABLESPACE fast",
            "CREATE DATABASE x TABLESPACE 'fast'",
            "CREATE DATABASE x ALLOW_CONNECTIONS false",
            "CREATE DATABASE x TEMPLATE postgres",
            "DROP DATABASE postgres",
            "ALTER DATABASE postgres RENAME TO x",
            "ALTER SYSTEM SET port = 1",
            "ALTER SYSTEM RESET PORT",
            "ALTER SYSTEM SET standard_conforming_strings = off",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
