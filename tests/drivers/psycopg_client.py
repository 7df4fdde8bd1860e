"""psycopg 3 against the proxy: parameters, transactions, pipeline, COPY, server-side errors, binary results."""
import datetime
import sys
import uuid

import psycopg
from psycopg import errors

conninfo = f"host=127.0.0.1 port={sys.argv[1]} user=postgres dbname=postgres"

with psycopg.connect(conninfo, autocommit=True) as connection:
    connection.execute("create table py (id serial primary key, name text not null unique, at timestamptz default now(), tag uuid default gen_random_uuid())")

with psycopg.connect(conninfo) as connection:
    with connection.cursor() as cursor:
        cursor.execute("insert into py (name) values (%s) returning id, at, tag", ("first",))
        number, at, tag = cursor.fetchone()
        assert number == 1 and isinstance(at, datetime.datetime) and isinstance(tag, uuid.UUID)
        cursor.executemany("insert into py (name) values (%s)", [(f"many {i}",) for i in range(20)])
    connection.commit()

    # Prepared statements: psycopg prepares from the fifth execution on.
    for i in range(10):
        connection.execute("update py set name = %s where id = %s", (f"renamed {i}", 2))
    connection.commit()

    # An error inside a savepoint leaves the transaction usable.
    with connection.transaction():
        connection.execute("insert into py (name) values ('kept')")
        try:
            with connection.transaction():
                connection.execute("insert into py (name) values ('first')")
            raise AssertionError("a duplicate was accepted")
        except errors.UniqueViolation:
            pass
    assert connection.execute("select count(*) from py").fetchone()[0] == 22

    # Rolled back: on no server.
    connection.execute("insert into py (name) values ('gone')")
    connection.rollback()

    with connection.pipeline():
        cursors = [connection.execute("select %s::int + 1", (i,)) for i in range(5)]
        connection.execute("insert into py (name) values ('in a pipeline')")
        assert [cursor.fetchone()[0] for cursor in cursors] == [1, 2, 3, 4, 5]
    connection.commit()

with psycopg.connect(conninfo, autocommit=True) as connection:
    connection.execute("create table py_copy (a int primary key, b text)")
with psycopg.connect(conninfo) as connection:
    with connection.cursor().copy("copy py_copy from stdin") as copy:
        for i in range(1000):
            copy.write_row((i, f"line {i}\twith a tab and an ümlaut"))
    connection.commit()
    with connection.cursor().copy("copy (select * from py_copy order by a) to stdout") as copy:
        assert sum(1 for _ in copy.rows()) == 1000
    rows = connection.execute("select a, b from py_copy where a = 999", binary=True).fetchall()
    assert rows == [(999, "line 999\twith a tab and an ümlaut")], rows

    # Cancel reaches the server that works for us.
    import threading

    threading.Timer(0.3, connection.cancel).start()
    try:
        connection.execute("select pg_sleep(30)")
        raise AssertionError("the cancel did not arrive")
    except errors.QueryCanceled:
        pass

# Pipelines with errors inside: what follows the error up to the sync is not run, what comes after is.
with psycopg.connect(conninfo, autocommit=True) as connection:
    connection.execute("create table py_pipe (i int primary key, what text)")
    try:
        with connection.pipeline() as pipeline:
            connection.execute("insert into py_pipe values (1, 'before')")
            pipeline.sync()
            connection.execute("insert into py_pipe values (3, 'undone')")
            connection.execute("insert into py_pipe values (1, 'duplicate')")
            connection.execute("insert into py_pipe values (2, 'skipped')")
        raise AssertionError("no error")
    except errors.UniqueViolation:
        pass
    assert connection.execute("select i from py_pipe order by i").fetchall() == [(1,)]
    with connection.pipeline():
        returned = [
            connection.execute("insert into py_pipe values (%s, %s) returning i, what", (i, f"n{i}")) for i in range(10, 60)
        ]
        assert [cursor.fetchone() for cursor in returned] == [(i, f"n{i}") for i in range(10, 60)]
    assert connection.execute("select count(*) from py_pipe").fetchone()[0] == 51

    # Binary parameters, of types that need a look: numeric, arrays, ranges, json.
    connection.execute("create table py_types (i int primary key, n numeric, a int[], j jsonb, t timestamptz, b bytea)")
    at = datetime.datetime(2020, 2, 3, 4, 5, 6, tzinfo=datetime.timezone.utc)
    from decimal import Decimal
    from psycopg.types.json import Jsonb
    with connection.cursor(binary=True) as cursor:
        cursor.execute(
            "insert into py_types values (%b, %b, %b, %b, %b, %b) returning *",
            (1, Decimal("1.50"), [1, 2, 3], Jsonb({"a": 1}), at, b"\x00\xff"),
        )
        assert cursor.fetchone() == (1, Decimal("1.50"), [1, 2, 3], {"a": 1}, at, b"\x00\xff")
        cursor.execute("update py_types set a = a || %b where i = %b returning a[4]", (9, 1))
        assert cursor.fetchone() == (9,)
    with connection.cursor().copy("copy py_types (i, n) from stdin (format binary)") as copy:
        copy.set_types(["int4", "numeric"])
        for i in range(2, 50):
            copy.write_row((i, Decimal(i)))
    with connection.cursor().copy("copy py_types (i) to stdout (format binary)") as copy:
        copy.set_types(["int4"])
        assert sum(row[0] for row in copy.rows()) == sum(range(1, 50))
    # A COPY that the client gives up.
    try:
        with connection.cursor().copy("copy py_types (i) from stdin") as copy:
            copy.write_row((100,))
            raise RuntimeError("given up")
    except RuntimeError:
        pass
    assert connection.execute("select count(*) from py_types").fetchone()[0] == 49

    connection.execute("listen py_channel")
    connection.execute("select pg_notify('py_channel', 'hello')")
    notify = next(connection.notifies(timeout=10))
    assert (notify.channel, notify.payload) == ("py_channel", "hello")

with psycopg.connect(conninfo) as connection:
    # A cursor of the server's, fetched in parts.
    with connection.cursor(name="part") as cursor:
        cursor.itersize = 7
        cursor.execute("select i from py_types order by i")
        assert [row[0] for row in cursor] == list(range(1, 50))
    # Session settings that a rollback takes back.
    connection.execute("set local timezone = 'Asia/Tokyo'")
    connection.execute("insert into py_types (i, t) values (200, '2020-01-01 00:00')")
    connection.rollback()
    connection.execute("insert into py_types (i, t) values (201, '2020-01-01 00:00')")
    connection.commit()
