//! The question that [`super::reach`] asks the leader's catalog. PostgreSQL 13 to 18.

/// A function's facts, of `p` in pg_proc.
pub(super) const FUNCTION: &str = r"json_build_object('oid', p.oid::int8, 'schema', y.nspname, 'name', p.proname, 'volatility', p.provolatile::text,
  'builtin', NOT p.oid >= 16384::oid, 'kind', p.prokind::text, 'language', l.lanname, 'config', pg_catalog.array_to_string(p.proconfig, ','),
  'has_head', p.prosrc = '', 'arguments', pg_catalog.array_to_json(p.proargnames), 'typed', (SELECT json_agg(x.name) FROM ROWS FROM (pg_catalog.unnest(p.proargnames),
    pg_catalog.unnest(coalesce(p.proallargtypes, p.proargtypes::pg_catalog.oid[]))) AS x(name, type) WHERE x.name IS NOT NULL AND x.type = ANY ('{20,21,23,25,1043}'::oid[])),
  'defaults', pg_catalog.pg_get_expr(p.proargdefaults, 0::oid), 'returns_set', p.proretset, 'no_arguments', p.pronargs = 0::int4, 'temporary', y.nspname ~ '^pg_temp',
  'of_row', p.pronargs = 1::int4 AND EXISTS (SELECT 1 FROM pg_catalog.pg_type t WHERE t.oid = p.proargtypes[0] AND t.typtype = ANY ('{c,p}')),
  'body', CASE WHEN l.lanname = ANY ('{sql,plpgsql}'::name[]) AND p.oid >= 16384::oid
    THEN CASE WHEN p.prosrc <> '' THEN p.prosrc ELSE pg_catalog.pg_get_functiondef(p.oid) END END)";

/// The unique keys of table `c` that hold at any moment: indexes that are valid, of columns alone, of all rows, not deferrable, and compare as
/// the operators of PostgreSQL do. None where a name in code may be a variable and not a column.
///
/// A value of another type can equal several of `int8` (a float), `numeric` and `varchar` (a `character`): these are blurred. What is neither of
/// them nor an integer, `text` or `uuid` can only be ordered by, and so can text while there are collations that take different texts for equal.
pub(super) const KEYS: &str = r"(SELECT json_agg( json_build_object('columns', k.columns, 'not_null', k.not_null,
      'blurred', k.blurred, 'unsure', k.unsure)) FROM (
    SELECT json_agg(a.attname) AS columns, pg_catalog.bool_and(a.attnotnull AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_constraint w
        WHERE w.conrelid = c.oid AND w.contype = 'n' AND NOT w.convalidated)) AS not_null,
      coalesce(json_agg(a.attname) FILTER (WHERE a.atttypid = ANY ('{20,1043}'::oid[])), '[]') AS blurred,
      coalesce(json_agg(a.attname) FILTER (WHERE NOT a.atttypid = ANY ('{20,21,23,25,1043,2950}'::oid[])
        OR a.attcollation <> 0::oid AND EXISTS (SELECT 1 FROM pg_catalog.pg_collation l WHERE NOT l.collisdeterministic)), '[]') AS unsure,
      pg_catalog.bool_and(a.attname IS NOT NULL AND o.opcdefault AND NOT o.oid >= 16384::oid
        AND i.indcollation[m.n OPERATOR(pg_catalog.-) 1] = a.attcollation) AS plain
    FROM pg_catalog.pg_index i CROSS JOIN LATERAL pg_catalog.generate_series(1::int4, i.indnkeyatts::int4) AS m(n)
    LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[m.n OPERATOR(pg_catalog.-) 1] AND a.attnum > 0::int4
    LEFT JOIN pg_catalog.pg_opclass o ON o.oid = i.indclass[m.n OPERATOR(pg_catalog.-) 1]
    WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL
      AND coalesce(current_setting('plpgsql.variable_conflict', true), '') <> 'use_variable'
      AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_operator e WHERE e.oprname = '=' AND e.oid >= 16384::oid
        AND (NOT e.oprleft >= 16384::oid OR NOT e.oprright >= 16384::oid))
    GROUP BY i.indexrelid) k WHERE k.plain)";

/// Blanks around operators matter, see [`super::catalog::qualify`].
pub(super) const TEMPLATE: &str = r"WITH RECURSIVE
asked(nsp, name) AS (VALUES $written),
written(oid, cascade) AS (
  SELECT c.oid, false FROM asked a JOIN pg_catalog.pg_class c ON c.relname = a.name
  JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  WHERE (a.nsp IS NULL OR n.nspname = a.nsp) AND c.relkind = ANY ('{r,p,v,f,m}')
    AND (n.nspname !~ '^pg_temp' OR n.oid = pg_my_temp_schema())
  UNION SELECT x.oid, x.cascade FROM written w CROSS JOIN LATERAL (
    SELECT h.inhrelid, w.cascade FROM pg_catalog.pg_inherits h WHERE h.inhparent = w.oid
    UNION ALL SELECT k.conrelid, true FROM pg_catalog.pg_constraint k WHERE k.confrelid = w.oid AND k.contype = 'f'
      AND (k.confdeltype = ANY ('{c,n,d}') OR k.confupdtype = ANY ('{c,n,d}'))) x(oid, cascade)),
