//! A small disk of its own for a host, so that it can be full: a tmpfs over the node's folder. Only root can have one.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use pgtandem::sandbox::user;

const FILLER: &str = "filler";

pub struct Disk {
    folder: PathBuf,
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}

impl Disk {
    /// Puts what is in `folder` on a disk of its own with so many MiB. Nothing of it may be open.
    ///
    /// # Errors
    /// Why there can be none; everything is as it was then.
    pub fn below(folder: &Path, size_mib: u32) -> Result<Self, String> {
        if !user::is_root() {
            return Err("only root can mount a small disk".into());
        }
        let owner = user::find("postgres").map_err(|error| error.to_string())?;
        let aside = folder.with_extension("aside");
        fs::rename(folder, &aside).and_then(|()| fs::create_dir(folder)).map_err(|error| error.to_string())?;
        let options = format!("size={size_mib}m,mode=0755,uid={},gid={}", owner.uid, owner.gid);
        let mounted = run(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(folder));
        if let Err(why) = mounted {
            fs::remove_dir(folder).and_then(|()| fs::rename(&aside, folder)).map_err(|error| error.to_string())?;
            return Err(format!("no tmpfs can be mounted: {why}"));
        }
        let disk = Self { folder: folder.to_owned() };
        run(Command::new("cp").arg("-a").arg(aside.join(".")).arg(folder))?;
        fs::remove_dir_all(&aside).map_err(|error| error.to_string())?;
        Ok(disk)
    }

    /// Leaves no byte free.
    pub fn fill(&self) {
        let mut file = fs::File::create(self.folder.join(FILLER)).expect("a file");
        for size in [1 << 20, 4 << 10] {
            let piece = vec![0; size];
            while file.write_all(&piece).is_ok() {}
        }
    }

    pub fn free(&self) {
        let _ = fs::remove_file(self.folder.join(FILLER));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What still has a file open keeps it until it ends; the folder is empty at once.
        if let Err(why) = run(Command::new("umount").arg("--lazy").arg(&self.folder)) {
            eprintln!("umount {}: {why}", self.folder.display());
        }
    }
}
