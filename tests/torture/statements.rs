//! Random statements on random tables.

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::schedule::{Kind, Sent, Statement, Value};
use crate::tables::{GROUPS, KEYS, Shape, Table};

/// What a seed is about.
#[derive(Clone, Copy, Debug)]
pub struct Profile {
    pub changes_schema: bool,
    pub with_once: bool,
}

fn text(kind: Kind, text: String) -> Statement {
    Statement { text, kind, sent: Sent::Text }
}

fn pick<'a, T>(rng: &mut StdRng, list: &'a [T]) -> &'a T {
    list.choose(rng).expect("a list that is not empty")
}

fn key(rng: &mut StdRng) -> i32 {
    rng.random_range(1..=KEYS)
}

fn group(rng: &mut StdRng) -> i32 {
    rng.random_range(0..GROUPS)
}

/// The condition that names the whole key.
fn by_key(rng: &mut StdRng, table: &Table) -> String {
    let k = key(rng);
    match table.shape {
        Shape::Composite => format!("a = {} and b = 'k{}'", k / 4, k % 4),
        Shape::Partitioned => format!("id = {k} and grp = {}", k % GROUPS),
        _ => format!("id = {k}"),
    }
}

fn key_columns(table: &Table) -> &'static str {
    match table.shape {
        Shape::Composite => "a, b",
        Shape::Partitioned => "id, grp",
        Shape::Keyless => "v, grp",
        _ => "id",
    }
}

/// One statement on any of the tables.
pub fn any(rng: &mut StdRng, tables: &[Table], profile: Profile, in_block: bool) -> Statement {
    let table = pick(rng, tables);
    match rng.random_range(0..100) {
        0..20 => insert(rng, table, tables),
        45..68 => by_condition(rng, table, tables),
        68..74 => on_conflict(rng, table),
        74..77 => copy(rng, table),
        77..88 => read(rng, table, tables),
        88..91 if in_block => lock(rng, table),
        91..93 => sequence(rng),
        93..94 => mistake(rng, table),
        94..96 => merge(rng, table),
        96..98 if profile.with_once => once(rng, table),
        98..100 if profile.changes_schema => definition(rng, table),
        _ => by_key_change(rng, table),
    }
}

fn insert(rng: &mut StdRng, table: &Table, tables: &[Table]) -> Statement {
    let name = &table.name;
    let (k, g, n) = (rng.random_range(1..=KEYS * 2), group(rng), rng.random_range(0..1000));
    let many = rng.random_range(0..1_000_000);
    let sql = match table.shape {
        Shape::Plain | Shape::Triggered => match rng.random_range(0..5) {
            0 => format!("insert into {name} (id, grp, v) values ({many}, {g}, {n}) returning id, v, ts"),
            1 => format!(
                "insert into {name} (id, grp, v, note) values ({k}, {g}, {n}, 'x''y'), ({}, {g}, {n}, null)",
                k + 100
            ),
            2 => format!(
                "insert into {name} (id, grp, v, note) select id + {many}, grp, v, note from {name} where grp = {g} limit 3"
            ),
            3 => format!("insert into {name} (id, v) select {many}, count(*) from {}", pick(rng, tables).name),
            _ => {
                return Statement {
                    text: format!(
                        "insert into {name} (id, grp, v, note) values ($1::int4, $2::int4, $3::int4, $4::text)"
                    ),
                    kind: Kind::Insert,
                    sent: Sent::Prepared(vec![
                        Value::Int(k),
                        Value::Int(g),
                        Value::Int(n),
                        Value::Text(format!("p{n}")),
                    ]),
                };
            }
        },
        Shape::Composite => format!("insert into {name} values ({}, 'k{}', {n})", k / 4, k % 5),
        Shape::Serial => match rng.random_range(0..3) {
            0 => format!("insert into {name} (grp, v) values ({g}, {n}) returning *"),
            1 => format!(
                "insert into {name} (grp, v, note) select grp, v, 'copy' from {name} where grp = {g} order by id limit 4"
            ),
            _ => format!("insert into {name} (grp) values ({g}), ({g}), (default)"),
        },
        Shape::Keyless => match rng.random_range(0..2) {
            0 => format!("insert into {name} values ({g}, {n}, 'z')"),
            _ => format!("insert into {name} select grp, v, note from {name} limit 2"),
        },
        Shape::TwoUnique => {
            format!("insert into {name} values ({k}, {}, {n}, {g})", 100 + rng.random_range(1..=KEYS * 2))
        }
        Shape::Child => format!("insert into {name} values ({k}, {}, {n}, {g})", key(rng)),
        Shape::Partitioned => format!("insert into {name} values ({k}, {g}, {n}), ({many}, {g}, {n})"),
        Shape::Types => match rng.random_range(0..2) {
            0 => format!(
                "insert into {name} (id, v, n, f, d, iv, b, j, a, m, s, c, q, tr, \"Odd Name\") values ({many}, {n}, {n}.25, {n} / 3.0, \
                 '2024-02-29', '1 day 02:03', '\\xdeadbeef', '{{\"k\": [{n}, null]}}', '{{1,NULL,{n}}}', 'mid', {n}, ({n}, 'y\"z'), true, \
                 '[2024-01-01,)', 'a b')"
            ),
            _ => format!(
                "insert into {name} (id, v, f, j, a) select {many}, {n}, random(), to_jsonb(array_agg(id)), array_agg(id order by id) from {name} where grp = {g}"
            ),
        },
    };
    text(Kind::Insert, sql)
}

