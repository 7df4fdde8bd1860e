//! Roles, passwords and settings of roles and databases: the same on every server.

mod common;

use common::ask::{run, run_all, same, state, value};
use tokio_postgres::NoTls;

/// Everything that a role is, and whose member.
const ROLES: &str = "select string_agg(concat_ws(' ', rolname, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolcanlogin,
    rolreplication, rolbypassrls, rolconnlimit, coalesce(rolpassword, 'none'), rolvaliduntil), E'\n' order by rolname) from pg_authid";
const MEMBERS: &str =
    "select coalesce(string_agg(concat_ws(' ', roleid::regrole, member::regrole, grantor::regrole, admin_option), E'\n'
    order by roleid::regrole::text, member::regrole::text), '') from pg_auth_members";
const SETTINGS: &str = "select coalesce(string_agg(concat_ws(' ', coalesce(datname, 'all'), coalesce(setrole::regrole::text, 'all'), setconfig),
    E'\n' order by datname, setrole::regrole::text), '') from pg_db_role_setting left join pg_database d on d.oid = setdatabase";
const GRANTS: &str = "select coalesce(string_agg(concat_ws(' ', relname, pg_get_userbyid(relowner), relacl::text), E'\n' order by relname), '')
    from pg_class where relnamespace = 'public'::regnamespace";
const COMMENTS: &str = "select coalesce(string_agg(description, E'\n' order by description), '') from pg_shdescription
    where description like 'ours%'";

#[tokio::test(flavor = "multi_thread")]
async fn roles_are_the_same_on_every_server() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    let state = async |sql: &str| {
        let error = client.batch_execute(sql).await.expect_err(sql);
        error.code().map(|code| code.code().to_owned()).unwrap_or_default()
    };
    run_all(&client, &[
        "create role readers",
        "create user alice password 'first secret' connection limit 3",
        "create role bob login createrole encrypted password $$second 'secret'$$ valid until '2040-01-01 00:00+00' in role readers",
        "begin; create role carol password E'third\\'secret'; alter role carol password 'fourth'; commit",
        "begin; alter role alice password 'never'; rollback",
        "create role dave password ''",
        "create role erin password null",
        "set password_encryption = md5; create role frank login password 'old style'; reset password_encryption",
        "grant readers to alice with admin option",
        "alter role alice createdb noinherit",
        "alter role frank rename to francis",
    ])
    .await;
    client.execute("alter role erin password 'extended'", &[]).await.expect("by the extended protocol");
    let roles = same(&cluster, "postgres", ROLES).await;
    assert_eq!(roles.matches("SCRAM-SHA-256$").count(), 4, "{roles}");
    same(&cluster, "postgres", MEMBERS).await;
    // As a role that may not see verifiers, for itself and for others.
    run_all(
        &client,
        &[
            "set role bob",
            "create role gus password 'fifth'",
            "alter role gus password 'sixth'",
            "alter user current_user password 'seventh'",
            "reset role",
        ],
    )
    .await;
    assert_eq!(same(&cluster, "postgres", ROLES).await.matches("SCRAM-SHA-256$").count(), 5);
    // The password that the client gave is the one that logs in.
    let port = cluster.layout.proxy_port();
    let config = format!("host=127.0.0.1 port={port} user=bob password=seventh dbname=postgres");
    let (_bob, connection) = tokio_postgres::connect(&config, NoTls).await.expect("bob logs in");
    tokio::spawn(connection);
    // Nothing of the proxy's or the follower's tells it.
    let follower = std::fs::read_to_string(cluster.layout.node_dir(1).join("postgresql.log")).unwrap_or_default();
    let proxy = std::fs::read_to_string(cluster.layout.proxy_log()).unwrap_or_default();
    for secret in ["first secret", "fourth", "seventh"] {
        assert!(!follower.contains(secret) && !proxy.contains(secret), "{secret}");
    }
    // Settings, grants, comments, owners.
    run_all(
        &client,
        &[
            "alter role alice set work_mem = '2MB'",
            "alter role all set statement_timeout = '1h'",
            "alter role alice in database postgres set search_path = a, b",
            "alter database postgres set lock_timeout = '1min'",
            "alter role all reset statement_timeout",
            "create table t (id int primary key, owner text default current_user)",
            "create table u (id int primary key)",
            "grant select, insert on t to alice with grant option",
            "alter table u owner to bob",
            "grant connect on database postgres to alice",
            "comment on role alice is 'ours 1'",
            "comment on database postgres is 'ours 2'",
            "set role alice",
            "grant select on t to readers",
            "reset role",
        ],
    )
    .await;
    same(&cluster, "postgres", SETTINGS).await;
    assert!(same(&cluster, "postgres", GRANTS).await.contains("/alice"));
    assert_eq!(same(&cluster, "postgres", COMMENTS).await, "ours 1\nours 2");
    run_all(
        &client,
        &[
            "reassign owned by bob to alice",
            "drop owned by bob",
            "drop role gus, bob",
            "drop owned by alice cascade",
            "drop role alice",
        ],
    )
    .await;
    assert!(!same(&cluster, "postgres", ROLES).await.contains("alice"));
    same(&cluster, "postgres", GRANTS).await;
    same(&cluster, "postgres", MEMBERS).await;
    same(&cluster, "postgres", SETTINGS).await;
    for sql in [
        "alter role carol set work_mem from current",
        "grant select on t to session_user",
        "create role x valid until 'tomorrow'",
        "alter role carol set session_replication_role = replica",
        "alter role pgtandem password 'x'",
    ] {
        assert_eq!(state(sql).await, "0A000", "{sql}");
    }
    cluster.assert_identical().await;
    cluster.wait_well().await;
}

