//! What the clients of a probe saw, and what can be concluded from it. Pure.

use std::time::Duration;

use super::Kind;

/// Answers of one client whose time is kept; more are only counted.
const ANSWERS_KEPT_MAX: usize = 20_000_000;
/// Errors of one client whose text is kept; more are only counted.
const ERRORS_KEPT_MAX: usize = 20;

/// What one client saw. Times are since the probe's start.
#[derive(Clone, Debug)]
pub struct ClientSeen {
    pub kind: Kind,
    /// Microseconds since the start of each answer, ascending.
    answers_us: Vec<u64>,
    answers: u64,
    /// Longest time that one operation took.
    pub longest: Duration,
    pub errors: u64,
    pub error_texts: Vec<(Duration, String)>,
    /// Times that the connection was lost.
    pub disconnects: u64,
    /// Writes that neither an answer nor an error was received for.
    pub unknown: u64,
}

impl ClientSeen {
    /// A client that has seen nothing yet.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            answers_us: Vec::new(),
            answers: 0,
            longest: Duration::ZERO,
            errors: 0,
            error_texts: Vec::new(),
            disconnects: 0,
            unknown: 0,
        }
    }

    /// An operation succeeded `at` this time, no earlier than the one before, and `took` so long.
    pub fn answer(&mut self, at: Duration, took: Duration) {
        self.answers += 1;
        self.longest = self.longest.max(took);
        if self.answers_us.len() < ANSWERS_KEPT_MAX {
            self.answers_us.push(u64::try_from(at.as_micros()).unwrap_or(u64::MAX));
        }
    }

    pub fn error(&mut self, at: Duration, text: String) {
        self.errors += 1;
        if self.error_texts.len() < ERRORS_KEPT_MAX {
            self.error_texts.push((at, text));
        }
    }

    /// Operations that succeeded.
    #[must_use]
    pub fn answers(&self) -> u64 {
        self.answers
    }
}

/// The longest time between two neighbouring answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gap {
    /// When it began, since the probe's start.
    pub from: Duration,
    pub length: Duration,
}

/// What all clients saw.
#[derive(Clone, Debug)]
pub struct Seen {
    pub clients: Vec<ClientSeen>,
    /// How long the probe ran.
    pub duration: Duration,
    /// Answers to all writers, microseconds since the start, ascending.
    writes_us: Vec<u64>,
    reads_us: Vec<u64>,
}

impl Seen {
    /// What these clients saw in `duration`.
    #[must_use]
    pub fn new(clients: Vec<ClientSeen>, duration: Duration) -> Self {
        let merge = |wanted: fn(&Kind) -> bool| {
            let clients = clients.iter().filter(|client| wanted(&client.kind));
            let mut all: Vec<u64> = clients.flat_map(|client| client.answers_us.iter().copied()).collect();
            all.sort_unstable();
            all
        };
        let writes_us = merge(|kind| matches!(kind, Kind::Writer(_)));
        let reads_us = merge(|kind| matches!(kind, Kind::Reader(_)));
        Self { clients, duration, writes_us, reads_us }
    }

    #[must_use]
    pub fn errors(&self) -> u64 {
        self.clients.iter().map(|client| client.errors).sum()
    }

    #[must_use]
    pub fn disconnects(&self) -> u64 {
        self.clients.iter().map(|client| client.disconnects).sum()
    }

    /// Up to `count` errors, the earliest first, with the time since the start.
    #[must_use]
    pub fn first_errors(&self, count: usize) -> Vec<(Duration, String)> {
        let mut texts: Vec<_> = self.clients.iter().flat_map(|client| client.error_texts.iter().cloned()).collect();
        texts.sort();
        texts.truncate(count);
        texts
    }

    #[must_use]
    pub fn writes(&self) -> u64 {
        self.writes_us.len() as u64
    }

    #[must_use]
    pub fn reads(&self) -> u64 {
        self.reads_us.len() as u64
    }

    /// Writes that were acknowledged in `from..to`.
    #[must_use]
    pub fn writes_in(&self, from: Duration, to: Duration) -> usize {
        inside(&self.writes_us, from, to).len()
    }

    /// Reads that were answered in `from..to`.
    #[must_use]
    pub fn reads_in(&self, from: Duration, to: Duration) -> usize {
        inside(&self.reads_us, from, to).len()
    }

    /// Increments that each writer was told had been committed.
    #[must_use]
    pub fn acknowledged(&self) -> Vec<u64> {
        self.writers().map(ClientSeen::answers).collect()
    }

    /// The longest time in `from..to` in which no writer got an answer.
    #[must_use]
    pub fn write_gap(&self, from: Duration, to: Duration) -> Gap {
        longest_gap(&self.writes_us, from, to)
    }

    /// The longest time in `from..to` in which no reader got an answer.
    #[must_use]
    pub fn read_gap(&self, from: Duration, to: Duration) -> Gap {
        longest_gap(&self.reads_us, from, to)
    }