/// An assignment for UPDATE that is the same everywhere.
fn assignment(rng: &mut StdRng, table: &Table) -> String {
    let n = rng.random_range(0..100);
    match rng.random_range(0..4) {
        0 => format!("v = {n}"),
        1 if table.shape != Shape::Composite => format!("v = v + 1, note = 'u{n}'"),
        2 => "v = v * 3 % 1009".to_owned(),
        _ => format!("v = v + {n}"),
    }
}

fn by_key_change(rng: &mut StdRng, table: &Table) -> Statement {
    let name = &table.name;
    if !table.has_key() {
        return without_key(rng, table);
    }
    let condition = by_key(rng, table);
    let set = assignment(rng, table);
    match rng.random_range(0..10) {
        0..4 => text(Kind::ByKey, format!("update {name} set {set} where {condition}")),
        4 => text(Kind::ByKey, format!("update {name} set {set} where {condition} and v % 2 = 0 returning v")),
        5..8 if table.key_is_id() => Statement {
            text: format!("update {name} set v = v + $1::int4 where id = $2::int4"),
            kind: Kind::ByKey,
            sent: Sent::Prepared(vec![Value::Int(rng.random_range(-5..50)), Value::Int(key(rng))]),
        },
        8 => text(Kind::ByKey, format!("delete from {name} where {condition}")),
        9 if table.shape == Shape::Partitioned => {
            // Moves the row to another part.
            text(Kind::KeyChange, format!("update {name} set grp = {} where {condition}", group(rng)))
        }
        _ => text(Kind::ByKey, format!("update {name} set v = v - 1 where {condition}")),
    }
}

fn without_key(rng: &mut StdRng, table: &Table) -> Statement {
    let (name, g, n) = (&table.name, group(rng), rng.random_range(0..7));
    let sql = match rng.random_range(0..3) {
        0 => format!("update {name} set v = v + 1 where grp = {g}"),
        1 => format!("delete from {name} where grp = {g} and v = {n}"),
        _ => format!("update {name} set note = 'w' where v = {n} returning grp"),
    };
    text(Kind::WithoutKey, sql)
}

fn by_condition(rng: &mut StdRng, table: &Table, tables: &[Table]) -> Statement {
    if !table.has_key() {
        return without_key(rng, table);
    }
    let name = &table.name;
    let (g, n, columns) = (group(rng), rng.random_range(0..50), key_columns(table));
    let other = &pick(rng, tables).name;
    let set = assignment(rng, table);
    let limited = format!("({columns}) in (select {columns} from {name} where grp = {g} order by {columns} limit 2)");
    let sql = match rng.random_range(0..15) {
        0 | 1 => format!("update {name} set {set} where grp = {g}"),
        2 => format!("delete from {name} where grp = {g} and v > {}", 900 - n),
        3 => format!("update {name} set {set} where {limited} returning *"),
        4 => format!("delete from {name} where ({columns}) in (select {columns} from {name} where v = {n} limit 1)"),
        5 => {
            format!("update {name} set v = o.s from (select count(*)::int as s from {other}) o where {name}.grp = {g}")
        }
        6 => format!("update {name} set v = (select coalesce(max(v), 0) from {other}) where grp = {g}"),
        7 => format!("update {name} set v = (random() * 100)::int where grp = {g}"),
        8 => format!(
            "with job as (select {columns} from {name} where grp = {g} order by {columns} limit 1 for update skip locked) \
             update {name} set {set} where ({columns}) in (select {columns} from job)"
        ),
        9 => format!(
            "update {name} set v = v + 1 where exists (select 1 from {other} o where o.v = {name}.v) and grp = {g}"
        ),
        10 => {
            format!("delete from {name} using {other} o where {name}.v = o.v and {name}.grp = {g} and {name}.v > 500")
        }
        11 => format!("update {name} set v = v + 1 where {} or {}", by_key(rng, table), by_key(rng, table)),
        12 if table.key_is_id() => format!("delete from {name} where id in ({}, {}) and v % 3 = 0", key(rng), key(rng)),
        13 if table.shape == Shape::Plain => {
            format!("update {name} set ts = clock_timestamp(), note = md5(random()::text) where grp = {g}")
        }
        _ if table.key_is_id() => {
            return Statement {
                text: format!("update {name} set v = v + $1::int4 where grp = $2::int4 and id < $3::int4 returning id"),
                kind: Kind::ByCondition,
                sent: Sent::Prepared(vec![Value::Int(n), Value::Int(g), Value::Int(key(rng))]),
            };
        }
        _ => format!("update {name} set v = v + 1 where grp = {g}"),
    };
    text(Kind::ByCondition, sql)
}

