//! Masking: what is masked, that nothing is lost, and that the lexer agrees with PostgreSQL's scanner.

use proptest::prelude::*;

use super::super::lex::Token;
use super::*;

fn unmask(shape: &Shape, text: &str) -> String {
    let mut parts = shape.key.split('\0');
    let mut made = parts.next().unwrap_or_default().to_owned();
    for (part, literal) in parts.zip(&shape.literals) {
        made.push_str(&text[literal.clone()]);
        // the letter for the kind
        made.push_str(&part[1..]);
    }
    made
}

#[test]
fn literals_of_one_kind_share_a_shape() {
    let same = [
        ("SELECT * FROM t WHERE a = 1", "SELECT * FROM t WHERE a = 22"),
        ("SELECT 'a''b', E'\\'', $$x$$, 1.5", "SELECT '', 'it', $t$ ' $t$, .5e3"),
        ("INSERT INTO t VALUES (0x1F, 1_000)", "INSERT INTO t VALUES (7, 8)"),
        ("SELECT 'a'\n 'b'", "SELECT 'ab'"),
    ];
    for (one, other) in same {
        assert_eq!(mask(one).key, mask(other).key, "{one} / {other}");
    }
    let different = [
        ("SELECT 1", "SELECT 3000000000"),
        ("SELECT 1", "SELECT 1.0"),
        ("SELECT 1", "SELECT '1'"),
        ("SELECT 3000000000", "SELECT 30000000000000000000"),
        ("SELECT 'a'", "SELECT B'1'"),
        ("SELECT a1", "SELECT a2"),
        ("SELECT \"1\"", "SELECT \"2\""),
        ("SELECT $1", "SELECT $2"),
        ("SELECT 1 -- 1", "SELECT 1 -- 2"),
        ("SET a = '1'", "SET a = '2'"),
        ("ALTER ROLE x PASSWORD 'a'", "ALTER ROLE x PASSWORD 'b'"),
        ("SELECT set_config('a', 'b', false)", "SELECT set_config('a', 'c', false)"),
    ];
    for (one, other) in different {
        assert_ne!(mask(one).key, mask(other).key, "{one} / {other}");
    }
}

#[test]
fn statements_are_counted() {
    for (text, count) in [
        ("", Statements::None),
        (" ; -- nothing\n", Statements::None),
        ("SELECT ';'", Statements::One),
        ("SELECT 1; /* ; */ ", Statements::One),
        (";SELECT 1;;", Statements::One),
        ("SELECT 1; SELECT 2", Statements::Several),
    ] {
        assert_eq!(mask(text).statements, count, "{text}");
    }
}

#[test]
fn spots_hold_in_every_text_of_a_shape() {
    let text = "UPDATE t SET a = 'x', b = now() WHERE id = 5";
    let other = "UPDATE t SET a = 'something longer', b = now() WHERE id = 123456";
    let at = text.find("now").expect("now");
    let spot = Spot::of(&mask(text), at).expect("outside of literals");
    assert_eq!(spot.at(&mask(other)), other.find("now").expect("now"));
    assert_eq!(Spot::of(&mask(text), text.find('x').expect("x")), None);
}

/// Pieces that make up statements, and pieces that make lexers stumble.
fn piece() -> impl Strategy<Value = String> {
    let fixed = prop::sample::select(vec![
        "SELECT",
        "from",
        " ",
        "\n",
        "\t",
        "(",
        ")",
        ",",
        ";",
        "a",
        "e",
        "E",
        "b",
        "x",
        "n",
        "u",
        "U&",
        "é",
        "_x$1",
        "1",
        "42",
        "0x1F",
        "0b",
        "1_000",
        "1.5",
        ".5",
        "1.",
        "1e10",
        "1e",
        "..",
        "$1",
        "$2",
        "$$",
        "$a$",
        "$é$",
        "'",
        "''",
        "'it'",
        "E'\\''",
        "e'a\\\\'",
        "U&'\\0061'",
        "B'01'",
        "X'1f'",
        "N'n'",
        "\"",
        "\"q\"\"q\"",
        "U&\"x\"",
        "--",
        "-- c\n",
        "/*",
        "*/",
        "/* c /* d */ */",
        "::",
        "=",
        "<>",
        "+",
        "-",
        "*",
        "/",
        "->>",
        "@",
        "[",
        "]",
        ":=",
        "\\",
        "'a'\n'b'",
        "'a' -- c\n 'b'",
        "9223372036854775808",
        "2147483648",
    ]);
    prop_oneof![8 => fixed.prop_map(str::to_owned), 1 => "[ -~]{0,4}", 1 => "\\PC{0,2}"]
}

fn statement() -> impl Strategy<Value = String> {
    prop::collection::vec(piece(), 0..24).prop_map(|pieces| format!("SELECT {}", pieces.concat()))
}

/// What PostgreSQL's own scanner calls literals. None: it does not take the text.
fn scanned(text: &str) -> Option<Vec<(Kind, Range<usize>)>> {
    use pg_query::protobuf::Token as Scanned;
    let result = pg_query::scan(text).ok()?;
    let mut found = Vec::new();
    for token in result.tokens {
        let start = usize::try_from(token.start).ok()?;
        let end = usize::try_from(token.end).ok()?;
        let kind = match Scanned::try_from(token.token).ok()? {
            Scanned::Sconst | Scanned::Usconst => Kind::String,
            Scanned::Bconst | Scanned::Xconst => Kind::Bits,
            Scanned::Iconst => Kind::Integer,
            Scanned::Fconst => Kind::Decimal,
            _ => continue,
        };
        found.push((kind, start..end));
    }
    Some(found)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn unmasking_gives_the_text_back(text in statement()) {
        let text = text.replace('\0', "");
        let shape = mask(&text);
        prop_assert_eq!(unmask(&shape, &text), text);
    }

    #[test]
    fn the_tokens_cover_any_text(text in "\\PC{0,40}") {
        let tokens: Vec<Token> = Lexer::new(&text).collect();
        let mut at = 0;
        for token in tokens {
            prop_assert_eq!(token.range.start, at);
            prop_assert!(token.range.end > at);
            at = token.range.end;
        }
        prop_assert_eq!(at, text.len());
    }

    #[test]
    fn literals_are_where_postgresql_finds_them(text in statement()) {
        if let Some(expected) = scanned(&text) {
            let found: Vec<(Kind, Range<usize>)> = Lexer::new(&text)
                .filter(|token| token.kind.is_literal())
                .map(|token| {
                    let kind = if token.kind == Kind::BigInteger { Kind::Decimal } else { token.kind };
                    (kind, token.range)
                })
                .collect();
            prop_assert_eq!(found, expected, "{}", text);
        }
    }
}
