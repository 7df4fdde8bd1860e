//! What speaks against filling one node from another. Pure.

use pgtandem_proto::message::NodeFacts;

use super::AT_LEAST_SETTINGS;

/// Room that a fill needs beyond the files: WAL made meanwhile, the new timeline's first segments.
pub(crate) const SPARE_BYTES: u64 = 1 << 30;
/// Names that one sentence lists.
const NAMES_SHOWN_MAX: usize = 5;

/// One thing that Preflight found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The recovery must not begin. Otherwise a person should know, and it goes on.
    pub refused: bool,
    /// What is wrong, one sentence, with names.
    pub what: String,
    /// The next thing to do, one sentence.
    pub hint: String,
}

/// Everything that speaks against filling `target` from `source`, the gravest first.
#[must_use]
pub fn compare(source: &NodeFacts, target: &NodeFacts) -> Vec<Finding> {
    let mut found = Vec::new();
    identity(source, target, &mut found);
    contents(source, target, &mut found);
    settings(source, target, &mut found);
    if !source.unlogged_tables.is_empty() {
        found.push(warned(
            format!("Unlogged tables arrive empty: {}.", some(&source.unlogged_tables)),
            "Make them logged (ALTER TABLE ... SET LOGGED) if their content matters.",
        ));
    }
    found.sort_by_key(|finding| !finding.refused);
    found
}

fn identity(source: &NodeFacts, target: &NodeFacts, found: &mut Vec<Finding>) {
    if target.foreign_server {
        found.push(refused(
            "A PostgreSQL that the agent did not start runs on the target's data directory.".into(),
            "Stop that server, or correct pgdata, port and socket_dir of the node.",
        ));
    }
    let (from, to) = (source.binaries_version_num / 10_000, target.binaries_version_num / 10_000);
    if from != to {
        found.push(refused(
            format!("The source runs PostgreSQL {from}, the target has the programs of PostgreSQL {to}."),
            "Install the source's major version on the target and set bin_dir.",
        ));
    }
    if let (Some(from), Some(to)) = (source.system_identifier, target.system_identifier)
        && from != to
    {
        found.push(refused(
            format!(
                "The target's data directory belongs to another cluster (system identifier {to} instead of {from})."
            ),
            "If nobody needs those data, move the directory away.",
        ));
    }
    if let Some(to) = target.data_major
        && to != from
    {
        found.push(refused(
            format!("The target's data directory is of PostgreSQL {to}, the source runs {from}."),
            "If nobody needs those data, move the directory away.",
        ));
    }
    if source.architecture != target.architecture {
        found.push(refused(
            format!(
                "The source is {}, the target {}; files can not be shared.",
                source.architecture, target.architecture
            ),
            "Use hosts of the same architecture.",
        ));
    }
    let known = !source.libc_version.is_empty() && !target.libc_version.is_empty();
    if known && source.libc_version != target.libc_version {
        found.push(refused(
            format!(
                "The C libraries differ ({} on the source, {} on the target); indexes on text may be sorted differently.",
                source.libc_version, target.libc_version
            ),
            "Run the same release of the operating system on both hosts.",
        ));
    }
}

fn contents(source: &NodeFacts, target: &NodeFacts, found: &mut Vec<Finding>) {
    if !source.tablespaces.is_empty() {
        found.push(warned(
            format!("The source has tablespaces: {}.", some(&source.tablespaces)),
            "They are at the same paths on the target, or where tablespaces of its [[node]] says.",
        ));
    }
    if !source.foreign_prepared.is_empty() {
        found.push(refused(
            format!("The source has prepared transactions that are not ours: {}.", some(&source.foreign_prepared)),
            "COMMIT PREPARED or ROLLBACK PREPARED them.",
        ));
    }
    let missing: Vec<String> =
        source.extensions.iter().filter(|extension| !target.extensions.contains(extension)).cloned().collect();
    if !target.extensions.is_empty() && !missing.is_empty() {
        found.push(refused(
            format!("Extensions of the source are not installed on the target: {}.", some(&missing)),
            "Install their packages on the target.",
        ));
    }
    // What lies on the target already is overwritten in place; how much of it is not known, so only an empty target
    // is measured.
    if let Some(bytes) = source.data_bytes
        && target.data_major.is_none()
        && target.free_bytes < bytes.saturating_add(SPARE_BYTES)
    {
        found.push(refused(
            format!(
                "The target has {} MiB free, the source's files need {} MiB and WAL.",
                target.free_bytes >> 20,
                bytes >> 20
            ),
            "Make room on the target.",
        ));
    }
}

