//! Older copies of a data directory: which pages differ is drawn from a seed, so that every program has the same.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::Before;

pub const PAGE_BYTES: usize = 8192;
/// Of the draw of pages.
const SEED: u64 = 37;
/// Written at the start of a page that is to differ; a page of PostgreSQL begins with its LSN.
const DIFFERENT: [u8; 64] = [0xa5; 64];

/// Files below `folder`, relative, in order.
pub fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for item in walkdir::WalkDir::new(folder).sort_by_file_name() {
        let item = item?;
        if item.file_type().is_file()
            && let Ok(path) = item.path().strip_prefix(folder)
        {
            found.push(path.to_owned());
        }
    }
    Ok(found)
}

/// Whether it is a part of a table or index, of which pages are changed and compared: the main fork in a database's folder.
pub fn is_relation(path: &Path) -> bool {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    path.starts_with("base") && name.split('.').all(digits)
}

/// Whether its relation was made by a user.
pub fn is_users(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    is_relation(path)
        && name.split('.').next().and_then(|number| number.parse().ok()).is_some_and(|number: u64| number >= 16_384)
}

/// Copies a data directory without WAL and what belongs to a running server, with all times.
pub fn copy(from: &Path, to: &Path) -> io::Result<()> {
    for item in walkdir::WalkDir::new(from).sort_by_file_name() {
        let item = item?;
        let Ok(path) = item.path().strip_prefix(from) else { continue };
        let target = to.join(path);
        if item.file_type().is_dir() {
            fs::create_dir_all(&target)?;
            fs::set_permissions(&target, fs::Permissions::from_mode(0o700))?;
        } else if item.file_type().is_file()
            && !path.starts_with("pg_wal")
            && !path.starts_with("pg_replslot")
            && !path.starts_with("postmaster.pid")
        {
            fs::copy(item.path(), &target)?;
            set_modified(&target, item.metadata().map_err(io::Error::from)?.modified()?)?;
        }
    }
    Ok(())
}

fn set_modified(path: &Path, time: SystemTime) -> io::Result<()> {
    File::options().write(true).open(path)?.set_modified(time)
}

/// Makes `percent` of the pages of all relations in `folder` differ; the files get an older time.
pub fn change(folder: &Path, percent: u32) -> io::Result<()> {
    for (path, pages) in draw(folder, percent)? {
        let file = File::options().write(true).open(folder.join(path))?;
        for page in pages {
            file.write_all_at(&DIFFERENT, page * PAGE_BYTES as u64)?;
        }
        file.set_modified(UNIX_EPOCH)?;
    }
    Ok(())
}

/// The pages that differ in such a copy, file by file; only files that have some.
fn draw(folder: &Path, percent: u32) -> io::Result<Vec<(PathBuf, Vec<u64>)>> {
    let mut random = StdRng::seed_from_u64(SEED);
    let mut drawn = Vec::new();
    for path in files(folder)?.into_iter().filter(|path| is_relation(path)) {
        let pages = fs::metadata(folder.join(&path))?.size() / PAGE_BYTES as u64;
        let pages: Vec<u64> = (0..pages).filter(|_| random.random_range(0..100) < percent).collect();
        if !pages.is_empty() {
            drawn.push((path, pages));
        }
    }
    Ok(drawn)
}

/// What has to be sent at least: bytes that the node does not have.
pub fn expected_bytes(reference: &Path, before: Before) -> io::Result<u64> {
    let mut bytes = 0;
    match before {
        Before::Empty => {
            for path in files(reference)? {
                bytes += fs::metadata(reference.join(path))?.size();
            }
        }
        Before::Changed(percent) => {
            bytes = draw(reference, percent)?.iter().map(|(_, pages)| pages.len() as u64 * PAGE_BYTES as u64).sum();
        }
        Before::Same | Before::Forked => {}
    }
    Ok(bytes)
}

/// Bytes of the pages that differ between two folders, in files that belong to relations.
pub fn differing_bytes(one: &Path, other: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for path in files(one)?.iter().filter(|path| is_relation(path)) {
        let (one, other) = (fs::read(one.join(path))?, fs::read(other.join(path)).unwrap_or_default());
        let mut others = other.chunks(PAGE_BYTES);
        for page in one.chunks(PAGE_BYTES) {
            if others.next() != Some(page) {
                bytes += page.len() as u64;
            }
        }
    }
    Ok(bytes)
}

/// The first difference of the users' relations in two folders, as a sentence.
pub fn difference(one: &Path, other: &Path) -> io::Result<Option<String>> {
    let relations = |folder: &Path| -> io::Result<Vec<PathBuf>> {
        Ok(files(folder)?.into_iter().filter(|path| is_users(path)).collect())
    };
    let (paths, others) = (relations(one)?, relations(other)?);
    if paths != others {
        return Ok(Some(format!("{} files of tables and indexes here, {} there", paths.len(), others.len())));
    }
    for path in paths {
        let (here, there) = (fs::read(one.join(&path))?, fs::read(other.join(&path))?);
        if here != there {
            let at =
                here.iter().zip(&there).position(|(here, there)| here != there).unwrap_or(here.len().min(there.len()));
            let page = at / PAGE_BYTES;
            return Ok(Some(format!(
                "{} differs in page {page} ({} and {} bytes)",
                path.display(),
                here.len(),
                there.len()
            )));
        }
    }
    Ok(None)
}

/// Reads every file below `folder` once; the time that this takes is the floor of a comparison.
pub fn read_all(folder: &Path) -> io::Result<u64> {
    let (mut bytes, mut buffer) = (0, vec![0; 1 << 20]);
    for path in files(folder)? {
        let file = File::open(folder.join(path))?;
        let mut offset = 0;
        loop {
            let count = file.read_at(&mut buffer, offset)?;
            if count == 0 {
                break;
            }
            offset += count as u64;
        }
        bytes += offset;
    }
    Ok(bytes)
}
