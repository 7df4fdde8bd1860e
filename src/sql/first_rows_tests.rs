//! Bodies of which the rows are certain, and bodies that look so.

use super::super::scan::{Code, scan};
use super::*;

fn key(columns: &[&str]) -> Key {
    Key {
        columns: columns.iter().map(|column| (*column).to_owned()).collect(),
        not_null: true,
        blurred: Vec::new(),
        unsure: Vec::new(),
    }
}

/// Whether the order of rows is certain in all of a body, with a table that has these columns and such keys.
fn certain_by(body: &str, keys: &[Key]) -> bool {
    let Code { ordered, unproven, typed, .. } = scan(body, false);
    let columns = ["id", "g", "v", "n"].iter().map(|column| (*column).to_owned()).collect();
    let holds = |mut query: Ordered| {
        query.know(&typed);
        query.holds(&columns, keys)
    };
    unproven.is_none() && !ordered.is_empty() && ordered.into_iter().all(holds)
}

fn certain(body: &str) -> bool {
    certain_by(body, &[key(&["id"])])
}

#[test]
fn a_key_that_is_compared_with_values_is_one_row() {
    for body in [
        "BEGIN SELECT v INTO x FROM t WHERE id = p_id; END",
        "BEGIN SELECT v, g INTO x, r.y FROM s.t AS a WHERE a.id = NEW.t_id AND a.g <> 4 FOR UPDATE; END",
        "BEGIN IF x > 1 THEN SELECT v INTO y FROM t WHERE p_id = t.id; END IF; END",
        "BEGIN SELECT v INTO x FROM ONLY t WHERE (g = 1 OR g = 2) AND id = coalesce(p_id, 0) + 1::int; END",
        "BEGIN SELECT CASE WHEN g = 1 THEN v ELSE n END INTO x FROM t WHERE id = $1; END",
        "BEGIN FOR r IN SELECT * FROM t WHERE id = p_id LOOP x := r.v; END LOOP; END",
        "BEGIN x := (SELECT v FROM t WHERE id = p_id LIMIT 1); END",
        "BEGIN SELECT extract(epoch FROM v) INTO x FROM t WHERE id = 'a'; END",
    ] {
        assert!(certain(body), "{body}: {:?}", scan(body, false));
    }
}

#[test]
fn a_key_that_is_ordered_by_is_an_order() {
    for body in [
        "BEGIN FOR r IN SELECT * FROM t WHERE g = p_g ORDER BY id LOOP x := r.v; END LOOP; END",
        "BEGIN SELECT id, g INTO x, y FROM t WHERE g = p_g ORDER BY v DESC NULLS LAST, t.id DESC LIMIT 1; END",
        "BEGIN SELECT v AS w INTO x FROM t ORDER BY id ASC OFFSET 3 FETCH FIRST 1 ROW ONLY; END",
        "BEGIN DELETE FROM t WHERE id IN (SELECT id FROM t ORDER BY id LIMIT 10); END",
    ] {
        assert!(certain(body), "{body}: {:?}", scan(body, false));
    }
    let two = [key(&["g", "n"])];
    assert!(certain_by("BEGIN SELECT v INTO x FROM t WHERE g = p ORDER BY n LIMIT 1; END", &two));
    assert!(!certain_by("BEGIN SELECT v INTO x FROM t WHERE g = p LIMIT 1; END", &two));
    let nulls = [Key { not_null: false, ..key(&["id"]) }];
    assert!(!certain_by("BEGIN SELECT v INTO x FROM t ORDER BY id LIMIT 1; END", &nulls));
    assert!(certain_by("BEGIN SELECT v INTO x FROM t WHERE id = p; END", &nulls));
}

