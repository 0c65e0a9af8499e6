// A port of a sandbox from outside, by the host that the SDK names.

import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { createFor, eventually, request, sharedSandbox } from '../support.mjs'

const SERVER = `
require('http').createServer(async (request, response) => {
  const chunks = []
  for await (const chunk of request) chunks.push(chunk)
  response.end(JSON.stringify({ method: request.method, url: request.url, host: request.headers.host, length: Buffer.concat(chunks).length }))
}).listen(8080, '0.0.0.0')`

describe('proxy', () => {
  const shared = sharedSandbox()

  test('a web server inside', async () => {
    const { sandbox } = shared
    await sandbox.files.write('server.js', SERVER)
    await sandbox.commands.run('node server.js', { background: true, timeoutMs: 0 })
    const host = sandbox.getHost(8080)
    await eventually(async () => (await request('/', { Host: host })).status === 200, 'the guest answers')
    const answer = JSON.parse((await request('/x?y=1', { Host: host }, { method: 'POST', body: Buffer.alloc(100_000) })).text)
    assert.deepEqual(answer, { method: 'POST', url: '/x?y=1', host, length: 100_000 })
    const byHeaders = { 'E2b-Sandbox-Id': sandbox.sandboxId, 'E2b-Sandbox-Port': '8080' }
    assert.equal((await request('/', byHeaders)).status, 200)
  })

  test('closed port', async () => {
    const { status, text } = await request('/', { Host: shared.sandbox.getHost(9999) })
    assert.equal(status, 502)
    assert.match(JSON.parse(text).message, /port is not open/)
  })

  test('gone sandbox', async (t) => {
    const sandbox = await createFor(t)
    await sandbox.kill()
    const { status, text } = await request('/', { Host: sandbox.getHost(8080) })
    assert.equal(status, 502)
    assert.match(JSON.parse(text).message, /was not found/)
  })
})
