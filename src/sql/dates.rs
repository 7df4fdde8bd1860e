//! Date and time literals whose value is the clock's: `'now'`, `'today 12:00'`, `'{yesterday}'`.

/// Words that PostgreSQL's date and time input reads as the time of the transaction (`datetktbl` in `datetime.c`).
const CLOCK_WORDS: [&str; 4] = ["now", "today", "tomorrow", "yesterday"];

/// True if PostgreSQL could read the text as a date or time that depends on the clock. Meant for the value of a literal
/// or parameter that goes to a date or time type, also inside an array, range or row; a literal may be given with its quotes.
///
/// A text with any word that has no place in a date, such as `do it now`, is not one.
#[must_use]
pub fn looks_like_now(literal: &str) -> bool {
    let mut found = false;
    let words = literal.split(|letter: char| !letter.is_alphabetic()).filter(|word| !word.is_empty());
    for word in words {
        if CLOCK_WORDS.iter().any(|known| known.eq_ignore_ascii_case(word)) {
            found = true;
        } else if literal.len() <= LITERAL_BYTES_MAX
            && !may_be_in_a_date(word)
            && !literal.contains(['/', '{', '(', '[', '\\'])
        {
            return false;
        }
    }
    // `\156ow` in E'..' and U&'..' hides the word
    found || (literal.len() <= LITERAL_BYTES_MAX && hides_letters(literal))
}

/// Above this many bytes a text that contains a clock word counts as a date without a look at its other words.
const LITERAL_BYTES_MAX: usize = 256;

/// `E'\156ow'` or `U&'\006eow'`: only literals given with their quotes can have escapes.
fn hides_letters(literal: &str) -> bool {
    let escaped = literal.starts_with("E'")
        || literal.starts_with("e'")
        || literal.starts_with("U&'")
        || literal.starts_with("u&'");
    escaped && (literal.contains('\\') || literal.starts_with(['U', 'u']))
}

/// Month and day names, zones, AM and PM are at most this long or are zone names with a slash (seen by the caller).
fn may_be_in_a_date(word: &str) -> bool {
    const LONG: [&str; 16] = [
        "january",
        "february",
        "october",
        "november",
        "december",
        "september",
        "saturday",
        "thursday",
        "wednesday",
        "infinity",
        "allballs",
        "august",
        "monday",
        "friday",
        "sunday",
        "tuesday",
    ];
    word.len() <= 5 || LONG.iter().any(|known| known.eq_ignore_ascii_case(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_words_are_found_where_dates_can_have_them() {
        for text in [
            "now",
            "'now'",
            " NOW ",
            "today 12:00",
            "'Tomorrow'",
            "yesterday",
            "12:00 today",
            "{today,now}",
            "[now,)",
            "now Europe/Berlin",
            "E'\\156ow'",
        ] {
            assert!(looks_like_now(text), "{text}");
        }
        for text in [
            "",
            "2026-11-23",
            "nowhere",
            "snow",
            "infinity",
            "do it right-away",
            "I shall come tomorrow, certainly",
            "'epoch'",
        ] {
            assert!(!looks_like_now(text), "{text}");
        }
    }
}
