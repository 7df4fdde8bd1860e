"""asyncpg against the proxy: extended protocol with binary parameters, transactions, cursors, COPY, concurrency."""
import asyncio
import sys

import asyncpg

address = {"host": "127.0.0.1", "port": int(sys.argv[1]), "user": "postgres", "database": "postgres"}


async def main():
    connection = await asyncpg.connect(**address)
    await connection.execute("create table apg (id int primary key, n bigint not null, what text)")
    await connection.executemany(
        "insert into apg values ($1, $2, $3)", [(i, i * i, f"row {i}") for i in range(100)]
    )
    async with connection.transaction():
        await connection.execute("update apg set n = n + $1 where id = $2", 5, 7)
        try:
            async with connection.transaction():
                await connection.execute("insert into apg values (7, 0, null)")
            raise AssertionError("a duplicate was accepted")
        except asyncpg.UniqueViolationError:
            pass
        rows = [row async for row in connection.cursor("select id from apg order by id", prefetch=10)]
        assert len(rows) == 100
    assert await connection.fetchval("select n from apg where id = 7") == 54

    await connection.copy_records_to_table("apg", records=[(i, i, "copied") for i in range(1000, 1500)])
    assert await connection.fetchval("select count(*) from apg") == 600

    # fetchval and fetchrow ask for one row: the write runs whole all the same, on all servers.
    await connection.execute("create table apg_serial (id serial primary key, at timestamptz default now(), what text)")
    assert [await connection.fetchval("insert into apg_serial (what) values ($1) returning id", "x") for _ in range(3)] == [1, 2, 3]
    row = await connection.fetchrow("insert into apg_serial (what) values ($1), ('second') returning id, at, what", "y")
    assert row["id"] == 4 and row["what"] == "y"
    row = await connection.fetchrow("update apg_serial set what = what || $2 where id = $1 returning *", 4, "!")
    assert row["what"] == "y!"
    assert await connection.fetchval("delete from apg_serial where id = $1 returning what", 1) == "x"
    assert await connection.fetchval("select count(*) from apg_serial") == 4
    assert await connection.execute("insert into apg_serial (what) select 'many' from generate_series(1, 10)") == "INSERT 0 10"

    # executemany is one transaction: an error in the middle takes all of it back.
    try:
        await connection.executemany("insert into apg values ($1, 0, null)", [(5000,), (5001,), (7,), (5002,)])
        raise AssertionError("a duplicate was accepted")
    except asyncpg.UniqueViolationError:
        pass
    assert await connection.fetchval("select count(*) from apg where id >= 5000") == 0
    fetched = await connection.fetch("select * from apg where what = any($1::text[])", ["row 1", "row 2"])
    assert len(fetched) == 2

    # A prepared statement lives on across a change of the table.
    statement = await connection.prepare("insert into apg_serial (what) values ($1) returning id")
    first = await statement.fetchval("before")
    other = await asyncpg.connect(**address)
    await other.execute("alter table apg_serial add column more int default 7")
    await other.close()
    assert await statement.fetchval("after") == first + 1

    # Cursors of a transaction, row by row and in parts.
    async with connection.transaction():
        cursor = await connection.cursor("select id from apg order by id")
        assert [row["id"] for row in await cursor.fetch(3)] == [0, 1, 2]
        await cursor.forward(10)
        assert (await cursor.fetchrow())["id"] == 13

    # A listener, a cancel by timeout, and the reset that a pool does.
    heard = asyncio.Queue()
    await connection.add_listener("apg_channel", lambda *event: heard.put_nowait(event[3]))
    await connection.execute("notify apg_channel, 'hello'")
    assert await asyncio.wait_for(heard.get(), 10) == "hello"
    try:
        await connection.fetch("select pg_sleep(30)", timeout=0.3)
        raise AssertionError("no timeout")
    except asyncio.TimeoutError:
        pass
    await connection.reset()
    assert await connection.copy_from_query("select id from apg where id < $1", 10, output="/dev/null") == "COPY 10"

    pool = await asyncpg.create_pool(**address, min_size=4, max_size=4)

    async def work(worker):
        for _ in range(25):
            await pool.execute("update apg set n = n + 1 where id = $1", worker)

    await asyncio.gather(*(work(worker) for worker in range(8)))
    assert await connection.fetchval("select sum(n) from apg where id < 8") == sum(i * i for i in range(8)) + 5 + 200
    await pool.close()
    await connection.close()


asyncio.run(main())
