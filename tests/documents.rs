//! The documents say what the program does: their examples are read by it, and nothing is left out.

use std::path::Path;

use pgtandem::config::Config;

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
    for section in ["cluster", "proxy", "node"] {
        let keys = if section == "node" { &value[section][0] } else { &value[section] };
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
