// `sandbox.commands`: output, exit codes, input, users, timeouts, many at once.

import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { describe, test } from 'node:test'
import { AuthenticationError, CommandExitError, InvalidArgumentError, NotFoundError, SandboxError, TimeoutError } from 'e2b'
import { createFor, directoryOf, eventually, sharedSandbox } from '../support.mjs'

const sha256 = (data) => createHash('sha256').update(data).digest('hex')

async function assertExit(promise, expected) {
  await assert.rejects(promise, (error) => {
    assert.ok(error instanceof CommandExitError, String(error))
    for (const [field, value] of Object.entries(expected)) assert.equal(error[field], value, field)
    return true
  })
}

describe('commands', () => {
  const shared = sharedSandbox()
  const run = (command, options) => shared.sandbox.commands.run(command, options)

  test('stdout and stderr', async () => {
    const { stdout, stderr, exitCode, error } = await run('echo out; echo err >&2')
    assert.deepEqual({ stdout, stderr, exitCode, error }, { stdout: 'out\n', stderr: 'err\n', exitCode: 0, error: undefined })
  })

  test('chunks arrive while the command runs', async (t) => {
    const cwd = directoryOf(t)
    await shared.sandbox.files.makeDir(cwd)
    const chunks = []
    // The command waits for a file that is written only when its first line has come through.
    const { stdout } = await run('echo first; until [ -e go ]; do sleep 0.05; done; echo second', {
      cwd,
      onStdout: async (chunk) => {
        if (chunks.push(chunk) === 1) await shared.sandbox.files.write(`${cwd}/go`, '')
      },
    })
    assert.equal(stdout, 'first\nsecond\n')
    assert.equal(chunks.join(''), stdout)
  })

  test('callbacks are called in order', async () => {
    const out = [], err = []
    const result = await run('for i in $(seq 200); do echo out $i; echo err $i >&2; done', {
      onStdout: (chunk) => void out.push(chunk),
      onStderr: (chunk) => void err.push(chunk),
    })
    const expected = (name) => Array.from({ length: 200 }, (_, i) => `${name} ${i + 1}\n`).join('')
    assert.equal(out.join(''), expected('out'))
    assert.equal(err.join(''), expected('err'))
    assert.equal(result.stdout, expected('out'))
  })

  test('ten megabytes without loss', async () => {
    const expected = Array.from({ length: 1_479_999 }, (_, i) => `${i + 1}\n`).join('')
    const { stdout } = await run('seq 1479999')
    assert.ok(stdout.length > 10 * 1024 * 1024)
    assert.equal(sha256(stdout), sha256(expected))
  })

  test('character split between chunks', async () => {
    const { stdout } = await run(String.raw`printf '\xe2'; sleep 0.3; printf '\x82'; sleep 0.3; printf '\xac'`)
    assert.equal(stdout, '€')
  })

  test('binary noise', async (t) => {
    const cwd = directoryOf(t)
    await shared.sandbox.files.makeDir(cwd)
    // The decoder would drop a byte order mark at the very beginning, so the noise begins with something else.
    const { stdout } = await run('(printf x; head -c 300000 /dev/urandom) | tee noise', { cwd })
    const noise = await shared.sandbox.files.read(`${cwd}/noise`, { format: 'bytes' })
    assert.equal(noise.length, 300_001)
    assert.equal(stdout, new TextDecoder().decode(noise))
  })

  test('exit code', async () => {
    await assertExit(run('echo out; echo err >&2; exit 42'), { exitCode: 42, stdout: 'out\n', stderr: 'err\n' })
    await assertExit(run('no-such-command'), { exitCode: 127 })
  })

  test('death by signal', async () => {
    await assert.rejects(run('kill -KILL $$'), (error) => error instanceof CommandExitError && error.exitCode !== 0)
  })

  test('background, list, kill', async () => {
    const handle = await run('sleep 988001', { background: true, cwd: '/tmp', envs: { MARK: 'x' } })
    const listed = (await shared.sandbox.commands.list()).find((process) => process.pid === handle.pid)
    assert.deepEqual([listed.cmd, listed.args], ['/bin/bash', ['-l', '-c', 'sleep 988001']])
    assert.deepEqual([listed.cwd, listed.envs.MARK], ['/tmp', 'x'])
    assert.equal(await handle.kill(), true)
    await assert.rejects(handle.wait(), CommandExitError)
    assert.equal(await shared.sandbox.commands.kill(handle.pid), false)
    assert.equal((await run('pgrep -f "[s]leep 988001" || true')).stdout, '')
  })

  test('disconnect and connect', async (t) => {
    const cwd = directoryOf(t)
    await shared.sandbox.files.makeDir(cwd)
    const handle = await run('until [ -e go ]; do sleep 0.05; done; echo late words; exit 5', { background: true, cwd })
    await handle.disconnect()
    const again = await shared.sandbox.commands.connect(handle.pid)
    await shared.sandbox.files.write(`${cwd}/go`, '')
    await assertExit(again.wait(), { exitCode: 5, stdout: 'late words\n' })
  })

  test('unknown pid', async () => {
    assert.equal(await shared.sandbox.commands.kill(4_000_000), false)
    await assert.rejects(shared.sandbox.commands.connect(4_000_000), NotFoundError)
    await assert.rejects(shared.sandbox.commands.sendStdin(4_000_000, 'x'), NotFoundError)
  })

  test('input', async () => {
    assert.equal((await run('cat; echo end')).stdout, 'end\n')
    const handle = await run('cat', { background: true, stdin: true })
    await shared.sandbox.commands.sendStdin(handle.pid, 'one\n')
    await handle.sendStdin('zwei €\n')
    await handle.closeStdin()
    assert.equal((await handle.wait()).stdout, 'one\nzwei €\n')
  })

  test('users', async () => {
    assert.equal((await run('whoami; pwd; echo $HOME')).stdout, 'user\n/home/user\n/home/user\n')
    assert.equal((await run('whoami; echo $HOME', { user: 'root' })).stdout, 'root\n/root\n')
    assert.equal((await run('sudo -n whoami')).stdout, 'root\n')
    await assert.rejects(
      run('true', { user: 'nobody-we-know' }),
      (error) => error instanceof AuthenticationError || error instanceof InvalidArgumentError
    )
  })

  test('directory and environment', async (t) => {
    assert.equal((await run('pwd', { cwd: '/usr/lib' })).stdout, '/usr/lib\n')
    await assert.rejects(run('pwd', { cwd: '/no/such/directory' }), SandboxError)
    const envs = { SPACED: ' a  b ', DOLLAR: '$HOME', LINES: 'x\ny', UNICODE: '€', EMPTY: '' }
    const { stdout } = await run('node -p "JSON.stringify(process.env)"', { envs })
    const seen = JSON.parse(stdout)
    for (const [name, value] of Object.entries(envs)) assert.equal(seen[name], value)
    const sandbox = await createFor(t, { envs: { A: 'sandbox', B: 'sandbox' } })
    assert.equal((await sandbox.commands.run('echo $A $B', { envs: { B: 'command' } })).stdout, 'sandbox command\n')
  })

  test('timeout', async () => {
    const chunks = []
    await assert.rejects(
      run('echo early; sleep 988002', { timeoutMs: 2_000, onStdout: (chunk) => void chunks.push(chunk) }),
      TimeoutError
    )
    assert.deepEqual(chunks, ['early\n'])
    const isGone = async () => (await run('pgrep -f "[s]leep 988002" || true')).stdout === ''
    await eventually(isGone, 'a command ends with its timeout')
    assert.equal((await run('sleep 2; echo done', { timeoutMs: 0 })).stdout, 'done\n')
  })

  test('twenty side by side', async (t) => {
    const cwd = directoryOf(t)
    await shared.sandbox.files.makeDir(cwd)
    const numbers = Array.from({ length: 20 }, (_, number) => number)
    // Each waits until all have started: they pass only if twenty really run at the same time.
    const results = await Promise.all(
      numbers.map((number) =>
        run(`touch s-${number}; until [ $(ls s-* | wc -l) -ge 20 ]; do sleep 0.1; done; echo ${number}`, { cwd, timeoutMs: 90_000 })
      )
    )
    assert.deepEqual(results.map((result) => result.stdout), numbers.map((number) => `${number}\n`))
  })
})
