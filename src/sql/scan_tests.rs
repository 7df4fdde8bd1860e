//! Pieces of code as people write them, and what is seen in them.

use super::*;

fn names(names: &BTreeSet<Name>) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

#[test]
fn what_a_body_calls_and_writes_is_found() {
    let code = scan(
        "BEGIN IF NEW.a IS DISTINCT FROM OLD.a THEN INSERT INTO app.audit (a, b) VALUES (lower(NEW.a), app.f(1)); \
         END IF; UPDATE ONLY total SET n = n + 1 WHERE id = NEW.id; DELETE FROM \"Old\"; RETURN NEW; END",
        false,
    );
    assert_eq!(names(&code.written), ["Old", "total", "app.audit"]);
    assert_eq!(names(&code.written_many), ["Old", "total"]);
    assert!(names(&code.calls).contains(&"app.f".to_owned()) && names(&code.calls).contains(&"lower".to_owned()));
    let insert = code.inserts.first().unwrap();
    assert_eq!(insert.columns, Columns::Named(vec!["a".into(), "b".into()]));
    assert!(code.operators.contains("+") && code.reads);
    assert_eq!((code.varies, code.unproven), (None, None));
}

#[test]
fn a_trigger_that_only_keeps_what_it_is_given_reads_nothing() {
    let code = scan("BEGIN NEW.b := NEW.a + 1; INSERT INTO log VALUES (NEW.a, TG_OP); RETURN NEW; END", false);
    assert!(!code.reads && code.written_many.is_empty() && code.unproven.is_none());
    assert_eq!(code.inserts.first().unwrap().columns, Columns::First(2));
}

#[test]
fn what_is_another_thing_on_another_server_is_told() {
    for body in [
        "BEGIN NEW.t := CURRENT_TIMESTAMP; RETURN NEW; END",
        "BEGIN NEW.u := session_user; RETURN NEW; END",
        "BEGIN SELECT 1 FROM t FOR UPDATE SKIP LOCKED; END",
        "BEGIN SET LOCAL role = 'x'; END",
        "BEGIN RESET SESSION AUTHORIZATION; END",
        "BEGIN PERFORM set_config('role', 'none', true); END",
        "BEGIN COMMIT; END",
        "BEGIN IF a THEN CREATE TABLE t (a int); END IF; END",
        "BEGIN NOTIFY x; END",
    ] {
        assert!(scan(body, false).varies.is_some(), "{body}");
    }
}

#[test]
fn what_may_stay_in_the_session_is_told() {
    for body in [
        "BEGIN PERFORM set_config('app.tenant', t, false); END",
        "SELECT pg_catalog . \"set_config\" ('a.b', f('c', true), $1)",
        "BEGIN x := set_config(n, v, is_local => true); END",
        "SET app.tenant = 'blue'",
        "BEGIN IF a THEN SET SESSION app.tenant TO 'blue'; END IF; END",
        "BEGIN <<l>> LOOP RESET ALL; END LOOP; END",
        "BEGIN EXECUTE format('SET %I = 1', n); END",
        "BEGIN PERFORM pg_try_advisory_lock(1); END",
        "SELECT setseed(0.5)",
        "SELECT query_to_xml(q, true, true, '')",
        "LISTEN news",
        "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
        "PREPARE p AS SELECT 1",
        "SELECT U&\"f\"()",
    ] {
        assert!(scan(body, false).stays.is_some(), "{body}");
    }
    for body in [
        "BEGIN PERFORM set_config('app.tenant', t, true), set_config('a.b', (SELECT f(1)), TRUE); END",
        "BEGIN SET LOCAL app.tenant = 'blue'; SET CONSTRAINTS ALL DEFERRED; UPDATE t SET v = 1; END",
        "INSERT INTO t VALUES (1) ON CONFLICT (id) DO UPDATE SET v = 2",
        "BEGIN PERFORM pg_advisory_xact_lock(1); RETURN current_setting('app.tenant'); END",
    ] {
        assert_eq!(scan(body, false).stays, None, "{body}");
    }
    assert_eq!(scan("SELECT set_config('a.b', 'c', false)", true).stays, None, "its tree tells");
}

