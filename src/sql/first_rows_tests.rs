//! Bodies of which the rows are certain, and bodies that look so.

use super::super::scan::{Code, scan};
use super::*;

fn key(columns: &[&str]) -> Key {
    Key {
        columns: columns.iter().map(|column| (*column).to_owned()).collect(),
        not_null: true,
        blurred_by_floats: false,
        blurred_by_blanks: false,
    }
}

/// Whether the order of rows is certain in all of a body, with a table that has these columns and the key `id`.
fn certain_by(body: &str, keys: &[Key], blurs: Blurs) -> bool {
    let Code { ordered, unproven, .. } = scan(body, false);
    let columns = ["id", "g", "v", "n"].iter().map(|column| (*column).to_owned()).collect();
    unproven.is_none() && !ordered.is_empty() && ordered.iter().all(|query| query.holds(&columns, keys, blurs))
}

fn certain(body: &str) -> bool {
    certain_by(body, &[key(&["id"])], Blurs::default())
}

#[test]
fn a_key_that_is_compared_with_values_is_one_row() {
    for body in [
        "BEGIN SELECT v INTO x FROM t WHERE id = p_id; END",
        "BEGIN SELECT v, g INTO x, r.y FROM s.t AS a WHERE a.id = NEW.t_id AND a.g <> 4 FOR UPDATE; END",
        "BEGIN IF x > 1 THEN SELECT INTO y v FROM t WHERE p_id = t.id; END IF; END",
        "BEGIN SELECT v FROM ONLY t WHERE (g = 1 OR g = 2) AND id = coalesce(p_id, 0) + 1::int INTO x; END",
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
    assert!(certain_by("BEGIN SELECT v INTO x FROM t WHERE g = p ORDER BY n LIMIT 1; END", &two, Blurs::default()));
    assert!(!certain_by("BEGIN SELECT v INTO x FROM t WHERE g = p LIMIT 1; END", &two, Blurs::default()));
    let nulls = [Key { not_null: false, ..key(&["id"]) }];
    assert!(!certain_by("BEGIN SELECT v INTO x FROM t ORDER BY id LIMIT 1; END", &nulls, Blurs::default()));
    assert!(certain_by("BEGIN SELECT v INTO x FROM t WHERE id = p; END", &nulls, Blurs::default()));
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

#[test]
fn values_that_equal_several_keys_make_none_certain() {
    let body = "BEGIN SELECT v INTO x FROM t WHERE id = p_id; END";
    let floats = [Key { blurred_by_floats: true, ..key(&["id"]) }];
    assert!(certain_by(body, &floats, Blurs { floats: false, blanks: true }));
    assert!(!certain_by(body, &floats, Blurs { floats: true, blanks: false }));
    let blanks = [Key { blurred_by_blanks: true, ..key(&["id"]) }];
    assert!(certain_by(body, &blanks, Blurs { floats: true, blanks: false }));
    assert!(!certain_by(body, &blanks, Blurs { floats: false, blanks: true }));
    let order = "BEGIN SELECT v INTO x FROM t ORDER BY id LIMIT 1; END";
    assert!(certain_by(order, &floats, Blurs { floats: true, blanks: true }));
}