fn settings(source: &NodeFacts, target: &NodeFacts, found: &mut Vec<Finding>) {
    for name in AT_LEAST_SETTINGS {
        if let (Some(from), Some(to)) = (number(source, name), number(target, name))
            && to < from
        {
            found.push(refused(
                format!("{name} is {from} on the source but only {to} on the target."),
                "Set it in the target's postgresql.conf to at least the source's value.",
            ));
        }
    }
    if text(source, "wal_level") == Some("minimal") {
        found.push(refused(
            "wal_level is minimal on the source, so nothing can follow it.".into(),
            "Set wal_level = replica on the source and restart it.",
        ));
    }
    if number(source, "max_replication_slots") == Some(0) {
        found.push(refused(
            "max_replication_slots is 0 on the source, so WAL can not be kept for the target.".into(),
            "Set max_replication_slots to at least 10 on the source and restart it.",
        ));
    }
    if text(source, "block_size").is_some_and(|size| size != "8192") {
        found.push(refused(
            "The source was built with another block size than 8 KiB.".into(),
            "Such servers are not supported.",
        ));
    }
    if number(source, "max_slot_wal_keep_size") == Some(-1) {
        found.push(warned(
            "max_slot_wal_keep_size is not limited on the source; a recovery that hangs can fill its disk with WAL."
                .into(),
            "Set max_slot_wal_keep_size on the source.",
        ));
    }
}

fn text<'facts>(facts: &'facts NodeFacts, name: &str) -> Option<&'facts str> {
    facts.settings.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
}

fn number(facts: &NodeFacts, name: &str) -> Option<i64> {
    text(facts, name)?.parse().ok()
}

fn refused(what: String, hint: &str) -> Finding {
    Finding { refused: true, what, hint: hint.to_owned() }
}

fn warned(what: String, hint: &str) -> Finding {
    Finding { refused: false, what, hint: hint.to_owned() }
}

fn some(names: &[String]) -> String {
    let shown: Vec<&str> = names.iter().take(NAMES_SHOWN_MAX).map(String::as_str).collect();
    match names.len() - shown.len() {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> NodeFacts {
        NodeFacts {
            binaries_version_num: 150_018,
            data_major: Some(15),
            system_identifier: Some(7),
            architecture: "x86_64".into(),
            libc_version: "glibc 2.36".into(),
            free_bytes: 100 << 30,
            data_bytes: Some(1 << 30),
            settings: vec![("max_connections".into(), "100".into()), ("wal_level".into(), "replica".into())],
            extensions: vec!["plpgsql".into()],
            ..NodeFacts::default()
        }
    }

    fn refusals(source: &NodeFacts, target: &NodeFacts) -> usize {
        compare(source, target).iter().filter(|finding| finding.refused).count()
    }

    #[test]
    fn equal_nodes_have_nothing_against_each_other() {
        assert_eq!(compare(&facts(), &facts()), []);
    }

    #[test]
    fn each_reason_is_one_refusal() {
        let changes: [fn(&mut NodeFacts, &mut NodeFacts); 10] = [
            |_, target| target.binaries_version_num = 160_000,
            |_, target| target.system_identifier = Some(8),
            |_, target| (target.data_major, target.system_identifier) = (Some(14), None),
            |_, target| target.architecture = "aarch64".into(),
            |_, target| target.libc_version = "glibc 2.41".into(),
            |_, target| target.foreign_server = true,
            |source, _| source.foreign_prepared = vec!["x".into()],
            |source, _| source.extensions.push("postgis".into()),
            |_, target| (target.data_major, target.free_bytes) = (None, 1 << 30),
            |_, target| target.settings = vec![("max_connections".into(), "50".into())],
        ];
        for (index, change) in changes.iter().enumerate() {
            let (mut source, mut target) = (facts(), facts());
            change(&mut source, &mut target);
            assert_eq!(refusals(&source, &target), 1, "change {index}");
        }
    }

    #[test]
    fn unlogged_tables_are_a_warning_and_an_empty_target_is_fine() {
        let mut source = facts();
        source.unlogged_tables = (0..7).map(|index| format!("db.public.t{index}")).collect();
        let target = NodeFacts { data_major: None, system_identifier: None, settings: Vec::new(), ..facts() };
        let found = compare(&source, &target);
        assert_eq!(found.len(), 1);
        assert!(!found[0].refused && found[0].what.contains("and 2 more"));
    }
}
