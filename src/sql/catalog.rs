//! The one query that reads what classification needs from the leader's catalog.
//!
//! It resolves names under the search_path of the session that it runs in, and must not be led astray by it: every
//! function, type and operator is taken from pg_catalog by name, so it may also run as a superuser with a client's
//! search_path. It raises no error for what does not exist. PostgreSQL 13 to 18.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::facts::quote_literal;
use super::needs::{Name, Needs};

/// Settings of the client's session that decide what a text means or does; followers get the same values.
/// The answer has them in [`super::facts::Facts::settings`].
pub const MIRRORED_SETTINGS: [&str; 23] = [
    "search_path",
    "role",
    "session_authorization",
    "TimeZone",
    "DateStyle",
    "IntervalStyle",
    "bytea_output",
    "extra_float_digits",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "default_text_search_config",
    "xmloption",
    "xmlbinary",
    "array_nulls",
    "transform_null_equals",
    "backslash_quote",
    "standard_conforming_strings",
    "check_function_bodies",
    "row_security",
    "timezone_abbreviations",
    "client_encoding",
    "default_table_access_method",
];

/// One SQL text that returns one row with one column: the JSON document that [`super::facts::Facts::parse`] reads.
#[must_use]
pub fn query(needs: &Needs) -> String {
    let settings = MIRRORED_SETTINGS.map(|name| format!("({})", quote_literal(name))).join(", ");
    qualify(TEMPLATE)
        .replace("$relations", &values(&needs.relations))
        .replace("$functions", &values(&needs.functions))
        .replace("$operators", &values(&needs.operators))
        .replace("$types", &values(&needs.types))
        .replace("$settings", &settings)
}

/// Rows for VALUES; the first one only gives the columns their types and names nothing.
fn values(names: &BTreeSet<Name>) -> String {
    let mut rows = "(NULL::pg_catalog.name, NULL::pg_catalog.name)".to_owned();
    for name in names {
        let schema = name.schema.as_deref().map_or_else(|| "NULL".to_owned(), quote_literal);
        let _ = write!(rows, ", ({schema}, {})", quote_literal(&name.name));
    }
    rows
}

/// Operators of the template to those of pg_catalog. The template has them with a blank on both sides.
pub(super) fn qualify(template: &str) -> String {
    let mut text = template.replace("@is_harmless", IS_HARMLESS);
    for operator in ["=", "<>", "<", ">", ">=", "<=", "~", "!~", "&", "|"] {
        text = text.replace(&format!(" {operator} "), &format!(" OPERATOR(pg_catalog.{operator}) "));
    }
    for name in [
        "json_build_object",
        "jsonb_build_object",
        "json_object_agg",
        "json_agg",
        "jsonb_agg",
        "unnest",
        "bit_or",
        "bool_or",
        "current_schemas",
        "regexp_matches",
        "format_type",
        "pg_my_temp_schema",
        "current_setting",
    ] {
        text = text.replace(&format!(" {name}("), &format!(" pg_catalog.{name}("));
        text = text.replace(&format!("({name}("), &format!("(pg_catalog.{name}("));
    }
    text.replace("::text", "::pg_catalog.text")
        .replace("::int8", "::pg_catalog.int8")
        .replace("::int4", "::pg_catalog.int4")
        .replace("::oid", "::pg_catalog.oid")
        .replace("::name", "::pg_catalog.name")
        .replace("@functions_of", FUNCTIONS_OF)
        .replace("@dates", DATE_TYPES)
        .replace("@floats", FLOAT_TYPES)
        .replace("@loose", LOOSE_TYPES)
        .replace("@harmless", HARMLESS_EXTENSIONS)
}

/// Functions that a node tree calls: `@functions_of` stands after `LATERAL (` with the tree as `n.tree`.
const FUNCTIONS_OF: &str = r"SELECT p.oid, p.pronamespace, p.proname, p.provolatile, p.prokind
    FROM pg_catalog.regexp_matches(n.tree, ':(?:funcid|opfuncid|aggfnoid|winfnoid) ([0-9]+)', 'g') AS m(m)
    JOIN pg_catalog.pg_proc p ON p.oid OPERATOR(pg_catalog.=) m.m[1]::pg_catalog.oid";

