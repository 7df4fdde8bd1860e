//! The clock on the wall of one host, which can jump while processes run: libfaketime, loaded before them. The clocks that know no time of day
//! are left alone, as an operator who sets the time, or a wrong time server, would leave them.

use std::path::{Path, PathBuf};

use super::Cluster;

pub struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    /// A clock that is right.
    pub fn new(cluster: &Cluster, host: &str) -> Self {
        let folders = std::fs::read_dir("/usr/lib").expect("/usr/lib").flatten().map(|entry| entry.path());
        let mut libraries = folders.map(|folder| folder.join("faketime/libfaketimeMT.so.1"));
        let library = libraries.find(|library| library.exists()).expect("libfaketime: scripts/setup test installs it");
        let clock = Self { library, file: cluster.dir().join(format!("clock-{host}")) };
        clock.jump("+0");
        clock
    }

    /// For the processes of the host.
    pub fn environment(&self) -> Vec<(&'static str, PathBuf)> {
        vec![
            ("LD_PRELOAD", self.library.clone()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.clone()),
            ("DONT_FAKE_MONOTONIC", "1".into()),
            // The file is looked at for each question.
            ("FAKETIME_NO_CACHE", "1".into()),
        ]
    }

    /// From here on it differs by this from the right time: `+1d`, say.
    pub fn jump(&self, by: &str) {
        let new = self.file.with_extension("new");
        std::fs::write(&new, by).expect("a file");
        std::fs::rename(&new, &self.file).expect("a file");
    }
}

impl Drop for Clock {
    /// The library leaves something in /dev/shm for each process that was killed, named by its id.
    fn drop(&mut self) {
        for entry in std::fs::read_dir("/dev/shm").into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let id = name.strip_prefix("faketime_shm_").or_else(|| name.strip_prefix("sem.faketime_sem_"));
            if id.is_some_and(|id| !Path::new("/proc").join(id).exists()) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}
