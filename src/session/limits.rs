//! How long a statement may run while the gate is closed: by limits of the server's own, below those that the session has.

/// How long a lock may not be free at the first attempt, doubled for each further one.
const LOCK_MS: u64 = 25;

/// How long the leader may take at one attempt, milliseconds.
pub(super) struct Limits {
    pub statement_ms: u64,
    /// `None`: code that catches errors must not meet this one.
    pub lock_ms: Option<u64>,
}

impl Limits {
    /// `share_ms`: what the leader has of the time under the gate.
    pub fn new(share_ms: u64, attempt: u32, catches_errors: bool) -> Self {
        let lock = (LOCK_MS << attempt).min(share_ms);
        if catches_errors {
            // A statement that is cancelled catches nothing, and waits for no lock as long as the deadlock detector does.
            Self { statement_ms: (lock * 2).min(share_ms), lock_ms: None }
        } else {
            Self { statement_ms: share_ms, lock_ms: Some(lock) }
        }
    }
}

/// The limits that the session has of its own.
pub(super) struct OwnLimits {
    pub statement: String,
    pub lock: String,
    pub statement_ms: Option<u64>,
    pub lock_ms: Option<u64>,
}

impl OwnLimits {
    pub fn read(text: &str) -> Self {
        let (statement, lock) = text.split_once('\x1f').unwrap_or(("0", "0"));
        Self {
            statement: statement.to_owned(),
            lock: lock.to_owned(),
            statement_ms: milliseconds(statement),
            lock_ms: milliseconds(lock),
        }
    }
}

/// A time as PostgreSQL shows it, such as `200ms`, `30s`, `5min`. `None`: no limit.
fn milliseconds(text: &str) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits)?;
    let factor = match unit {
        "" | "ms" => 1,
        "s" => 1000,
        "min" => 60_000,
        "h" => 3_600_000,
        _ => 86_400_000,
    };
    number.parse::<u64>().ok().filter(|n| *n > 0).map(|n| n.saturating_mul(factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_postgresql_shows_them() {
        assert_eq!(
            ["0", "200ms", "30s", "5min", "1h"].map(milliseconds),
            [None, Some(200), Some(30_000), Some(300_000), Some(3_600_000)]
        );
    }

    #[test]
    fn limits_are_within_the_leader_s_share_of_the_time() {
        for attempt in 0..=crate::session::once::AGAIN_MAX {
            let limits = Limits::new(350, attempt, false);
            assert!(limits.statement_ms <= 350 && limits.lock_ms.is_some_and(|lock| lock <= 350));
            let limits = Limits::new(350, attempt, true);
            assert!(limits.statement_ms <= 350 && limits.lock_ms.is_none());
        }
    }
}
