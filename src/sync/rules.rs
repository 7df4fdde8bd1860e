//! Which files of a data directory belong to a copy, and which paths of a peer are acceptable.
//!
//! Pure: works on names. The rules are PostgreSQL's own (`basebackup.c`: `excludeDirContents`, `excludeFiles`,
//! `sendDir`), with two of ours: files that belong to a node, and log files, stay where they are.

/// Directories whose content is made anew by every server.
const CONTENT_EXCLUDED: [&str; 10] = [
    "pg_stat_tmp",
    "pg_replslot",
    "pg_dynshmem",
    "pg_notify",
    "pg_serial",
    "pg_snapshots",
    "pg_subtrans",
    "pg_wal",
    "log",
    "pg_log",
];

/// Files that describe a running server or an earlier copy.
const FILES_EXCLUDED: [&str; 9] = [
    "postmaster.pid",
    "postmaster.opts",
    "backup_label",
    "backup_label.old",
    "tablespace_map",
    "backup_manifest",
    "postgresql.auto.conf.tmp",
    "current_logfiles",
    "current_logfiles.tmp",
];

/// Endings of files at the top of the data directory that belong to a node: B keeps its own and takes A's only if it
/// has none.
const NODE_FILE_ENDINGS: [&str; 5] = [".conf", ".crt", ".key", ".pem", ".crl"];

/// Written by the agent on each node and never copied.
pub const NODE_CONF: &str = "pgtandem.node.conf";
/// Settings of a recovery under way; written by the agent, emptied when PostgreSQL has left recovery.
pub const RECOVERY_CONF: &str = "pgtandem.recovery.conf";

/// Settings of archiving; written by the agent on each node and never copied.
pub const ARCHIVE_CONF: &str = "pgtandem.archive.conf";
/// In the data directory of a server that was restored from an archive: it is no node's.
pub const RESTORED_MARK: &str = "pgtandem.restored";

/// The directory of links to tablespaces.
pub const TABLESPACES: &str = "pg_tblspc";

/// Longest path in the table of a peer.
const PATH_BYTES_MAX: usize = 1024;

/// Whether what lies in this directory, relative to the data directory, is left out.
#[must_use]
pub fn content_excluded(directory: &str) -> bool {
    CONTENT_EXCLUDED.contains(&directory)
}

/// Directories that are listed although they lie in one whose content is left out.
#[must_use]
pub fn kept_inside_excluded(path: &str) -> bool {
    matches!(path, "pg_wal/archive_status" | "pg_wal/summaries")
}

/// Whether this file or directory is left out by its own name. Unlogged relations need [`unlogged_fork`], too.
#[must_use]
pub fn name_excluded(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    FILES_EXCLUDED.contains(&name)
        || name.starts_with("pg_internal.init")
        || name.starts_with("pgsql_tmp")
        || matches!(
            path,
            "standby.signal" | "recovery.signal" | "promote" | NODE_CONF | RECOVERY_CONF | ARCHIVE_CONF | RESTORED_MARK
        )
        || name.ends_with(STAGED_ENDING)
        || (in_database(path) && temporary_relation(name))
}

/// Ending of a file that is complete but not yet in its place.
pub const STAGED_ENDING: &str = ".pgtandem-new";

/// Whether B keeps its own file of this name, if it has one.
#[must_use]
pub fn belongs_to_node(path: &str) -> bool {
    !path.contains('/') && NODE_FILE_ENDINGS.iter().any(|ending| path.ends_with(ending))
}

/// Whether the path lies directly in the directory of a database, in the data directory or in a tablespace.
fn in_database(path: &str) -> bool {
    path.rsplit_once('/').is_some_and(|(folder, _)| is_database(folder))
}

/// Whether the path is the directory of a database.
#[must_use]
pub fn is_database(path: &str) -> bool {
    let mut parts = path.split('/');
    match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some("base"), Some(oid), None, None, None) => is_number(oid),
        (Some(TABLESPACES), Some(tablespace), Some(version), Some(oid), None) => {
            is_number(tablespace) && version.starts_with("PG_") && is_number(oid)
        }
        _ => false,
    }
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// Whether the path is the link to a tablespace.
#[must_use]
pub fn is_tablespace(path: &str) -> bool {
    path.strip_prefix(TABLESPACES).and_then(|rest| rest.strip_prefix('/')).is_some_and(is_number)
}

/// `tNN_NN` with an optional fork and segment: a temporary relation (`looks_like_temp_rel_name`).
fn temporary_relation(name: &str) -> bool {
    let Some(rest) = name.strip_prefix('t') else { return false };
    let Some((backend, relation)) = rest.split_once('_') else { return false };
    let digits = relation.bytes().take_while(u8::is_ascii_digit).count();
    !backend.is_empty() && backend.bytes().all(|byte| byte.is_ascii_digit()) && digits > 0
}

