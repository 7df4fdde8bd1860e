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
