// `sandbox.files`: contents, directories, owners, names.

import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'
import { describe, test } from 'node:test'
import { FileNotFoundError, InvalidArgumentError, NotFoundError, SandboxError } from 'e2b'
import { directoryOf, sharedSandbox } from '../support.mjs'

const sha256 = (data) => createHash('sha256').update(data).digest('hex')

function streamOf(buffer, size = 65_536) {
  let at = 0
  return new ReadableStream({
    pull(controller) {
      if (at >= buffer.length) return controller.close()
      controller.enqueue(buffer.subarray(at, (at += size)))
    },
  })
}

describe('files', () => {
  const shared = sharedSandbox()
  const files = () => shared.sandbox.files
  const run = (command, options) => shared.sandbox.commands.run(command, options)

  test('text', async (t) => {
    const path = `${directoryOf(t)}/text`
    const written = await files().write(path, 'Grüße\n€ 🫙\r\n')
    assert.deepEqual([written.name, written.path, written.type], ['text', path, 'file'])
    assert.equal(await files().read(path), 'Grüße\n€ 🫙\r\n')
  })

  test('bytes, blobs and streams', async (t) => {
    const path = `${directoryOf(t)}/data`
    const data = randomBytes(3_000_000)
    for (const body of [data.buffer.slice(data.byteOffset, data.byteOffset + data.length), new Blob([data]), streamOf(data)]) {
      await files().write(path, body)
      assert.equal(sha256(await files().read(path, { format: 'bytes' })), sha256(data))
    }
    const blob = await files().read(path, { format: 'blob' })
    assert.equal(blob.size, data.length)
    const received = createHash('sha256')
    for await (const chunk of await files().read(path, { format: 'stream' })) received.update(chunk)
    assert.equal(received.digest('hex'), sha256(data))
  })

  test('empty', async (t) => {
    const path = `${directoryOf(t)}/empty`
    for (const useOctetStream of [false, true]) {
      await files().write(path, '', { useOctetStream })
      assert.equal(await files().read(path), '')
      assert.equal((await files().read(path, { format: 'bytes' })).length, 0)
    }
  })

  test('compressed', async (t) => {
    const path = `${directoryOf(t)}/text`
    const text = 'the same line over and over\n'.repeat(10_000)
    await files().write(path, text, { gzip: true })
    assert.equal((await files().getInfo(path)).size, text.length)
    assert.equal(await files().read(path, { gzip: true }), text)
  })

  test('overwriting shortens', async (t) => {
    const path = `${directoryOf(t)}/file`
    await files().write(path, 'a long first version')
    await files().write(path, 'short')
    assert.equal(await files().read(path), 'short')
  })

  test('hundred megabytes there and back', { timeout: 300_000 }, async (t) => {
    const path = `${directoryOf(t)}/large`
    const data = Buffer.alloc(100 * 1024 * 1024)
    for (let at = 0; at < data.length; at += 4) data.writeUInt32LE((at * 2654435761) >>> 0, at)
    await files().write(path, streamOf(data))
    assert.equal((await run(`sha256sum < ${path}`)).stdout.split(' ')[0], sha256(data))
    const received = createHash('sha256')
    for await (const chunk of await files().read(path, { format: 'stream' })) received.update(chunk)
    assert.equal(received.digest('hex'), sha256(data))
    await files().remove(path)
  })

  test('many in one call', async (t) => {
    const directory = directoryOf(t)
    for (const useOctetStream of [false, true]) {
      const entries = Array.from({ length: 20 }, (_, n) => ({ path: `${directory}/${useOctetStream}/${n}/ü`, data: `content ${n}` }))
      const written = await files().write(entries, { useOctetStream })
      assert.deepEqual(written.map((info) => info.path), entries.map((entry) => entry.path))
      for (const entry of entries) assert.equal(await files().read(entry.path), entry.data)
    }
    assert.deepEqual(await files().write([]), [])
  })

  test('missing', async (t) => {
    await assert.rejects(files().read('/no/such/file'), (error) => error instanceof FileNotFoundError && error instanceof NotFoundError)
    await assert.rejects(files().read('/no/such/file', { format: 'stream' }), FileNotFoundError)
    await assert.rejects(files().getInfo('/no/such/file'), FileNotFoundError)
    await assert.rejects(files().list('/no/such/file'), FileNotFoundError)
    await assert.rejects(files().rename('/no/such/file', '/tmp/x'), FileNotFoundError)
    await files().remove(directoryOf(t))
  })

  test('wrong kind', async (t) => {
    const directory = directoryOf(t)
    await files().write(`${directory}/file`, '')
    await assert.rejects(files().read(directory), InvalidArgumentError)
    await assert.rejects(files().list(`${directory}/file`), InvalidArgumentError)
    await assert.rejects(files().makeDir(`${directory}/file`), InvalidArgumentError)
    await assert.rejects(files().write(directory, 'text'), SandboxError)
  })

  test('paths', async () => {
    assert.equal((await files().write('relative', 'x')).path, '/home/user/relative')
    assert.equal((await files().write('~/tilde', 'x')).path, '/home/user/tilde')
    assert.equal((await files().write('of-root', 'x', { user: 'root' })).path, '/root/of-root')
    assert.equal(await files().exists('~/tilde'), true)
  })

  test('awkward names', async (t) => {
    const directory = directoryOf(t)
    const names = ['with space', 'grüße-日本語-🫙', '100% sure?', 'a&b=c;d', '#hash+plus', `quote'and"quote`, 'back\\slash', '.hidden', 'x'.repeat(255)]
    for (const name of names) {
      // A form's file name can't hold every character; the request's own parameter can.
      await files().write(`${directory}/${name}`, name)
      assert.equal(await files().read(`${directory}/${name}`), name)
    }
    assert.deepEqual((await files().list(directory)).map((entry) => entry.name).sort(), names.sort())
  })

  test('owners', async (t) => {
    const directory = directoryOf(t)
    await files().write(`${directory}/of-user`, '')
    await files().write(`${directory}/of-root`, '', { user: 'root' })
    assert.equal((await files().getInfo(`${directory}/of-user`)).owner, 'user')
    assert.equal((await files().getInfo(`${directory}/of-root`)).owner, 'root')
    assert.equal((await files().getInfo(directory)).owner, 'user')
  })

  test('info', async (t) => {
    const directory = directoryOf(t)
    await files().write(`${directory}/file`, '12345')
    const info = await files().getInfo(`${directory}/file`)
    assert.deepEqual([info.name, info.type, info.size, info.mode & 0o777], ['file', 'file', 5, 0o644])
    assert.ok(Math.abs(info.modifiedTime - Date.now()) < 60_000)
    assert.equal((await files().getInfo(directory)).type, 'dir')
    assert.equal(await files().exists(`${directory}/other`), false)
    await run('ln -s file link', { cwd: directory })
    assert.ok((await files().getInfo(`${directory}/link`)).symlinkTarget.endsWith('file'))
  })

  test('metadata', async (t) => {
    const path = `${directoryOf(t)}/file`
    const written = await files().write(path, 'x', { metadata: { Author: 'Ada' } })
    assert.deepEqual(written.metadata, { author: 'Ada' })
    assert.deepEqual({ ...(await files().getInfo(path)).metadata }, { author: 'Ada' })
  })

  test('directories', async (t) => {
    const directory = directoryOf(t)
    assert.equal(await files().makeDir(`${directory}/1/2`), true)
    assert.equal(await files().makeDir(`${directory}/1/2`), false)
    await files().write(`${directory}/1/2/file`, '')
    const paths = async (depth) => (await files().list(directory, { depth })).map((entry) => entry.path.slice(directory.length)).sort()
    assert.deepEqual(await paths(1), ['/1'])
    assert.deepEqual(await paths(2), ['/1', '/1/2'])
    assert.deepEqual(await paths(9), ['/1', '/1/2', '/1/2/file'])
    assert.equal((await files().rename(`${directory}/1`, `${directory}/one`)).type, 'dir')
    assert.equal(await files().read(`${directory}/one/2/file`), '')
    await files().remove(directory)
    assert.equal(await files().exists(directory), false)
  })
})
