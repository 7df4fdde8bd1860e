//! Moments as people type them and as PostgreSQL reads them. Pure.

use crate::observe::time;

const DAY_S: i64 = 86_400;

/// Microseconds since 1970 of a moment like `2026-11-27 14:15:00.25+01`. It has to say its zone: at night nobody should have to
/// remember which one a server thinks in.
pub fn parse(text: &str) -> Result<u64, &'static str> {
    let text = text.trim();
    let (date, rest) = text.split_once(['T', 't', ' ']).ok_or("it has no time of day")?;
    let rest = rest.trim();
    let end =
        rest.find(|c: char| !(c.is_ascii_digit() || c == ':' || c == '.')).ok_or("it does not say its time zone")?;
    let (clock, zone) = rest.split_at(end);
    let mut parts = date.splitn(3, '-');
    let mut next = |digits: usize| parts.next().and_then(|part| number(part, digits)).ok_or("its date is no date");
    let (year, month, day) = (next(4)?, next(2)?, next(2)?);
    let days = days(year, month, day).ok_or("its date is no date")?;
    let wrong = "its time of day is none";
    let mut parts = clock.splitn(3, ':');
    let (hour, minute) = (parts.next().and_then(|part| number(part, 2)), parts.next().and_then(|part| number(part, 2)));
    let (seconds, fraction) = parts.next().map_or(("00", ""), |part| part.split_once('.').unwrap_or((part, "")));
    let (hour, minute, second) = (hour.ok_or(wrong)?, minute.ok_or(wrong)?, number(seconds, 2).ok_or(wrong)?);
    let micros = if fraction.is_empty() { Some(0) } else { number(&format!("{fraction:0<6}"), 6) };
    if hour > 24 || minute > 59 || second > 60 {
        return Err(wrong);
    }
    let seconds = days * DAY_S + hour * 3600 + minute * 60 + second
        - offset_s(zone.trim()).ok_or("its time zone is not understood")?;
    let micros = seconds.checked_mul(1_000_000).and_then(|all| all.checked_add(micros?)).ok_or(wrong)?;
    u64::try_from(micros).map_err(|_| "it is before 1970")
}

fn number(text: &str, digits: usize) -> Option<i64> {
    (text.len() == digits && text.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.parse().ok())?
}

/// Seconds east of Greenwich: `Z`, `UTC`, `+01`, `-0330`, `+05:30`.
fn offset_s(zone: &str) -> Option<i64> {
    if ["z", "utc", "gmt"].iter().any(|name| zone.eq_ignore_ascii_case(name)) {
        return Some(0);
    }
    let (sign, rest) = if let Some(rest) = zone.strip_prefix('+') { (1, rest) } else { (-1, zone.strip_prefix('-')?) };
    let (hours, minutes) = match rest.len() {
        2 => (rest, "00"),
        4 => rest.split_at_checked(2)?,
        _ => rest.split_once(':')?,
    };
    let (hours, minutes) = (number(hours, 2)?, number(minutes, 2)?);
    (hours <= 15 && minutes < 60).then_some(sign * (hours * 3600 + minutes * 60))
}

/// Days since 1970, after Howard Hinnant's `days_from_civil`; None: there is no such day.
fn days(year: i64, month: i64, day: i64) -> Option<i64> {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let longest = match month {
        2 => 28 + i64::from(leap),
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    (1..=longest).contains(&day).then_some(())?;
    let year = year - i64::from(month <= 2);
    let (era, of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    Some(era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468)
}

/// `2026-11-27 14:15:00.250000+00`, which PostgreSQL takes whatever its own time zone is.
#[must_use]
pub fn for_postgres(micros: u64) -> String {
    format!("{}.{:06}+00", time::utc(micros / 1_000_000), micros % 1_000_000)
}

/// `20261127T141500Z` of seconds since 1970.
#[must_use]
pub fn compact(seconds: u64) -> String {
    let text = time::utc(seconds).replace(['-', ':'], "").replace(' ', "T");
    format!("{text}Z")
}

/// What [`compact`] writes, and nothing else.
#[must_use]
pub fn parse_compact(text: &str) -> Option<u64> {
    let (date, clock) = text.strip_suffix('Z')?.split_once('T')?;
    let year = date.len().checked_sub(4)?;
    let (year, month, day) = (date.get(..year)?, date.get(year..year + 2)?, date.get(year + 2..)?);
    let of = |text: &str| number(text, text.len());
    let part = |at: usize| number(clock.get(at..at + 2)?, 2);
    let seconds = days(of(year)?, of(month)?, of(day)?)? * DAY_S + part(0)? * 3600 + part(2)? * 60 + part(4)?;
    u64::try_from(seconds).ok().filter(|seconds| compact(*seconds) == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_understood_as_it_is_meant() {
        let at = 1_795_788_900_000_000;
        for text in [
            "2026-11-27 14:15:00+00",
            "2026-11-27T14:15:00Z",
            "2026-11-27 15:15:00+01",
            "2026-11-27 15:15:00 +01:00",
            "2026-11-27 14:15 UTC",
            "2026-11-27 10:45:00.0-0330",
        ] {
            assert_eq!(parse(text), Ok(at), "{text}");
        }
        assert_eq!(parse("2026-11-27 14:15:00.25Z"), Ok(at + 250_000));
        assert_eq!(for_postgres(at + 250_000), "2026-11-27 14:15:00.250000+00");
    }

    #[test]
    fn a_moment_without_zone_or_sense_is_refused() {
        assert_eq!(parse("2026-11-27 14:15:00"), Err("it does not say its time zone"));
        assert_eq!(parse("2026-11-27"), Err("it has no time of day"));
        assert_eq!(parse("2026-02-29 00:00:00Z"), Err("its date is no date"));
        for text in [
            "",
            "yesterday",
            "2026-13-01 00:00Z",
            "2026-11-27 25:00Z",
            "2026-11-27 14:15:00+X",
            "2026-11-27 14:15:00.1234567Z",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn moments_are_read_as_they_are_written(micros in 0_u64..1 << 57) {
            assert_eq!(parse(&for_postgres(micros)), Ok(micros));
            assert_eq!(parse_compact(&compact(micros / 1_000_000)), Some(micros / 1_000_000));
        }

        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,40}|[0-9:. T+Z-]{0,40}") {
            let _ = (parse(&text), parse_compact(&text));
        }
    }
}
