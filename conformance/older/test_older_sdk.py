"""The oldest SDK we promise to serve: it creates and connects through the first version of the API.

A smoke test of each flavour, run in an environment of its own; the newest SDK gets the full suite.
"""

import hashlib
import os

import e2b
import pytest
from e2b import (
    AsyncSandbox,
    AuthenticationException,
    CommandExitException,
    NotFoundException,
    Sandbox,
    SandboxException,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)


@pytest.fixture
def sandbox():
    sandbox = Sandbox.create(timeout=120, metadata={"suite": "older"}, envs={"A": "1"})
    yield sandbox
    sandbox.kill()


def test_blocking_flavour(sandbox):
    info = sandbox.get_info()
    assert (info.name, info.metadata, info.state) == ("base", {"suite": "older"}, SandboxState.RUNNING)
    assert sandbox.is_running()
    listed = Sandbox.list(query=SandboxQuery(metadata={"suite": "older"}), limit=1).next_items()
    assert [item.sandbox_id for item in listed] == [sandbox.sandbox_id]

    chunks = []
    result = sandbox.commands.run("echo out $A; echo err >&2", on_stdout=chunks.append)
    assert (result.stdout, result.stderr, chunks) == ("out 1\n", "err\n", ["out 1\n"])
    with pytest.raises(CommandExitException) as exit:
        sandbox.commands.run("exit 3")
    assert exit.value.exit_code == 3
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 60", timeout=1)

    handle = sandbox.commands.run("cat", background=True, stdin=True)
    sandbox.commands.send_stdin(handle.pid, "hello\n")
    sandbox.commands.close_stdin(handle.pid)
    assert handle.wait().stdout == "hello\n"

    data = os.urandom(2_000_000)
    sandbox.files.write("data", data)
    assert sandbox.commands.run("sha256sum data").stdout.split()[0] == hashlib.sha256(data).hexdigest()
    assert bytes(sandbox.files.read("data", format="bytes")) == data
    assert [entry.name for entry in sandbox.files.list("/home/user") if entry.name == "data"] == ["data"]
    with pytest.raises(NotFoundException):
        sandbox.files.read("missing")

    other = Sandbox.connect(sandbox.sandbox_id)
    assert other.files.exists("data")
    sandbox.set_timeout(60)
    assert sandbox.kill() is True
    assert sandbox.kill() is False
    assert not sandbox.is_running()
    with pytest.raises(NotFoundException):
        sandbox.get_info()
    with pytest.raises(TimeoutException):
        sandbox.commands.run("true")


async def test_asynchronous_flavour():
    async with await AsyncSandbox.create(timeout=120) as sandbox:
        assert (await sandbox.commands.run("whoami")).stdout == "user\n"
        await sandbox.files.write_files([{"path": "a", "data": "1"}, {"path": "b/c", "data": b"2"}])
        assert await sandbox.files.read("b/c") == "2"
        other = await AsyncSandbox.connect(sandbox.sandbox_id, timeout=100)
        assert await other.is_running()
    assert not await sandbox.is_running()


def test_left_open_on_request():
    sandbox = Sandbox.create(timeout=60, secure=False)
    try:
        assert sandbox.commands.run("echo open").stdout == "open\n"
    finally:
        sandbox.kill()


def test_errors():
    with pytest.raises(AuthenticationException):
        Sandbox.create(api_key="e2b_" + "0" * 40)
    with pytest.raises(SandboxException, match="no-such-template"):
        Sandbox.create(template="no-such-template")
    with pytest.raises(SandboxException, match="(?i)timeout"):
        Sandbox.create(timeout=-1)


def test_it_is_the_older_one():
    from importlib.metadata import version

    assert version("e2b") == "2.45.0"
    assert not hasattr(e2b, "SandboxNotRunningException")
