//! Scripts of PostgreSQL's that can not print the same, with the reason: the tables of docs/differential.md.

use std::collections::BTreeMap;
use std::path::Path;

pub const FILE: &str = "docs/differential.md";

#[derive(Default)]
pub struct Expected(BTreeMap<String, String>);

impl Expected {
    /// The reasons are about PostgreSQL's own scripts; those of other folders are all expected to be the same.
    pub fn of(dir: &Path) -> Self {
        if !dir.join("parallel_schedule").exists() {
            return Self::default();
        }
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE);
        let text = std::fs::read_to_string(path).expect(FILE);
        Self(text.lines().filter_map(row).collect())
    }

    pub fn reason(&self, script: &str) -> Option<&str> {
        self.0.get(script).map(String::as_str)
    }
}

/// ``| `name` | reason |``
fn row(line: &str) -> Option<(String, String)> {
    let (name, rest) = line.strip_prefix("| `")?.split_once("` | ")?;
    Some((name.to_owned(), rest.strip_suffix(" |")?.to_owned()))
}