/// What belongs to sessions stays with the leader, once, also in a transaction that writes.
#[tokio::test(flavor = "multi_thread")]
async fn notifications_come_once_and_advisory_locks_hold() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run_all(&client, &["create table t (id int primary key)"]).await;
    let config = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", cluster.layout.proxy_port());
    let (listener, mut connection) = tokio_postgres::connect(&config, NoTls).await.expect("a listener");
    let (sender, mut receiver) = tokio::sync::mpsc::channel(100);
    tokio::spawn(async move {
        while let Some(Ok(message)) = std::future::poll_fn(|context| connection.poll_message(context)).await {
            if let tokio_postgres::AsyncMessage::Notification(heard) = message {
                let _ = sender.send(heard.payload().to_owned()).await;
            }
        }
    });
    run_all(&listener, &["listen news"]).await;
    run_all(
        &client,
        &[
            "begin; insert into t values (1); notify news, 'one'; commit",
            "begin; insert into t values (2); notify news, 'never'; rollback",
            "begin; insert into t values (3); select pg_notify('news', 'two'); commit",
            "notify news, 'three'",
        ],
    )
    .await;
    for expected in ["one", "two", "three"] {
        let heard = tokio::time::timeout(common::LIMIT, receiver.recv()).await.expect("a notification");
        assert_eq!(heard.as_deref(), Some(expected));
    }
    run_all(&listener, &["unlisten *", "select 1"]).await;
    assert!(receiver.try_recv().is_err());
    // A lock that one session holds, another does not get; one of a transaction ends with it.
    let get = "select pg_try_advisory_lock(7)";
    assert_eq!(value(&client, get).await, "t");
    assert_eq!(value(&listener, get).await, "f");
    run_all(&client, &["begin; select pg_advisory_xact_lock(8); insert into t values (4)"]).await;
    assert_eq!(value(&listener, "select pg_try_advisory_xact_lock(8)").await, "f");
    run_all(&client, &["commit", "discard all"]).await;
    assert_eq!(value(&listener, get).await, "t");
    assert_eq!(value(&listener, "select pg_try_advisory_xact_lock(8)").await, "t");
    run_all(&client, &["checkpoint", "insert into t values (5)"]).await;
    assert!(client.batch_execute("begin; discard all").await.is_err());
    run_all(&client, &["rollback", "insert into t values (6)"]).await;
    cluster.assert_identical().await;
}

/// Row-level security is not for the owner of a table: its policies are not called, and values of sequences and clocks are as ever.
#[tokio::test(flavor = "multi_thread")]
async fn policies_are_for_those_they_apply_to() {
    let cluster = common::cluster();
    let client = cluster.connect("postgres").await;
    run_all(
        &client,
        &[
            "create role owner_of; create role tenant; grant create on schema public to owner_of; set role owner_of",
            "create table t (id serial primary key, who text default current_user, at timestamptz default clock_timestamp())",
            "create policy own on t using (who = current_user); alter table t enable row level security",
            "grant all on t to tenant; grant usage on sequence t_id_seq to tenant",
            "insert into t (at) select now() from generate_series(1, 3)",
            "update t set at = clock_timestamp() where id > 1",
            "prepare renew as update t set at = clock_timestamp()",
            "execute renew",
        ],
    )
    .await;
    // To this one they apply: what they call is not known to take the same clock on every server.
    run(&client, "set role tenant").await;
    assert_eq!(state(&client, "execute renew").await, "0A000");
    assert_eq!(state(&client, "insert into t (at) values (now())").await, "0A000");
    run(&client, "update t set who = 'nobody'").await;
    // Neither to superusers; and to the owner if it says so.
    run(&client, "reset role; execute renew; alter table t force row level security; set role owner_of").await;
    assert_eq!(state(&client, "execute renew").await, "0A000");
    run(&client, "update t set at = null where id = 1").await;
    // Followers write as the owner, whom the policy would stop.
    run(&client, "reset role").await;
    assert_eq!(state(&client, "insert into t (who, at) values ('nobody', now())").await, "0A000");
    // Or who has lost his rights.
    run(
        &client,
        "create table lost (id int primary key); alter table lost owner to tenant; revoke all on lost from tenant",
    )
    .await;
    assert_eq!(state(&client, "insert into lost values (1)").await, "0A000");
    run(&client, "grant all on lost to tenant; insert into lost values (1)").await;
    cluster.assert_identical().await;
    assert_eq!(same(&cluster, "postgres", "select count(*) from t where at is null and who = 'owner_of'").await, "1");
}
