//! What is wrong is told clearly, with what to do next, and nothing is left behind.

mod common;

use std::net::TcpListener;

use common::{folder, pgtandem, text};

const GOOD: &str = r#"
[cluster]
name = "shop"

[proxy]
node = "a"
listen = "127.0.0.1:6432"
state_dir = "/nonexistent/proxy"

[[node]]
name = "a"
agent = "127.0.0.1:6433"
state_dir = "/nonexistent/a"
pgdata = "/nonexistent/a/pgdata"
bin_dir = "/usr/lib/postgresql/15/bin"
socket_dir = "/nonexistent/run"
port = 5432
"#;

/// Runs the agent with this configuration; it must fail at once. Returns what it says.
fn refused(configuration: &str, node: &str) -> String {
    let folder = folder();
    let file = folder.path().join("pgtandem.toml");
    std::fs::write(&file, configuration).expect("a file");
    let output = pgtandem().args(["agent", "--node", node, "--config"]).arg(&file).output().expect("pgtandem");
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    text(&output)
}

#[test]
fn unknown_key() {
    let said = refused(&GOOD.replace("listen =", "listn ="), "a");
    assert!(said.contains("line 7: unknown key \"listn\"; the nearest known one is \"listen\""), "{said}");
    assert!(said.contains("next:  write listen, or remove the line"), "{said}");
}

#[test]
fn wrong_meaning() {
    let said = refused(&GOOD.replace("node = \"a\"", "node = \"b\""), "a");
    assert!(said.contains("proxy.node is \"b\", which is no [[node]]; there are: a"), "{said}");
    let said = refused(&GOOD.replace("6433", "6432"), "a");
    assert!(said.contains("proxy.listen and the agent of node \"a\" both listen on 127.0.0.1:6432"), "{said}");
}

#[test]
fn no_configuration() {
    let output = pgtandem().args(["agent", "--node", "a", "--config", "/nonexistent/x.toml"]).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("/nonexistent/x.toml") && said.contains("--config FILE"), "{said}");
}

#[test]
fn unknown_command_is_a_wrong_command_line() {
    let output = pgtandem().arg("recvoer").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn sandbox_on_a_port_in_use() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let base = listener.local_addr().unwrap().port() - 1;
    let folder = folder();
    let dir = folder.path().join("d");
    let output =
        pgtandem().args(["sandbox", "up", "--base-port", &base.to_string(), "--dir"]).arg(&dir).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains(&format!("port {}, needed for node0's PostgreSQL, is in use", base + 1)), "{said}");
    assert!(said.contains("next:  choose another --base-port"), "{said}");
    assert!(!dir.exists(), "something was left behind");
}

#[test]
fn sandbox_in_a_folder_with_other_things() {
    let folder = folder();
    std::fs::write(folder.path().join("letter.txt"), "mine").unwrap();
    for command in ["up", "down", "status"] {
        let output = pgtandem().args(["sandbox", command, "--dir"]).arg(folder.path()).output().unwrap();
        let said = text(&output);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("is no sandbox") && said.contains("next:"), "{said}");
    }
    assert_eq!(std::fs::read_to_string(folder.path().join("letter.txt")).unwrap(), "mine");
}

#[test]
fn sandbox_in_a_folder_that_the_user_cannot_reach() {
    use std::os::unix::fs::PermissionsExt;
    if !pgtandem::sandbox::user::is_root() {
        return; // Only root steps down to another user.
    }
    let folder = folder();
    let closed = folder.path().join("closed");
    std::fs::create_dir(&closed).unwrap();
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o700)).unwrap();
    let output = pgtandem().args(["sandbox", "up", "--dir"]).arg(closed.join("d")).output().unwrap();
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let expected = format!("cannot reach the folder {}: {} is not open", closed.join("d").display(), closed.display());
    assert!(said.contains(&expected), "{said}");
}

#[test]
fn sandbox_with_an_impossible_number_of_nodes() {
    let folder = folder();
    let output = pgtandem().args(["sandbox", "up", "--nodes", "99", "--dir"]).arg(folder.path()).output().unwrap();
    assert!(text(&output).contains("99 nodes: a sandbox has 1 to 16"), "{}", text(&output));
}
