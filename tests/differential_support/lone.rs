//! A plain PostgreSQL server with the sandbox's settings and nothing of pgtandem in it.

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use pgtandem::sandbox::{self, user};

use super::psql::Place;
use crate::common::text;

/// Ends with the value.
pub struct Lone {
    bin_dir: PathBuf,
    port: u16,
    postgres: Child,
}

/// A command that runs as the user `postgres` if root calls.
pub fn as_user(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir("/").stdin(Stdio::null());
    if user::is_root() {
        let user = user::find("postgres").expect("user postgres");
        command.uid(user.uid).gid(user.gid).env("HOME", user.home);
    }
    command
}

/// A folder that the servers' user owns.
pub fn give(dir: &Path) {
    let name = if user::is_root() { "postgres".to_owned() } else { user::current().expect("a user") };
    user::give(dir, &user::find(&name).expect("the user exists")).expect("a folder of the servers' user");
}

impl Lone {
    /// Made in `dir`; returns when it answers.
    pub async fn start(dir: &Path) -> Self {
        give(dir);
        let bin_dir = sandbox::find_bin_dir().expect("PostgreSQL is installed");
        let data = dir.join("data");
        let mut initdb = as_user(&bin_dir.join("initdb"));
        initdb.arg("-D").arg(&data).args(["--username=postgres", "--auth=trust", "--data-checksums"]);
        let output = initdb.args(["--encoding=UTF8", "--no-locale", "--no-sync"]).output().expect("initdb");
        assert!(output.status.success(), "initdb: {}", text(&output));
        let conf = data.join("postgresql.conf");
        let old = std::fs::read_to_string(&conf).expect("postgresql.conf");
        let addresses = "listen_addresses = '127.0.0.1'\nunix_socket_directories = ''\n";
        std::fs::write(&conf, format!("{old}{}{addresses}", sandbox::SETTINGS)).expect("postgresql.conf");

        let port =
            TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port();
        let log = dir.join("log");
        let file = std::fs::File::create(&log).expect("a log");
        let mut postgres = as_user(&bin_dir.join("postgres"));
        postgres.arg("-D").arg(&data).args(["-p", &port.to_string()]);
        postgres.stdout(file.try_clone().expect("a log")).stderr(file);
        let lone = Self { bin_dir, port, postgres: postgres.spawn().expect("postgres") };
        crate::common::wait_for(&format!("PostgreSQL answers, see {}", log.display()), async || {
            sandbox::compare::connect(port, "postgres").await.is_ok()
        })
        .await;
        lone
    }

    pub fn place(&self) -> Place {
        Place { name: "lone", bin_dir: self.bin_dir.clone(), port: self.port }
    }
}

impl Drop for Lone {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.postgres.id()).ok().and_then(rustix::process::Pid::from_raw) {
            // Ended already: nothing to stop.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::QUIT);
        }
        let _ = self.postgres.wait();
    }
}
