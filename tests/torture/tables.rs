//! Random tables: every kind of primary key, defaults that vary, unique indexes, foreign keys, partitions, many types.

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

/// What statements must know of a table.
#[derive(Clone, Debug)]
pub struct Table {
    pub name: String,
    pub shape: Shape,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `id int primary key, grp int, v int, note text`, and defaults that vary
    Plain,
    /// `a int, b text, v int`, primary key (a, b)
    Composite,
    /// `id` from a sequence or identity, `grp int, v int`, random defaults
    Serial,
    /// `grp int, v int, note text`, no key
    Keyless,
    /// `id int primary key, u int unique, v int, grp int`
    TwoUnique,
    /// `id int primary key, p int references ..., v int, grp int`
    Child,
    /// `id int, grp int, v int`, primary key (id, grp), by grp in three parts
    Partitioned,
    /// `id int primary key, v int, grp int` and a column of each of many types
    Types,
    /// as Plain, with a trigger
    Triggered,
}

/// Keys are few, so that clients meet.
pub const KEYS: i32 = 24;
pub const GROUPS: i32 = 5;

impl Table {
    pub fn has_key(&self) -> bool {
        self.shape != Shape::Keyless
    }

    /// Whether one `int` column is the whole key.
    pub fn key_is_id(&self) -> bool {
        !matches!(self.shape, Shape::Keyless | Shape::Composite | Shape::Partitioned)
    }
}

/// Tables of one seed and the statements that make and fill them.
pub fn make(rng: &mut StdRng, with_triggers: bool) -> (Vec<Table>, Vec<String>) {
    let shapes = [
        Shape::Plain,
        Shape::Composite,
        Shape::Serial,
        Shape::Keyless,
        Shape::TwoUnique,
        Shape::Partitioned,
        Shape::Types,
        Shape::Plain,
    ];
    let count = rng.random_range(3..=5);
    let mut chosen: Vec<Shape> = (0..count).filter_map(|_| shapes.choose(rng).copied()).collect();
    if with_triggers {
        chosen.push(Shape::Triggered);
    }
    let (mut tables, mut setup) = (Vec::new(), Vec::new());
    for (number, shape) in chosen.into_iter().enumerate() {
        let name = format!("t{number}");
        define(rng, &name, shape, &mut setup);
        tables.push(Table { name, shape });
    }
    // A parent with children, most of the time.
    if rng.random_bool(0.7) {
        setup.push(
            "create table parent (id int primary key, grp int not null default 0, v int not null default 0, note text, ts timestamptz default now())"
                .into(),
        );
        setup.push(format!("insert into parent select i, i % {GROUPS}, i from generate_series(1, {KEYS}) i"));
        let actions = [
            "on delete cascade on update cascade",
            "on delete set null on update cascade",
            "on delete set default",
            "",
            "on delete restrict",
            "deferrable initially deferred",
            "on delete cascade deferrable initially deferred",
        ];
        let action = *actions.choose(rng).expect("not empty");
        setup.push(format!(
            "create table child (id int primary key, p int references parent {action}, v int not null default 0, grp int default 1, note text)"
        ));
        setup.push(format!(
            "insert into child select i, 1 + i % {KEYS}, i, i % {GROUPS} from generate_series(1, {KEYS}) i"
        ));
        tables.push(Table { name: "parent".into(), shape: Shape::Plain });
        tables.push(Table { name: "child".into(), shape: Shape::Child });
    }
    (tables, setup)
}

fn define(rng: &mut StdRng, name: &str, shape: Shape, setup: &mut Vec<String>) {
    match shape {
        Shape::Plain | Shape::Triggered => {
            let check = ["", ", check (v > -100000)", ", check (length(note) < 4000)"].choose(rng).expect("not empty");
            let generated = ["", ", g int generated always as (v * 2 + 1) stored"].choose(rng).expect("not empty");
            setup.push(format!(
                "create table {name} (id int primary key, grp int not null default 0, v int not null default 0, note text, \
                 ts timestamptz default now(){generated}{check})"
            ));
            if rng.random_bool(0.5) {
                setup.push(format!("create index on {name} (grp)"));
            }
            setup.push(format!("insert into {name} (id, grp, v, note) select i, i % {GROUPS}, i, 'n' || i from generate_series(1, {KEYS}) i"));
            if shape == Shape::Triggered {
                setup.push(format!("create table {name}_log (id int, v int)"));
                setup.push(format!(
                    "create function {name}_note() returns trigger language plpgsql as \
                     'begin insert into {name}_log values (new.id, new.v); return new; end'"
                ));
                setup.push(format!(
                    "create trigger note after insert or update on {name} for each row execute function {name}_note()"
                ));
            }
        }
        Shape::Composite => {
            setup.push(format!(
                "create table {name} (a int, b text, v int not null default 0, grp int default 1, primary key (a, b))"
            ));
            setup.push(format!(
                "insert into {name} select i / 4, 'k' || i % 4, i, i % {GROUPS} from generate_series(1, {KEYS}) i"
            ));
        }
        Shape::Serial => {
            let id =
                ["serial", "int generated by default as identity", "int generated always as identity (increment 3)"]
                    .choose(rng)
                    .expect("not empty");
            setup.push(format!(
                "create table {name} (id {id} primary key, grp int not null default 0, v int not null default 0, note text, \
                 r float8 default random(), u uuid default gen_random_uuid(), ts timestamptz default clock_timestamp())"
            ));
            setup.push(format!("insert into {name} (grp, v) select i % {GROUPS}, i from generate_series(1, {KEYS}) i"));
        }
        Shape::Keyless => {
            setup.push(format!("create table {name} (grp int, v int, note text)"));
            setup.push(format!(
                "insert into {name} select i % {GROUPS}, i % 7, 'n' || i % 3 from generate_series(1, {KEYS}) i"
            ));
        }
        Shape::TwoUnique => {
            setup.push(format!(
                "create table {name} (id int primary key, u int unique, v int not null default 0, grp int not null default 0, note text, ts timestamptz default now())"
            ));
            setup.push(format!(
                "insert into {name} select i, 100 + i, i, i % {GROUPS} from generate_series(1, {KEYS}) i"
            ));
        }
        Shape::Partitioned => {
            setup.push(format!(
                "create table {name} (id int, grp int, v int not null default 0, note text, primary key (id, grp)) partition by range (grp)"
            ));
            setup.push(format!("create table {name}_a partition of {name} for values from (minvalue) to (2)"));
            setup.push(format!("create table {name}_b partition of {name} for values from (2) to (4)"));
            setup.push(format!("create table {name}_c partition of {name} default"));
            setup.push(format!("insert into {name} select i, i % {GROUPS}, i from generate_series(1, {KEYS}) i"));
        }
        Shape::Types => {
            setup.push(format!("create domain {name}_small as int check (value between -1000000 and 1000000)"));
            setup.push(format!("create type {name}_mood as enum ('low', 'mid', 'high')"));
            setup.push(format!("create type {name}_pair as (x int, y text)"));
            setup.push(format!(
                "create table {name} (id int primary key, v int not null default 0, grp int not null default 0, note text, \
                 n numeric(20, 6), f float8, d date, iv interval, b bytea, j jsonb, a int[], m {name}_mood, s {name}_small, \
                 c {name}_pair, q bool, tr tstzrange, \"Odd Name\" varchar(20))"
            ));
            setup.push(format!(
                "insert into {name} (id, v, grp) select i, i, i % {GROUPS} from generate_series(1, {KEYS}) i"
            ));
        }
        Shape::Child => {}
    }
}
