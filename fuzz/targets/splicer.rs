//! Plans and the texts that they splice: a plan that one text has made serves every text of its shape; what leader and followers get is
//! one statement again, and with its parameters filled in the text that followers share is the statement itself.
#![no_main]

mod statement;

use libfuzzer_sys::fuzz_target;
use pgtandem::sql::classify::{classify, writing};
use pgtandem::sql::facts::{Bulk, Column, DefaultKind, Facts, Function, Operator, Relation, Type};
use pgtandem::sql::lex::{Kind, Lexer};
use pgtandem::sql::needs::Needs;
use pgtandem::sql::parse::parse_one;
use pgtandem::sql::plan::{EffectPlan, Lane, Plan, Write};
use pgtandem::sql::shape::{Shape, mask};

fuzz_target!(|data: &[u8]| {
    let Some((text, choices)) = statement::split(data) else { return };
    let Ok(parsed) = parse_one(text) else { return };
    let facts = facts(&Needs::of(&parsed));
    let shape = mask(text);
    let other = statement::with_other_literals(text, &shape, choices);
    let other_shape = mask(&other);
    // What PostgreSQL's parser does not take is the server's to refuse, whatever the plan.
    let other_parsed = parse_one(&other).ok().filter(|_| other_shape.key == shape.key);
    for plan in [classify, writing] {
        let made = plan(&parsed, text, &shape, &facts);
        applied(&made, text, &shape);
        if let Some(other_parsed) = &other_parsed {
            let other_made = plan(other_parsed, &other, &other_shape, &facts);
            assert_eq!(made, other_made, "plans of one shape:\n{text}\n{other}");
            applied(&made, &other, &other_shape);
        }
    }
});

fn applied(plan: &Plan, text: &str, shape: &Shape) {
    let values = vec![Some("2020-02-03 04:05:06+00".to_owned()); 100];
    match &plan.lane {
        Lane::Write(write) => written(write, text, shape, &values),
        Lane::Once(once) => one(&once.follower_text(text, shape, &values), text),
        _ => {}
    }
}

fn written(write: &Write, text: &str, shape: &Shape, values: &[Option<String>]) {
    if let Some(leader) = write.leader_text(text, shape) {
        one(&leader, text);
    }
    let _ = write.reads_clock(text, shape, &[]);
    let follower = write.follower_text(text, shape, values, None);
    one(&follower, text);
    if !matches!(write.effect, EffectPlan::Text { .. }) {
        return;
    }
    one(&write.follower_text(text, shape, values, Some(3)), text);
    if let Some((shared, literals)) = write.shared_text(text, shape, Some(1)) {
        one(&shared.text, text);
        let mut left = literals.iter();
        let filled: String = Lexer::new(&shared.plain)
            .map(|token| match token.kind {
                Kind::Parameter => left.next().expect("a literal for each parameter"),
                _ => &shared.plain[token.range],
            })
            .collect();
        assert_eq!(filled, follower, "the shared text of {text}");
        assert_eq!(u16::try_from(literals.len()).expect("at most 1000").to_be_bytes(), shared.types[..2]);
    }
}

fn one(made: &str, text: &str) {
    if let Err(error) = parse_one(made) {
        panic!("{error}: {made}\nof: {text}");
    }
}

/// A catalog in which every name means something: what, a hash of the name decides.
fn facts(needs: &Needs) -> Facts {
    let mut facts = Facts::default();
    for name in &needs.relations {
        facts.relations.insert(name.clone(), relation(&name.name));
    }
    for name in &needs.functions {
        facts.functions.insert(name.clone(), vec![function(&name.name)]);
    }
    for name in &needs.types {
        let builtin = !name.name.starts_with("own");
        let dates = ["date", "time", "interval"].iter().any(|word| name.name.contains(word));
        let fact = Type {
            schema: "pg_catalog".to_owned(),
            name: name.name.clone(),
            builtin,
            dates,
            text: name.name == "text",
            reg: name.name.starts_with("reg"),
            floats: name.name.starts_with("float"),
            ..Type::default()
        };
        facts.types.insert(name.clone(), fact);
    }
    facts
}

fn hash(name: &str) -> u32 {
    name.bytes().fold(2_166_136_261, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(16_777_619))
}

fn relation(name: &str) -> Relation {
    let hash = hash(name);
    // Most names are of ordinary tables; each property has a few.
    let is = |value: u32| hash >> 8 & 31 == value;
    let columns = [
        ("id", "integer"),
        ("v", "integer"),
        ("note", "text"),
        ("at", "timestamp with time zone"),
        ("d", "double precision"),
    ];
    let columns = columns.map(|(name, sql_type)| Column {
        name: name.to_owned(),
        sql_type: sql_type.to_owned(),
        dates: name == "at",
        zones: name == "at",
        floats: name == "d",
        text: name == "note",
        may_select: !is(1),
        may_insert: true,
        bulk: Bulk::Array,
        identity: name == "id" && is(2),
        default: if name == "id" && is(3) { DefaultKind::Other } else { DefaultKind::None },
        default_sql: (name == "id" && is(3)).then(|| "nextval('s')".to_owned()),
        ..Column::default()
    });
    let key = !is(4) && !is(5) && !is(6);
    Relation {
        oid: 20_000 + hash % 1000,
        schema: "public".to_owned(),
        name: name.to_owned(),
        kind: if is(7) {
            "v"
        } else if is(8) {
            "p"
        } else {
            "r"
        }
        .to_owned(),
        persistence: if is(9) { "t" } else { "p" }.to_owned(),
        owner: "alice".to_owned(),
        columns: columns.to_vec(),
        key: if key { vec!["id".to_owned()] } else { Vec::new() },
        key_operators: vec![Operator { schema: "pg_catalog".to_owned(), name: "=".to_owned() }; usize::from(key)],
        unique_columns: if is(10) { vec!["v".to_owned()] } else { Vec::new() },
        referenced: if is(11) { vec!["id".to_owned()] } else { Vec::new() },
        triggers: if is(12) { 21 } else { 0 },
        rules: is(13),
        rls: is(14),
        cascade_delete: is(11),
        deferrable: is(15),
        ..Relation::default()
    }
}

fn function(name: &str) -> Function {
    let volatility = match name {
        "now" => "s",
        "random" | "clock_timestamp" | "nextval" => "v",
        _ => ["i", "s", "v", "i"][hash(name) as usize >> 8 & 3],
    };
    Function {
        schema: "pg_catalog".to_owned(),
        name: name.to_owned(),
        volatility: volatility.to_owned(),
        builtin: !name.starts_with("own"),
        kind: "f".to_owned(),
        ..Function::default()
    }
}
