//! Whether archiving goes on, as `pgtandem status` says it. Pure: what was seen goes in, a sentence comes out.

use crate::observe::time;

/// PostgreSQL tries again at least every minute: a segment that waits longer is not a busy moment. Seconds.
pub const WAITING_S_MAX: u64 = 120;
/// How late a base copy by schedule may be, seconds, on top of one more interval.
pub const LATE_S_MAX: u64 = 3600;

/// What is seen of a node that archives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Segments that PostgreSQL wants to be rid of, and since when the oldest waits, seconds since 1970.
    pub waiting: Option<(usize, u64)>,
    /// When the newest base copy of the current stream ended.
    pub copied_s: Option<u64>,
    /// The last attempt at a copy failed.
    pub copy_failed: bool,
}

/// The gravest thing that is wrong, without the node's name; None: all is well.
#[must_use]
pub fn problem(seen: Seen, every_s: u64, now_s: u64) -> Option<String> {
    if let Some((count, since_s)) = seen.waiting
        && now_s.saturating_sub(since_s) > WAITING_S_MAX
    {
        let since = time::utc(since_s);
        return Some(format!(
            "{count} WAL segments wait to be archived, the oldest since {since} UTC, and fill the disk"
        ));
    }
    match seen.copied_s {
        None if seen.copy_failed => {
            Some("no base copy could be taken, so nothing can be restored from its archive".into())
        }
        Some(copied_s) if every_s > 0 && now_s.saturating_sub(copied_s) > every_s.saturating_mul(2) + LATE_S_MAX => {
            Some(format!("its newest base copy is of {} UTC", time::utc(copied_s)))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_moment_is_no_problem_and_a_failing_archive_is() {
        let busy = Seen { waiting: Some((40, 1000)), copied_s: Some(900), copy_failed: false };
        assert_eq!(problem(busy, 86_400, 1000 + WAITING_S_MAX), None);
        assert!(
            problem(busy, 86_400, 1001 + WAITING_S_MAX).is_some_and(|what| what.starts_with("40 WAL segments wait"))
        );
        assert_eq!(problem(Seen::default(), 86_400, 1 << 40), None, "the first copy is under way");
        assert!(problem(Seen { copy_failed: true, ..Seen::default() }, 86_400, 1000).is_some());
        let old = Seen { copied_s: Some(1000), ..Seen::default() };
        assert_eq!(problem(old, 0, 1 << 40), None, "nobody asked for more");
        assert_eq!(problem(old, 60, 1000 + 120 + LATE_S_MAX), None);
        assert!(problem(old, 60, 1001 + 120 + LATE_S_MAX).is_some());
    }
}