#[test]
fn all_else_is_not_certain() {
    for body in [
        "BEGIN SELECT v INTO x FROM t WHERE g = p_id; END",
        "BEGIN SELECT v INTO x FROM t WHERE id = g; END",
        "BEGIN SELECT v INTO x FROM t WHERE t.id = t.n; END",
        "BEGIN SELECT v INTO x FROM t WHERE id = p_id OR g = 1; END",
        "BEGIN SELECT v INTO x FROM t WHERE NOT id = p_id; END",
        "BEGIN SELECT v INTO x FROM t WHERE v BETWEEN 1 AND id = p_id; END",
        "BEGIN SELECT v INTO x FROM t WHERE CASE WHEN g = 1 AND id = p_id THEN true ELSE true END; END",
        "BEGIN SELECT v INTO x FROM t WHERE id = ANY (p_ids); END",
        "BEGIN SELECT v INTO x FROM t WHERE id >= p_id; END",
        "BEGIN SELECT v INTO x FROM t WHERE id = p_id COLLATE \"other\"; END",
        "BEGIN SELECT v INTO x FROM t WHERE id = f(p_id); END",
        "BEGIN SELECT v INTO x FROM t WHERE id = |/ p_id; END",
        "BEGIN SELECT v INTO x FROM t WHERE id = p_id IS NULL; END",
        "BEGIN SELECT v INTO x FROM t WHERE id = p_id UNION SELECT 1; END",
        "BEGIN SELECT v INTO x FROM t, u WHERE t.id = p_id; END",
        "BEGIN SELECT v INTO x FROM t JOIN u ON true WHERE t.id = p_id; END",
        "BEGIN SELECT v INTO x FROM (SELECT 1) t WHERE id = p_id; END",
        "BEGIN WITH t AS (SELECT 1) SELECT v INTO x FROM t WHERE id = p_id; END",
        "BEGIN SELECT count(*) INTO x FROM t WHERE g = 1 GROUP BY v; END",
        "BEGIN SELECT v INTO x FROM t ORDER BY id + 1 LIMIT 1; END",
        "BEGIN SELECT g AS id INTO x FROM t ORDER BY id LIMIT 1; END",
        "BEGIN SELECT g id INTO x FROM t ORDER BY id LIMIT 1; END",
        "BEGIN SELECT id(t) INTO x FROM t ORDER BY id LIMIT 1; END",
        "BEGIN SELECT DISTINCT g INTO x FROM t ORDER BY id LIMIT 1; END",
        "BEGIN SELECT v INTO x FROM t ORDER BY id USING > LIMIT 1; END",
        "BEGIN FOR r IN SELECT * FROM t ORDER BY g LOOP x := r.v; END LOOP; END",
        "BEGIN FOR r IN SELECT * FROM t ORDER BY id LOOP PERFORM v FROM u LIMIT 1; END LOOP; END",
        "BEGIN IF x THEN SELECT v INTO y FROM t WHERE id = p_id; ELSE PERFORM v FROM t OFFSET 1; END IF; END",
        "#variable_conflict use_variable BEGIN SELECT v INTO x FROM t WHERE id = p_id; END",
        "BEGIN FETCH NEXT FROM c INTO x; END",
        "BEGIN INSERT INTO t SELECT id FROM u WHERE id = p_id LIMIT 1; END",
    ] {
        assert!(!certain(body), "{body}: {:?}", scan(body, false));
    }
}

