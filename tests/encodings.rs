//! Client encodings other than UTF-8: what psql says is byte for byte what it says on a lone server, and the servers stay identical.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test that panics has failed")]

mod common;

use std::process::Command;

use common::Cluster;

/// A script with a word of several characters, and a single one, in the client's encoding, in texts, names, errors.
const SCRIPT: &str = r#"
create table "WORD" (i int primary key, "CHAR" text, at timestamptz default clock_timestamp());
insert into "WORD" values (1, 'WORD', '2020-01-01'), (2, 'CHARWORDCHAR', now());
insert into "WORD" (i, "CHAR") select i, 'WORD' || i from generate_series(3, 5) i returning i, "CHAR";
update "WORD" set "CHAR" = "CHAR" || 'CHAR' where i = 1 returning *;
update "WORD" set "CHAR" = 'CHAR' where "CHAR" like 'WORD_' ;
delete from "WORD" where "CHAR" = 'CHARWORDCHAR';
prepare "CHARp" as insert into "WORD" (i, "CHAR") values ($1, $2);
execute "CHARp"(10, 'WORD');
execute "CHARp"(11, upper('WORD') || 'CHAR');
select 'WORD' as "CHAR"\; insert into "WORD" (i, "CHAR") values (20, $$WORD$$)\; select nosuch, 'WORD';
select 'WORD'\; select /* WORD */ 'CHAR' nosuch nosuch;
insert into "WORD" (i, "CHAR") values (1, 'WORD');
do not understand this WORD;
insert into "nosuchWORD" values ('WORD');
create role "WORDrole";
grant all on "WORD" to "WORDrole";
create schema "WORDschema";
grant all on schema "WORDschema" to "WORDrole";
set search_path = "WORDschema", public;
set role "WORDrole";
create table "WORDschema"."inWORD" (i serial primary key, who text default current_user, t text);
insert into "inWORD" (t) values ('WORD') returning who, t;
insert into "inWORD" (i, who, t) values (100, current_user, 'CHAR');
update "inWORD" set who = current_user || 'CHAR' where i = 100;
reset role;
reset search_path;
copy "WORD" from stdin;
30	WORD	2020-01-01
31	CHAR	2020-01-02
\.
begin;
savepoint "WORD";
insert into "WORD" (i, "CHAR") values (40, 'WORD');
rollback to "WORD";
insert into "WORD" (i, "CHAR") values (41, 'WORD');
commit;
select i, "CHAR", length("CHAR"), encode(convert_to("CHAR", 'UTF8'), 'hex') from "WORD" order by i;
select who, t, encode(convert_to(who, 'UTF8'), 'hex') from "WORDschema"."inWORD" order by t, who;
drop table "WORD";
drop schema "WORDschema" cascade;
drop owned by "WORDrole";
drop role "WORDrole";
"#;

fn script(word: &[u8], character: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = SCRIPT;
    while let Some(at) = rest.find(|letter: char| letter.is_ascii_uppercase()) {
        out.extend_from_slice(&rest.as_bytes()[..at]);
        let length = 4;
        out.extend_from_slice(if rest[at..].starts_with("WORD") { word } else { character });
        rest = &rest[at + length..];
    }
    out.extend_from_slice(rest.as_bytes());
    out
}

fn psql(cluster: &Cluster, port: u16, encoding: &str, file: &std::path::Path) -> Vec<u8> {
    let mut psql = Command::new(cluster.layout.plan.bin_dir.join("psql"));
    psql.args([
        "-X",
        "-a",
        "-v",
        "VERBOSITY=default",
        "-h",
        "127.0.0.1",
        "-U",
        "postgres",
        "-p",
        &port.to_string(),
        "postgres",
    ]);
    let output = psql.arg("-f").arg(file).env("PGCLIENTENCODING", encoding).env("LC_ALL", "C").output().expect("psql");
    [output.stdout, output.stderr].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn texts_in_other_encodings_are_carried_as_they_are() {
    let cluster = common::cluster();
    let lone = Cluster::up(&["--nodes", "1"]);
    let folder = common::folder();
    let cases: [(&str, &[u8], &[u8]); 6] = [
        ("LATIN1", b"gr\xf6\xdfe", b"\xe9"),
        ("WIN1252", b"\x80uro", b"\x9c"),
        ("KOI8R", b"\xf0\xd2\xc9\xd7\xc5\xd4", b"\xc9"),
        ("EUC_JP", b"\xc6\xfc\xcb\xdc\x8e\xb1", b"\xa4\xa2"),
        ("SQL_ASCII", "größe".as_bytes(), "é".as_bytes()),
        ("UTF8", "größe日本".as_bytes(), "€".as_bytes()),
    ];
    for (encoding, word, character) in cases {
        let file = folder.path().join(encoding);
        std::fs::write(&file, script(word, character)).unwrap();
        let expected = psql(&lone, lone.layout.postgres_port(0), encoding, &file);
        let found = psql(&cluster, cluster.layout.proxy_port(), encoding, &file);
        let expected: Vec<&[u8]> = expected.split(|byte| *byte == b'\n').collect();
        let found: Vec<&[u8]> = found.split(|byte| *byte == b'\n').collect();
        for (number, (expected, found)) in expected.iter().zip(&found).enumerate() {
            let (expected, found) = (expected.escape_ascii().to_string(), found.escape_ascii().to_string());
            assert_eq!(expected, found, "{encoding}, line {}", number + 1);
        }
        assert_eq!(expected.len(), found.len(), "{encoding}");
        cluster.wait_member(1, true).await;
        cluster.assert_identical().await;
    }

    // Bytes after the first of a character may be ASCII there: a text that could be read wrongly is not run.
    let file = folder.path().join("sjis");
    cluster.connect("postgres").await.batch_execute("create table s (t text)").await.unwrap();
    std::fs::write(&file, b"select E'\x95\\', 1;\ninsert into s values ('ascii');\n").unwrap();
    let said = String::from_utf8_lossy(&psql(&cluster, cluster.layout.proxy_port(), "SJIS", &file)).into_owned();
    assert_eq!(said.matches("under client_encoding SJIS").count(), 1, "{said}");
    assert_eq!(said.matches("client_encoding SJIS is not supported").count(), 1, "{said}");
    cluster.assert_identical().await;
}
