//! What of a sandbox runs. Members and states are `pgtandem status`'s business.

use serde::Serialize;

use super::{Layout, SandboxError, process, stop};

/// What runs, with stable names for `--json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    pub dir: String,
    pub config: String,
    pub proxy: Running,
    pub nodes: Vec<Node>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Running {
    pub port: u16,
    /// None: it does not run.
    pub pid: Option<u32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    pub name: String,
    pub pgdata: String,
    pub socket_dir: String,
    pub agent: Running,
    pub postgres: Running,
}

/// Looks at the processes.
pub fn report(layout: &Layout) -> Result<Report, SandboxError> {
    let node = |index| {
        let agent = stop::daemon(layout, &layout.agent_pid_file(index))?;
        let pgdata = layout.pgdata(index);
        let postgres = process::named_in(&layout.postmaster_pid_file(index));
        Ok(Node {
            name: Layout::node_name(index),
            socket_dir: layout.socket_dir(index).display().to_string(),
            agent: Running { port: layout.agent_port(index), pid: agent },
            postgres: Running {
                port: layout.postgres_port(index),
                pid: postgres.filter(|pid| process::working_in(&pgdata).contains(pid)),
            },
            pgdata: pgdata.display().to_string(),
        })
    };
    Ok(Report {
        dir: layout.dir.display().to_string(),
        config: layout.config_path().display().to_string(),
        proxy: Running { port: layout.proxy_port(), pid: stop::daemon(layout, &layout.proxy_pid_file())? },
        nodes: (0..layout.plan.nodes).map(node).collect::<Result<_, SandboxError>>()?,
    })
}

impl Report {
    /// Whether any process runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.proxy.pid.is_some()
            || self.nodes.iter().any(|node| node.agent.pid.is_some() || node.postgres.pid.is_some())
    }

    /// Ports that are in use by the sandbox itself.
    #[must_use]
    pub fn running_ports(&self) -> Vec<u16> {
        let nodes = self.nodes.iter().flat_map(|node| [&node.agent, &node.postgres]);
        nodes.chain([&self.proxy]).filter(|running| running.pid.is_some()).map(|running| running.port).collect()
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let state = |pid: Option<u32>| pid.map_or_else(|| "not running".to_owned(), |pid| format!("process {pid}"));
        let mut lines = vec![format!("{:<20} port {:<6} {}", "proxy", self.proxy.port, state(self.proxy.pid))];
        for Node { name, agent, postgres, .. } in &self.nodes {
            lines.push(format!("{:<20} port {:<6} {}", format!("{name} agent"), agent.port, state(agent.pid)));
            lines.push(format!(
                "{:<20} port {:<6} {}",
                format!("{name} PostgreSQL"),
                postgres.port,
                state(postgres.pid)
            ));
        }
        lines.join("\n")
    }
}
