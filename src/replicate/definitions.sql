-- What followers do instead of a definition that gives rows values, asked after the leader has run it. One line a step, the first
-- letter says what it is: C a statement under the client's role, O one under the proxy's own role, K the client's own text,
-- W the owner of the next tables (empty: a superuser, so the proxy's own role does), D a statement under that role,
-- L a COPY TO STDOUT for the leader whose data go into the next F, a COPY FROM STDIN under the owner's role: what functions of theirs
-- in checks and indexes do then, they may. T nothing: what was made is temporary. R the reason why it can not be carried.
CREATE OR REPLACE FUNCTION pgtandem.columns(of_relation oid, definitions boolean) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT string_agg(quote_ident(a.attname) || CASE WHEN definitions THEN ' ' || format_type(a.atttypid, a.atttypmod)
            || CASE WHEN a.attcollation NOT IN (0, t.typcollation)
                THEN (SELECT format(' COLLATE %I.%I', n.nspname, o.collname) FROM pg_collation o
                    JOIN pg_namespace n ON n.oid = o.collnamespace WHERE o.oid = a.attcollation)
                ELSE '' END ELSE '' END, ', ' ORDER BY a.attnum)
    FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
    WHERE a.attrelid = of_relation AND a.attnum > 0 AND NOT a.attisdropped AND a.attgenerated = ''
$$;
CREATE OR REPLACE FUNCTION pgtandem.storage(of_relation oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(' USING ' || quote_ident(m.amname), '')
        || coalesce(' WITH (' || (SELECT string_agg(format('%s%I = %L', x.prefix, o.option_name, o.option_value), ', ')
            FROM (SELECT ''::text AS prefix, c.reloptions AS options
                UNION ALL SELECT 'toast.', s.reloptions FROM pg_class s WHERE s.oid = c.reltoastrelid) x
            CROSS JOIN LATERAL pg_options_to_table(x.options) o) || ')', '')
    FROM pg_class c LEFT JOIN pg_am m ON m.oid = c.relam WHERE c.oid = of_relation
$$;
-- The rows of these relations, to be read from the leader and written where they are empty.
CREATE OR REPLACE FUNCTION pgtandem.owner_step(of_relation oid) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT 'W' || CASE WHEN r.rolsuper THEN '' ELSE r.rolname END
    FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner WHERE c.oid = of_relation
$$;
CREATE OR REPLACE FUNCTION pgtandem.rows(relations oid[]) RETURNS SETOF text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT step FROM unnest(relations) WITH ORDINALITY u(relation, at) JOIN pg_class c ON c.oid = u.relation
    JOIN pg_namespace n ON n.oid = c.relnamespace CROSS JOIN LATERAL pgtandem.columns(c.oid, false) l(list)
    CROSS JOIN LATERAL (VALUES
        (0, pgtandem.owner_step(c.oid)),
        (1, format('LCOPY (SELECT %s FROM ONLY %I.%I) TO STDOUT (ENCODING ''UTF8'')', l.list, n.nspname, c.relname)),
        (2, format('FCOPY %I.%I (%s) FROM STDIN (ENCODING ''UTF8'')', n.nspname, c.relname, l.list))) s(k, step)
    ORDER BY u.at, s.k
$$;
-- Where a sequence stands: its value, and whether it was given.
CREATE OR REPLACE FUNCTION pgtandem.position(of_schema name, of_sequence name) RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    stands text;
BEGIN
    EXECUTE format('SELECT last_value || '', '' || is_called FROM %I.%I', of_schema, of_sequence) INTO stands;
    RETURN stands;
END $$;
-- The sequences that this transaction called nextval or setval of, which hold their lock to its end. A line each, parts separated by
-- U+001F: number, last value, increment, smallest, largest, given already, cycles, schema and name in hexadecimal.
CREATE OR REPLACE FUNCTION pgtandem.sequences(given text) RETURNS SETOF text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    s record;
    at bigint;
    called boolean;
BEGIN
    PERFORM 1 FROM pgtandem.epoch e WHERE e.one AND e.secret_hash = sha256(convert_to(given, 'UTF8'));
    IF NOT FOUND THEN
        RAISE EXCEPTION 'pgtandem.sequences is for the proxy alone' USING ERRCODE = '42501';
    END IF;
    FOR s IN SELECT DISTINCT c.oid, n.nspname, c.relname, q.seqincrement, q.seqmin, q.seqmax, q.seqcycle
        FROM pg_locks l JOIN pg_class c ON c.oid = l.relation JOIN pg_namespace n ON n.oid = c.relnamespace
        JOIN pg_sequence q ON q.seqrelid = c.oid
        WHERE l.pid = pg_backend_pid() AND l.locktype = 'relation' AND l.mode = 'RowExclusiveLock'
            AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
            AND c.relpersistence <> 't' ORDER BY c.oid
    LOOP
        EXECUTE format('SELECT last_value, is_called FROM %I.%I', s.nspname, s.relname) INTO at, called;
        RETURN NEXT concat_ws(E'\x1f', s.oid, at, s.seqincrement, s.seqmin, s.seqmax, called, s.seqcycle,
            encode(convert_to(s.nspname, 'UTF8'), 'hex'), encode(convert_to(s.relname, 'UTF8'), 'hex'));
    END LOOP;
END $$;
CREATE OR REPLACE FUNCTION pgtandem.followers_do(
    given text, kind text, target oid, new_schema text, new_name text, parts text[], sequences oid[])
RETURNS SETOF text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    relation oid := target;
    c record;
    place text;
    tables oid[];
    obstacle text;
BEGIN
    PERFORM 1 FROM pgtandem.epoch e WHERE e.one AND e.secret_hash = sha256(convert_to(given, 'UTF8'));
    IF NOT FOUND THEN
        RAISE EXCEPTION 'pgtandem.followers_do is for the proxy alone' USING ERRCODE = '42501';
    END IF;
    IF new_schema ~ '^pg_temp' THEN
        RETURN NEXT 'T';
        RETURN;
    END IF;
    IF relation IS NULL THEN
        SELECT r.oid INTO relation FROM pg_class r JOIN pg_namespace n ON n.oid = r.relnamespace
        WHERE n.nspname = new_schema AND r.relname = new_name;
    END IF;
    SELECT r.*, n.nspname INTO c FROM pg_class r JOIN pg_namespace n ON n.oid = r.relnamespace WHERE r.oid = relation;
    IF NOT FOUND THEN
        RETURN NEXT 'Rwhat the statement made is not found';
        RETURN;
    END IF;
    IF c.relpersistence = 't' THEN
        RETURN NEXT 'T';
        RETURN;
    END IF;
    place := format('%I.%I', c.nspname, c.relname);
    -- The rows go and come back under the owner's role, which may have given up its rights.
    IF kind <> 'text' AND NOT has_table_privilege(c.relowner, relation, 'INSERT') THEN
        RETURN NEXT 'Rits owner may not INSERT into it';
        RETURN;
    END IF;
    RETURN QUERY SELECT format('OSELECT pg_catalog.setval(%L, %s)', format('%I.%I', n.nspname, s.relname),
            pgtandem.position(n.nspname, s.relname))
        FROM unnest(sequences) u(oid) JOIN pg_class s ON s.oid = u.oid JOIN pg_namespace n ON n.oid = s.relnamespace;
    IF kind = 'text' THEN
        RETURN NEXT 'K';
    END IF;
    IF kind IN ('table', 'table with rows', 'view') THEN
        SELECT a.attname INTO obstacle FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
            JOIN pg_namespace n ON n.oid = t.typnamespace
            WHERE a.attrelid = relation AND a.attnum > 0 AND n.nspname ~ '^pg_(toast_)?temp_' LIMIT 1;
        IF FOUND THEN
            RETURN NEXT format('Rthe type of its column %s is a temporary one', obstacle);
            RETURN;
        END IF;
        IF pgtandem.columns(relation, false) IS NULL THEN
            RETURN NEXT 'Rit has no columns';
            RETURN;
        END IF;
    END IF;
    IF kind IN ('table', 'table with rows') THEN
        IF c.relpersistence = 'u' AND kind = 'table with rows' THEN
            RETURN NEXT 'Rit is unlogged: a node that is filled gets it empty';
            RETURN;
        END IF;
        RETURN NEXT format('CCREATE %sTABLE %s%s (%s)%s', CASE WHEN c.relpersistence = 'u' THEN 'UNLOGGED ' ELSE '' END,
            CASE WHEN kind = 'table' THEN 'IF NOT EXISTS ' ELSE '' END, place, pgtandem.columns(relation, true),
            pgtandem.storage(relation));
        IF kind = 'table with rows' THEN
            RETURN QUERY SELECT pgtandem.rows(ARRAY[relation]);
        END IF;
    ELSIF kind = 'view' THEN
        RETURN NEXT format('CCREATE MATERIALIZED VIEW IF NOT EXISTS %s (%s)%s AS %s WITH NO DATA', place,
            pgtandem.columns(relation, false), pgtandem.storage(relation), rtrim(pg_get_viewdef(relation), ';'));
    END IF;
    IF kind IN ('view', 'refresh') AND c.relispopulated THEN
        -- No command puts given rows into a materialized view; for this transaction alone it is a table.
        RETURN NEXT pgtandem.owner_step(relation);
        RETURN NEXT format('DREFRESH MATERIALIZED VIEW %s WITH NO DATA', place);
        RETURN NEXT format('OUPDATE pg_catalog.pg_class SET relkind = ''r'' WHERE oid OPERATOR(pg_catalog.=) '
            '%L::pg_catalog.regclass::pg_catalog.oid', place);
        RETURN QUERY SELECT pgtandem.rows(ARRAY[relation]);
        RETURN NEXT format('OUPDATE pg_catalog.pg_class SET relkind = ''m'', relispopulated = true '
            'WHERE oid OPERATOR(pg_catalog.=) %L::pg_catalog.regclass::pg_catalog.oid', place);
    END IF;
    IF kind = 'defaults' THEN
        RETURN NEXT 'K';
        RETURN QUERY SELECT format('CALTER TABLE %s ALTER COLUMN %I SET DEFAULT %s', place, a.attname,
                pg_get_expr(d.adbin, d.adrelid))
            FROM pg_attrdef d JOIN pg_attribute a ON a.attrelid = d.adrelid AND a.attnum = d.adnum
            WHERE d.adrelid = relation AND a.attname = ANY (parts::name[]) ORDER BY a.attnum;
    ELSIF kind = 'rows' THEN
        WITH RECURSIVE tree(oid) AS (SELECT relation UNION SELECT i.inhrelid FROM tree t JOIN pg_inherits i ON i.inhparent = t.oid)
        SELECT array_agg(t.oid ORDER BY t.oid) INTO tables FROM tree t JOIN pg_class r ON r.oid = t.oid WHERE r.relkind = 'r';
        SELECT format('the owner of %s may not INSERT, DELETE or use its schema', r.relname) INTO obstacle FROM pg_class r
            WHERE r.oid = ANY (tables) AND NOT (has_table_privilege(r.relowner, r.oid, 'INSERT')
                AND has_table_privilege(r.relowner, r.oid, 'DELETE')
                AND has_schema_privilege(r.relowner, r.relnamespace, 'USAGE')) LIMIT 1;
        IF obstacle IS NOT NULL THEN
            RETURN NEXT 'R' || obstacle;
            RETURN;
        END IF;
        SELECT format('the trigger %s fires on every server', g.tgname) INTO obstacle FROM pg_trigger g
            WHERE g.tgrelid = ANY (tables) AND g.tgenabled IN ('A', 'R') LIMIT 1;
        IF obstacle IS NULL THEN
            SELECT format('the rule %s works on every server', w.rulename) INTO obstacle FROM pg_rewrite w
                WHERE w.ev_class = ANY (tables) AND w.ev_enabled IN ('A', 'R') LIMIT 1;
        END IF;
        IF obstacle IS NULL THEN
            SELECT format('the foreign key %s of another table refers to the column', k.conname) INTO obstacle
                FROM pg_constraint k JOIN pg_attribute a ON a.attrelid = k.confrelid AND a.attnum = ANY (k.confkey)
                WHERE k.contype = 'f' AND k.confrelid = ANY (tables || relation)
                    AND k.conrelid <> ALL (tables || relation) AND a.attname = ANY (parts::name[]) LIMIT 1;
        END IF;
        IF obstacle IS NOT NULL THEN
            RETURN NEXT 'R' || obstacle;
            RETURN;
        END IF;
        -- On empty tables the text gives no value to any row. Neither triggers nor foreign keys are asked about the rows that
        -- go and come back: they are the leader's.
        RETURN NEXT 'OSET LOCAL session_replication_role = replica';
        RETURN QUERY SELECT s.step FROM unnest(tables) u(oid) JOIN pg_class r ON r.oid = u.oid
            JOIN pg_namespace n ON n.oid = r.relnamespace
            CROSS JOIN LATERAL (VALUES (1, pgtandem.owner_step(r.oid)),
                (2, format('DDELETE FROM ONLY %I.%I', n.nspname, r.relname))) s(k, step)
            ORDER BY r.oid, s.k;
        RETURN NEXT 'OSET LOCAL session_replication_role = origin';
        RETURN NEXT 'K';
        RETURN NEXT 'OSET LOCAL session_replication_role = replica';
        RETURN QUERY SELECT pgtandem.rows(tables);
        RETURN NEXT 'OSET LOCAL session_replication_role = origin';
    END IF;
END $$;
-- Large objects that this transaction made (C) or removed (U), and their numbers. What it may see although it is in progress is its own.
CREATE OR REPLACE FUNCTION pgtandem.large_objects(given text) RETURNS SETOF text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    own bigint := pg_current_xact_id_if_assigned()::text::bigint;
BEGIN
    PERFORM 1 FROM pgtandem.epoch e WHERE e.one AND e.secret_hash = sha256(convert_to(given, 'UTF8'));
    IF NOT FOUND THEN
        RAISE EXCEPTION 'pgtandem.large_objects is for the proxy alone' USING ERRCODE = '42501';
    END IF;
    RETURN QUERY SELECT 'U' || l.objid FROM pg_locks l
        WHERE l.pid = pg_backend_pid() AND l.locktype = 'object' AND l.classid = 2613 AND l.mode = 'AccessExclusiveLock'
            AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
            AND NOT EXISTS (SELECT FROM pg_largeobject_metadata m WHERE m.oid = l.objid);
    RETURN QUERY SELECT 'C' || m.oid FROM pg_largeobject_metadata m
        WHERE own IS NOT NULL AND age(m.xmin) <= 0 AND CASE WHEN age(m.xmin) <= 0 THEN
            pg_xact_status((own - own % 4294967296 + m.xmin::text::bigint
                + CASE WHEN m.xmin::text::bigint < own % 4294967296 THEN 4294967296 ELSE 0 END)::text::xid8) = 'in progress' END
        ORDER BY m.oid;
END $$;
-- Bytes of a large object, in hexadecimal, and how many it has.
CREATE OR REPLACE FUNCTION pgtandem.large_object(given text, object oid, at bigint, bytes integer) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM 1 FROM pgtandem.epoch e WHERE e.one AND e.secret_hash = sha256(convert_to(given, 'UTF8'));
    IF NOT FOUND THEN
        RAISE EXCEPTION 'pgtandem.large_object is for the proxy alone' USING ERRCODE = '42501';
    END IF;
    RETURN encode(lo_get(object, at, bytes), 'hex');
END $$;
CREATE OR REPLACE FUNCTION pgtandem.large_object_bytes(given text, object oid) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM 1 FROM pgtandem.epoch e WHERE e.one AND e.secret_hash = sha256(convert_to(given, 'UTF8'));
    IF NOT FOUND THEN
        RAISE EXCEPTION 'pgtandem.large_object_bytes is for the proxy alone' USING ERRCODE = '42501';
    END IF;
    -- A page is a quarter of a block (LOBLKSIZE of large_object.h).
    RETURN coalesce((SELECT l.pageno * (current_setting('block_size')::bigint / 4) + length(l.data) FROM pg_largeobject l
        WHERE l.loid = object ORDER BY l.pageno DESC LIMIT 1), 0);
END $$;
-- SHARE ROW EXCLUSIVE on tables, before a statement that must come in one order with everything else that writes them. Whoever
-- writes them has a transaction open; while this waits, new writers wait behind it, so it steps aside now and then. Long enough for
-- PostgreSQL to find deadlocks; at most 15 times, or as long as the client's own lock_timeout says.
CREATE OR REPLACE FUNCTION pgtandem.lock(given text, tables oid[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    name text;
    asked text := current_setting('lock_timeout');
    asked_ms bigint := extract(epoch FROM asked::interval) * 1000;
    step_ms bigint := extract(epoch FROM current_setting('deadlock_timeout')::interval) * 1000 + 1000;
    left_ms bigint := CASE asked_ms WHEN 0 THEN 15 * step_ms ELSE asked_ms END;
BEGIN
    PERFORM 1 FROM pgtandem.epoch e WHERE e.secret_hash = sha256(convert_to(given, 'UTF8'));
    IF NOT FOUND THEN
        RAISE EXCEPTION 'pgtandem.lock is for the proxy alone' USING ERRCODE = '42501';
    END IF;
    LOOP
        BEGIN
            PERFORM set_config('lock_timeout', least(step_ms, left_ms)::text, true);
            FOR name IN SELECT DISTINCT t::regclass::text FROM unnest(tables) t ORDER BY 1 LOOP
                EXECUTE 'LOCK TABLE ' || name || ' IN SHARE ROW EXCLUSIVE MODE';
            END LOOP;
            PERFORM set_config('lock_timeout', asked, true);
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            left_ms := left_ms - step_ms;
            IF left_ms <= 0 THEN
                RAISE EXCEPTION 'the tables of the statement could not be locked: other transactions that wrote to them are still open'
                    USING ERRCODE = '55P03', HINT = 'Try the transaction again; the open ones are in pg_stat_activity.';
            END IF;
        END;
    END LOOP;
END $$;