found(oid, written, cascade, direct) AS (
  SELECT w.oid, true, bool_or(w.cascade), bool_or(NOT w.cascade) FROM written w GROUP BY w.oid
  UNION ALL SELECT c.oid, false, false, false FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
  WHERE c.relname = ANY (ARRAY[$relations]::name[]) AND c.relkind = ANY ('{r,p,v,f,m,S}')
    AND n.nspname <> 'information_schema' AND (n.nspname !~ '^pg_temp' OR n.oid = pg_my_temp_schema())
    AND NOT EXISTS (SELECT 1 FROM written w WHERE w.oid = c.oid)),
odd_casts(source, target) AS (
  SELECT k.castsource, k.casttarget FROM pg_catalog.pg_cast k JOIN pg_catalog.pg_proc p ON p.oid = k.castfunc
  WHERE k.oid >= 16384::oid AND p.provolatile <> 'i'),
odd_types(oid) AS (
  (SELECT x.oid FROM odd_casts k CROSS JOIN LATERAL (VALUES (k.source), (k.target)) y(oid)
    CROSS JOIN LATERAL (
      SELECT y.oid
      UNION ALL SELECT t.typelem FROM pg_catalog.pg_type t WHERE t.oid = y.oid AND t.typcategory = 'A'
      UNION ALL SELECT r.rngtypid FROM pg_catalog.pg_range r
        WHERE pg_catalog.json_extract_path_text(pg_catalog.row_to_json(r), 'rngmultitypid') = y.oid::text) x(oid)
    WHERE x.oid >= 16384::oid
  UNION SELECT k.contypid FROM pg_catalog.pg_constraint k
    CROSS JOIN LATERAL pg_catalog.regexp_matches(k.conbin::text, ':(?:funcid|opfuncid) ([0-9]+)', 'g') AS m(m)
    JOIN pg_catalog.pg_proc p ON p.oid = m.m[1]::oid
    WHERE k.contypid >= 16384::oid AND k.oid >= 16384::oid AND k.contype = 'c' AND p.provolatile <> 'i')
  UNION SELECT x.oid FROM odd_types o CROSS JOIN LATERAL (
    SELECT t.oid FROM pg_catalog.pg_type t WHERE t.typelem = o.oid OR t.typbasetype = o.oid
    UNION ALL SELECT c.reltype FROM pg_catalog.pg_attribute a JOIN pg_catalog.pg_class c ON c.oid = a.attrelid
      WHERE a.atttypid = o.oid AND a.attnum > 0::int4 AND c.reltype <> 0::oid
    UNION ALL SELECT z.oid FROM pg_catalog.pg_range r CROSS JOIN LATERAL (VALUES (r.rngtypid),
      (pg_catalog.json_extract_path_text(pg_catalog.row_to_json(r), 'rngmultitypid')::oid)) z(oid)
      WHERE r.rngsubtype = o.oid AND z.oid IS NOT NULL) x(oid)),
met_tables(oid) AS (
  SELECT f.oid FROM found f
  UNION ALL SELECT k.confrelid FROM found f JOIN pg_catalog.pg_constraint k ON k.conrelid = f.oid WHERE k.contype = 'f'
  UNION ALL SELECT k.conrelid FROM found f JOIN pg_catalog.pg_constraint k ON k.confrelid = f.oid WHERE k.contype = 'f')