/// Date and time types, their arrays and ranges (`pg_type.dat`).
const DATE_TYPES: &str =
    "'{1082,1083,1114,1184,1266,1182,1183,1115,1185,1270,3908,3910,3912,3909,3911,3913}'::pg_catalog.oid[]";

/// Whether function `p` is one in C of those extensions: `@is_harmless`.
const IS_HARMLESS: &str = r"p.prolang = 13::oid AND EXISTS (SELECT 1 FROM pg_catalog.pg_depend d
    JOIN pg_catalog.pg_extension e ON e.oid = d.refobjid
    WHERE d.classid = 1255::oid AND d.objid = p.oid AND d.refclassid = 3079::oid AND d.deptype = 'e' AND e.extname = ANY (@harmless))";

/// Types that hold floating point numbers or give them: real, double precision, the geometric ones, money by money.
const FLOAT_TYPES: &str = "'{700,701,600,601,602,603,604,628,718,790}'::pg_catalog.oid[]";

/// Types with values that are equal and look different: numeric (1.0, 1.00), interval, jsonb, floating point (-0), character, time with
/// time zone (`pg_type.dat`).
const LOOSE_TYPES: &str = "'{1700,1186,3802,700,701,1042,1266}'::pg_catalog.oid[]";

/// Extensions of PostgreSQL's own distribution whose functions in C neither write nor run a text that they are given. The others have such
/// functions, or a state of their own in the session (`isn`), or types whose text is not all of the value (`seg`).
const HARMLESS_EXTENSIONS: &str = "'{btree_gin,btree_gist,citext,cube,dict_int,dict_xsyn,earthdistance,fuzzystrmatch,hstore,intarray,ltree,\
     pg_trgm,pgcrypto,unaccent,uuid-ossp}'::pg_catalog.name[]";

/// Blanks around operators matter, see [`qualify`].
const TEMPLATE: &str = r"WITH RECURSIVE
spaces(oid, pos) AS MATERIALIZED (
  SELECT n.oid, u.pos FROM pg_catalog.unnest(pg_catalog.current_schemas(true)) WITH ORDINALITY AS u(nsp, pos)
  JOIN pg_catalog.pg_namespace n ON n.nspname = u.nsp),
named(nsp, oid) AS MATERIALIZED (
  SELECT n.nspname, n.oid FROM pg_catalog.pg_namespace n
  UNION ALL SELECT 'pg_temp'::name, pg_my_temp_schema()),
asked_relations(nsp, name) AS (VALUES $relations),
found AS MATERIALIZED (
  SELECT a.nsp, a.name, c.oid, c.relkind FROM asked_relations a CROSS JOIN LATERAL (
    SELECT c.oid, c.relkind FROM pg_catalog.pg_class c
    LEFT JOIN spaces s ON s.oid = c.relnamespace
    WHERE c.relname = a.name
      AND CASE WHEN a.nsp IS NULL THEN s.pos IS NOT NULL
          ELSE EXISTS (SELECT 1 FROM named n WHERE n.nsp = a.nsp AND n.oid = c.relnamespace) END
    ORDER BY s.pos LIMIT 1) c),
tree(root, oid) AS (
  SELECT f.oid, f.oid FROM found f
  UNION SELECT t.root, h.inhrelid FROM tree t JOIN pg_catalog.pg_inherits h ON h.inhparent = t.oid),
cascades(root, oid, events, opaque) AS (
  SELECT t.root, t.oid, 0::int4, false FROM tree t
  UNION SELECT s.root, k.conrelid,
    CASE WHEN k.confdeltype = 'c' THEN 8::int4 ELSE 0::int4 END
      | CASE WHEN k.confdeltype = ANY ('{n,d}') OR k.confupdtype = ANY ('{c,n,d}') THEN 16::int4 ELSE 0::int4 END,
    (k.confdeltype = 'd' OR k.confupdtype = 'd') AND EXISTS (SELECT 1 FROM pg_catalog.pg_attribute a
      JOIN pg_catalog.pg_type y ON y.oid = a.atttypid
      LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
      WHERE a.attrelid = k.conrelid AND a.attnum = ANY (k.conkey)
        AND (d.adbin::text !~ '^[{]CONST ' OR y.typdefault IS NOT NULL OR a.attidentity <> ''))
  FROM cascades s JOIN pg_catalog.pg_constraint k ON k.confrelid = s.oid
  WHERE k.contype = 'f' AND (k.confdeltype = ANY ('{c,n,d}') OR k.confupdtype = ANY ('{c,n,d}'))),
