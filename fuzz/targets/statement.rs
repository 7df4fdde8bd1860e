//! The input of the targets that take statements: a text, and after a NUL the numbers of the literals that replace its own.

use pgtandem::sql::lex::{Kind, Lexer};
use pgtandem::sql::shape::Shape;

/// Longer texts find nothing that shorter ones do not, and cost time.
const BYTES_MAX: usize = 2000;

pub fn split(data: &[u8]) -> Option<(&str, &[u8])> {
    let end = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
    let (text, choices) = (&data[..end], data.get(end + 1..).unwrap_or_default());
    Some((std::str::from_utf8(text).ok().filter(|text| text.len() <= BYTES_MAX)?, choices))
}

/// The text with other literals of the same kinds.
pub fn with_other_literals(text: &str, shape: &Shape, choices: &[u8]) -> String {
    let mut made = String::with_capacity(text.len());
    let mut copied = 0;
    for (number, literal) in shape.literals.iter().enumerate() {
        let kind = Lexer::new(&text[literal.clone()]).next().map_or(Kind::String, |token| token.kind);
        let others: &[&str] = match kind {
            Kind::Integer => &["0", "1", "7", "53", "2147483647", "00042"],
            Kind::BigInteger => &["2147483648", "9223372036854775807"],
            Kind::Decimal => &["0.5", "1e10", "123456789012345678901234567890", "2.50"],
            Kind::Bits => &["B'0'", "X'1f'", "B''"],
            _ => &[
                "''",
                "'x'",
                "'now'",
                "'2020-01-01'",
                "'it''s'",
                "'1 day'",
                "E'\\n'",
                "$q$'$q$",
                "U&'\\0061'",
                "'{1,2}'",
                "'t'",
            ],
        };
        made.push_str(&text[copied..literal.start]);
        made.push_str(others[usize::from(choices.get(number).copied().unwrap_or(1)) % others.len()]);
        copied = literal.end;
    }
    made.push_str(&text[copied..]);
    made
}
