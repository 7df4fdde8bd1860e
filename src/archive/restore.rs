//! Makes a data directory of a moment, from a base copy and the WAL behind it. Blocking.
//!
//! Only into a directory that is new or empty. The server that comes out is no node: no record names it, it does not archive, it listens to
//! nobody but on a socket of its own, and a file in it says what it is, so that no agent starts it as its own ([`MARK`]). PostgreSQL
//! replays when a person starts it; `pg_control` is written last, so a half-written directory can not be started.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use pgtandem_proto::message::{EXTENT_BYTES, Lsn};

use super::error::ArchiveError;
use super::file;
use super::inventory::{self, StreamFound};
use super::manifest::{CopiedFile, Manifest};
use super::moment;
use super::names::{ArchivePath, BaseName, Segment, gaps};
use super::settings::{self, Restored, Target};
use super::stream::Stream;
use crate::sync::control_file::CONTROL_FILE;
use crate::sync::rules::{RESTORED_MARK as MARK, TABLESPACES};
use crate::sync::wal::format_lsn;

/// Settings of a restored server; the last line of its `postgresql.conf` includes it.
pub const RESTORE_CONF: &str = "pgtandem.restore.conf";
/// Threads that write files.
const WRITERS_MAX: usize = 8;
/// Longest path of a directory for a socket, bytes; behind it comes the socket's own name.
const SOCKET_DIR_BYTES_MAX: usize = 80;

/// A base copy to start from.
#[derive(Clone, Debug)]
pub struct Chosen {
    pub node: String,
    /// Of the node's archive.
    pub folder: PathBuf,
    pub stream: StreamFound,
    pub base: BaseName,
    pub manifest: Manifest,
    /// The server that the archive is of, if it is on this host and still writes this stream.
    pub live: Option<PathBuf>,
}

/// An archive that lies here.
#[derive(Clone, Debug)]
pub struct Source {
    pub node: String,
    pub folder: PathBuf,
    /// Data directory of the node, if it is on this host.
    pub pgdata: Option<PathBuf>,
}

/// What is known of a copy, for choosing.
#[derive(Clone, Debug)]
struct Candidate {
    source: Source,
    stream: StreamFound,
    base: BaseName,
    manifest: Manifest,
    live: Option<PathBuf>,
    /// How far its WAL goes, by position and by the time at which the last segment came; None: on, with the living server.
    until: Option<(Lsn, u64)>,
    /// The first segment that is missing in the middle.
    gap: Option<Segment>,
}

impl Candidate {
    /// Why the target can not be reached from here.
    fn fault(&self, target: Target) -> Option<String> {
        let (node, base) = (&self.source.node, self.base);
        match target {
            Target::Latest => {
                self.gap.map(|gap| format!("behind base copy {base} of {node} WAL segment {gap} is missing"))
            }
            Target::Time(micros) if micros < self.manifest.ended_us => Some(format!(
                "base copy {base} of {node} ended later, at {}",
                moment::for_postgres(self.manifest.ended_us)
            )),
            Target::Time(micros) => {
                self.until.filter(|(_, until_s)| until_s.saturating_add(1) < micros / 1_000_000).map(|(_, until_s)| {
                    let until = moment::for_postgres(until_s * 1_000_000);
                    format!("the WAL behind base copy {base} of {node} ends earlier, at about {until}")
                })
            }
            Target::Lsn(lsn) if lsn.0 < self.manifest.stop => {
                Some(format!("base copy {base} of {node} ended later, at {}", format_lsn(Lsn(self.manifest.stop))))
            }
            Target::Lsn(lsn) => self.until.filter(|(until, _)| *until < lsn).map(|(until, _)| {
                format!("the WAL behind base copy {base} of {node} ends earlier, at {}", format_lsn(until))
            }),
        }
    }
}