fn on_conflict(rng: &mut StdRng, table: &Table) -> Statement {
    let name = &table.name;
    let (k, g, n) = (rng.random_range(1..=KEYS + 4), group(rng), rng.random_range(0..100));
    let sql = match table.shape {
        Shape::TwoUnique => match rng.random_range(0..3) {
            0 => format!("insert into {name} values ({k}, {}, {n}, {g}) on conflict do nothing", 100 + key(rng)),
            1 => format!(
                "insert into {name} values ({k}, {}, {n}, {g}) on conflict (u) do update set v = excluded.v + {name}.v",
                100 + key(rng)
            ),
            _ => format!(
                "insert into {name} values ({k}, {}, {n}, {g}) on conflict (id) do update set v = excluded.v where {name}.v > {n} returning *",
                1000 + k
            ),
        },
        Shape::Plain | Shape::Types => match rng.random_range(0..2) {
            0 => format!(
                "insert into {name} (id, v) values ({k}, {n}), ({}, {n}) on conflict (id) do update set v = {name}.v + 1",
                k + 1
            ),
            _ => format!(
                "insert into {name} (id, v) select id, v from {name} where grp = {g} on conflict (id) do update set v = excluded.v + 1"
            ),
        },
        Shape::Composite => format!(
            "insert into {name} values ({}, 'k{}', {n}) on conflict (a, b) do update set v = excluded.v",
            k / 4,
            k % 4
        ),
        Shape::Partitioned => {
            format!("insert into {name} values ({k}, {g}, {n}) on conflict (id, grp) do update set v = {name}.v + 1")
        }
        _ => return by_key_change(rng, table),
    };
    text(Kind::OnConflict, sql)
}

fn copy(rng: &mut StdRng, table: &Table) -> Statement {
    let name = &table.name;
    let base = rng.random_range(1000..1_000_000);
    let (columns, rows): (&str, Vec<String>) = match table.shape {
        Shape::Plain | Shape::TwoUnique | Shape::Types | Shape::Triggered => {
            ("id, grp, v, note", (0..5).map(|i| format!("{}\t{}\t{i}\tco\\tpy", base + i, i % GROUPS)).collect())
        }
        Shape::Serial => ("grp, v", (0..5).map(|i| format!("{}\t{i}", i % GROUPS)).collect()),
        Shape::Keyless => ("grp, v, note", (0..4).map(|i| format!("{i}\t{i}\t\\N")).collect()),
        Shape::Partitioned => ("id, grp, v", (0..5).map(|i| format!("{}\t{}\t{i}", base + i, i % GROUPS)).collect()),
        Shape::Composite => ("a, b, v", (0..3).map(|i| format!("{base}\tc{i}\t{i}")).collect()),
        Shape::Child => ("id, p, v", (0..3).map(|i| format!("{}\t{}\t{i}", base + i, key(rng))).collect()),
    };
    let data = rows.iter().fold(String::new(), |data, row| data + row + "\n");
    Statement { text: format!("copy {name} ({columns}) from stdin"), kind: Kind::Copy, sent: Sent::Copy(data) }
}

