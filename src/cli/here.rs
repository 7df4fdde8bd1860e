//! Which node the host is on which a command was typed.

use super::Explained;
use crate::agent::tls::Identity;
use crate::config::Config;

/// The node that was named, or the one whose certificate lies on this host. `None`: several lie here, or none, and nobody said.
pub fn node(config: &Config, given: Option<&str>) -> Result<Option<String>, Explained> {
    if let Some(given) = given {
        return match config.node(given) {
            Some(node) => Ok(Some(node.name.clone())),
            None => {
                let names: Vec<_> = config.nodes.iter().map(|node| node.name.as_str()).collect();
                let what = format!("no node is named {given}; the configuration has {}", names.join(", "));
                Err(Explained { what, hint: "give one of these names".into() })
            }
        };
    }
    let is_here = |name: &str, folder| Identity::load(folder).is_ok_and(|identity| identity.name() == name);
    let mut here = config.nodes.iter().filter(|node| is_here(&node.name, &node.state_dir));
    Ok(match (here.next(), here.next()) {
        (Some(node), None) => Some(node.name.clone()),
        _ => None,
    })
}
