//! Scripts print the same through the proxy as on a lone server, and leave identical nodes: our own in tests/differential, or
//! a folder given by `make differential DIR=...` (docs/differential.md).

mod common;
mod differential_support;

use std::path::{Path, PathBuf};

use pgtandem::sandbox::user;

#[tokio::test(flavor = "multi_thread")]
async fn scripts_print_what_they_print_on_a_lone_server() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/differential");
    let dir = std::env::var_os("PGTANDEM_SCRIPTS").map_or(own, PathBuf::from);
    let only = std::env::var("PGTANDEM_SCRIPTS_ONLY").unwrap_or_default();
    let only: Vec<&str> = only.split_whitespace().collect();
    let results = Path::new(env!("CARGO_TARGET_TMPDIR")).join("differential").join(dir.file_name().unwrap_or_default());
    // The servers are taken down when the run is dropped.
    let totals = tokio::select! {
        biased;
        () = user::interrupted() => panic!("interrupted"),
        totals = differential_support::run(&dir, &only, &results) => totals,
    };
    assert!(totals.failures.is_empty(), "\n{}", totals.failures.join("\n"));
}