#[test]
fn what_may_be_is_not_proven() {
    for body in [
        "BEGIN EXECUTE 'DELETE FROM ' || t; END",
        "BEGIN SELECT v INTO n FROM t WHERE g = 1; END",
        "BEGIN FOR r IN SELECT * FROM t LOOP n := r.v; END LOOP; END",
        "SELECT v FROM t LIMIT 1",
        "SELECT sum(v::float8) FROM t",
        "SELECT string_agg(v, ',') FROM t",
        "INSERT INTO t VALUES ('now')",
        "SELECT current_setting(name) FROM t",
    ] {
        let code = scan(body, false);
        assert!(code.varies.is_none() && (code.unproven.is_some() || !code.ordered.is_empty()), "{body}: {code:?}");
    }
    for body in [
        "BEGIN SELECT count(*) INTO n FROM t WHERE g = 1; END",
        "BEGIN SELECT v INTO STRICT n FROM t WHERE g = 1; END",
        "BEGIN UPDATE t SET v = 1 WHERE id = 1 RETURNING v INTO n; END",
        "BEGIN FOR i IN 1..3 LOOP INSERT INTO t (v) VALUES (i); END LOOP; END",
        "INSERT INTO t VALUES (1) ON CONFLICT DO NOTHING",
        "SELECT sum(v) FROM t",
    ] {
        let code = scan(body, false);
        assert_eq!((code.varies, code.unproven), (None, None), "{body}");
        assert!(code.ordered.is_empty(), "{body}");
    }
}

#[test]
fn settings_and_handlers_are_found() {
    let code = scan("BEGIN NEW.t := current_setting('App.Tenant', true); EXCEPTION WHEN OTHERS THEN NULL; END", false);
    assert!(code.settings.contains("app.tenant") && code.catches_errors);
    assert!(scan("INSERT INTO t VALUES (now(), CURRENT_DATE, 'now')", true).varies.is_none());
}

#[test]
fn what_a_trigger_gives_its_row_is_found() {
    let assigned = |body: &str| {
        let code = scan(body, false);
        (code.assigned.into_iter().collect::<Vec<_>>().join(","), code.assigns_all)
    };
    let one = |columns: &str| (columns.to_owned(), false);
    assert_eq!(assigned("begin new.a := new.b; if new.c > 1 then NEW.\"D\" = 2; end if; return new; end"), one("D,a"));
    assert_eq!(assigned("begin select x, y into new.a, new.b from t; return new; end"), one("a,b"));
    assert_eq!(
        assigned("begin if f(new) and new is distinct from old then return null; end if; return old; end"),
        one("")
    );
    for body in [
        "begin new := old; return new; end",
        "begin select * into new from t; return new; end",
        "declare n alias for new; begin n.id := 1; return n; end",
        "begin return r; end",
        "begin return jsonb_populate_record(new, '{}'); end",
    ] {
        assert!(assigned(body).1, "{body}");
    }
}

#[test]
fn what_acts_without_a_name_is_found() {
    for body in [
        "begin execute 'insert into t values (1)'; end",
        "begin create table x (i int); end",
        "begin truncate t; end",
        "begin set local role other; end",
        "begin perform set_config('role', 'other', true); end",
    ] {
        assert!(scan(body, false).acts.is_some(), "{body}");
    }
    assert_eq!(
        scan("begin select a into new.b from t order by 1 limit 1; set work_mem = '1MB'; end", false).acts,
        None
    );
}

#[test]
fn what_only_the_client_sees_needs_no_proof() {
    let outer = |text: &str| {
        let code = scan(text, true);
        (code.unproven.is_some(), code.output.is_some())
    };
    for text in [
        "with i as (insert into t select 1 returning tableoid::regclass, *) select a, count(*) from i group by 1 order by 1 limit 3",
        "update t set v = 1 returning ctid",
        "insert into t values (1) on conflict (id) do update set v = 2 returning xmin",
        "with d as (delete from t returning *) select rank() over (order by v) from d",
    ] {
        assert_eq!(outer(text), (false, true), "{text}");
    }
    for text in [
        "insert into t select v from u limit 1 returning *",
        "with i as (insert into t values (1) returning ctid) insert into u select ctid::text from i",
        "with recursive i as (insert into t select * from u returning *), u as (select 1 limit 1) select * from i",
        "delete from t where ctid = '(0,1)' returning *",
    ] {
        assert!(outer(text).0, "{text}");
    }
    assert!(scan("update t set v = 1 returning ctid", false).unproven.is_some(), "a function may keep it");
}
