//! `pgtandem demo`: the main job on this machine, with numbers.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;

use super::sandbox::lines_to_try;
use crate::sandbox::{self, Layout, SandboxError, demo, user};

#[derive(Debug, Args)]
pub struct Demo {
    /// Leave the cluster up at the end.
    #[arg(long)]
    keep: bool,
    /// Print what was seen as JSON.
    #[arg(long)]
    json: bool,
    /// When root calls: everything runs as this user.
    #[arg(long, default_value = "postgres")]
    user: String,
    /// The folder that root has made.
    #[arg(long, hide = true)]
    dir: Option<PathBuf>,
}

impl Demo {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        super::runtime()?.block_on(async {
            let dir = self.dir.clone().unwrap_or_else(fresh_dir);
            if user::is_root() {
                let user = user::find(&self.user)?;
                user::give(&dir, &user)?;
                let program = user::copy_program(&dir, &user)?;
                let status = user::run_as(&user, &program, &["--dir", &dir.display().to_string()]).await;
                if !self.keep {
                    // What the other user left: its program, and the folder itself.
                    let _ = std::fs::remove_dir_all(&dir);
                }
                return Ok(if status?.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
            }
            self.show(&dir).await
        })
    }

    async fn show(&self, dir: &Path) -> anyhow::Result<ExitCode> {
        let result = tokio::select! {
            result = demo::run(dir.to_owned(), &|line| eprintln!("{line}")) => result,
            () = user::interrupted() => Err(SandboxError::Interrupted.into()),
        };
        if let Ok((layout, outcome)) = &result {
            if self.json {
                println!("{}", serde_json::to_string(outcome)?);
            } else {
                println!("\n{}\n", outcome.table());
                println!("{}", if self.keep { lines_to_try(layout) } else { lines_without(layout) });
            }
        }
        if !self.keep
            && let Ok(layout) = Layout::load(dir)
        {
            sandbox::down(&layout).await?;
            sandbox::remove_folder(&layout)?;
        }
        let (_, outcome) = result?;
        Ok(if outcome.held { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn fresh_dir() -> PathBuf {
    std::env::temp_dir().join(format!("pgtandem-demo-{:08x}", rand::random::<u32>()))
}

/// What to type for a cluster that stays.
fn lines_without(layout: &Layout) -> String {
    let scale = layout.plan.scale;
    format!(
        "Everything was taken down. Try it yourself:\n  pgtandem sandbox up --dir /tmp/tandem --base-port 15000 --scale {scale}\n  \
         psql -h 127.0.0.1 -p 15000 -U postgres bench\n  pgtandem status --config /tmp/tandem/pgtandem.toml\n  \
         pgtandem recover node1 --yes --config /tmp/tandem/pgtandem.toml\n  pgtandem sandbox down --dir /tmp/tandem --remove"
    )
}