/// The copy to start from: of a leader if there is one, because what followers commit comes a moment later there; of these the newest.
pub fn choose(sources: &[Source], target: Target) -> Result<Chosen, ArchiveError> {
    let (mut candidates, mut faults) = (Vec::new(), Vec::new());
    for source in sources {
        for stream in inventory::streams(&source.folder)? {
            let stream_candidates = candidates_of(source, &stream, &mut faults);
            for candidate in stream_candidates {
                match candidate.fault(target) {
                    None => candidates.push(candidate),
                    Some(fault) => faults.push(fault),
                }
            }
        }
    }
    // A peer's copy of the same is no closer to the present than the own one.
    candidates
        .sort_by_key(|candidate| (candidate.manifest.leads, candidate.manifest.ended_us, candidate.live.is_some()));
    let Some(candidate) = candidates.pop() else {
        let places: Vec<String> = sources.iter().map(|source| source.folder.display().to_string()).collect();
        let what = if faults.is_empty() {
            format!("there is no base copy in {}", places.join(", "))
        } else {
            format!("no base copy leads there: {}", faults.join("; "))
        };
        return Err(ArchiveError::refused(
            what,
            "pgtandem archive shows what there is on this host; the other hosts keep archives, too",
        ));
    };
    let Candidate { source, stream, base, manifest, live, .. } = candidate;
    Ok(Chosen { node: source.node, folder: source.folder, stream, base, manifest, live })
}

fn candidates_of(source: &Source, stream: &StreamFound, faults: &mut Vec<String>) -> Vec<Candidate> {
    let live = source.pgdata.clone().filter(|pgdata| Stream::of(pgdata).is_ok_and(|found| found.name() == stream.name));
    let mut found = Vec::new();
    for base in &stream.bases {
        let manifest = match Manifest::load(&stream.base_path(*base)) {
            Ok(manifest) => manifest,
            Err(error) => {
                faults.push(error.to_string());
                continue;
            }
        };
        if let Some(why) = super::verify::incomplete(stream, *base, &manifest) {
            faults.push(why);
            continue;
        }
        let segments = stream.segments();
        let gap = gaps(&segments, base.start, manifest.wal_segment_bytes).into_iter().next();
        let end = |segment: Segment| segment.next(manifest.wal_segment_bytes).start(manifest.wal_segment_bytes);
        let gap = gap.map(|(first, _)| first);
        let last = segments.iter().rfind(|segment| gap.is_none_or(|gap| **segment < gap));
        let until = match last {
            _ if gap.is_none() && live.is_some() => None,
            last => last.map(|last| (end(*last), stream.stored_s(*last).unwrap_or(u64::MAX))),
        };
        let (source, live) = (source.clone(), live.clone());
        found.push(Candidate { source, stream: stream.clone(), base: *base, manifest, live, until, gap });
    }
    found
}

/// Where the restored server goes, and how it is to be.
pub struct Options<'a> {
    pub to: &'a Path,
    pub target: Target,
    pub pause: bool,
    pub port: u16,
    pub program: &'a Path,
    /// Data directories of the nodes, which are never touched.
    pub nodes: &'a [PathBuf],
}

/// What was written.
#[derive(Clone, Debug)]
pub struct Made {
    pub files: usize,
    pub bytes: u64,
    pub socket_dir: PathBuf,
    pub tablespaces: Option<PathBuf>,
}

/// Writes the data directory. On an error what was written stays, and can not be started.
pub fn restore(chosen: &Chosen, options: &Options<'_>) -> Result<Made, ArchiveError> {
    let to = options.to;
    check_place(to, options.nodes)?;
    check_tablespaces(chosen)?;
    let tablespaces = with_ending(to, ".tablespaces");
    let has_tablespaces = chosen.manifest.files.iter().any(|file| file.tablespace.is_some());
    for folder in std::iter::once(to).chain(has_tablespaces.then_some(tablespaces.as_path())) {
        empty_folder(folder)?;
    }
    write(&to.join(MARK), mark(chosen).as_bytes())?;
    folders(chosen, to, &tablespaces)?;
    let files: Vec<&CopiedFile> = chosen.manifest.files.iter().filter(|file| !file.directory).collect();
    let (control, others): (Vec<_>, Vec<_>) = files.iter().copied().partition(|file| file.path == CONTROL_FILE);
    if control.len() != 1 {
        return Err(ArchiveError::damaged(&chosen.stream.base_path(chosen.base), "it has no pg_control"));
    }
    write_files(&chosen.folder, to, &others)?;
    write(&to.join("backup_label"), chosen.manifest.backup_label.as_bytes())?;
    if has_tablespaces {
        write(&to.join("tablespace_map"), tablespace_map(&chosen.manifest, &tablespaces)?.as_bytes())?;
    }
    write(&to.join("recovery.signal"), b"")?;
    let own = if to.as_os_str().len() <= SOCKET_DIR_BYTES_MAX { to } else { Path::new("/tmp") };
    configure(chosen, options, own)?;
    sync_file_system(to)?;
    write_files(&chosen.folder, to, &control)?;
    sync_file_system(to)?;
    Ok(Made {
        files: files.len(),
        bytes: chosen.manifest.bytes(),
        socket_dir: own.to_owned(),
        tablespaces: has_tablespaces.then_some(tablespaces),
    })
}

