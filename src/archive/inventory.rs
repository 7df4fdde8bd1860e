//! What lies in an archive, by the names of its files. Blocking; what is no name of ours is passed over.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::error::ArchiveError;
use super::names::{ArchivePath, BaseName, ENDING, EXTENTS, Hash, Segment, StreamName, WalName};

/// One stream of a node.
#[derive(Clone, Debug)]
pub struct StreamFound {
    pub name: StreamName,
    pub folder: PathBuf,
    /// Sorted.
    pub wal: Vec<WalName>,
    /// Sorted, the oldest first.
    pub bases: Vec<BaseName>,
}

impl StreamFound {
    /// Its segments, sorted.
    #[must_use]
    pub fn segments(&self) -> Vec<Segment> {
        let segments = self.wal.iter().filter_map(|name| match name {
            WalName::Segment(segment) => Some(*segment),
            _ => None,
        });
        segments.filter(|segment| segment.timeline == self.name.timeline).collect()
    }

    #[must_use]
    pub fn base_path(&self, base: BaseName) -> PathBuf {
        self.folder.join("base").join(format!("{base}{ENDING}"))
    }

    /// When a segment was stored, seconds since 1970.
    #[must_use]
    pub fn stored_s(&self, segment: Segment) -> Option<u64> {
        let modified =
            fs::metadata(self.folder.join("wal").join(format!("{segment}{ENDING}"))).ok()?.modified().ok()?;
        modified.duration_since(SystemTime::UNIX_EPOCH).ok().map(|since| since.as_secs())
    }
}

/// The names in `folder`, none if it is not there.
fn names(folder: &Path) -> Result<Vec<String>, ArchiveError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(ArchiveError::file("listing", folder))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        if let Ok(name) = entry.map_err(ArchiveError::file("listing", folder))?.file_name().into_string() {
            names.push(name);
        }
    }
    Ok(names)
}

/// The nodes whose archives lie in `dir`, sorted.
pub fn nodes(dir: &Path) -> Result<Vec<String>, ArchiveError> {
    let mut found: Vec<String> = names(dir)?.into_iter().filter(|name| dir.join(name).is_dir()).collect();
    found.sort_unstable();
    Ok(found)
}

/// The folders of a node's streams.
pub fn folders(folder: &Path) -> Result<Vec<PathBuf>, ArchiveError> {
    let names = names(folder)?;
    Ok(names.iter().filter(|name| StreamName::parse(name).is_some()).map(|name| folder.join(name)).collect())
}

/// The streams of a node, sorted.
pub fn streams(folder: &Path) -> Result<Vec<StreamFound>, ArchiveError> {
    let mut found = Vec::new();
    for name in names(folder)?.iter().filter_map(|name| StreamName::parse(name)) {
        let folder = folder.join(name.to_string());
        let without = |name: &str| name.strip_suffix(ENDING).map(str::to_owned);
        let listed = names(&folder.join("wal"))?;
        let mut wal: Vec<WalName> = listed.iter().filter_map(|name| WalName::parse(&without(name)?)).collect();
        let listed = names(&folder.join("base"))?;
        let mut bases: Vec<BaseName> = listed.iter().filter_map(|name| BaseName::parse(&without(name)?)).collect();
        wal.sort_unstable();
        bases.sort_unstable();
        found.push(StreamFound { name, folder, wal, bases });
    }
    found.sort_unstable_by_key(|stream| stream.name);
    Ok(found)
}

/// The newest base copy of one stream.
pub fn newest_base(folder: &Path, stream: StreamName) -> Result<Option<BaseName>, ArchiveError> {
    let listed = names(&folder.join(stream.to_string()).join("base"))?;
    Ok(listed.iter().filter_map(|name| BaseName::parse(name.strip_suffix(ENDING)?)).max())
}

/// Every extent of a node.
pub fn extents(folder: &Path) -> Result<Vec<Hash>, ArchiveError> {
    let folder = folder.join(EXTENTS);
    let mut found = Vec::new();
    for first in names(&folder)? {
        let inside = names(&folder.join(&first))?;
        found.extend(inside.iter().filter_map(|name| match ArchivePath::parse(&format!("{EXTENTS}/{first}/{name}")) {
            Some(ArchivePath::Extent(hash)) => Some(hash),
            _ => None,
        }));
    }
    Ok(found)
}
