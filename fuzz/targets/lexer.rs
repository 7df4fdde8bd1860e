//! The lexer and the masking of literals: tokens cover the text; the shape keeps what is outside of literals, and where they are;
//! other literals of the same kinds give the same shape; PostgreSQL's own scanner finds the same literals.
#![no_main]

mod statement;

use std::ops::Range;

use libfuzzer_sys::fuzz_target;
use pg_query::protobuf::Token as Scanned;
use pgtandem::sql::lex::{Kind, Lexer, Token};
use pgtandem::sql::shape::{self, Shape, Spot, mask};

fuzz_target!(|data: &[u8]| {
    let Some((text, choices)) = statement::split(data) else { return };
    let tokens = covering(text);
    let shape = mask(text);
    assert_eq!(unmasked(&shape, text), text);
    if shape.literals.is_empty() {
        assert_eq!(shape.key, text);
    }
    for literal in &shape.literals {
        assert!(tokens.iter().any(|token| token.range == *literal && token.kind.is_literal()), "{text}: {literal:?}");
    }
    spots(&shape, text);
    let _ = shape::without_literals(&shape.key);
    let other = statement::with_other_literals(text, &shape, choices);
    let other_shape = mask(&other);
    if other_shape.key == shape.key {
        assert_eq!(outside(text, &tokens, &shape), outside(&other, &covering(&other), &other_shape));
        assert_eq!(other_shape.statements, shape.statements);
    }
    agrees(text, &tokens);
});

fn covering(text: &str) -> Vec<Token> {
    let tokens: Vec<Token> = Lexer::new(text).collect();
    let mut at = 0;
    for token in &tokens {
        assert!(token.range.start == at && token.range.end > at, "{text}: {token:?} after {at}");
        assert!(text.get(token.range.clone()).is_some(), "{text}: {token:?} cuts a letter");
        at = token.range.end;
    }
    assert_eq!(at, text.len());
    tokens
}

fn unmasked(shape: &Shape, text: &str) -> String {
    let mut parts = shape.key.split('\0');
    let mut made = parts.next().unwrap_or_default().to_owned();
    assert_eq!(parts.clone().count(), shape.literals.len());
    for (part, literal) in parts.zip(&shape.literals) {
        made.push_str(&text[literal.clone()]);
        made.push_str(&part[1..]);
    }
    made
}

/// A spot comes back to where it was; inside a literal there is none.
fn spots(shape: &Shape, text: &str) {
    for at in 0..=text.len() {
        let inside = shape.literals.iter().any(|literal| literal.start < at && at < literal.end);
        let spot = Spot::of(shape, at);
        assert_eq!(spot.is_none(), inside, "{text}: {at}");
        assert!(spot.is_none_or(|spot| spot.at(shape) == at), "{text}: {at}");
    }
}

/// All tokens; masked literals by their kind alone.
fn outside<'t>(text: &'t str, tokens: &[Token], shape: &Shape) -> Vec<(Kind, &'t str)> {
    let masked = |range: &Range<usize>| shape.literals.contains(range);
    tokens
        .iter()
        .map(|token| (token.kind, if masked(&token.range) { "" } else { &text[token.range.clone()] }))
        .collect()
}

fn agrees(text: &str, tokens: &[Token]) {
    let Ok(result) = pg_query::scan(text) else { return };
    let mut expected = Vec::new();
    for token in result.tokens {
        let kind = match Scanned::try_from(token.token) {
            Ok(Scanned::Sconst | Scanned::Usconst) => Kind::String,
            Ok(Scanned::Bconst | Scanned::Xconst) => Kind::Bits,
            Ok(Scanned::Iconst) => Kind::Integer,
            Ok(Scanned::Fconst) => Kind::Decimal,
            _ => continue,
        };
        let at = |position: i32| usize::try_from(position).expect("a position");
        expected.push((kind, at(token.start)..at(token.end)));
    }
    let found: Vec<_> = tokens
        .iter()
        .filter(|token| token.kind.is_literal())
        // The scanner calls what does not fit int4 a float.
        .map(|token| (if token.kind == Kind::BigInteger { Kind::Decimal } else { token.kind }, token.range.clone()))
        .collect();
    assert_eq!(found, expected, "{text}");
}
