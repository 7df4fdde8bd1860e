//! A lexer that follows PostgreSQL's `scan.l` (with `standard_conforming_strings = on`) closely enough to find where
//! literals, comments, words and parentheses begin and end. It gives no meaning to them, allocates nothing and can not fail:
//! what PostgreSQL would refuse comes out as some token, and the server answers the error.

use std::ops::Range;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Space,
    Comment,
    /// Keyword or identifier without quotes.
    Word,
    QuotedIdentifier,
    /// `'..'`, `U&'..'`, `E'..'`, `$tag$..$tag$`
    String,
    /// `B'..'`, `X'..'`
    Bits,
    /// Fits int4.
    Integer,
    /// Fits int8, not int4.
    BigInteger,
    /// Everything else that is a number: its type is numeric.
    Decimal,
    /// `$1`
    Parameter,
    /// One byte of punctuation or operator.
    Symbol,
    /// A string, identifier or comment that does not end.
    Unterminated,
}

impl Kind {
    #[must_use]
    pub fn is_literal(self) -> bool {
        matches!(self, Kind::String | Kind::Bits | Kind::Integer | Kind::BigInteger | Kind::Decimal)
    }

    /// Neither white space nor comment.
    #[must_use]
    pub fn is_significant(self) -> bool {
        !matches!(self, Kind::Space | Kind::Comment)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    pub kind: Kind,
    /// In bytes.
    pub range: Range<usize>,
}

/// Gives the tokens of a text one after the other; their ranges cover it without gaps.
pub struct Lexer<'a> {
    bytes: &'a [u8],
    at: usize,
}

fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c)
}

fn is_newline(byte: u8) -> bool {
    matches!(byte, b'\n' | b'\r')
}

fn is_word_start(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80
}

fn is_word(byte: u8) -> bool {
    is_word_start(byte) || byte.is_ascii_digit() || byte == b'$'
}

impl<'a> Lexer<'a> {
    #[must_use]
    pub fn new(text: &'a str) -> Self {
        Self { bytes: text.as_bytes(), at: 0 }
    }

    fn byte(&self, at: usize) -> u8 {
        // NUL can not be part of a statement, so it serves as the end
        self.bytes.get(at).copied().unwrap_or(0)
    }

    fn skip_while(&self, mut at: usize, test: impl Fn(u8) -> bool) -> usize {
        while at < self.bytes.len() && test(self.byte(at)) {
            at += 1;
        }
        at
    }

    fn line_comment(&self, at: usize) -> usize {
        self.skip_while(at, |byte| !is_newline(byte))
    }

    /// `at` is after the first `/*`. Comments nest.
    fn block_comment(&self, mut at: usize) -> Option<usize> {
        let mut depth = 1_usize;
        while at < self.bytes.len() {
            match (self.byte(at), self.byte(at + 1)) {
                (b'/', b'*') => {
                    depth += 1;
                    at += 2;
                }
                (b'*', b'/') => {
                    depth -= 1;
                    at += 2;
                    if depth == 0 {
                        return Some(at);
                    }
                }
                _ => at += 1,
            }
        }
        None
    }

    /// `at` is after the opening quote. The end is after the closing one; a doubled quote is part of the text.
    fn quoted(&self, mut at: usize, quote: u8, backslash: bool) -> Option<usize> {
        while at < self.bytes.len() {
            let byte = self.byte(at);
            if byte == quote {
                if self.byte(at + 1) != quote {
                    return Some(at + 1);
                }
                at += 2;
            } else if backslash && byte == b'\\' {
                at += 2;
            } else {
                at += 1;
            }
        }
        None
    }

    /// Where a string goes on after white space with a newline in it (`quotecontinue` in `scan.l`): after its new quote.
    fn continued(&self, mut at: usize) -> Option<usize> {
        let mut newline = false;
        loop {
            let byte = self.byte(at);
            if is_newline(byte) && at < self.bytes.len() {
                newline = true;
                at += 1;
            } else if is_space(byte) {
                at += 1;
            } else if byte == b'-' && self.byte(at + 1) == b'-' {
                at = self.line_comment(at);
                // after the first newline a comment counts only with the newline that ends it
                if !is_newline(self.byte(at)) {
                    return None;
                }
            } else {
                return (newline && byte == b'\'').then_some(at + 1);
            }
        }
    }

    /// `at` is after the opening quote of a string.
    fn string(&self, mut at: usize, backslash: bool) -> Option<usize> {
        loop {
            let end = self.quoted(at, b'\'', backslash)?;
            match self.continued(end) {
                Some(next) => at = next,
                None => return Some(end),
            }
        }
    }

    /// `at` is after the opening quote of `B'..'` or `X'..'`, in which a quote can not be doubled.
    fn bits(&self, mut at: usize) -> Option<usize> {
        loop {
            let end = self.skip_while(at, |byte| byte != b'\'');
            if end >= self.bytes.len() {
                return None;
            }
            match self.continued(end + 1) {
                Some(next) => at = next,
                None => return Some(end + 1),
            }
        }
    }

