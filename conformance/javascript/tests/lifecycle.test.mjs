// From create to kill, and lists.

import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { describe, test } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { Sandbox, SandboxError, SandboxNotFoundError, TimeoutError } from 'e2b'
import { createFor, eventually } from '../support.mjs'

// Clock steps and a busy machine; the timeouts under test differ by far more.
const TOLERANCE_MS = 15_000

function assertEndsIn(info, ms) {
  const difference = Math.abs(info.endAt - (Date.now() + ms))
  assert.ok(difference < TOLERANCE_MS, `ends ${difference} ms off`)
}

async function isUnknown(sandbox) {
  try {
    await sandbox.getInfo()
    return false
  } catch (error) {
    if (error instanceof SandboxNotFoundError) return true
    throw error
  }
}

describe('lifecycle', () => {
  test('create without options', async () => {
    const sandbox = await Sandbox.create()
    try {
      assert.match(sandbox.sandboxId, /^[a-z][a-z0-9]{19}$/)
      assert.equal(await sandbox.isRunning(), true)
      const info = await sandbox.getInfo()
      assert.equal(info.sandboxId, sandbox.sandboxId)
      assert.equal(info.name, 'base')
      assert.equal(info.state, 'running')
      assert.deepEqual(info.metadata, {})
      assert.ok(info.cpuCount >= 1 && info.memoryMB >= 128)
      assertEndsIn(info, 300_000)
    } finally {
      assert.equal(await sandbox.kill(), true)
    }
  })

  test('create with options', async (t) => {
    const metadata = { customer: 'Grüße & co', empty: '' }
    const sandbox = await Sandbox.create('base', { timeoutMs: 900_500, metadata, envs: { GREETING: 'hello\nworld' }, secure: true })
    t.after(() => sandbox.kill())
    const info = await sandbox.getInfo()
    assert.deepEqual(info.metadata, metadata)
    assertEndsIn(info, 901_000)
    assert.equal((await sandbox.commands.run('printf "$GREETING"')).stdout, 'hello\nworld')
  })

  test('unknown template', async () => {
    await assert.rejects(Sandbox.create('no-such-template'), (error) => {
      assert.ok(error instanceof SandboxError)
      assert.match(error.message, /no-such-template/)
      assert.ok([400, 404].includes(error.statusCode))
      return true
    })
  })

  test('connect from elsewhere', async (t) => {
    const sandbox = await createFor(t)
    await sandbox.files.write('note', 'left by the first')
    const other = await Sandbox.connect(sandbox.sandboxId)
    assert.equal(await other.files.read('note'), 'left by the first')
  })

  test('connect extends but never shortens', async (t) => {
    const sandbox = await createFor(t, { timeoutMs: 300_000 })
    await sandbox.connect({ timeoutMs: 900_000 })
    assertEndsIn(await sandbox.getInfo(), 900_000)
    await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 60_000 })
    assertEndsIn(await sandbox.getInfo(), 900_000)
  })

  test('setTimeout extends and shortens', async (t) => {
    const sandbox = await createFor(t, { timeoutMs: 300_000 })
    for (const ms of [900_000, 60_000]) {
      await sandbox.setTimeout(ms)
      assertEndsIn(await sandbox.getInfo(), ms)
    }
    await assert.rejects(sandbox.setTimeout(-1000), { name: 'SandboxError', statusCode: 400 })
  })

  test('timeout kills', async (t) => {
    const sandbox = await createFor(t, { timeoutMs: 3_000 })
    await eventually(() => isUnknown(sandbox), 'the sandbox ends at its timeout')
    assert.equal(await sandbox.isRunning(), false)
    // The SDK makes of one answer of the proxy two errors: a command's start tells it this way, a file that.
    await assert.rejects(sandbox.commands.run('true'), SandboxNotFoundError)
    await assert.rejects(sandbox.files.read('x'), TimeoutError)
  })

  test('extended timeout outlives the first', async (t) => {
    const sandbox = await createFor(t, { timeoutMs: 3_000 })
    await sandbox.setTimeout(300_000)
    await sleep(5_000)
    assert.equal(await sandbox.isRunning(), true)
  })

  test('kill', async (t) => {
    const sandbox = await createFor(t)
    assert.equal(await sandbox.kill(), true)
    assert.equal(await sandbox.kill(), false)
    assert.equal(await Sandbox.kill(sandbox.sandboxId), false)
    assert.equal(await sandbox.isRunning(), false)
  })

  test('kill in the middle of a command', async (t) => {
    const sandbox = await createFor(t)
    const handle = await sandbox.commands.run('sleep 600', { background: true, timeoutMs: 0 })
    const waiting = assert.rejects(handle.wait(), SandboxError)
    await sandbox.kill()
    await waiting
  })

  test('killed sandbox is not found', async (t) => {
    const sandbox = await createFor(t)
    await sandbox.kill()
    await assert.rejects(sandbox.getInfo(), SandboxNotFoundError)
    await assert.rejects(sandbox.setTimeout(60_000), SandboxNotFoundError)
    await assert.rejects(Sandbox.connect(sandbox.sandboxId), SandboxNotFoundError)
  })

  test('sandbox that never was', async () => {
    for (const id of ['inosuchsandboxatall0', 'I-AM-NOT-AN-ID', 'x'.repeat(300)]) {
      assert.equal(await Sandbox.kill(id), false)
      await assert.rejects(Sandbox.getInfo(id), SandboxNotFoundError)
      await assert.rejects(Sandbox.connect(id), SandboxNotFoundError)
    }
  })

  test('host of a port', async (t) => {
    const sandbox = await createFor(t)
    assert.equal(sandbox.getHost(3000), `3000-${sandbox.sandboxId}.${sandbox.sandboxDomain}`)
  })
})

