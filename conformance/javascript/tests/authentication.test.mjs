// Who may do what.

import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { AuthenticationError, Sandbox } from 'e2b'
import { createFor } from '../support.mjs'

const WRONG_KEY = 'e2b_' + '0'.repeat(40)

describe('authentication', () => {
  test('wrong key', async () => {
    await assert.rejects(Sandbox.create({ apiKey: WRONG_KEY }), AuthenticationError)
    await assert.rejects(Sandbox.list({ apiKey: WRONG_KEY }).nextItems(), AuthenticationError)
    await assert.rejects(Sandbox.kill('inosuchsandboxatall0', { apiKey: WRONG_KEY }), AuthenticationError)
  })

  test('token of another sandbox', async (t) => {
    const [one, other] = [await createFor(t), await createFor(t)]
    const intruder = new Sandbox({
      sandboxId: one.sandboxId,
      sandboxDomain: one.sandboxDomain,
      envdVersion: '0.6.4',
      envdAccessToken: other.envdAccessToken,
    })
    await assert.rejects(intruder.commands.run('true'), AuthenticationError)
    await assert.rejects(intruder.files.read('/etc/hostname'), AuthenticationError)
    await assert.rejects(intruder.files.list('/'), AuthenticationError)
    assert.equal((await one.commands.run('echo fine')).stdout, 'fine\n')
  })
})
