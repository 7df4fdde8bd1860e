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

    pool = await asyncpg.create_pool(**address, min_size=4, max_size=4)

    async def work(worker):
        for _ in range(25):
            await pool.execute("update apg set n = n + 1 where id = $1", worker)

    await asyncio.gather(*(work(worker) for worker in range(8)))
    assert await connection.fetchval("select sum(n) from apg where id < 8") == sum(i * i for i in range(8)) + 5 + 200
    await pool.close()
    await connection.close()


asyncio.run(main())
