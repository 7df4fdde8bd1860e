//! The shape of a text: the text with its literals masked, by which plans are looked up without a parse.
//!
//! Texts of one shape have the same tokens except for the values of literals, and each literal keeps its kind
//! (string, bits, int4, int8, numeric), so PostgreSQL gives them the same types and the same tree. Only statements that
//! take data are masked: in all others (SET, COPY, CREATE ROLE ...) a literal can decide what the statement does.

use std::ops::Range;

use super::lex::{Kind, Lexer};

/// A text with its literals masked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Equal for texts that may share a plan. A masked literal is NUL and a letter for its kind; no text has a NUL of its own.
    pub key: String,
    /// Where the masked literals are in the text, in bytes, in order. Empty if nothing was masked.
    pub literals: Vec<Range<usize>>,
    /// How many statements the text seems to have, without a parse.
    pub statements: Statements,
}

/// A guess that errs to [`Statements::Several`] (a semicolon can be inside a function's body or a rule).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statements {
    /// White space, comments and semicolons only.
    None,
    One,
    /// Something comes after a semicolon: parse, and mask each statement's text on its own.
    Several,
}

/// A position in every text of a shape: bytes from the end of a literal, or from the start of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spot {
    /// Number of literals before the position.
    pub part: usize,
    /// Bytes after the last of them.
    pub offset: usize,
}

impl Spot {
    /// The spot of a position of the text that `shape` was made from. None: it is inside a literal.
    #[must_use]
    pub fn of(shape: &Shape, at: usize) -> Option<Self> {
        let part = shape.literals.partition_point(|literal| literal.end <= at);
        if shape.literals.get(part).is_some_and(|literal| literal.start < at) {
            return None;
        }
        let start = part.checked_sub(1).and_then(|before| shape.literals.get(before)).map_or(0, |literal| literal.end);
        Some(Self { part, offset: at - start })
    }

    /// The position in the text of another shape with the same key.
    #[must_use]
    pub fn at(self, shape: &Shape) -> usize {
        let start =
            self.part.checked_sub(1).and_then(|before| shape.literals.get(before)).map_or(0, |literal| literal.end);
        start + self.offset
    }
}

/// Statements whose literals are data: the plan must not depend on them.
const MASKED: [&str; 9] = ["select", "insert", "update", "delete", "with", "values", "call", "merge", "execute"];

/// Calls whose literals decide what the statement does: from there on nothing is masked.
const LITERALS_MATTER: [&str; 1] = ["set_config"];

/// Masks the literals of a text. Never fails; a text that does not lex gets a shape of its own.
#[must_use]
pub fn mask(text: &str) -> Shape {
    let mut key = String::with_capacity(text.len());
    let mut literals = Vec::new();
    let mut copied = 0;
    let mut masking = None;
    let mut statements = Statements::None;
    let mut ended = false;
    for token in Lexer::new(text) {
        if token.kind.is_significant() {
            if token.kind == Kind::Symbol && text.as_bytes().get(token.range.start) == Some(&b';') {
                ended = true;
                continue;
            }
            statements = match statements {
                Statements::None => Statements::One,
                Statements::One if ended => Statements::Several,
                known => known,
            };
            ended = false;
        }
        match token.kind {
            Kind::Space | Kind::Comment => {}
            Kind::Word => {
                let word = text.get(token.range).unwrap_or_default();
                if masking.is_none() {
                    masking = Some(MASKED.iter().any(|keyword| keyword.eq_ignore_ascii_case(word)));
                } else if LITERALS_MATTER.iter().any(|name| name.eq_ignore_ascii_case(word)) {
                    masking = Some(false);
                }
            }
            // "(SELECT 1)"
            Kind::Symbol if masking.is_none() && text.get(token.range.clone()) == Some("(") => {}
            Kind::Unterminated => {
                return Shape { key: text.to_owned(), literals: Vec::new(), statements };
            }
            Kind::QuotedIdentifier => {
                let name = text.get(token.range).unwrap_or_default().trim_matches('"');
                if masking.is_none() || LITERALS_MATTER.contains(&name) {
                    masking = Some(false);
                }
            }
            kind if kind.is_literal() && masking == Some(true) => {
                key.push_str(text.get(copied..token.range.start).unwrap_or_default());
                key.push('\0');
                key.push(match kind {
                    Kind::String => 's',
                    Kind::Bits => 'b',
                    Kind::Integer => 'i',
                    Kind::BigInteger => 'l',
                    _ => 'n',
                });
                copied = token.range.end;
                literals.push(token.range);
            }
            _ => {
                if masking.is_none() {
                    masking = Some(false);
                }
            }
        }
    }
    key.push_str(text.get(copied..).unwrap_or_default());
    Shape { key, literals, statements }
}

/// A shape's key for people: every literal is `?`. Of a DO block's code between dollar quotes the literals are.
#[must_use]
pub fn without_literals(key: &str) -> String {
    let mut text = String::with_capacity(key.len());
    let mut letters = key.chars();
    while let Some(letter) = letters.next() {
        if letter == '\0' {
            letters.next();
            text.push('?');
        } else {
            text.push(letter);
        }
    }
    let mut out = String::with_capacity(text.len());
    let mut words = Lexer::new(&text).filter(|token| token.kind == Kind::Word);
    let first = words.next().and_then(|token| text.get(token.range)).unwrap_or_default();
    hide_literals(&text, first.eq_ignore_ascii_case("do"), &mut out);
    out
}

/// `has_code`: what is between dollar quotes is code.
fn hide_literals(text: &str, has_code: bool, out: &mut String) {
    for token in Lexer::new(text) {
        let part = text.get(token.range).unwrap_or_default();
        let quote = part.strip_prefix('$').and_then(|rest| rest.find('$')).and_then(|at| part.get(..at + 2));
        match (token.kind, quote) {
            (Kind::String, Some(quote)) if has_code => {
                out.push_str(quote);
                let code = part.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote)).unwrap_or_default();
                hide_literals(code, false, out);
                out.push_str(quote);
            }
            (kind, _) if kind.is_literal() || kind == Kind::Unterminated => out.push('?'),
            _ => out.push_str(part),
        }
    }
}

#[cfg(test)]
#[path = "shape_tests.rs"]
mod tests;
