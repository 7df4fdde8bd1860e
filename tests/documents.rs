//! The documents say what the program does: their examples are read by it, and nothing is left out.

use std::path::Path;

use pgtandem::config::{ArchiveConfig, Config};

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn the_example_configuration_is_good_and_every_key_is_explained() {
    let text = document("docs/settings.md");
    let example = text.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
    let config = Config::parse(example, Path::new("docs/settings.md")).expect("a good example");
    let value = serde_json::to_value(&config).expect("plain values");
    let archive = serde_json::to_value(ArchiveConfig::default()).expect("plain values");
    for section in ["cluster", "proxy", "fence", "node", "archive"] {
        let keys = match section {
            "node" => &value[section][0],
            "archive" => &archive,
            _ => &value[section],
        };
        for (key, default) in keys.as_object().expect("a table") {
            let row = text.lines().find(|line| line.starts_with(&format!("| `{key}` |")));
            let row = row.unwrap_or_else(|| panic!("docs/settings.md does not explain {section}.{key}"));
            let shown = row.split('|').nth(2).unwrap_or_default().trim();
            if shown.parse::<u64>().is_ok() {
                assert_eq!(shown, default.to_string(), "the default of {section}.{key} in docs/settings.md");
            }
        }
    }
}

#[test]
fn links_between_documents_lead_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for entry in [root.to_owned(), root.join("docs")] {
        for file in std::fs::read_dir(&entry).expect("a folder").map(|file| file.expect("a file").path()) {
            if file.extension().is_none_or(|extension| extension != "md") {
                continue;
            }
            let text = std::fs::read_to_string(&file).expect("text");
            for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
                if !link.contains("://") && !link.starts_with('#') {
                    let target = link.split('#').next().unwrap_or_default();
                    assert!(entry.join(target).exists(), "{}: {link} leads nowhere", file.display());
                }
            }
        }
    }
}

/// Names and contents of README.md and of everything in docs.
fn documents() -> Vec<(String, String)> {
    let folder = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")).expect("a folder");
    let names = folder.map(|file| format!("docs/{}", file.expect("a file").file_name().display()));
    let names = names.filter(|name| Path::new(name).extension().is_some_and(|extension| extension == "md"));
    names.chain(["README.md".to_owned()]).map(|name| (name.clone(), document(&name))).collect()
}

/// All of `src` and `proto/src`, one behind the other.
fn sources() -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let files = ["src", "proto/src"].into_iter().flat_map(|folder| walkdir::WalkDir::new(root.join(folder)));
    let files = files.map(|entry| entry.expect("readable tree").into_path());
    files.filter(|path| path.is_file()).map(|path| std::fs::read_to_string(path).expect("text")).collect()
}

#[test]
fn the_program_knows_every_command_of_the_documents() {
    let mut commands = std::collections::BTreeSet::new();
    for (_, text) in documents() {
        for (number, part) in text.split("```").enumerate() {
            let lines: Vec<&str> =
                if number % 2 == 1 { part.lines().collect() } else { part.split('`').skip(1).step_by(2).collect() };
            let typed = lines.into_iter().filter_map(|line| line.trim().strip_prefix("pgtandem "));
            let bare = typed.map(|line| line.split(['#', '|', ';']).next().unwrap_or_default().trim().to_owned());
            // The line of pg_ident.conf is no command.
            commands.extend(bare.filter(|line| !line.starts_with("postgres ")));
        }
    }
    assert!(commands.len() > 8, "{commands:?}");
    for command in commands {
        let mut program = std::process::Command::new(env!("CARGO_BIN_EXE_pgtandem"));
        let output = program.args(command.split_whitespace()).arg("--help").output().expect("the program runs");
        assert!(output.status.success(), "pgtandem {command}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn every_sqlstate_of_the_proxy_is_explained() {
    let (sources, explained) = (sources(), document("docs/errors.md"));
    let raised = sources.split("ClientError::").filter_map(|rest| {
        let rest = rest.strip_prefix("error(").or_else(|| rest.strip_prefix("fatal("))?;
        rest.trim_start().strip_prefix('"')?.get(..5)
    });
    let raised: std::collections::BTreeSet<&str> = raised.collect();
    assert!(raised.len() > 8, "{raised:?}");
    for sqlstate in raised {
        assert!(explained.contains(&format!("| {sqlstate} |")), "docs/errors.md does not explain {sqlstate}");
    }
}

#[test]
fn every_limit_of_the_documents_is_one_of_the_program() {
    let (sources, text) = (sources(), document("docs/limits.md"));
    let (_, limits) = text.split_once("## Every limit").expect("the section");
    let settings = document("docs/settings.md");
    for name in limits.split('`').skip(1).step_by(2) {
        if let Some(key) = name.strip_prefix("proxy.") {
            assert!(settings.contains(&format!("| `{key}` |")), "docs/settings.md has no {name}");
        } else if name.chars().all(|c| c.is_ascii_uppercase() || c == '_') {
            assert!(sources.contains(&format!("const {name}: ")), "there is no constant {name}");
        }
    }
}