truncated(root, oid) AS (
  SELECT f.oid, f.oid FROM found f
  UNION SELECT s.root, k.conrelid FROM truncated s JOIN pg_catalog.pg_constraint k ON k.confrelid = s.oid WHERE k.contype = 'f'),
views(root, oid) AS (
  SELECT f.oid, f.oid FROM found f WHERE f.relkind = ANY ('{v,m}')
  UNION SELECT v.root, d.refobjid FROM views v
  JOIN pg_catalog.pg_rewrite w ON w.ev_class = v.oid
  JOIN pg_catalog.pg_depend d ON d.objid = w.oid
  WHERE w.ev_type = '1' AND d.classid = 2618::oid AND d.refclassid = 1259::oid AND v.oid >= 16384::oid),
uniques(root, immediate, name) AS (
  SELECT t.root, i.indimmediate, a.attname FROM tree t JOIN pg_catalog.pg_index i ON i.indrelid = t.oid
  JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid
  WHERE (i.indisunique OR i.indisexclusion) AND NOT i.indisprimary AND a.attnum > 0::int4 AND NOT a.attisdropped
    AND (a.attnum = ANY (i.indkey::pg_catalog.int2[])
      OR i.indexprs::text ~ ':varattno 0 ' OR i.indpred::text ~ ':varattno 0 '
      OR EXISTS (SELECT 1 FROM pg_catalog.pg_depend d WHERE d.classid = 1259::oid AND d.objid = i.indexrelid
        AND d.refclassid = 1259::oid AND d.refobjid = t.oid AND d.refobjsubid = a.attnum))),
asked_types(nsp, name) AS (VALUES $types),
found_types AS MATERIALIZED (
  SELECT a.nsp, a.name, t.oid FROM asked_types a CROSS JOIN LATERAL (
    SELECT t.oid FROM pg_catalog.pg_type t
    LEFT JOIN spaces s ON s.oid = t.typnamespace
    WHERE t.typname = a.name
      AND CASE WHEN a.nsp IS NULL THEN s.pos IS NOT NULL
          ELSE EXISTS (SELECT 1 FROM named n WHERE n.nsp = a.nsp AND n.oid = t.typnamespace) END
    ORDER BY s.pos LIMIT 1) t),
inside(top, oid) AS (
  SELECT x.oid, x.oid FROM (
    SELECT a.atttypid FROM found f JOIN pg_catalog.pg_attribute a ON a.attrelid = f.oid WHERE a.attnum > 0::int4
    UNION SELECT t.oid FROM found_types t) x(oid)
  UNION SELECT i.top, y.oid FROM inside i
  JOIN pg_catalog.pg_type t ON t.oid = i.oid
  CROSS JOIN LATERAL (
    SELECT t.typbasetype WHERE t.typtype = 'd'
    UNION ALL SELECT t.typelem WHERE t.typcategory = 'A'
    UNION ALL SELECT r.rngsubtype FROM pg_catalog.pg_range r WHERE r.rngtypid = t.oid
    UNION ALL SELECT r.rngtypid FROM pg_catalog.pg_range r WHERE t.typtype = 'm'
      AND pg_catalog.json_extract_path_text(pg_catalog.row_to_json(r), 'rngmultitypid') = t.oid::text
    UNION ALL SELECT a.atttypid FROM pg_catalog.pg_attribute a
      WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0::int4 AND NOT a.attisdropped) y(oid)),
traits AS MATERIALIZED (
  SELECT i.top,
    bool_or(i.oid = ANY ('{1082,1083,1114,1184,1266,4533,4534,4535}'::oid[])) AS dates,
    bool_or(i.oid = 1184::oid) AS zones,
    bool_or(i.oid = ANY (@floats) OR t.typtype = 'b' AND i.oid >= 16384::oid AND NOT t.typcategory = ANY ('{A,S}')) AS floats,
    bool_or(i.oid = ANY (@loose) OR t.typtype = 'b' AND i.oid >= 16384::oid AND t.typcategory <> 'A') AS loose,
    bool_or(i.oid = ANY ('{24,2202,2203,2204,2205,2206,3734,3769,4089,4096,4191}'::oid[])) AS reg,
    bool_or(t.typcategory = 'S') AS text
  FROM inside i JOIN pg_catalog.pg_type t ON t.oid = i.oid GROUP BY i.top),