SELECT json_build_object(
'functions', (SELECT json_agg(@function) FROM pg_catalog.pg_proc p
  JOIN pg_catalog.pg_namespace y ON y.oid = p.pronamespace JOIN pg_catalog.pg_language l ON l.oid = p.prolang
  WHERE p.proname = ANY (ARRAY[$functions]::name[])),
'relations', (SELECT json_agg( json_build_object('oid', c.oid::int8, 'schema', n.nspname, 'name', c.relname,
    'kind', c.relkind::text, 'persistence', c.relpersistence::text, 'builtin', NOT c.oid >= 16384::oid,
    'written', f.written, 'cascade', f.cascade,
    'floats', EXISTS (SELECT 1 FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0::int4
      AND a.atttypid = ANY ('{700,701,1021,1022}'::oid[])),
    'columns', CASE WHEN c.relname = ANY (ARRAY[$ordered]::name[]) THEN (SELECT json_agg(a.attname)
      FROM pg_catalog.pg_attribute a WHERE a.attrelid = c.oid AND NOT a.attisdropped) END,
    'keys', CASE WHEN c.relname = ANY (ARRAY[$ordered]::name[]) AND (c.relkind = 'p' OR NOT c.relhassubclass) THEN @keys END,
    'view', CASE WHEN c.relkind = 'v' THEN pg_catalog.pg_get_viewdef(c.oid) END,
    'policies', CASE WHEN c.relrowsecurity THEN (SELECT json_agg(pg_catalog.concat_ws(' , ',
        pg_catalog.pg_get_expr(o.polqual, o.polrelid), pg_catalog.pg_get_expr(o.polwithcheck, o.polrelid)))
      FROM pg_catalog.pg_policy o WHERE o.polrelid = c.oid) END,
    'defaults', CASE WHEN f.written THEN (SELECT json_agg( json_build_object('name', a.attname, 'position',
        (SELECT pg_catalog.count(*) FROM pg_catalog.pg_attribute b
          WHERE b.attrelid = c.oid AND b.attnum > 0::int4 AND b.attnum <= a.attnum AND NOT b.attisdropped),
        'expression', coalesce(pg_catalog.pg_get_expr(d.adbin, d.adrelid), t.typdefault),
        'identity', a.attidentity <> '', 'generated', a.attgenerated <> ''))
      FROM pg_catalog.pg_attribute a LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
      LEFT JOIN pg_catalog.pg_type t ON t.oid = a.atttypid
      WHERE a.attrelid = c.oid AND a.attnum > 0::int4 AND NOT a.attisdropped
        AND (d.adbin IS NOT NULL OR t.typdefault IS NOT NULL OR a.attidentity <> '')
        AND (f.direct OR a.attgenerated <> '' OR EXISTS (SELECT 1 FROM pg_catalog.pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'f'
          AND (k.confdeltype = 'd' OR k.confupdtype = 'd') AND a.attnum = ANY (k.conkey)))) END,
    'checks', CASE WHEN f.written THEN (SELECT json_agg(pg_catalog.pg_get_expr(k.conbin, k.conrelid))
      FROM pg_catalog.pg_constraint k WHERE k.conrelid = c.oid AND k.contype = 'c') END,
    'rules', CASE WHEN f.written THEN (SELECT json_agg(pg_catalog.pg_get_ruledef(w.oid))
      FROM pg_catalog.pg_rewrite w WHERE w.ev_class = c.oid AND w.ev_type <> '1' AND w.ev_enabled <> 'D') END,
    'triggers', CASE WHEN f.written THEN (SELECT json_agg( json_build_object('deferrable', g.tgdeferrable, 'enabled', g.tgenabled::text,
        'definition', pg_catalog.pg_get_triggerdef(g.oid), 'function', @function))
      FROM pg_catalog.pg_trigger g JOIN pg_catalog.pg_proc p ON p.oid = g.tgfoid
      JOIN pg_catalog.pg_namespace y ON y.oid = p.pronamespace JOIN pg_catalog.pg_language l ON l.oid = p.prolang
      WHERE g.tgrelid = c.oid AND NOT g.tgisinternal AND g.tgenabled <> 'D') END))
  FROM found f JOIN pg_catalog.pg_class c ON c.oid = f.oid JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace),
'operators', (SELECT json_agg(DISTINCT o.oprname::text) FROM pg_catalog.pg_operator o JOIN pg_catalog.pg_proc p ON p.oid = o.oprcode::oid
  WHERE o.oid >= 16384::oid AND p.provolatile <> 'i'),
'temporary', (SELECT pg_catalog.min(t.typname::text) FROM pg_catalog.pg_type t
  WHERE t.typname = ANY (ARRAY[$relations]::name[]) AND t.typnamespace = pg_my_temp_schema()),
'odd_operators', (SELECT json_agg(DISTINCT o.oprname::text) FROM odd_types t JOIN pg_catalog.pg_operator o
  ON o.oprleft = t.oid OR o.oprright = t.oid OR o.oprresult = t.oid),
'odd_somewhere', EXISTS (SELECT 1 FROM odd_types),
'odd', CASE
  WHEN EXISTS (SELECT 1 FROM odd_casts k WHERE NOT k.source >= 16384::oid AND NOT k.target >= 16384::oid)
    THEN 'between types of PostgreSQL'
  ELSE (SELECT pg_catalog.min(format_type(t.oid, NULL)) FROM pg_catalog.pg_type t JOIN odd_types o ON o.oid = t.oid
    WHERE t.typname = ANY (ARRAY[$relations]::name[])
    OR EXISTS (SELECT 1 FROM met_tables f JOIN pg_catalog.pg_attribute a ON a.attrelid = f.oid
      WHERE a.atttypid = t.oid AND a.attnum > 0::int4)
    OR EXISTS (SELECT 1 FROM pg_catalog.pg_proc p WHERE p.proname = ANY (ARRAY[$functions]::name[])
      AND (p.prorettype = t.oid OR t.oid = ANY (p.proargtypes::pg_catalog.oid[]) OR t.oid = ANY (p.proallargtypes)))
    OR EXISTS (SELECT 1 FROM found f JOIN pg_catalog.pg_index i ON i.indrelid = f.oid
      JOIN pg_catalog.pg_depend d ON d.objid = i.indexrelid
      WHERE d.classid = 1259::oid AND d.refclassid = 1247::oid AND d.refobjid = t.oid)
    OR EXISTS (SELECT 1 FROM found f JOIN pg_catalog.pg_depend d ON d.objid = f.oid
      WHERE d.classid = 1259::oid AND d.refclassid = 1247::oid AND d.refobjid = t.oid)) END
)::text";