    /// The longest gap between writes of each window of this length that lies between `from` and `to`; their median is
    /// what is normal on this machine without anything happening.
    #[must_use]
    pub fn write_gaps(&self, from: Duration, to: Duration, window: Duration) -> Vec<Duration> {
        longest_gaps(&self.writes_us, from, to, window)
    }

    /// The same for reads.
    #[must_use]
    pub fn read_gaps(&self, from: Duration, to: Duration, window: Duration) -> Vec<Duration> {
        longest_gaps(&self.reads_us, from, to, window)
    }

    /// How long each write took whose answer came in `from..to`, ascending: from the answer before to its own, since a
    /// writer does not rest.
    #[must_use]
    pub fn write_times(&self, from: Duration, to: Duration) -> Vec<Duration> {
        let mut times = Vec::new();
        for writer in self.writers() {
            let inside = inside(&writer.answers_us, from, to);
            let pairs = inside.iter().zip(inside.iter().skip(1));
            times.extend(pairs.map(|(before, answer)| Duration::from_micros(answer.saturating_sub(*before))));
        }
        times.sort_unstable();
        times
    }

    /// Compares the counters of one server with what was acknowledged; one sentence for each that cannot be.
    #[must_use]
    pub fn check_counters(&self, server: &str, counters: &[i64]) -> Vec<String> {
        let mut wrong = Vec::new();
        for (index, client) in self.writers().enumerate() {
            let acknowledged = client.answers();
            let most = acknowledged + client.unknown;
            let found = counters.get(index).copied().and_then(|found| u64::try_from(found).ok());
            match found {
                Some(found) if (acknowledged..=most).contains(&found) => {}
                Some(found) => wrong.push(format!(
                    "counter {index} is {found} on {server}; {acknowledged} increments were acknowledged, {} got no answer",
                    client.unknown
                )),
                None => wrong.push(format!("counter {index} is not there on {server}")),
            }
        }
        wrong
    }

    fn writers(&self) -> impl Iterator<Item = &ClientSeen> {
        self.clients.iter().filter(|client| matches!(client.kind, Kind::Writer(_)))
    }
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The answers from `from` to `to`, both included.
fn inside(answers_us: &[u64], from: Duration, to: Duration) -> &[u64] {
    let first = answers_us.partition_point(|answer| *answer < us(from));
    let end = answers_us.partition_point(|answer| *answer <= us(to));
    answers_us.get(first..end).unwrap_or_default()
}

/// The longest gap of each window between `from` and `to`, in order.
fn longest_gaps(answers_us: &[u64], from: Duration, to: Duration, window: Duration) -> Vec<Duration> {
    let (mut gaps, mut start) = (Vec::new(), from);
    while !window.is_zero() && start + window <= to {
        gaps.push(longest_gap(answers_us, start, start + window).length);
        start += window;
    }
    gaps
}

/// `answers_us` ascending. The ends of the window count as answers, so that a window without any is one gap.
fn longest_gap(answers_us: &[u64], from: Duration, to: Duration) -> Gap {
    let (from_us, to_us) = (us(from), us(to));
    let (mut previous, mut gap) = (from_us, Gap::default());
    for answer in inside(answers_us, from, to).iter().copied().chain([to_us]) {
        let length = Duration::from_micros(answer.saturating_sub(previous));
        if length > gap.length {
            gap = Gap { from: Duration::from_micros(previous), length };
        }
        previous = answer;
    }
    gap
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    fn writer(index: usize, answers_ms: &[u64]) -> ClientSeen {
        let mut seen = ClientSeen::new(Kind::Writer(index));
        for answer in answers_ms {
            seen.answer(ms(*answer), ms(1));
        }
        seen
    }

    #[test]
    fn gaps_are_of_all_writers_together() {
        let seen = Seen::new(vec![writer(0, &[10, 20, 90]), writer(1, &[15, 50])], ms(100));
        assert_eq!(seen.write_gap(ms(0), ms(100)), Gap { from: ms(50), length: ms(40) });
        assert_eq!(seen.write_gap(ms(0), ms(60)), Gap { from: ms(20), length: ms(30) });
        assert_eq!(seen.write_gap(ms(55), ms(85)), Gap { from: ms(55), length: ms(30) });
        assert_eq!(seen.write_gaps(ms(0), ms(90), ms(30)), [ms(10), ms(20), ms(30)]);
        assert_eq!(seen.write_times(ms(15), ms(100)), [ms(35), ms(70)]);
        assert_eq!(seen.writes(), 5);
    }

    #[test]
    fn counters_must_be_what_was_acknowledged() {
        let mut unsure = writer(1, &[1, 2]);
        unsure.unknown = 1;
        let seen = Seen::new(vec![writer(0, &[1, 2, 3]), unsure], ms(10));
        assert_eq!(seen.check_counters("node0", &[3, 2]), Vec::<String>::new());
        assert_eq!(seen.check_counters("node0", &[3, 3]), Vec::<String>::new());
        assert_eq!(seen.check_counters("node0", &[2, 4]).len(), 2);
        assert_eq!(seen.check_counters("node1", &[3]), ["counter 1 is not there on node1"]);
    }
}