domain_checks AS MATERIALIZED (
  SELECT DISTINCT i.top, p.oid, p.pronamespace, p.proname, p.provolatile, p.prokind FROM inside i
  JOIN pg_catalog.pg_constraint k ON k.contypid = i.oid
  CROSS JOIN LATERAL (SELECT k.conbin::text) n(tree) CROSS JOIN LATERAL (@functions_of) p
  WHERE k.contype = 'c'),
asked_functions(nsp, name) AS (VALUES $functions),
asked_operators(nsp, name) AS (VALUES $operators),
asked_settings(name) AS (VALUES $settings)
SELECT json_build_object(
'relations', (SELECT json_agg( json_build_object('schema', f.nsp, 'name', f.name, 'fact', json_build_object(
    'oid', c.oid::int8, 'schema', n.nspname, 'name', c.relname, 'kind', c.relkind::text, 'persistence', c.relpersistence::text,
    'owner', r.rolname, 'owner_superuser', r.rolsuper,
    'owner_lacks', NOT (pg_catalog.has_schema_privilege(c.relowner, n.oid, 'USAGE')
      AND pg_catalog.has_table_privilege(c.relowner, c.oid, 'SELECT') AND pg_catalog.has_table_privilege(c.relowner, c.oid, 'INSERT')
      AND pg_catalog.has_table_privilege(c.relowner, c.oid, 'UPDATE') AND pg_catalog.has_table_privilege(c.relowner, c.oid, 'DELETE')),
    'columns', coalesce((SELECT json_agg( json_build_object(
        'name', a.attname, 'sql_type', format_type(a.atttypid, a.atttypmod), 'not_null', a.attnotnull,
        'generated', a.attgenerated <> '', 'identity', a.attidentity <> '', 'identity_always', a.attidentity = 'a',
        'may_select', pg_catalog.has_column_privilege(c.oid, a.attnum, 'SELECT'),
        'bulk', CASE
          WHEN (t.typcategory = 'A' AND t.typtype = 'b' OR t.typcategory = 'C') AND NOT EXISTS (SELECT 1
            FROM pg_catalog.pg_cast k WHERE k.castsource = 25::oid AND k.casttarget = t.oid) THEN 't'
          WHEN t.typarray <> 0::oid AND t.typdelim = ',' AND NOT (t.typcategory = 'A' AND t.typtype = 'b')
            AND t.typcategory <> 'C' THEN 'a'
          ELSE 'n' END,
        'loose', CASE
          WHEN a.atttypid = 1700::oid AND a.atttypmod <> -1::int4 THEN false
          WHEN EXISTS (SELECT 1 FROM pg_catalog.pg_collation o WHERE o.oid = a.attcollation AND NOT o.collisdeterministic) THEN true
          ELSE coalesce(x.loose, true) END,
        'dates', coalesce(x.dates, true), 'zones', coalesce(x.zones, true), 'floats', coalesce(x.floats, true),
        'text', coalesce(x.text, true),
        'may_insert', pg_catalog.has_column_privilege(c.oid, a.attnum, 'INSERT'),
        'default_sql', CASE
          WHEN a.attidentity <> '' THEN CASE WHEN pg_catalog.has_sequence_privilege(d.sequence, 'USAGE')
            THEN pg_catalog.format('pg_catalog.nextval(%L::pg_catalog.regclass)', d.sequence) END
          WHEN a.attgenerated <> '' THEN NULL
          ELSE coalesce(pg_catalog.pg_get_expr(e.adbin, e.adrelid), pg_catalog.pg_get_expr(t.typdefaultbin, 0::oid)) END,
        'default', CASE
          WHEN a.attidentity <> '' THEN 'o'
          WHEN d.tree IS NULL THEN 'n'
          WHEN EXISTS (SELECT 1 FROM pg_catalog.regexp_matches(d.tree, ':(?:funcid|opfuncid|aggfnoid|winfnoid) ([0-9]+)', 'g') AS m(m)
            JOIN pg_catalog.pg_proc p ON p.oid = m.m[1]::oid
            WHERE p.oid >= 16384::oid AND p.prolang > 13::oid AND (p.provolatile <> 'i' OR p.prokind <> 'f')) THEN 'u'
          WHEN d.tree ~ '\{(SQLVALUEFUNCTION|NEXTVALUEEXPR|COERCEVIAIO)' THEN 'o'
          WHEN EXISTS (SELECT 1 FROM pg_catalog.regexp_matches(d.tree, ':(?:funcid|opfuncid|aggfnoid|winfnoid) ([0-9]+)', 'g') AS m(m)
            LEFT JOIN pg_catalog.pg_proc p ON p.oid = m.m[1]::oid WHERE p.oid IS NULL OR p.provolatile <> 'i') THEN 'o'
          ELSE 'i' END) ORDER BY a.attnum)
      FROM pg_catalog.pg_attribute a
      LEFT JOIN pg_catalog.pg_attrdef e ON e.adrelid = a.attrelid AND e.adnum = a.attnum
      LEFT JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
      LEFT JOIN traits x ON x.top = a.atttypid
      CROSS JOIN LATERAL (SELECT CASE WHEN a.attgenerated <> '' THEN NULL ELSE coalesce(e.adbin::text, t.typdefaultbin::text) END,
        CASE WHEN a.attidentity <> '' THEN pg_catalog.pg_get_serial_sequence(pg_catalog.format('%I.%I', n.nspname, c.relname), a.attname::text) END)
        d(tree, sequence)
      WHERE a.attrelid = c.oid AND a.attnum > 0::int4 AND NOT a.attisdropped), '[]'),
    'key', coalesce((SELECT json_agg(a.attname ORDER BY k.pos)
      FROM pg_catalog.pg_index i CROSS JOIN LATERAL pg_catalog.unnest(i.indkey) WITH ORDINALITY AS k(num, pos)
      JOIN pg_catalog.pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.num
      WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate AND i.indisvalid AND NOT k.pos > i.indnkeyatts::int8), '[]'),
    'key_operators', coalesce((SELECT json_agg( json_build_object('schema', y.nspname, 'name', o.oprname) ORDER BY k.pos)
      FROM pg_catalog.pg_index i CROSS JOIN LATERAL pg_catalog.unnest(i.indclass) WITH ORDINALITY AS k(class, pos)
      JOIN pg_catalog.pg_opclass q ON q.oid = k.class
      JOIN pg_catalog.pg_amop m ON m.amopfamily = q.opcfamily AND m.amoplefttype = q.opcintype AND m.amoprighttype = q.opcintype
      JOIN pg_catalog.pg_operator o ON o.oid = m.amopopr
      JOIN pg_catalog.pg_namespace y ON y.oid = o.oprnamespace
      WHERE i.indrelid = c.oid AND i.indisprimary AND i.indimmediate AND i.indisvalid AND m.amopstrategy = 3::int4), '[]'),
    'unique_columns', coalesce((SELECT json_agg(DISTINCT u.name) FROM uniques u WHERE u.root = c.oid AND u.immediate), '[]'),
    'deferrable_unique_columns', coalesce((SELECT json_agg(DISTINCT u.name) FROM uniques u
      WHERE u.root = c.oid AND NOT u.immediate), '[]'),
    'referenced', coalesce((SELECT json_agg(DISTINCT a.attname) FROM tree t JOIN pg_catalog.pg_constraint k ON k.confrelid = t.oid
      CROSS JOIN LATERAL pg_catalog.unnest(k.confkey) u(num)
      JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = u.num
      WHERE t.root = c.oid AND k.contype = 'f'), '[]'),
    'self_referencing', EXISTS (SELECT 1 FROM tree t JOIN pg_catalog.pg_constraint k ON k.conrelid = t.oid
      JOIN tree s ON s.root = t.root AND s.oid = k.confrelid WHERE t.root = c.oid AND k.contype = 'f'),
    'triggers', coalesce((SELECT bit_or(g.tgtype::int4) FROM tree t JOIN pg_catalog.pg_trigger g ON g.tgrelid = t.oid
      WHERE t.root = c.oid AND NOT g.tgisinternal AND g.tgenabled <> 'D'), 0),
    'rules', EXISTS (SELECT 1 FROM tree t JOIN pg_catalog.pg_rewrite w ON w.ev_class = t.oid
      WHERE t.root = c.oid AND w.ev_type <> '1' AND w.ev_enabled <> 'D'),
    'rls', pg_catalog.row_security_active(c.oid) OR c.relrowsecurity AND c.relforcerowsecurity,
    'children', c.relkind <> 'p' AND EXISTS (SELECT 1 FROM tree t WHERE t.root = c.oid AND t.oid <> c.oid),
    'foreign', EXISTS (SELECT 1 FROM tree t JOIN pg_catalog.pg_class k ON k.oid = t.oid WHERE t.root = c.oid AND k.relkind = 'f'),
    'truncate_trigger', (SELECT pg_catalog.min(s.oid::regclass::text) FROM truncated s JOIN pg_catalog.pg_trigger g ON g.tgrelid = s.oid
      WHERE s.root = c.oid AND s.oid <> c.oid AND NOT g.tgisinternal AND g.tgenabled <> 'D' AND (g.tgtype::int4 & 32::int4) <> 0::int4),
    'partition_columns', coalesce((SELECT json_agg(DISTINCT a.attname) FROM tree t
      JOIN pg_catalog.pg_partitioned_table r ON r.partrelid = t.oid JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid
      WHERE t.root = c.oid AND a.attnum > 0::int4 AND (r.partexprs IS NOT NULL OR a.attnum = ANY (r.partattrs::pg_catalog.int2[]))), '[]'),
    'unlogged_child', (SELECT pg_catalog.min(k.oid::regclass::text) FROM tree t JOIN pg_catalog.pg_class k ON k.oid = t.oid
      WHERE t.root = c.oid AND t.oid <> c.oid AND k.relpersistence = 'u'),
    'deferrable', EXISTS (SELECT 1 FROM tree t JOIN pg_catalog.pg_constraint k ON k.conrelid = t.oid OR k.confrelid = t.oid
      WHERE t.root = c.oid AND k.condeferrable),
    'cascade_delete', EXISTS (SELECT 1 FROM tree t JOIN pg_catalog.pg_constraint k ON k.confrelid = t.oid
      WHERE t.root = c.oid AND k.contype = 'f' AND k.confdeltype = ANY ('{c,n,d}')),
    'cascade_update', coalesce((SELECT json_agg(a.attname) FROM tree t JOIN pg_catalog.pg_constraint k ON k.confrelid = t.oid
      CROSS JOIN LATERAL pg_catalog.unnest(k.confkey) u(num)
      JOIN pg_catalog.pg_attribute a ON a.attrelid = t.oid AND a.attnum = u.num
      WHERE t.root = c.oid AND k.contype = 'f' AND k.confupdtype = ANY ('{c,n,d}')), '[]'),
    'cascade_opaque', EXISTS (SELECT 1 FROM cascades s WHERE s.root = c.oid AND (s.opaque OR s.events > 0::int4 AND (
      EXISTS (SELECT 1 FROM pg_catalog.pg_trigger g WHERE g.tgrelid = s.oid AND NOT g.tgisinternal AND g.tgenabled <> 'D'
        AND (g.tgtype::int4 & s.events) <> 0::int4)
      OR EXISTS (SELECT 1 FROM pg_catalog.pg_rewrite w WHERE w.ev_class = s.oid AND w.ev_type <> '1' AND w.ev_enabled <> 'D')))),
    'check_functions', coalesce((SELECT jsonb_agg(DISTINCT jsonb_build_object('schema', y.nspname, 'name', p.proname,
        'volatility', p.provolatile::text, 'builtin', NOT p.oid >= 16384::oid, 'kind', p.prokind::text, 'of_row', false))
      FROM (SELECT p.oid, p.pronamespace, p.proname, p.provolatile, p.prokind FROM tree t
          JOIN pg_catalog.pg_constraint k ON k.conrelid = t.oid
          CROSS JOIN LATERAL (SELECT k.conbin::text) n(tree) CROSS JOIN LATERAL (@functions_of) p
          WHERE t.root = c.oid AND k.contype = 'c'
        UNION ALL SELECT z.oid, z.pronamespace, z.proname, z.provolatile, z.prokind FROM domain_checks z
          JOIN pg_catalog.pg_attribute a ON a.atttypid = z.top WHERE a.attrelid = c.oid AND a.attnum > 0::int4
        UNION ALL SELECT 0::oid, 11::oid, 'now'::name, 's', 'f' FROM tree t
          JOIN pg_catalog.pg_constraint k ON k.conrelid = t.oid
          WHERE t.root = c.oid AND k.contype = 'c' AND k.conbin::text ~ '\{SQLVALUEFUNCTION') p
      LEFT JOIN pg_catalog.pg_namespace y ON y.oid = p.pronamespace), '[]'),
    'view_functions', coalesce((SELECT jsonb_agg(DISTINCT jsonb_build_object('schema', y.nspname, 'name', p.proname,
        'volatility', p.provolatile::text, 'builtin', NOT p.oid >= 16384::oid, 'kind', p.prokind::text, 'of_row', false))
      FROM views v JOIN pg_catalog.pg_rewrite w ON w.ev_class = v.oid
      CROSS JOIN LATERAL (SELECT w.ev_action::text) n(tree) CROSS JOIN LATERAL (@functions_of) p
      LEFT JOIN pg_catalog.pg_namespace y ON y.oid = p.pronamespace
      WHERE v.root = c.oid AND w.ev_type = '1' AND v.oid >= 16384::oid), '[]'),
    'view_opaque', EXISTS (SELECT 1 FROM views v JOIN pg_catalog.pg_class k ON k.oid = v.oid
      WHERE v.root = c.oid AND (k.relkind = 'f' OR k.relrowsecurity)),
    'sequences', coalesce((SELECT json_agg( json_build_object('column', a.attname, 'oid', coalesce(s.oid, 0::oid)::int8))
      FROM pg_catalog.pg_attribute a
      LEFT JOIN pg_catalog.pg_attrdef e ON e.adrelid = a.attrelid AND e.adnum = a.attnum
      LEFT JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
      LEFT JOIN LATERAL (
        SELECT p.objid AS oid FROM pg_catalog.pg_depend p WHERE a.attidentity <> '' AND p.classid = 1259::oid
          AND p.refclassid = 1259::oid AND p.refobjid = c.oid AND p.refobjsubid = a.attnum::int4 AND p.deptype = 'i'
        UNION ALL SELECT p.refobjid FROM pg_catalog.pg_depend p WHERE p.classid = 2604::oid AND p.objid = e.oid
          AND p.refclassid = 1259::oid AND p.deptype = 'n'
          AND pg_catalog.pg_get_expr(e.adbin, e.adrelid) ~ '^nextval\(''[^'']*''::regclass\)$' LIMIT 1) s ON true
      WHERE a.attrelid = c.oid AND a.attnum > 0::int4 AND NOT a.attisdropped AND a.attgenerated = ''
        AND (a.attidentity <> '' OR coalesce(e.adbin::text, t.typdefaultbin::text) ~ ':funcid (1574|1576|1765|[0-9]{5,})')), '[]'))))
  FROM found f JOIN pg_catalog.pg_class c ON c.oid = f.oid
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_catalog.pg_roles r ON r.oid = c.relowner),
'functions', (SELECT json_agg( json_build_object('schema', a.nsp, 'name', a.name, 'fact', b.fact))
  FROM asked_functions a CROSS JOIN LATERAL (
    SELECT jsonb_agg(DISTINCT jsonb_build_object('schema', y.nspname, 'name', p.proname, 'volatility',
      CASE WHEN p.oid >= 16384::oid AND p.pronargdefaults > 0::int4 AND (p.proargdefaults::text ~ '\{(SQLVALUEFUNCTION|NEXTVALUEEXPR)'
        OR EXISTS (SELECT 1 FROM pg_catalog.regexp_matches(p.proargdefaults::text, ':(?:funcid|opfuncid) ([0-9]+)', 'g') AS m(m)
          JOIN pg_catalog.pg_proc q ON q.oid = m.m[1]::oid WHERE q.provolatile <> 'i'))
        THEN 'v' ELSE p.provolatile::text END,
      'builtin', NOT p.oid >= 16384::oid, 'kind', p.prokind::text,
      'harmless', @is_harmless,
      'immutable_parts', p.prokind = 'a' AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_aggregate g CROSS JOIN LATERAL pg_catalog.unnest(ARRAY[
          g.aggtransfn::oid, g.aggfinalfn::oid, g.aggcombinefn::oid, g.aggserialfn::oid, g.aggdeserialfn::oid, g.aggmtransfn::oid,
          g.aggminvtransfn::oid, g.aggmfinalfn::oid]) u(oid)
        JOIN pg_catalog.pg_proc q ON q.oid = u.oid WHERE g.aggfnoid::oid = p.oid AND q.provolatile <> 'i'),
      'dates', p.prorettype = ANY (@dates) OR EXISTS (SELECT 1 FROM pg_catalog.unnest(p.proargtypes) u(oid) WHERE u.oid = ANY (@dates) OR u.oid >= 16384::oid),
      'floats', p.prorettype = ANY ('{700,701,1021,1022}'::oid[]), 'loose', p.prorettype = ANY (@loose) OR p.prorettype >= 16384::oid,
      'of_row', p.pronargs = 1::int4 AND EXISTS (SELECT 1 FROM pg_catalog.pg_type t WHERE t.oid = p.proargtypes[0] AND t.typtype = ANY ('{c,p}')))) AS fact
    FROM pg_catalog.pg_proc p JOIN pg_catalog.pg_namespace y ON y.oid = p.pronamespace
    LEFT JOIN spaces s ON s.oid = p.pronamespace
    WHERE p.proname = a.name AND CASE WHEN a.nsp IS NULL THEN s.pos IS NOT NULL
      ELSE EXISTS (SELECT 1 FROM named n WHERE n.nsp = a.nsp AND n.oid = p.pronamespace) END) b
  WHERE b.fact IS NOT NULL),
