//! `pgtandem sandbox up|status|down`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};

use crate::sandbox::{self, Layout, SandboxError, user};

#[derive(Debug, Subcommand)]
pub enum Sandbox {
    /// Make a cluster in a folder, or start of one that is there whatever does not run; returns when it is up.
    Up(Up),
    /// Show what runs.
    Status(Folder),
    /// End every process of a sandbox; can be repeated.
    Down(Down),
}

#[derive(Debug, Args)]
pub struct Up {
    /// The sandbox's folder: empty, not there yet, or a sandbox.
    #[arg(long, value_name = "D")]
    dir: PathBuf,
    /// Number of PostgreSQL servers [default: 2].
    #[arg(long)]
    nodes: Option<usize>,
    /// The proxy listens on P, node i's PostgreSQL on P+1+i, its agent on P+101+i [default: free ones are found].
    #[arg(long, value_name = "P")]
    base_port: Option<u16>,
    /// Make a database bench with pgbench's tables at this scale.
    #[arg(long, value_name = "N")]
    scale: Option<u32>,
    /// Clients may use TLS: makes a certificate for localhost.
    #[arg(long)]
    tls: bool,
    /// Every node archives its WAL and keeps base copies.
    #[arg(long)]
    archive: bool,
    /// When root calls: everything runs as this user.
    #[arg(long, default_value = "postgres")]
    user: String,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct Folder {
    /// The sandbox's folder.
    #[arg(long, value_name = "D")]
    dir: PathBuf,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub struct Down {
    #[command(flatten)]
    folder: Folder,
    /// Remove the folder, with all data in it.
    #[arg(long)]
    remove: bool,
}

impl Sandbox {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        super::runtime()?.block_on(async {
            match self {
                Self::Up(up) => up.run().await,
                Self::Status(folder) => {
                    let report = sandbox::report(&Layout::load(&folder.dir)?)?;
                    print(&report, folder.json)?;
                    Ok(ExitCode::SUCCESS)
                }
                Self::Down(down) => down.run().await,
            }
        })
    }
}

impl Up {
    async fn run(self) -> anyhow::Result<ExitCode> {
        if user::is_root() {
            return step_down(&self.dir, &self.user).await;
        }
        let Self { dir, nodes, base_port, scale, tls, archive, json, .. } = self;
        let options = sandbox::Options { dir, nodes, base_port, scale, tls, archive };
        let layout = sandbox::up(&options, &|line| eprintln!("{line}")).await?;
        print(&sandbox::report(&layout)?, json)?;
        if !json {
            println!("\n{}", lines_to_try(&layout));
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Down {
    async fn run(self) -> anyhow::Result<ExitCode> {
        let layout = Layout::load(&self.folder.dir)?;
        let ended = sandbox::down(&layout).await?;
        if self.remove {
            sandbox::remove_folder(&layout)?;
        }
        if self.folder.json {
            println!("{}", serde_json::json!({ "ended": ended }));
        } else if ended.is_empty() {
            println!("nothing was running");
        } else {
            println!("ended: {}", ended.join(", "));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Runs this same command as `name`, in a folder that is made that user's own.
async fn step_down(dir: &Path, name: &str) -> anyhow::Result<ExitCode> {
    let user = user::find(name)?;
    let dir = std::path::absolute(dir)?;
    let runs = match Layout::load(&dir) {
        Ok(layout) => sandbox::report(&layout)?.runs(),
        Err(SandboxError::NotASandbox { .. }) => sandbox::refuse_unless_empty(&dir).map(|()| false)?,
        Err(error) => return Err(error.into()),
    };
    let existed = dir.exists();
    user::give(&dir, &user)?;
    // What runs keeps its program.
    let program = if runs { dir.join("bin/pgtandem") } else { user::copy_program(&dir, &user)? };
    let text = dir.to_str().ok_or_else(|| anyhow::anyhow!("{} is not valid UTF-8", dir.display()))?;
    let status = user::run_as(&user, &program, &["--dir", text]).await?;
    if Layout::load(&dir).is_err() {
        // Nothing came of it, so nothing is left of it; the other user has told why.
        std::fs::remove_dir_all(if existed { dir.join("bin") } else { dir })?;
    }
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn print(report: &sandbox::Report, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string(report)?);
    } else {
        println!("{}", report.text());
    }
    Ok(())
}

/// What to type next.
pub fn lines_to_try(layout: &Layout) -> String {
    let (dir, port) = (layout.dir.display(), layout.proxy_port());
    let database = if layout.plan.scale > 0 { "bench" } else { "postgres" };
    let config = layout.config_path();
    let psql = if layout.plan.tls {
        let root = layout.ca_dir().join(crate::agent::certificates::CA_FILE);
        let root = root.display();
        format!(
            "psql 'host=localhost port={port} user=postgres dbname={database} sslmode=verify-full sslrootcert={root}'"
        )
    } else {
        format!("psql -h 127.0.0.1 -p {port} -U postgres {database}")
    };
    format!(
        "Try:\n  {psql}\n  pgtandem status --config {config}\n  \
         pgtandem recover node1 --yes --config {config}\n  pgtandem sandbox down --dir {dir}",
        config = config.display(),
    )
}
