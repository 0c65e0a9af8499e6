// What the test files share: sandboxes that are gone afterwards, waiting, and HTTP with a Host header of one's own.

import http from 'node:http'
import { after, before } from 'node:test'
import { setTimeout as sleep } from 'node:timers/promises'
import { Sandbox } from 'e2b'

// Sandboxes die by themselves if a run is cut short.
export const SANDBOX_TIMEOUT_MS = 600_000

export const SANDBOX_URL = process.env.E2B_SANDBOX_URL

/** A sandbox that the tests of a file share; they leave it usable. Read it inside tests: `shared.sandbox`. */
export function sharedSandbox() {
  const shared = {}
  before(async () => {
    shared.sandbox = await Sandbox.create({ timeoutMs: SANDBOX_TIMEOUT_MS })
  })
  after(() => shared.sandbox?.kill())
  return shared
}

/** Makes a sandbox for one test and kills it after it. */
export async function createFor(t, options = {}) {
  const sandbox = await Sandbox.create({ timeoutMs: SANDBOX_TIMEOUT_MS, ...options })
  t.after(() => sandbox.kill())
  return sandbox
}

/** A path below the sandbox's home that is the test's own. */
export function directoryOf(t) {
  return `/home/user/tests/${t.name.replace(/[^A-Za-z0-9]/g, '_')}`
}

export async function eventually(condition, what, withinMs = 30_000) {
  const deadline = Date.now() + withinMs
  while (!(await condition())) {
    if (Date.now() > deadline) throw new Error(`not within ${withinMs} ms: ${what}`)
    await sleep(100)
  }
}

/** One request to the sandbox listener; `fetch` would not let the Host header be chosen. */
export function request(path, headers, { method = 'GET', body } = {}) {
  return new Promise((resolve, reject) => {
    const sent = http.request(new URL(path, SANDBOX_URL), { method, headers, agent: false, timeout: 30_000 }, async (response) => {
      const chunks = []
      for await (const chunk of response) chunks.push(chunk)
      resolve({ status: response.statusCode, headers: response.headers, text: Buffer.concat(chunks).toString() })
    })
    sent.on('timeout', () => sent.destroy(new Error('no answer')))
    sent.on('error', reject)
    sent.end(body)
  })
}