/// Each of these was accepted once, with rows in another order on a follower.
#[test]
fn what_looks_certain_and_is_not() {
    for body in [
        "BEGIN FOR r IN DELETE FROM t WHERE id IN (SELECT id FROM t ORDER BY id LIMIT 3) RETURNING v LOOP x := r.v; END LOOP; END",
        "BEGIN FOR r IN WITH s AS (SELECT id FROM t ORDER BY id LIMIT 5) SELECT v FROM t LOOP x := r.v; END LOOP; END",
        "BEGIN FOR r IN (SELECT v FROM t WHERE id = 1) UNION ALL SELECT v FROM u LOOP x := r.v; END LOOP; END",
        "BEGIN SELECT v, (SELECT count(*) FROM u) INTO x, c FROM t WHERE g = p; END",
        "BEGIN WITH d AS (UPDATE t SET g = 1 RETURNING v) SELECT v INTO x FROM d; END",
        "BEGIN SELECT INTO r g AS id, v FROM t ORDER BY id LIMIT 1; END",
        "BEGIN SELECT a.v INTO x FROM t a WHERE t.id = 3; END",
        "BEGIN SELECT a.v INTO x FROM t a ORDER BY t.id LIMIT 1; END",
        "BEGIN WITH t AS (SELECT g AS id FROM u), y AS (SELECT v FROM t WHERE id = 1 LIMIT 1) INSERT INTO o SELECT v FROM y; END",
        "BEGIN SELECT v INTO x FROM s.t WHERE id = s.t.g; END",
        "BEGIN x := array(SELECT v FROM t)::text; END",
        "BEGIN UPDATE o SET v = u.v FROM u WHERE u.g = 1; END",
        "BEGIN SELECT t.ctid INTO x FROM t WHERE id = 1; END",
        "BEGIN SELECT \"ctid\" INTO x FROM t WHERE id = 1; END",
        "BEGIN WITH s AS (TABLE t) TABLE s INTO r; END",
        "BEGIN FOR r IN SELECT q.*, v AS w FROM t ORDER BY id LOOP x := r.v; END LOOP; END",
        "BEGIN SELECT 5::id INTO x FROM t ORDER BY id LIMIT 1; END",
        "BEGIN SELECT v FROM t WHERE id = 5 INTO x OR true; END",
        "BEGIN SELECT v FROM t WHERE g IN (SELECT g INTO x FROM u WHERE id = 1); END",
        "BEGIN SET LOCAL plpgsql.variable_conflict = 'use_variable'; SELECT v INTO x FROM t WHERE id = p; END",
        "BEGIN SELECT v INTO x FROM t WHERE p += id; END",
    ] {
        assert!(!certain(body), "{body}: {:?}", scan(body, false));
    }
}

#[test]
fn only_values_of_a_known_type_are_one_of_a_blurred_key() {
    let blurred = [Key { blurred: vec!["id".to_owned()], ..key(&["id"]) }];
    for (value, known) in [
        ("5", true),
        ("'a'", true),
        ("f::bigint", true),
        ("r.f::text", true),
        ("a", true),
        ("b", false),
        ("c", false),
        ("1.5", false),
        ("r.f", false),
        ("a + 1", false),
        ("f::pg_catalog.float8", false),
    ] {
        let body = format!(
            "DECLARE a bigint := 1; b float8; c int; BEGIN SELECT v INTO x FROM t WHERE id = {value}; DECLARE c float8; BEGIN END; END"
        );
        assert_eq!(certain_by(&body, &blurred), known, "{value}");
    }
    let unsure = [Key { unsure: vec!["id".to_owned()], ..key(&["id"]) }];
    assert!(!certain_by("BEGIN SELECT v INTO x FROM t WHERE id = 5; END", &unsure));
    assert!(certain_by("BEGIN SELECT v INTO x FROM t ORDER BY id LIMIT 1; END", &unsure));
}

#[test]
fn an_argument_that_is_declared_again_is_in_doubt() {
    let mut code = scan("DECLARE a bigint; BEGIN END", false);
    let names = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<String>>();
    code.type_arguments(names(&["a", "b", "c"]).iter(), names(&["a", "b"]).iter());
    assert_eq!(code.typed.into_iter().collect::<Vec<_>>(), ["b"]);
}

/// What stands in the catalog need not be valid (`check_function_bodies`).
#[test]
fn texts_that_are_no_queries_are_no_one_row() {
    for text in ["", ")", ") from t", "loop from t", "; select", "(", "select", "select from", "into", "for", "limit"] {
        let words = super::super::scan::tokens(text).unwrap();
        for at in 0..=words.len() {
            assert!(!is_one_row(&words, at) || text.contains("select"), "{text}");
            assert_eq!(query(&words, at, ""), None, "{text}");
        }
        assert_eq!(whole(&words, ""), None, "{text}");
        let _ = (scan(text, false), declared(&words));
    }
}
