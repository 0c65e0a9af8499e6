// What the SDK offers and this server doesn't serve yet: a clear error that names it.

import assert from 'node:assert/strict'
import { describe, test } from 'node:test'
import { Sandbox } from 'e2b'
import { sharedSandbox } from '../support.mjs'

describe('unserved', () => {
  const shared = sharedSandbox()

  const options = {
    autoPause: { lifecycle: { onTimeout: 'pause' } },
    volumeMounts: { volumeMounts: { '/mnt': 'data' } },
    denyOut: { network: { denyOut: ['1.1.1.1'] } },
    mcp: { mcp: { browserbase: {} } },
  }
  for (const [name, option] of Object.entries(options)) {
    test(`create with ${name}`, () => assert.rejects(Sandbox.create(option), { name: 'SandboxError', message: new RegExp(name, 'i') }))
  }

  const calls = {
    paus: (sandbox) => sandbox.pause(),
    snapshot: (sandbox) => sandbox.createSnapshot(),
    fork: (sandbox) => sandbox.fork(),
    network: (sandbox) => sandbox.updateNetwork({ denyOut: ['1.1.1.1'] }),
    pty: (sandbox) => sandbox.pty.create({ cols: 80, rows: 24, onData: () => {} }),
    watch: (sandbox) => sandbox.files.watchDir('/tmp', () => {}),
  }
  for (const [name, call] of Object.entries(calls)) {
    test(name, async () => {
      await assert.rejects(call(shared.sandbox), { name: 'SandboxError', message: new RegExp(name, 'i') })
      assert.equal(await shared.sandbox.isRunning(), true)
    })
  }
})
