//! Code that statements on temporary tables run: what it writes to permanent tables would be on the leader alone.

mod common;

use common::ask::{run, state, value};
use tokio_postgres::error::SqlState;

#[tokio::test(flavor = "multi_thread")]
async fn code_on_temporary_tables_writes_no_permanent_ones() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run(
        &client,
        "create table log (id int primary key); insert into log values (1);
         create function note() returns trigger language plpgsql as $$ begin insert into log values (new.id); return new; end $$;
         create function given() returns int language plpgsql as $$ begin insert into log values (100); return 1; end $$",
    )
    .await;
    for table in [
        "create temp table fired (id int)",
        "create trigger note after insert on fired for each row execute function note()",
        "create temp table late (id int)",
        "create constraint trigger note after insert on late deferrable initially deferred for each row execute function note()",
        "create temp table given_by (id int, v int default given())",
        "create temp table checked (id int check (given() > 0))",
        "create temp view logs as select id from log where id > 0",
    ] {
        run(&client, table).await;
    }
    for write in [
        "insert into fired values (2)",
        "insert into late values (2)",
        "insert into given_by (id) values (2)",
        "insert into checked values (2)",
        "insert into logs values (2)",
        "update logs set id = 5",
        "delete from logs",
        "with x as (insert into fired values (3) returning id) select * from x",
        "copy fired from program 'echo 4'",
    ] {
        assert_eq!(state(&client, write).await, "0A000", "{write}");
        let extended = client.execute(write, &[]).await.expect_err(write);
        assert_eq!(extended.code().map(SqlState::code), Some("0A000"), "{write}: {extended:?}");
    }
    run(&client, "insert into given_by values (2, 2)").await;
    assert_eq!(value(&client, "select string_agg(id::text, ',') from log").await, "1");
    cluster.assert_identical().await;
}
