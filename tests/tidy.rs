//! Style that a machine can check is a test, not a request.

use std::path::{Path, PathBuf};

/// Longest source file, lines; one idea fits into less.
const LINES_MAX: usize = 600;
/// Files that may be longer, with the reason.
const LONGER: &[(&str, &str)] = &[("src/sql/classify_tests.rs", "one table: some 270 statements and their lanes")];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

/// Every committed text file with one of these extensions, as path relative to the root and content.
fn files(extensions: &[&str]) -> Vec<(String, String)> {
    let skip = ["target", ".git"];
    let walk = walkdir::WalkDir::new(root()).into_iter().filter_entry(move |entry| {
        entry.depth() == 0 || !skip.iter().any(|name| entry.file_name().to_str() == Some(*name))
    });
    let mut found = Vec::new();
    for entry in walk.map(|entry| entry.expect("readable tree")).filter(|entry| entry.file_type().is_file()) {
        let name = entry.path().strip_prefix(root()).expect("below root").display().to_string();
        let extension = entry.path().extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        if extensions.contains(&extension) {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
            found.push((name, text));
        }
    }
    assert!(!found.is_empty());
    found
}

/// Fails with every finding at once, one line each.
fn assert_none(findings: &[String]) {
    assert!(findings.is_empty(), "\n{}", findings.join("\n"));
}

#[test]
fn files_are_short() {
    let long = |(name, text): &(String, String)| {
        let lines = text.lines().count();
        let allowed = LONGER.iter().any(|(longer, _)| longer == name);
        (lines > LINES_MAX && !allowed).then(|| format!("{name}: {lines} lines, at most {LINES_MAX}"))
    };
    assert_none(&files(&["rs"]).iter().filter_map(long).collect::<Vec<_>>());
}

#[test]
fn modules_say_what_they_are_for() {
    let silent = |(name, text): &(String, String)| {
        let first = text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        (!first.starts_with("//!")).then(|| format!("{name}: begins without a //! comment"))
    };
    assert_none(&files(&["rs"]).iter().filter_map(silent).collect::<Vec<_>>());
}

#[test]
fn nothing_unfinished_or_forgotten_is_committed() {
    // Spelt in two parts, so that this file does not find itself.
    let words = [
        concat!("to", "do!("),
        concat!("db", "g!("),
        concat!("unimplement", "ed!("),
        concat!("#[ig", "nore"),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
    ];
    let mut findings = Vec::new();
    for (name, text) in files(&["rs"]) {
        for (number, line) in text.lines().enumerate() {
            findings.extend(
                words
                    .iter()
                    .filter(|word| line.contains(**word))
                    .map(|word| format!("{name}:{}: contains {word}", number + 1)),
            );
        }
    }
    assert_none(&findings);
}

#[test]
fn no_path_of_a_machine_is_committed() {
    let paths = [concat!("/wo", "rk/"), concat!("/home", "/"), concat!("/ro", "ot/"), concat!("/tmp/br", "ief")];
    let mut findings = Vec::new();
    for (name, text) in files(&["rs", "toml", "md", "sh", "yml", "sql", "py"]) {
        for (number, line) in text.lines().enumerate() {
            findings.extend(
                paths
                    .iter()
                    .filter(|path| line.contains(**path))
                    .map(|path| format!("{name}:{}: contains {path}", number + 1)),
            );
        }
    }
    assert_none(&findings);
}

#[test]
fn lines_end_as_unix_lines_do() {
    let mut findings = Vec::new();
    for (name, text) in files(&["rs", "toml", "md", "sh", "sql", "py"]) {
        if text.contains('\r') {
            findings.push(format!("{name}: contains a carriage return"));
        }
        if !text.is_empty() && !text.ends_with('\n') {
            findings.push(format!("{name}: does not end with a newline"));
        }
        for (number, line) in text.lines().enumerate() {
            if line.ends_with([' ', '\t']) {
                findings.push(format!("{name}:{}: ends with a blank", number + 1));
            }
        }
    }
    assert_none(&findings);
}

#[test]
fn unsafe_code_is_forbidden_in_every_crate() {
    for name in ["src/lib.rs", "src/main.rs", "proto/src/lib.rs"] {
        let text = std::fs::read_to_string(root().join(name)).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{name} does not forbid unsafe code");
    }
}