    /// `at` is at a `$` that may begin `$tag$`. None: it does not.
    fn dollar_string(&self, at: usize) -> Option<(Kind, usize)> {
        let mut tag_end = at + 1;
        if is_word_start(self.byte(tag_end)) {
            tag_end = self.skip_while(tag_end, |byte| byte != b'$' && is_word(byte));
        }
        if self.byte(tag_end) != b'$' {
            return None;
        }
        let tag = self.bytes.get(at..=tag_end)?;
        let mut from = tag_end + 1;
        while let Some(rest) = self.bytes.get(from..) {
            let Some(offset) = rest.iter().position(|byte| *byte == b'$') else { break };
            from += offset;
            if self.bytes.get(from..).is_some_and(|rest| rest.starts_with(tag)) {
                return Some((Kind::String, from + tag.len()));
            }
            from += 1;
        }
        Some((Kind::Unterminated, self.bytes.len()))
    }

    /// Digits with single underscores between them.
    fn digits(&self, mut at: usize, test: impl Fn(u8) -> bool) -> usize {
        while at < self.bytes.len() {
            if test(self.byte(at)) {
                at += 1;
            } else if self.byte(at) == b'_' && test(self.byte(at + 1)) {
                at += 2;
            } else {
                break;
            }
        }
        at
    }

    fn number(&self, start: usize) -> (Kind, usize) {
        if self.byte(start) == b'0' {
            let (radix, test): (u32, fn(u8) -> bool) = match self.byte(start + 1) {
                b'x' | b'X' => (16, |byte| byte.is_ascii_hexdigit()),
                b'o' | b'O' => (8, |byte| matches!(byte, b'0'..=b'7')),
                b'b' | b'B' => (2, |byte| matches!(byte, b'0' | b'1')),
                _ => (10, |byte| byte.is_ascii_digit()),
            };
            if radix != 10 {
                let end = self.digits(start + 2, test);
                if end > start + 2 {
                    return (self.integer_kind(start + 2..end, radix), end);
                }
            }
        }
        let digit = |byte: u8| byte.is_ascii_digit();
        let mut at = self.digits(start, digit);
        let mut integer = true;
        // `1..10` is an integer and two dots
        if self.byte(at) == b'.' && self.byte(at + 1) != b'.' {
            integer = false;
            at += 1;
            if digit(self.byte(at)) {
                at = self.digits(at, digit);
            }
        }
        if matches!(self.byte(at), b'e' | b'E') {
            let signed = usize::from(matches!(self.byte(at + 1), b'+' | b'-'));
            if digit(self.byte(at + 1 + signed)) {
                integer = false;
                at = self.digits(at + 1 + signed, digit);
            }
        }
        if integer { (self.integer_kind(start..at, 10), at) } else { (Kind::Decimal, at) }
    }

    fn integer_kind(&self, range: Range<usize>, radix: u32) -> Kind {
        let mut value = 0_i64;
        for byte in self.bytes.get(range).unwrap_or_default() {
            let Some(digit) = char::from(*byte).to_digit(radix) else { continue };
            let Some(next) = value.checked_mul(i64::from(radix)).and_then(|value| value.checked_add(i64::from(digit)))
            else {
                return Kind::Decimal;
            };
            value = next;
        }
        if i32::try_from(value).is_ok() { Kind::Integer } else { Kind::BigInteger }
    }

    fn ended(&self, kind: Kind, end: Option<usize>) -> (Kind, usize) {
        end.map_or((Kind::Unterminated, self.bytes.len()), |end| (kind, end.min(self.bytes.len())))
    }

    fn word(&self, at: usize) -> (Kind, usize) {
        let next = self.byte(at + 1);
        match self.byte(at) {
            b'e' | b'E' if next == b'\'' => self.ended(Kind::String, self.string(at + 2, true)),
            b'b' | b'B' | b'x' | b'X' if next == b'\'' => self.ended(Kind::Bits, self.bits(at + 2)),
            b'u' | b'U' if next == b'&' && self.byte(at + 2) == b'\'' => {
                self.ended(Kind::String, self.string(at + 3, false))
            }
            b'u' | b'U' if next == b'&' && self.byte(at + 2) == b'"' => {
                self.ended(Kind::QuotedIdentifier, self.quoted(at + 3, b'"', false))
            }
            _ => (Kind::Word, self.skip_while(at, is_word)),
        }
    }

    fn token(&self, at: usize) -> (Kind, usize) {
        let byte = self.byte(at);
        let next = self.byte(at + 1);
        match byte {
            _ if is_word_start(byte) => self.word(at),
            _ if is_space(byte) => (Kind::Space, self.skip_while(at, is_space)),
            b'\'' => self.ended(Kind::String, self.string(at + 1, false)),
            b'"' => self.ended(Kind::QuotedIdentifier, self.quoted(at + 1, b'"', false)),
            b'-' if next == b'-' => (Kind::Comment, self.line_comment(at)),
            b'/' if next == b'*' => self.ended(Kind::Comment, self.block_comment(at + 2)),
            b'0'..=b'9' => self.number(at),
            b'.' if next.is_ascii_digit() => self.number(at),
            b'$' if next.is_ascii_digit() => (Kind::Parameter, self.skip_while(at + 1, |byte| byte.is_ascii_digit())),
            b'$' => self.dollar_string(at).unwrap_or((Kind::Symbol, at + 1)),
            // the second dot of `1..10` must not begin a number
            b'.' if next == b'.' => (Kind::Symbol, at + 2),
            _ => (Kind::Symbol, at + 1),
        }
    }
}

impl Iterator for Lexer<'_> {
    type Item = Token;

    fn next(&mut self) -> Option<Token> {
        if self.at >= self.bytes.len() {
            return None;
        }
        let start = self.at;
        let (kind, end) = self.token(start);
        self.at = end.max(start + 1).min(self.bytes.len());
        Some(Token { kind, range: start..self.at })
    }
}