fn mark(chosen: &Chosen) -> String {
    format!(
        "Restored by pgtandem from base copy {} of node {}, stream {}.\n",
        chosen.base, chosen.node, chosen.stream.name
    )
}

fn with_ending(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// A node's own directory is refused even if it is empty: its agent would take what comes for its data.
fn check_place(to: &Path, nodes: &[PathBuf]) -> Result<(), ArchiveError> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let place = match (to.parent(), to.file_name()) {
        (Some(parent), Some(name)) if !to.exists() => real(parent).join(name),
        _ => real(to),
    };
    match nodes.iter().find(|node| place.starts_with(real(node)) || real(node).starts_with(&place)) {
        Some(node) => Err(ArchiveError::refused(
            format!("{} is, contains or lies in the data directory of a node, {}", to.display(), node.display()),
            "restore into a directory of its own, look at it, and carry over what is needed through the proxy",
        )),
        None => Ok(()),
    }
}

/// Replay makes a tablespace that is younger than the copy at its own path, which on this host is the living server's.
fn check_tablespaces(chosen: &Chosen) -> Result<(), ArchiveError> {
    let Some(live) = &chosen.live else { return Ok(()) };
    let folder = live.join(TABLESPACES);
    let known: HashSet<&str> =
        chosen.manifest.files.iter().filter_map(|file| file.path.strip_prefix("pg_tblspc/")).collect();
    for entry in fs::read_dir(&folder).map_err(ArchiveError::file("listing", &folder))? {
        let name = entry.map_err(ArchiveError::file("listing", &folder))?.file_name();
        let name = name.to_string_lossy();
        if !known.contains(&*name) {
            let what = format!(
                "tablespace {name} of {} is younger than base copy {}: replaying how it was made would write into the living server's directory",
                chosen.node, chosen.base
            );
            return Err(ArchiveError::refused(
                what,
                "take a base copy (pgtandem base) and restore from that one, or restore on another host",
            ));
        }
    }
    Ok(())
}

fn empty_folder(folder: &Path) -> Result<(), ArchiveError> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => return made.map_err(ArchiveError::file("making", folder)),
    }
    let mut entries = fs::read_dir(folder).map_err(ArchiveError::file("listing", folder))?;
    if entries.next().is_some() {
        return Err(ArchiveError::refused(
            format!("{} is not empty; nothing is restored over anything", folder.display()),
            "name a directory that is not there yet",
        ));
    }
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    fs::set_permissions(folder, mode).map_err(ArchiveError::file("setting the mode of", folder))
}