'operators', (SELECT json_agg( json_build_object('schema', a.nsp, 'name', a.name, 'fact', b.fact))
  FROM asked_operators a CROSS JOIN LATERAL (
    SELECT jsonb_agg(DISTINCT jsonb_build_object('schema', y.nspname, 'name', p.proname, 'volatility', p.provolatile::text,
      'builtin', NOT p.oid >= 16384::oid, 'kind', p.prokind::text,
      'harmless', @is_harmless,
      'of_row', false)) AS fact
    FROM pg_catalog.pg_operator o JOIN pg_catalog.pg_proc p ON p.oid = o.oprcode::oid
    JOIN pg_catalog.pg_namespace y ON y.oid = p.pronamespace
    LEFT JOIN spaces s ON s.oid = o.oprnamespace
    WHERE o.oprname = a.name AND o.oid >= 16384::oid AND CASE WHEN a.nsp IS NULL THEN s.pos IS NOT NULL
      ELSE EXISTS (SELECT 1 FROM named n WHERE n.nsp = a.nsp AND n.oid = o.oprnamespace) END) b
  WHERE b.fact IS NOT NULL),
'types', (SELECT json_agg( json_build_object('schema', f.nsp, 'name', f.name, 'fact', json_build_object(
    'schema', n.nspname, 'name', t.typname, 'builtin', NOT t.oid >= 16384::oid, 'dates', coalesce(x.dates, true),
    'floats', coalesce(x.floats, true), 'loose', coalesce(x.loose, true), 'text', coalesce(x.text, true), 'reg', coalesce(x.reg, true),
    'has_default', t.typdefaultbin IS NOT NULL,
    'check_functions', coalesce((SELECT jsonb_agg(DISTINCT jsonb_build_object('schema', y.nspname, 'name', z.proname,
        'volatility', z.provolatile::text, 'builtin', NOT z.oid >= 16384::oid, 'kind', z.prokind::text, 'of_row', false))
      FROM domain_checks z LEFT JOIN pg_catalog.pg_namespace y ON y.oid = z.pronamespace WHERE z.top = t.oid), '[]'))))
  FROM found_types f JOIN pg_catalog.pg_type t ON t.oid = f.oid
  JOIN pg_catalog.pg_namespace n ON n.oid = t.typnamespace
  LEFT JOIN traits x ON x.top = t.oid),
'settings', (SELECT json_object_agg(s.name, current_setting(s.name, true)) FROM asked_settings s)
)::text";