describe('list', () => {
  async function idsOf(paginator) {
    const ids = []
    while (paginator.hasNext) ids.push(...(await paginator.nextItems()).map((item) => item.sandboxId))
    return ids
  }

  test('filters, order and pages', async (t) => {
    const mark = { suite: randomUUID(), 'odd name & more': '50% +é=/?#' }
    const made = []
    for (let number = 0; number < 3; number++) {
      made.push((await createFor(t, { metadata: { ...mark, number: `${number}` } })).sandboxId)
    }
    const query = { metadata: mark }

    assert.deepEqual(await idsOf(Sandbox.list({ query })), made.toReversed())
    assert.deepEqual(await idsOf(Sandbox.list({ query, order: 'asc' })), made)
    assert.deepEqual(await idsOf(Sandbox.list({ query: { metadata: { ...mark, number: '1' } } })), [made[1]])
    assert.deepEqual(await idsOf(Sandbox.list({ query: { ...query, state: ['paused'] } })), [])
    assert.deepEqual(await idsOf(Sandbox.list({ query: { ...query, state: ['running', 'paused'] } })), made.toReversed())
    assert.deepEqual(await idsOf(Sandbox.list({ query: { ...query, template: 'base' } })), made.toReversed())

    const pages = Sandbox.list({ query, limit: 2 })
    assert.equal((await pages.nextItems()).length, 2)
    assert.equal(pages.hasNext, true)
    const rest = Sandbox.list({ query, limit: 2, nextToken: pages.nextToken })
    assert.deepEqual(await idsOf(rest), [made[0]])
    assert.equal((await pages.nextItems()).length, 1)
    assert.equal(pages.hasNext, false)

    const [item] = await Sandbox.list({ query, limit: 1 }).nextItems()
    const info = await Sandbox.getInfo(item.sandboxId)
    for (const field of ['templateId', 'name', 'metadata', 'startedAt', 'state', 'cpuCount', 'memoryMB', 'envdVersion']) {
      assert.deepEqual(item[field], info[field], field)
    }
  })
})