fn read(rng: &mut StdRng, table: &Table, tables: &[Table]) -> Statement {
    let (name, g) = (&table.name, group(rng));
    let sql = match rng.random_range(0..5) {
        0 => format!("select count(*), sum(v) from {name}"),
        1 => format!("select * from {name} where grp = {g}"),
        2 => format!("select max(v) from {} where grp in (select grp from {name})", pick(rng, tables).name),
        3 => "select opaque()".to_owned(),
        _ => format!("select v from {name} where grp = {g} order by v limit 3"),
    };
    text(Kind::Read, sql)
}

fn lock(rng: &mut StdRng, table: &Table) -> Statement {
    let (name, g) = (&table.name, group(rng));
    let sql = match rng.random_range(0..6) {
        0 => format!("select * from {name} where grp = {g} for update"),
        1 => format!("select v from {name} where grp = {g} for update skip locked"),
        2 => format!("select v from {name} where grp = {g} for no key update nowait"),
        3 => format!("select v from {name} where grp = {g} for key share"),
        4 => format!("select pg_advisory_xact_lock({g})"),
        _ => "notify news, 'x'".to_owned(),
    };
    text(Kind::Lock, sql)
}

fn sequence(rng: &mut StdRng) -> Statement {
    let sql = match rng.random_range(0..3) {
        0 => "insert into numbered (n, v) values (nextval('counter'), 1)".to_owned(),
        1 => "insert into numbered (v) values (2), (3) returning n".to_owned(),
        _ => format!("update numbered set v = v + 1 where n = {}", rng.random_range(1..200)),
    };
    text(if sql.starts_with("update") { Kind::ByKey } else { Kind::Insert }, sql)
}

fn mistake(rng: &mut StdRng, table: &Table) -> Statement {
    let name = &table.name;
    let sql = match rng.random_range(0..4) {
        0 => format!("update {name} set v = 1 / (v - v)"),
        1 => format!("insert into {name} select * from nowhere"),
        2 => "selec 1".to_owned(),
        _ => format!(
            "update {name} set v = 2147483647 + v where {}",
            if table.has_key() { by_key(rng, table) } else { "true".into() }
        ),
    };
    text(Kind::Mistake, sql)
}

fn merge(rng: &mut StdRng, table: &Table) -> Statement {
    if table.shape != Shape::Plain {
        return by_key_change(rng, table);
    }
    let (name, k) = (&table.name, rng.random_range(1..=KEYS + 4));
    text(
        Kind::Merge,
        format!(
            "merge into {name} t using (values ({k}, 7), ({}, 8)) s (id, v) on t.id = s.id \
             when matched then update set v = t.v + s.v when not matched then insert (id, v) values (s.id, s.v)",
            k + 1
        ),
    )
}

fn once(rng: &mut StdRng, table: &Table) -> Statement {
    let (name, g) = (&table.name, group(rng));
    let has_id = !matches!(table.shape, Shape::Composite | Shape::Keyless | Shape::Partitioned);
    let (k, other) = (rng.random_range(1..=KEYS), rng.random_range(1..=KEYS));
    let sql = match rng.random_range(0..6) {
        // A key makes certain which rows these are.
        0 if has_id => format!(
            "do $$ declare x int; begin select v into x from {name} where id = {k}; \
             if found then update {name} set v = x + 1 where id = {other}; end if; end $$"
        ),
        1 if has_id => format!(
            "do $$ declare r record; begin for r in select id, v from {name} where grp = {g} order by id limit 3 loop \
             update {name} set v = r.v + 1 where id = r.id; end loop; end $$"
        ),
        0..=3 => format!("do $$ begin update {name} set v = v + 1 where grp = {g}; end $$"),
        4 => format!("select bump('{name}', {g})"),
        _ => format!("call bump_all('{name}', {g})"),
    };
    text(Kind::Once, sql)
}

fn definition(rng: &mut StdRng, table: &Table) -> Statement {
    let name = &table.name;
    let n = rng.random_range(0..3);
    match rng.random_range(0..7) {
        0 => text(Kind::Definition, format!("create table if not exists extra{n} (id int primary key, v int)")),
        1 => text(Kind::Definition, format!("drop table if exists extra{n}")),
        2 => text(Kind::Definition, format!("alter table {name} add column if not exists added{n} int default {n}")),
        3 => text(Kind::Definition, format!("alter table {name} drop column if exists added{n}")),
        4 => text(Kind::Definition, format!("create index if not exists extra_index{n} on {name} (v)")),
        5 => text(Kind::Truncate, format!("truncate {name} cascade")),
        _ => text(Kind::Insert, format!("insert into extra{n} values ({}, 1)", rng.random_range(0..10_000))),
    }
}
