//! What both benchmarks share: a folder of their own, the step down from root, running programs, figures.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use pgtandem::sandbox::{SandboxError, user};

#[derive(Debug, Args)]
pub struct Common {
    /// Scale of pgbench's tables; 1 is 16 MB.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=5000))]
    pub scale: u32,
    /// Leave the folder with the logs; nothing runs any more.
    #[arg(long)]
    pub keep: bool,
    /// When root calls: everything runs as this user.
    #[arg(long, default_value = "postgres")]
    pub user: String,
    /// The folder that was made for this run.
    #[arg(long, hide = true)]
    pub dir: Option<PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    pub bench: bool,
}

/// The sandbox's folder within that of the run.
pub fn cluster_dir(dir: &Path) -> PathBuf {
    dir.join("cluster")
}

/// Makes a folder in TMPDIR, steps down to `common.user` if root calls, and runs `work` in the folder. True: all held.
pub fn run<F>(name: &str, common: &Common, work: impl FnOnce(PathBuf) -> F) -> anyhow::Result<ExitCode>
where
    F: Future<Output = anyhow::Result<bool>>,
{
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(async {
        let code = |held| if held { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        if let Some(dir) = &common.dir {
            return work(dir.clone()).await.map(code);
        }
        let dir = std::env::temp_dir().join(format!("pgtandem-{name}-{:08x}", rand::random::<u32>()));
        let result = prepare_and_run(name, common, &dir, work).await;
        if common.keep {
            eprintln!("logs are in {}", dir.display());
        } else {
            std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
        }
        result.map(code)
    })
}

async fn prepare_and_run<F>(
    name: &str,
    common: &Common,
    dir: &Path,
    work: impl FnOnce(PathBuf) -> F,
) -> anyhow::Result<bool>
where
    F: Future<Output = anyhow::Result<bool>>,
{
    let user = if user::is_root() { user::find(&common.user)? } else { user::find(&user::current()?)? };
    user::give(dir, &user)?;
    let cluster = cluster_dir(dir);
    user::give(&cluster, &user)?;
    // A sandbox starts its daemons from this copy.
    user::copy_as(Path::new(env!("CARGO_BIN_EXE_pgtandem")), &cluster, "pgtandem", &user)?;
    if !user::is_root() {
        return work(dir.to_owned()).await;
    }
    let program = user::copy_as(&std::env::current_exe()?, dir, name, &user)?;
    Ok(user::run_as(&user, &program, &["--dir", &dir.display().to_string()]).await?.success())
}

/// `work`, or an error when the run is interrupted; what was started is taken down by the caller either way.
pub async fn until_interrupted<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::select! {
        result = work => result,
        () = user::interrupted() => Err(SandboxError::Interrupted.into()),
    }
}

/// The build that was measured; figures of a debug build say nothing.
pub fn profile() -> &'static str {
    if cfg!(debug_assertions) { "debug" } else { "release" }
}

/// The median of the values, and the largest; 0 if there is none.
#[allow(dead_code, reason = "each benchmark uses a part")]
pub fn median_and_max(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or_default();
    let (below, above) = (values.len().saturating_sub(1) / 2, values.len() / 2);
    (f64::midpoint(at(below), at(above)), at(values.len().saturating_sub(1)))
}