/// Every directory; tablespaces beside the data directory.
fn folders(chosen: &Chosen, to: &Path, tablespaces: &Path) -> Result<(), ArchiveError> {
    for file in chosen.manifest.files.iter().filter(|file| file.directory) {
        let path = to.join(&file.path);
        let make = || -> io::Result<()> {
            if file.tablespace.is_none() {
                return DirBuilder::new().recursive(true).mode(0o700).create(&path);
            }
            let target = tablespaces.join(path.file_name().unwrap_or_default());
            DirBuilder::new().mode(0o700).create(&target)?;
            std::os::unix::fs::symlink(&target, &path)
        };
        make().map_err(ArchiveError::file("making", &path))?;
    }
    // A copy has no WAL, and these are needed for a start.
    for (name, since) in [("pg_wal/archive_status", 0), ("pg_wal/summaries", 170_000)] {
        let path = to.join(name);
        if chosen.manifest.version_num < since {
            continue;
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(ArchiveError::file("making", &path))?;
    }
    Ok(())
}

/// One line for each, as PostgreSQL writes it (`do_pg_backup_start`), with the new places.
fn tablespace_map(manifest: &Manifest, tablespaces: &Path) -> Result<String, ArchiveError> {
    let place = tablespaces.to_str().filter(|place| !place.contains(['\\', '\n', '\r']));
    let place = place.ok_or_else(|| {
        ArchiveError::refused(
            format!("{} has a name that PostgreSQL can not read", tablespaces.display()),
            "choose a plainer one",
        )
    })?;
    let oids = manifest
        .files
        .iter()
        .filter(|file| file.tablespace.is_some())
        .filter_map(|file| file.path.strip_prefix("pg_tblspc/"));
    Ok(oids.fold(String::new(), |text, oid| text + &format!("{oid} {place}/{oid}\n")))
}

fn write_files(archive: &Path, to: &Path, files: &[&CopiedFile]) -> Result<(), ArchiveError> {
    let (next, failed) = (AtomicUsize::new(0), Mutex::new(None));
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..cores.min(WRITERS_MAX) {
            scope.spawn(|| {
                while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(error) = write_file(archive, to, file) {
                        // The others find nothing more to do.
                        next.store(files.len(), Ordering::Relaxed);
                        *failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(error);
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner).map_or(Ok(()), Err)
}

fn write_file(archive: &Path, to: &Path, file: &CopiedFile) -> Result<(), ArchiveError> {
    let path = to.join(&file.path);
    let writing = || ArchiveError::file("writing", &path);
    let mode = 0o600 | (file.mode & 0o040);
    let out = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path).map_err(writing())?;
    for (index, extent) in file.extents.iter().enumerate() {
        let offset = index as u64 * EXTENT_BYTES as u64;
        let Some(hash) = extent.hash else {
            out.set_len(offset + u64::from(extent.bytes)).map_err(writing())?;
            continue;
        };
        let stored = ArchivePath::Extent(hash).below(archive);
        let (head, content) = file::read(&stored, EXTENT_BYTES as u64)?;
        if head.hash != hash || head.bytes != u64::from(extent.bytes) {
            return Err(ArchiveError::damaged(&stored, "it has another content than its name and the base copy say"));
        }
        out.write_all_at(&content, offset).map_err(writing())?;
    }
    Ok(())
}

fn configure(chosen: &Chosen, options: &Options<'_>, socket_dir: &Path) -> Result<(), ArchiveError> {
    let to = options.to;
    let conf = to.join("postgresql.conf");
    let theirs = match fs::read_to_string(&conf) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        text => Some(text.map_err(ArchiveError::file("reading", &conf))?),
    };
    let restored = Restored {
        target: options.target,
        timeline: chosen.manifest.timeline,
        pause: options.pause,
        port: options.port,
        socket_dir,
        program: options.program,
        archive: &chosen.stream.folder,
        live: chosen.live.as_deref(),
        settings: if theirs.is_some() { &[] } else { &chosen.manifest.settings },
    };
    write(&to.join(RESTORE_CONF), settings::restore_conf(&restored)?.as_bytes())?;
    write(&conf, format!("{}\ninclude '{RESTORE_CONF}'\n", theirs.unwrap_or_default()).as_bytes())?;
    let auto = to.join("postgresql.auto.conf");
    let text = fs::read_to_string(&auto).unwrap_or_default();
    write(&auto, settings::without_restored(&text).as_bytes())?;
    if !to.join("pg_hba.conf").exists() {
        write(&to.join("pg_hba.conf"), b"local all all peer\n")?;
    }
    Ok(())
}

fn write(path: &Path, content: &[u8]) -> Result<(), ArchiveError> {
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        io::Write::write_all(&mut file, content)
    };
    write().map_err(ArchiveError::file("writing", path))
}

fn sync_file_system(folder: &Path) -> Result<(), ArchiveError> {
    let sync = || -> io::Result<()> { Ok(rustix::fs::syncfs(&File::open(folder)?)?) };
    sync().map_err(ArchiveError::file("syncing the file system of", folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_of_a_node_and_what_is_not_empty_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let pgdata = folder.path().join("pgdata");
        fs::create_dir(&pgdata).unwrap();
        let nodes = [pgdata.clone()];
        assert!(check_place(&pgdata, &nodes).is_err() && check_place(&pgdata.join("inside"), &nodes).is_err());
        assert!(check_place(folder.path(), &nodes).is_err(), "it contains a node's");
        let (link, to) = (folder.path().join("link"), folder.path().join("restored"));
        std::os::unix::fs::symlink(&pgdata, &link).unwrap();
        assert!(check_place(&link, &nodes).is_err());
        assert!(check_place(&to, &nodes).is_ok());
        empty_folder(&to).unwrap();
        empty_folder(&to).unwrap();
        fs::write(to.join("x"), b"").unwrap();
        assert!(empty_folder(&to).is_err());
    }

    #[test]
    fn a_copy_is_taken_that_leads_to_the_target() {
        use super::super::manifest::tests::manifest;
        let folder = tempfile::tempdir().unwrap();
        let source = Source { node: "a".into(), folder: folder.path().to_owned(), pgdata: None };
        let stream = "00000001-0011223344556677";
        let make = |ended_us: u64, segment: u64, leads: bool| {
            let mut made = manifest(Vec::new());
            (made.start, made.stop) = ((segment << 24) + 40, (segment << 24) + 400);
            (made.ended_us, made.leads) = (ended_us, leads);
            let base = BaseName { ended_s: ended_us / 1_000_000, start: Segment::of(1, Lsn(made.start), 16 << 20) };
            let path = folder.path().join(format!("{stream}/base/{base}.zst"));
            file::store_bytes(&path, &made.encode().unwrap(), None).unwrap();
            base
        };
        let wal = |segment: u64| {
            let name = Segment::of(1, Lsn(segment << 24), 16 << 20);
            let path = folder.path().join(format!("{stream}/wal/{name}.zst"));
            file::store_bytes(&path, b"", None).unwrap();
            let at = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(60 * segment + 40);
            File::options().append(true).open(path).unwrap().set_modified(at).unwrap();
        };
        assert!(choose(std::slice::from_ref(&source), Target::Latest).is_err());
        let (first, second, third) =
            (make(100_000_000, 2, true), make(200_000_000, 4, true), make(300_000_000, 6, false));
        (2..=6).for_each(wal);
        let choose = |target| choose(std::slice::from_ref(&source), target).map(|chosen| chosen.base);
        assert!(choose(Target::Time(99_000_000)).is_err());
        assert_eq!(choose(Target::Time(150_000_000)).unwrap(), first);
        assert_eq!(choose(Target::Time(250_000_000)).unwrap(), second);
        assert_eq!(choose(Target::Time(350_000_000)).unwrap(), second, "the leader's");
        assert_eq!(choose(Target::Lsn(Lsn(5 << 24))).unwrap(), second);
        assert!(choose(Target::Lsn(Lsn(9 << 24))).is_err(), "there is no WAL so far");
        assert!(choose(Target::Time(500_000_000)).is_err(), "the last WAL came before");
        fs::remove_file(folder.path().join(format!("{stream}/base/{second}.zst"))).unwrap();
        fs::remove_file(folder.path().join(format!("{stream}/wal/{}.zst", Segment::of(1, Lsn(3 << 24), 16 << 20))))
            .unwrap();
        assert_eq!(choose(Target::Latest).unwrap(), third);
        assert_eq!(choose(Target::Time(150_000_000)).unwrap(), first, "before the gap");
        assert_eq!(choose(Target::Time(350_000_000)).unwrap(), third);
    }
}
