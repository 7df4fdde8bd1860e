//! docs/failover.md: what a person types, as it stands there.

use std::path::Path;

pub fn text() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/failover.md")).expect("the page")
}

/// Commands of a block of the page, with other names of nodes than a and b.
pub fn commands(block: usize, a: &str, b: &str) -> Vec<Vec<String>> {
    let page = text();
    let mut blocks = page.split("```").filter(|part| part.trim_start().starts_with("pgtandem"));
    let block = blocks.nth(block).expect("a block of commands");
    block.trim().lines().map(|line| words(line, a, b)).collect()
}

/// A command that stands somewhere in the page.
pub fn command(line: &str, a: &str, b: &str) -> Vec<String> {
    assert!(text().contains(&format!("`{line}`")), "docs/failover.md has no {line}");
    words(line, a, b)
}

fn words(line: &str, a: &str, b: &str) -> Vec<String> {
    let word = |word: &str| match word {
        "a" => a.to_owned(),
        "b" => b.to_owned(),
        word => word.to_owned(),
    };
    line.split_whitespace().skip(1).map(word).collect()
}
