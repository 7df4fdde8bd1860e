//! The effects of one transaction, in order, in a form that can be applied again on any follower.
//!
//! Small things stay in a list; parameters, rows and COPY data go to one byte store that spills to an unlinked
//! file. Positions into it make ROLLBACK TO SAVEPOINT a truncation.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::replicate::schema::Context;
use crate::sql::rows::RowTexts;

/// Bytes of one effect list that stay in memory.
pub const LIST_BYTES_MAX: usize = 16 << 20;
/// Bytes of all effect lists that stay in memory.
pub const ALL_LISTS_BYTES_MAX: u64 = 256 << 20;
/// The same while the disk takes nothing: no client pays for a backlog that fills the memory. The backlog is given up then.
pub const ALL_LISTS_NO_DISK_BYTES_MAX: u64 = 512 << 20;
/// Effects of one transaction, whatever their size.
pub const EFFECTS_MAX: usize = 10_000_000;

/// What all effect lists of a proxy share: where they spill, and how much.
#[derive(Debug)]
pub struct SpillBudget {
    pub dir: PathBuf,
    /// Bytes of one list on disk.
    pub disk_bytes_max: u64,
    in_memory: AtomicU64,
}

impl SpillBudget {
    #[must_use]
    pub fn new(dir: PathBuf, disk_bytes_max: u64) -> Self {
        Self { dir, disk_bytes_max, in_memory: AtomicU64::new(0) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum EffectsError {
    #[error("the effects of this transaction exceed effects_disk_max ({0} bytes)")]
    TooLarge(u64),
    #[error("the transaction has more than {EFFECTS_MAX} effects")]
    TooMany,
    #[error("the effects of this transaction can not be kept in {dir}: {source}")]
    Io { dir: PathBuf, source: io::Error },
}

/// One effect. Byte ranges point into the store of its list.
#[derive(Clone, Debug)]
pub enum Effect {
    /// A statement by the extended protocol.
    Statement {
        context: Arc<Context>,
        /// Owner to run under; `None`: the client's role.
        role: EffectRole,
        text: StatementText,
        /// Parameter types as in `Parse`; empty for none.
        types: Arc<[u8]>,
        /// Parameter section of a `Bind`; an empty range for none.
        parameters: Range,
    },
    /// The rows that one statement changed, whose values are in text format: for each row four bytes of length and the
    /// parameter section of a `Bind`, one row after the other.
    Rows { context: Arc<Context>, role: EffectRole, texts: Arc<RowTexts>, data: Range, rows: u64 },
    /// The statement before this changed that many rows, by its command tag.
    Changed { rows: u64 },
    /// `COPY ... FROM STDIN` with its data: the bytes of the `CopyData` messages, one after the other.
    /// `after_triggers`: they are rows as the leader's triggers left them, and no trigger fires again.
    Copy { context: Arc<Context>, role: EffectRole, text: Arc<str>, data: Range, rows: u64, after_triggers: bool },
    /// A statement that ran once on every member, in the halves that were open then: it can not be applied again.
    Once,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EffectRole {
    /// The client's role of that moment.
    Client,
    /// The table's owner.
    Named(Arc<str>),
    /// The proxy's own role: the owner is a superuser anyway.
    Own,
}

#[derive(Clone, Debug)]
pub enum StatementText {
    /// Sent once, parsed each time; kept with the data of the list.
    Once(Range),
    /// The same text for many executions: followers keep it prepared.
    Shared(Arc<str>),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    pub start: u64,
    pub len: u64,
}

/// Where a list stands; given back to [`EffectLog::truncate`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Position {
    effects: usize,
    bytes: u64,
}

#[derive(Debug)]
pub struct EffectLog {
    budget: Arc<SpillBudget>,
    effects: Vec<Effect>,
    memory: Vec<u8>,
    /// Once there is a file, all bytes are in it.
    file: Option<File>,
    bytes: u64,
    accounted: u64,
    /// It was to be on disk, which took nothing; so it is in memory.
    without_disk: bool,
    /// Commits numbered below this must be finished on a follower before the flight.
    pub barrier: Option<u64>,
    pub ddl: bool,
    /// The schema number that must still hold at the commit: a definition did something with whatever was there.
    pub schema_bound: Option<u64>,
    pub deferrable_constraints: bool,
}

impl Position {
    /// How many effects are before it.
    #[must_use]
    pub fn effects(self) -> usize {
        self.effects
    }
}

impl EffectLog {
    #[must_use]
    pub fn new(budget: Arc<SpillBudget>) -> Self {
        Self {
            budget,
            effects: Vec::new(),
            memory: Vec::new(),
            file: None,
            bytes: 0,
            accounted: 0,
            without_disk: false,
            barrier: None,
            ddl: false,
            schema_bound: None,
            deferrable_constraints: false,
        }
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.effects.is_empty()
    }

    #[must_use]
    pub fn effects(&self) -> &[Effect] {
        &self.effects
    }

    /// Bytes of data, in memory and on disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its data do not fit into memory.
    #[must_use]
    pub fn is_in_file(&self) -> bool {
        self.file.is_some()
    }

    #[must_use]
    pub fn position(&self) -> Position {
        Position { effects: self.effects.len(), bytes: self.bytes }
    }

    /// Forgets everything after `position`.
    pub fn truncate(&mut self, position: Position) {
        self.effects.truncate(position.effects);
        self.bytes = self.bytes.min(position.bytes);
        if self.file.is_none() {
            self.memory.truncate(usize::try_from(self.bytes).unwrap_or(usize::MAX));
            self.account();
        }
        if self.effects.is_empty() {
            (self.ddl, self.barrier, self.deferrable_constraints) = (false, None, false);
            self.schema_bound = None;
        }
    }

    /// # Errors
    /// Past [`EFFECTS_MAX`].
    pub fn push(&mut self, effect: Effect) -> Result<(), EffectsError> {
        if self.effects.len() >= EFFECTS_MAX {
            return Err(EffectsError::TooMany);
        }
        self.effects.push(effect);
        Ok(())
    }

    /// Appends bytes and says where they are.
    ///
    /// # Errors
    /// If the disk refuses or the list gets too large.
    pub fn append(&mut self, data: &[u8]) -> Result<Range, EffectsError> {
        let range = Range { start: self.bytes, len: data.len() as u64 };
        if self.file.is_none() && self.must_spill(data.len()) {
            match self.spill() {
                Err(error) if self.fits_without_disk(data.len()) => {
                    tracing::warn!(%error, "effects stay in memory; a node that joins is given up for that");
                    self.without_disk = true;
                }
                spilled => spilled?,
            }
        }
        match &self.file {
            Some(file) => {
                if self.bytes + range.len > self.budget.disk_bytes_max {
                    return Err(EffectsError::TooLarge(self.budget.disk_bytes_max));
                }
                file.write_all_at(data, self.bytes).map_err(|source| self.io(source))?;
            }
            None => self.memory.extend_from_slice(data),
        }
        self.bytes += range.len;
        self.account();
        Ok(range)
    }

    fn must_spill(&self, more: usize) -> bool {
        let all_max = if self.without_disk { ALL_LISTS_NO_DISK_BYTES_MAX } else { ALL_LISTS_BYTES_MAX };
        self.memory.len() + more > LIST_BYTES_MAX
            || (more + self.memory.len() > 4096
                && self.budget.in_memory.load(Ordering::Relaxed) + more as u64 > all_max)
    }

    fn fits_without_disk(&self, more: usize) -> bool {
        self.memory.len() + more <= LIST_BYTES_MAX
            && self.budget.in_memory.load(Ordering::Relaxed) + more as u64 <= ALL_LISTS_NO_DISK_BYTES_MAX
    }

    /// Whether it is in memory only because the disk took nothing.
    #[must_use]
    pub fn is_without_disk(&self) -> bool {
        self.without_disk
    }

    fn io(&self, source: io::Error) -> EffectsError {
        EffectsError::Io { dir: self.budget.dir.clone(), source }
    }

    /// Moves the bytes into a file without a name: it is gone when it is closed, even after a kill.
    fn spill(&mut self) -> Result<(), EffectsError> {
        let flags = rustix::fs::OFlags::TMPFILE | rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC;
        let fd = rustix::fs::open(&self.budget.dir, flags, rustix::fs::Mode::from_raw_mode(0o600))
            .map_err(|e| self.io(e.into()))?;
        let file = File::from(fd);
        file.write_all_at(&self.memory, 0).map_err(|source| self.io(source))?;
        self.memory = Vec::new();
        self.file = Some(file);
        self.account();
        Ok(())
    }

    fn account(&mut self) {
        let now = self.memory.len() as u64;
        if now >= self.accounted {
            self.budget.in_memory.fetch_add(now - self.accounted, Ordering::Relaxed);
        } else {
            self.budget.in_memory.fetch_sub(self.accounted - now, Ordering::Relaxed);
        }
        self.accounted = now;
    }

    /// Calls `take` with the bytes of `range`, in pieces of at most `piece_bytes_max`.
    ///
    /// # Errors
    /// If the file can not be read.
    pub fn read(&self, range: Range, buffer: &mut Vec<u8>) -> Result<(), EffectsError> {
        let len = usize::try_from(range.len).unwrap_or(usize::MAX);
        buffer.clear();
        match &self.file {
            Some(file) => {
                buffer.resize(len, 0);
                file.read_exact_at(buffer, range.start).map_err(|source| self.io(source))
            }
            None => {
                let start = usize::try_from(range.start).unwrap_or(usize::MAX);
                buffer.extend_from_slice(self.memory.get(start..start.saturating_add(len)).unwrap_or_default());
                Ok(())
            }
        }
    }
}

impl Drop for EffectLog {
    fn drop(&mut self) {
        self.budget.in_memory.fetch_sub(self.accounted, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(disk_bytes_max: u64) -> EffectLog {
        EffectLog::new(Arc::new(SpillBudget::new(std::env::temp_dir(), disk_bytes_max)))
    }

    #[test]
    fn what_was_appended_is_read_back_across_the_spill_and_after_a_truncation() {
        let mut log = log(1 << 30);
        let chunk = vec![7u8; 1 << 20];
        let first = log.append(b"first").unwrap();
        let kept = log.position();
        let ranges: Vec<_> = (0..20).map(|_| log.append(&chunk).unwrap()).collect();
        assert!(log.file.is_some());
        let mut back = Vec::new();
        log.read(ranges[19], &mut back).unwrap();
        assert_eq!(back, chunk);
        log.truncate(kept);
        let second = log.append(b"second").unwrap();
        log.read(first, &mut back).unwrap();
        assert_eq!(back, b"first");
        log.read(second, &mut back).unwrap();
        assert_eq!(back, b"second");
    }

    #[test]
    fn a_list_past_its_limit_on_disk_is_refused() {
        let mut log = log(20 << 20);
        let chunk = vec![7u8; 1 << 20];
        let refused = (0..21).find_map(|_| log.append(&chunk).err());
        assert!(matches!(refused, Some(EffectsError::TooLarge(_))));
    }

    #[test]
    fn where_the_disk_takes_nothing_small_lists_stay_in_memory_and_large_ones_are_refused() {
        let budget = Arc::new(SpillBudget::new("/nowhere/at/all".into(), 1 << 30));
        budget.in_memory.store(ALL_LISTS_BYTES_MAX, Ordering::Relaxed);
        let mut log = EffectLog::new(Arc::clone(&budget));
        log.append(&[1; 100]).unwrap();
        assert!(!log.is_without_disk(), "it need not be on disk");
        let range = log.append(&vec![2; 1 << 20]).unwrap();
        let mut back = Vec::new();
        log.read(range, &mut back).unwrap();
        assert!(log.is_without_disk() && back == vec![2; 1 << 20]);
        let refused = (0..16).find_map(|_| log.append(&vec![3; 1 << 20]).err());
        assert!(matches!(refused, Some(EffectsError::Io { .. })), "{refused:?}");
        budget.in_memory.store(ALL_LISTS_NO_DISK_BYTES_MAX, Ordering::Relaxed);
        let refused = EffectLog::new(Arc::clone(&budget)).append(&[4; 5000]);
        assert!(matches!(refused, Err(EffectsError::Io { .. })), "{refused:?}");
    }

    #[test]
    fn memory_is_given_back() {
        let budget = Arc::new(SpillBudget::new(std::env::temp_dir(), 0));
        let mut log = EffectLog::new(Arc::clone(&budget));
        log.append(&[0; 1000]).unwrap();
        drop(log);
        assert_eq!(budget.in_memory.load(Ordering::Relaxed), 0);
    }
}
