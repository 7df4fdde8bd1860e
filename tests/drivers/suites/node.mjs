// What applications do through node-postgres (`pg`), pg-cursor and pg-copy-streams. One line per test: outcome, a tab, the name.
// Where to connect comes from PGHOST, PGPORT, PGUSER, PGDATABASE.
import assert from 'node:assert/strict'
import { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import pg from 'pg'
import Cursor from 'pg-cursor'
import copyStreams from 'pg-copy-streams'

const tests = []
const test = (name, run) => tests.push({ name, run })
const rows = async (client, text, values) => (await client.query({ text, values, rowMode: 'array' })).rows
const fails = async (promise, code) => {
  const error = await promise.then(() => null, (e) => e)
  assert.ok(error, 'no error')
  assert.equal(error.code, code, error.message)
  return error
}

test('simple query', async (c) => assert.deepEqual(await rows(c, 'select 1, null, true'), [[1, null, true]]))
test('empty query', async (c) => assert.equal((await c.query('')).rows.length, 0))
test('several statements give several results', async (c) => {
  const results = await c.query('select 1 as a; create temp table several (i int); insert into several values (1), (2); select * from several')
  assert.deepEqual(results.map((r) => [r.command, r.rowCount]), [['SELECT', 1], ['CREATE', null], ['INSERT', 2], ['SELECT', 2]])
})
test('several statements are one transaction', async (c) => {
  await c.query('create table one_tx (i int primary key)')
  await fails(c.query('insert into one_tx values (1); insert into one_tx values (1)'), '23505')
  assert.deepEqual(await rows(c, 'select count(*)::int from one_tx'), [[0]])
})
test('parameters of many types', async (c) => {
  await c.query(`create table kinds (i int primary key, t text, b bytea, n numeric, f float8, j jsonb, a int[], ts timestamptz, d date, u uuid,
    bo boolean, bi bigint)`)
  const at = new Date('2020-02-03T04:05:06.789Z')
  const values = [1, "it's", Buffer.from([0, 255, 39]), '1.50', 1.25, { a: [1, null] }, [1, 2, 3], at, '2020-02-03',
    'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', true, '9007199254740993']
  const text = `insert into kinds values (${values.map((_, i) => `$${i + 1}`).join(', ')}) returning *`
  const { rows: [row] } = await c.query(text, values)
  assert.equal(row.t, "it's")
  assert.deepEqual([...row.b], [0, 255, 39])
  assert.deepEqual([row.n, row.f, row.j, row.a], ['1.50', 1.25, { a: [1, null] }, [1, 2, 3]])
  assert.equal(row.ts.getTime(), at.getTime())
  assert.equal(row.bi, '9007199254740993')
})
test('binary results', async (c) => {
  const { rows: [row] } = await c.query({ text: 'select 7::int4 as i, 1.5::float8 as f, true as b', binary: true })
  assert.deepEqual(row, { i: 7, f: 1.5, b: true })
  await c.query('create table binary_rows (i serial primary key, t text)')
  const inserted = await c.query({ text: "insert into binary_rows (t) values ($1) returning i", values: ['x'], binary: true })
  assert.deepEqual(inserted.rows, [{ i: 1 }])
})
test('field descriptions', async (c) => {
  await c.query('create table described (i serial primary key, name varchar(20) not null)')
  const { fields } = await c.query("insert into described (name) values ('x') returning name, i + 1 as next")
  assert.deepEqual(fields.map((f) => [f.name, f.dataTypeID, f.dataTypeModifier, f.columnID]), [['name', 1043, 24, 2], ['next', 23, -1, 0]])
  assert.ok(fields[0].tableID > 0)
})
test('named prepared statements', async (c) => {
  await c.query('create table named (i int primary key, t text)')
  for (let i = 0; i < 20; i++) {
    const result = await c.query({ name: 'ins', text: 'insert into named values ($1, $2)', values: [i, `n${i}`] })
    assert.equal(result.rowCount, 1)
  }
  await fails(c.query({ name: 'ins', text: 'insert into named values ($1, $2)', values: [1, 'again'] }), '23505')
  const updated = await c.query({ name: 'upd', text: 'update named set t = t || $2 where i < $1 returning i', values: [5, 'x'] })
  assert.equal(updated.rows.length, 5)
  const deleted = await c.query({ name: 'del', text: 'delete from named where i = any($1)', values: [[1, 2, 99]] })
  assert.equal(deleted.rowCount, 2)
})
test('a named statement after a change of its table', async (c) => {
  await c.query('create table changing (i serial primary key, t text)')
  const insert = { name: 'changing', text: 'insert into changing (t) values ($1) returning *', values: ['x'] }
  assert.deepEqual((await c.query(insert)).rows, [{ i: 1, t: 'x' }])
  await c.query('alter table changing add column more int default 5')
  const error = await fails(c.query(insert), '0A000')
  assert.match(error.message, /cached plan must not change result type/)
})
test('SQL PREPARE and EXECUTE', async (c) => {
  await c.query('create table by_name (i int primary key, at timestamptz)')
  await c.query('prepare by_name (int) as insert into by_name values ($1, clock_timestamp()) returning i')
  assert.deepEqual(await rows(c, 'execute by_name(1 + 1)'), [[2]])
  await c.query('deallocate by_name')
  await fails(c.query('execute by_name(3)'), '26000')
})
test('fields of errors', async (c) => {
  await c.query('create table wrong (i int primary key check (i > 0), t text not null)')
  let error = await fails(c.query('insert into wrong values (0, $1)', ['x']), '23514')
  assert.deepEqual([error.severity, error.table, error.constraint, error.schema], ['ERROR', 'wrong', 'wrong_i_check', 'public'])
  error = await fails(c.query('insert into wrong values ($1, null)', [1]), '23502')
  assert.equal(error.column, 't')
  error = await fails(c.query('select 1 from nosuch'), '42P01')
  assert.equal(error.position, '15')
  error = await fails(c.query("insert into wrong values (1, 'x'); update wrong set nosuch = 1"), '42703')
  assert.equal(error.position, '53')
  await fails(c.query('selct 1'), '42601')
  await fails(c.query('select $1::int', ['x']), '22P02')
  await fails(c.query('select $1::int, $2::int', [1]), '08P01')
  assert.deepEqual(await rows(c, 'select 1'), [[1]])
})
test('transactions', async (c) => {
  await c.query('create table tx (i int primary key)')
  await c.query('begin')
  await c.query('insert into tx values ($1)', [1])
  await c.query('savepoint a')
  await fails(c.query('insert into tx values ($1)', [1]), '23505')
  await fails(c.query('select 1'), '25P02')
  await c.query('rollback to a')
  await c.query('insert into tx values ($1)', [2])
  assert.equal((await c.query('commit')).command, 'COMMIT')
  await c.query('begin')
  await c.query('insert into tx values ($1)', [3])
  await c.query('rollback')
  await c.query('begin')
  await fails(c.query('insert into tx values ($1)', [1]), '23505')
  assert.equal((await c.query('commit')).command, 'ROLLBACK')
  assert.deepEqual(await rows(c, 'select i from tx order by i'), [[1], [2]])
})
test('isolation levels', async (c) => {
  await c.query('create table levels (i int primary key, n int)')
  await c.query('insert into levels values (1, 0)')
  const other = await connected()
  for (const level of ['repeatable read', 'serializable']) {
    await c.query(`begin isolation level ${level}`)
    await c.query('select * from levels')
    await other.query('update levels set n = n + 1 where i = $1', [1])
    await fails(c.query('update levels set n = n + 1 where i = $1', [1]), '40001')
    await c.query('rollback')
  }
  await other.end()
})
test('queries queued at once keep their order', async (c) => {
  await c.query('create table queued (i serial primary key, n int)')
  const all = await Promise.all(Array.from({ length: 50 }, (_, n) => c.query('insert into queued (n) values ($1) returning i', [n])))
  assert.deepEqual(all.map((r) => r.rows[0].i), Array.from({ length: 50 }, (_, n) => n + 1))
})
test('errors among queued queries', async (c) => {
  await c.query('create table among (i int primary key)')
  const all = await Promise.allSettled([1, 1, 2, 'x', 3].map((i) => c.query('insert into among values ($1)', [i])))
  assert.deepEqual(all.map((r) => r.status), ['fulfilled', 'rejected', 'fulfilled', 'rejected', 'fulfilled'])
})
test('many rows', async (c) => {
  const { rows } = await c.query("select i, repeat('x', 100) as t from generate_series(1, 50000) i")
  assert.equal(rows.length, 50000)
  await c.query('create table many (i int primary key, t text)')
  const inserted = await c.query("insert into many select i, repeat('y', 50) from generate_series(1, 20000) i returning i")
  assert.equal(inserted.rows.length, 20000)
})
test('large values', async (c) => {
  await c.query('create table large (i int primary key, b bytea, t text)')
  const b = Buffer.alloc(3_000_000, 7)
  await c.query('insert into large values ($1, $2, $3)', [1, b, 'z'.repeat(2_000_000)])
  const { rows: [row] } = await c.query('select b, length(t) as n from large')
  assert.ok(row.b.equals(b) && row.n === 2_000_000)
})
test('a cursor of the driver', async (c) => {
  const cursor = c.query(new Cursor('select i from generate_series(1, 25) i'))
  const sizes = []
  for (;;) {
    const part = await cursor.read(10)
    if (part.length === 0) break
    sizes.push(part.length)
  }
  assert.deepEqual(sizes, [10, 10, 5])
  await cursor.close()
})
test('a cursor over a write', async (c) => {
  await c.query('create table parts (i serial primary key, n int)')
  const cursor = c.query(new Cursor('insert into parts (n) select g from generate_series(1, 7) g returning i'))
  assert.equal((await cursor.read(3)).length, 3)
  assert.equal((await cursor.read(3)).length, 3)
  assert.equal((await cursor.read(3)).length, 1)
  await cursor.close()
  assert.deepEqual(await rows(c, 'select count(*)::int from parts'), [[7]])
})
test('a cursor that is closed early', async (c) => {
  const cursor = c.query(new Cursor('select i from generate_series(1, 100) i'))
  await cursor.read(1)
  await cursor.close()
  assert.deepEqual(await rows(c, 'select 2'), [[2]])
})
test('a cursor with an error', async (c) => {
  const cursor = c.query(new Cursor('select 10 / (5 - i) from generate_series(1, 9) i'))
  await cursor.read(3)
  await fails(cursor.read(5), '22012')
  await cursor.close()
  assert.deepEqual(await rows(c, 'select 3'), [[3]])
})
test('cursors of SQL', async (c) => {
  await c.query('begin')
  await c.query('declare k scroll cursor for select i from generate_series(1, 9) i')
  assert.deepEqual(await rows(c, 'fetch 3 from k'), [[1], [2], [3]])
  assert.deepEqual(await rows(c, 'fetch backward 1 from k'), [[2]])
  await c.query('commit')
  await fails(c.query('fetch 1 from k'), '34000')
})
test('COPY in and out', async (c) => {
  await c.query('create table copied (i int primary key, t text)')
  const lines = Array.from({ length: 5000 }, (_, i) => `${i}\tline ${i} ü\n`)
  await pipeline(Readable.from(lines), c.query(copyStreams.from('copy copied from stdin')))
  let text = ''
  const out = c.query(copyStreams.to('copy (select * from copied order by i) to stdout'))
  for await (const part of out) text += part
  assert.equal(text, lines.join(''))
})
test('COPY with a wrong line', async (c) => {
  await c.query('create table wrong_copy (i int primary key)')
  await fails(pipeline(Readable.from(['1\n', '2\n', 'x\n']), c.query(copyStreams.from('copy wrong_copy from stdin'))), '22P02')
  assert.deepEqual(await rows(c, 'select count(*)::int from wrong_copy'), [[0]])
})
test('notifications', async (c) => {
  await c.query('listen node_channel')
  const other = await connected()
  const heard = new Promise((resolve) => c.once('notification', resolve))
  await other.query("select pg_notify('node_channel', 'hello')")
  const { channel, payload } = await heard
  assert.deepEqual([channel, payload], ['node_channel', 'hello'])
  await other.end()
})
test('notices', async (c) => {
  const heard = []
  const listen = (notice) => heard.push([notice.code, notice.severity])
  c.on('notice', listen)
  await c.query('drop table if exists nothing_here; create table if not exists tx (i int)')
  c.off('notice', listen)
  assert.deepEqual(heard, [['00000', 'NOTICE'], ['42P07', 'NOTICE']])
})
test('parameter status', async (c) => {
  const seen = {}
  const listen = ({ parameterName, parameterValue }) => { seen[parameterName] = parameterValue }
  c.connection.on('parameterStatus', listen)
  await c.query("set timezone = 'Asia/Tokyo'")
  await c.query("set application_name = 'node'")
  c.connection.off('parameterStatus', listen)
  assert.deepEqual([seen.TimeZone, seen.application_name], ['Asia/Tokyo', 'node'])
  await c.query('reset all')
})
test('statement_timeout', async (c) => {
  await c.query('set statement_timeout = 200')
  await fails(c.query('select pg_sleep(20)'), '57014')
  await c.query('create table slow (i int primary key)')
  await fails(c.query('insert into slow select 1 from pg_sleep(20)'), '57014')
  await c.query('reset statement_timeout')
  assert.deepEqual(await rows(c, 'select count(*)::int from slow'), [[0]])
})
test('a cancelled query', async (c) => {
  const other = await connected()
  const running = c.query('select pg_sleep(20)')
  const stop = setInterval(() => other.query('select pg_cancel_backend($1)', [c.processID]), 100)
  await fails(running, '57014')
  clearInterval(stop)
  await other.query('select 1')
  await other.end()
})
test('a backend that is ended', async () => {
  const victim = await connected()
  const other = await connected()
  const ended = new Promise((resolve) => victim.once('error', resolve))
  await other.query('select pg_terminate_backend($1)', [victim.processID])
  assert.equal((await ended).code, '57P01')
  await other.end()
})
test('a pool', async () => {
  const pool = new pg.Pool({ max: 5 })
  await pool.query('create table pooled (i int primary key)')
  await Promise.all(Array.from({ length: 40 }, (_, i) => pool.query('insert into pooled values ($1)', [i])))
  assert.equal((await pool.query('select count(*)::int as n from pooled')).rows[0].n, 40)
  const client = await pool.connect()
  client.release()
  await pool.end()
})
test('temporary tables', async (c) => {
  await c.query('create temp table passing (i int)')
  await c.query('insert into passing values ($1)', [1])
  await c.query('create table lasting (i int primary key)')
  await c.query('insert into lasting select i from passing')
  assert.deepEqual(await rows(c, 'select * from lasting'), [[1]])
})
test('upserts', async (c) => {
  await c.query('create table upserts (k text primary key, n int not null default 1)')
  const text = 'insert into upserts (k) values ($1) on conflict (k) do update set n = upserts.n + 1 returning n'
  const found = []
  for (const key of ['a', 'b', 'a', 'a']) found.push((await c.query(text, [key])).rows[0].n)
  assert.deepEqual(found, [1, 1, 2, 3])
  assert.equal((await c.query('insert into upserts (k) values ($1) on conflict do nothing', ['a'])).rowCount, 0)
})
test('a queue with SKIP LOCKED', async (c) => {
  await c.query('create table jobs (id serial primary key, state text not null default $$new$$)')
  await c.query('insert into jobs (id) select g from generate_series(1, 3) g')
  const take = `update jobs set state = 'taken' where id = (select id from jobs where state = 'new' order by id for update skip locked limit 1)
    returning id`
  assert.deepEqual((await c.query(take)).rows, [{ id: 1 }])
  assert.deepEqual((await c.query(take)).rows, [{ id: 2 }])
})
test('defaults that vary', async (c) => {
  await c.query('create table varying (i serial primary key, u uuid default gen_random_uuid(), r float8 default random(), at timestamptz default now())')
  const { rows: [row] } = await c.query('insert into varying default values returning *')
  assert.ok(row.u.length === 36 && row.r < 1 && row.at instanceof Date)
})
test('texts in UTF-8', async (c) => {
  await c.query('create table "größe 日本" (i int primary key, "é" text)')
  await c.query('insert into "größe 日本" values ($1, $2)', [1, '🐘'])
  await c.query(`insert into "größe 日本" values (2, '€')`)
  assert.deepEqual(await rows(c, 'select "é" from "größe 日本" order by i'), [['🐘'], ['€']])
})
test('a password that is not needed, a database that is not there', async () => {
  const client = new pg.Client({ database: 'nosuch' })
  await fails(client.connect(), '3D000')
})

const connected = async () => {
  const client = new pg.Client()
  client.on('error', () => {})
  await client.connect()
  return client
}

const setup = await connected()
await setup.query(`drop table if exists one_tx, kinds, binary_rows, described, named, changing, by_name, wrong, tx, levels, queued, among, many,
  large, parts, copied, wrong_copy, slow, pooled, lasting, upserts, jobs, varying, "größe 日本"`)
await setup.end()
for (const { name, run } of tests) {
  const client = await connected()
  let outcome = 'passed'
  let detail = ''
  try {
    await run(client)
  } catch (error) {
    outcome = 'failure'
    detail = `${error.message} ${error.hint ?? ''}`.replaceAll(/\s+/g, ' ')
  }
  console.log(`${outcome}\t${name.replaceAll(' ', '_')}\t${detail}`)
  await client.end().catch(() => {})
}
process.exit(0)
