"""One test body for both flavours of the Python SDK.

`e2b` has every class twice: `Sandbox` blocks, `AsyncSandbox` is awaited. The tests are written for the second. For the
first, `Awaited` wraps the blocking objects so that exactly those methods that are coroutines in the asynchronous twin
can be awaited; each call runs in a thread of its own, as a threaded program would do it. What the twin answers at once
(`get_host`, `Sandbox.list`) stays an ordinary call. The SDK itself is neither patched nor subclassed.
"""

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import e2b
from e2b.sandbox.filesystem.filesystem import AsyncFileStreamReader, FileStreamReader
from e2b.sandbox_async.commands.command import Commands as AsyncCommands
from e2b.sandbox_async.commands.command_handle import AsyncCommandHandle
from e2b.sandbox_async.commands.pty import Pty as AsyncPty
from e2b.sandbox_async.filesystem.filesystem import Filesystem as AsyncFilesystem
from e2b.sandbox_async.paginator import AsyncSandboxPaginator
from e2b.sandbox_sync.commands.command import Commands
from e2b.sandbox_sync.commands.command_handle import CommandHandle
from e2b.sandbox_sync.commands.pty import Pty
from e2b.sandbox_sync.filesystem.filesystem import Filesystem
from e2b.sandbox_sync.paginator import SandboxPaginator

ASYNC_TWIN = {
    e2b.Sandbox: e2b.AsyncSandbox,
    Commands: AsyncCommands,
    CommandHandle: AsyncCommandHandle,
    Filesystem: AsyncFilesystem,
    FileStreamReader: AsyncFileStreamReader,
    Pty: AsyncPty,
    SandboxPaginator: AsyncSandboxPaginator,
}

# More than any test has calls in flight. asyncio's own pool has six threads on two cores: twenty commands side by side
# would queue in the client and prove nothing about the server.
THREADS = ThreadPoolExecutor(max_workers=64, thread_name_prefix="sync-sdk")

EXHAUSTED = object()


def _is_coroutine(attribute: Any) -> bool:
    return inspect.iscoroutinefunction(inspect.unwrap(attribute)) if callable(attribute) else False


def _wrap(value: Any) -> Any:
    twin = ASYNC_TWIN.get(type(value))
    return value if twin is None else Awaited(value, twin)


class Awaited:
    """A blocking SDK object (or the class `Sandbox` itself) that is used like its asynchronous twin."""

    def __init__(self, blocking: Any, twin: type):
        self._blocking = blocking
        self._twin = twin

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._blocking, name)
        if not callable(attribute):
            return _wrap(attribute)

        def call(*arguments: Any, **options: Any) -> Any:
            return _wrap(attribute(*arguments, **options))

        async def call_in_thread(*arguments: Any, **options: Any) -> Any:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(THREADS, lambda: call(*arguments, **options))

        return call_in_thread if _is_coroutine(getattr(self._twin, name, None)) else call

    async def __aenter__(self) -> "Awaited":
        self._blocking.__enter__()
        return self

    async def __aexit__(self, *exception: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(THREADS, lambda: self._blocking.__exit__(*exception))

    async def __aiter__(self) -> Any:
        loop = asyncio.get_running_loop()
        iterator = iter(self._blocking)
        while (item := await loop.run_in_executor(THREADS, next, iterator, EXHAUSTED)) is not EXHAUSTED:
            yield item


FLAVOURS = {
    "sync": Awaited(e2b.Sandbox, e2b.AsyncSandbox),
    "async": e2b.AsyncSandbox,
}
