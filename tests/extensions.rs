//! Extensions of PostgreSQL's own distribution, as applications use them: what their functions give is the leader's on every server.

mod common;

use common::ask::{run_all, same, state};

#[tokio::test(flavor = "multi_thread")]
async fn functions_of_well_known_extensions_are_used_in_writes() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run_all(
        &client,
        &[
            "create extension pgcrypto; create extension \"uuid-ossp\"; create extension citext; create extension hstore",
            "create extension unaccent; create extension pg_trgm; create extension ltree; create extension dblink",
            "create table account (id uuid primary key default uuid_generate_v4(), email citext unique not null, secret text,
                tags hstore, path ltree, token bytea default gen_random_bytes(8), at timestamptz not null default now())",
            "create index on account using gin (secret gin_trgm_ops); create index on account using gist (path)",
            "insert into account (email, secret, tags, path)
                values ('Ada@example.org', crypt('secret', gen_salt('bf', 4)), 'a=>1', 'top.science')",
            "insert into account (email, secret) values ('bob@example.org', unaccent('Crème')), ('eve@example.org', md5('x'))",
            "insert into account (email) values ('ADA@EXAMPLE.ORG')
                on conflict (email) do update set secret = crypt('other', gen_salt('md5'))",
            "update account set secret = crypt('third', gen_salt('des')) where email = 'Bob@Example.org'",
            "update account set tags = coalesce(tags, '') || hstore('key', uuid_generate_v1()::text)",
            "update account set token = gen_random_bytes(16) where similarity(secret, 'Creme') < 1",
            "delete from account where path <@ 'top' and secret = crypt('wrong', secret)",
        ],
    )
    .await;
    assert_eq!(same(&cluster, "postgres", "select count(*) from account").await, "3");
    let right = "select secret = crypt('other', secret) from account where email = 'ada@example.org'";
    assert_eq!(same(&cluster, "postgres", right).await, "t");
    // Its functions run whatever they are given, elsewhere.
    let elsewhere = "update account set secret = (select a from dblink('dbname=postgres', 'select ''x''') d (a text))";
    assert_eq!(state(&client, elsewhere).await, "0A000");
    cluster.assert_identical().await;
}