/// The number of the relation if `name` is its init fork: `16384_init`.
#[must_use]
pub fn init_fork_of(name: &str) -> Option<&str> {
    let relation = name.strip_suffix("_init")?;
    relation_number(relation).filter(|number| number.len() == relation.len())
}

/// Whether `name` is a fork other than the init fork of the relation whose init fork exists; those are left out,
/// because a server that leaves recovery makes them anew from the init fork.
#[must_use]
pub fn unlogged_fork(name: &str) -> Option<&str> {
    let number = relation_number(name)?;
    let rest = name.get(number.len()..)?;
    (!rest.starts_with("_init")).then_some(number)
}

/// The leading digits, if they are followed by the end, a fork or a segment.
fn relation_number(name: &str) -> Option<&str> {
    let digits = name.bytes().take_while(u8::is_ascii_digit).count();
    let rest = name.get(digits..)?;
    (digits > 0 && (rest.is_empty() || rest.starts_with('_') || rest.starts_with('.'))).then(|| name.get(..digits))?
}

/// Why a path from a peer's table is not acceptable; `None` if it is.
#[must_use]
pub fn path_fault(path: &str) -> Option<&'static str> {
    if path.is_empty() {
        return Some("it is empty");
    }
    if path.len() > PATH_BYTES_MAX {
        return Some("it is longer than 1024 bytes");
    }
    if path.bytes().any(|byte| byte < b' ' || byte == b'\\') {
        return Some("it has a control character or a backslash");
    }
    if path.split('/').any(|part| part.is_empty() || part == "." || part == "..") {
        return Some("it is not a plain relative path");
    }
    let wal = path.strip_prefix("pg_wal/");
    if wal.is_some() && !kept_inside_excluded(path) {
        return Some("WAL does not come with the files");
    }
    if let Some(rest) = path.strip_prefix("pg_tblspc/")
        && !rest.split('/').next().is_some_and(is_number)
    {
        return Some("it is no tablespace");
    }
    name_excluded(path).then_some("a file of this name is never copied")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_server_makes_anew_is_left_out() {
        for path in [
            "postmaster.pid",
            "backup_label",
            "base/5/pg_internal.init",
            "base/pgsql_tmp",
            "base/5/t3_16384",
            "base/5/t3_16384_fsm",
            "pg_tblspc/16390/PG_15_202209061/5/t3_16384",
            "pg_tblspc/16390/PG_15_202209061/pgsql_tmp",
            "pgtandem.node.conf",
            "pgtandem.archive.conf",
            "standby.signal",
        ] {
            assert!(name_excluded(path), "{path}");
        }
        for path in
            ["base/5/16384", "base/5/PG_VERSION", "global/pg_control", "postgresql.conf", "pg_xact/0000", "t3_16384"]
        {
            assert!(!name_excluded(path), "{path}");
        }
        assert!(content_excluded("pg_replslot") && content_excluded("pg_wal") && !content_excluded("pg_xact"));
    }

    #[test]
    fn forks_of_unlogged_relations_are_recognised() {
        assert_eq!(init_fork_of("16384_init"), Some("16384"));
        assert_eq!(init_fork_of("x_init"), None);
        assert_eq!(unlogged_fork("16384"), Some("16384"));
        assert_eq!(unlogged_fork("16384.1"), Some("16384"));
        assert_eq!(unlogged_fork("16384_vm"), Some("16384"));
        assert_eq!(unlogged_fork("16384_init"), None);
        assert_eq!(unlogged_fork("PG_VERSION"), None);
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for path in [
            "",
            "/etc/passwd",
            "../x",
            "base/../../x",
            "base//x",
            "a\\b",
            "a\nb",
            "pg_wal/0001",
            "pg_tblspc/x",
            "./x",
            "base/",
        ] {
            assert!(path_fault(path).is_some(), "{path:?}");
        }
        for path in
            ["base/5/16384.1", "PG_VERSION", "pg_tblspc/1/PG_15_1/5/1", "pg_wal/archive_status", "postgresql.conf"]
        {
            assert_eq!(path_fault(path), None, "{path}");
        }
    }

    proptest::proptest! {
        #[test]
        fn an_accepted_path_stays_below_the_directory(path in "\\PC{0,40}|([a.]{0,3}/){0,5}") {
            if path_fault(&path).is_none() {
                let joined = std::path::Path::new("/base/directory").join(&path);
                assert!(joined.starts_with("/base/directory"));
                assert!(joined.components().all(|part| part != std::path::Component::ParentDir));
            }
        }
    }
}
