"""From create to kill, and what is said about a sandbox in between."""

import re
from datetime import datetime, timedelta, timezone

import pytest
from e2b import (
    SandboxException,
    SandboxNotFoundException,
    SandboxNotRunningException,
    SandboxState,
    TimeoutException,
)
from packaging.version import Version

from waiting import eventually

# Clock steps and a busy machine; the timeouts under test differ by far more.
TOLERANCE = timedelta(seconds=15)


def in_seconds(seconds):
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


async def is_unknown(sandbox):
    try:
        await sandbox.get_info()
    except SandboxNotFoundException:
        return True
    return False


async def test_create_without_options(Sandbox):
    sandbox = await Sandbox.create()
    try:
        assert re.fullmatch(r"[a-z][a-z0-9]{19}", sandbox.sandbox_id)
        assert await sandbox.is_running()
        info = await sandbox.get_info()
        assert info.sandbox_id == sandbox.sandbox_id
        assert info.name == "base"
        assert info.state == SandboxState.RUNNING
        assert info.metadata == {}
        assert info.volume_mounts == []
        assert abs(info.end_at - in_seconds(300)) < TOLERANCE
    finally:
        assert await sandbox.kill()


async def test_create_with_options(create):
    metadata = {"customer": "Grüße & co", "empty": "", "a=b": "c d"}
    sandbox = await create(
        template="base", timeout=900, metadata=metadata, envs={"GREETING": "hello\nworld", "EMPTY": ""}, secure=True
    )
    info = await sandbox.get_info()
    assert info.metadata == metadata
    assert abs(info.end_at - in_seconds(900)) < TOLERANCE
    result = await sandbox.commands.run('printf "%s|%s" "$GREETING" "${EMPTY-unset}"')
    assert result.stdout == "hello\nworld|"


async def test_info_tells_what_the_sandbox_is(create):
    sandbox = await create()
    info = await sandbox.get_info()
    assert abs(info.started_at - in_seconds(0)) < TOLERANCE
    assert info.end_at > info.started_at
    assert info.cpu_count >= 1
    assert info.memory_mb >= 128
    assert info.sandbox_domain == sandbox.sandbox_domain
    # Every gate that the SDKs know opens at this version, and the Python SDK can't parse a suffix.
    assert Version(info.envd_version) >= Version("0.6.4")


async def test_template_by_id(create, sandbox):
    template_id = (await sandbox.get_info()).template_id
    twin = await create(template=template_id)
    assert (await twin.get_info()).template_id == template_id


async def test_unknown_template(Sandbox):
    with pytest.raises(SandboxException, match="no-such-template") as refused:
        await Sandbox.create(template="no-such-template")
    assert refused.value.status_code in (400, 404)


async def test_connect_from_elsewhere(Sandbox, create):
    sandbox = await create(metadata={"made": "here"})
    await sandbox.files.write("note", "left by the first")
    other = await Sandbox.connect(sandbox.sandbox_id)
    assert other.sandbox_id == sandbox.sandbox_id
    assert await other.files.read("note") == "left by the first"
    assert (await other.get_info()).metadata == {"made": "here"}


async def test_connect_extends_but_never_shortens(create):
    sandbox = await create(timeout=300)
    await sandbox.connect(timeout=900)
    assert abs((await sandbox.get_info()).end_at - in_seconds(900)) < TOLERANCE
    await sandbox.connect(timeout=60)
    assert abs((await sandbox.get_info()).end_at - in_seconds(900)) < TOLERANCE


async def test_set_timeout_extends_and_shortens(create):
    sandbox = await create(timeout=300)
    for seconds in (900, 60):
        await sandbox.set_timeout(seconds)
        assert abs((await sandbox.get_info()).end_at - in_seconds(seconds)) < TOLERANCE


async def test_timeout_kills(create):
    sandbox = await create(timeout=3)
    await sandbox.files.write("still", "here")
    await eventually(lambda: is_unknown(sandbox), "the sandbox ends at its timeout")
    assert not await sandbox.is_running()
    with pytest.raises(SandboxNotRunningException):
        await sandbox.commands.run("true")
    with pytest.raises(SandboxNotRunningException):
        await sandbox.files.read("still")


async def test_shortened_timeout_kills(create):
    sandbox = await create(timeout=300)
    await sandbox.set_timeout(1)
    await eventually(lambda: is_unknown(sandbox), "the sandbox ends at its new timeout")


async def test_extended_timeout_outlives_the_first(create):
    sandbox = await create(timeout=3)
    await sandbox.set_timeout(300)
    result = await sandbox.commands.run("sleep 5 && echo still here")
    assert result.stdout == "still here\n"


async def test_kill(create):
    sandbox = await create()
    assert await sandbox.kill() is True
    assert await sandbox.kill() is False
    assert not await sandbox.is_running()


async def test_kill_by_id(Sandbox, create):
    sandbox = await create()
    assert await Sandbox.kill(sandbox.sandbox_id) is True
    assert await Sandbox.kill(sandbox.sandbox_id) is False


async def test_kill_in_the_middle_of_a_command(create):
    sandbox = await create()
    handle = await sandbox.commands.run("sleep 600", background=True)
    assert await sandbox.kill()
    # What the SDK makes of a stream that breaks off: it asks for the sandbox's health and finds it gone.
    with pytest.raises(TimeoutException):
        await handle.wait()


async def test_context_manager_kills(Sandbox):
    async with await Sandbox.create() as sandbox:
        assert await sandbox.is_running()
    assert await is_unknown(sandbox)


@pytest.mark.parametrize("sandbox_id", ["inosuchsandboxatall0", "I-AM-NOT-AN-ID", "x" * 300])
async def test_sandbox_that_never_was(Sandbox, sandbox_id):
    assert await Sandbox.kill(sandbox_id) is False
    for call in (
        lambda: Sandbox.get_info(sandbox_id),
        lambda: Sandbox.connect(sandbox_id),
        lambda: Sandbox.set_timeout(sandbox_id, 60),
    ):
        with pytest.raises(SandboxNotFoundException):
            await call()


async def test_killed_sandbox_is_not_found(Sandbox, create):
    sandbox = await create()
    await sandbox.kill()
    for call in (
        lambda: sandbox.get_info(),
        lambda: sandbox.set_timeout(60),
        lambda: Sandbox.connect(sandbox.sandbox_id),
    ):
        with pytest.raises(SandboxNotFoundException):
            await call()


async def test_negative_timeout_is_refused(Sandbox, sandbox):
    with pytest.raises(SandboxException, match="timeout") as refused:
        await Sandbox.create(timeout=-1)
    assert refused.value.status_code == 400
    with pytest.raises(SandboxException, match="timeout") as refused:
        await sandbox.set_timeout(-1)
    assert refused.value.status_code == 400
    assert await sandbox.is_running()


async def test_host_of_a_port(sandbox):
    assert sandbox.get_host(3000) == f"3000-{sandbox.sandbox_id}.{sandbox.sandbox_domain}"


async def test_same_idempotency_key_makes_one_sandbox(create):
    key = "conformance-" + datetime.now().strftime("%H%M%S%f")
    first = await create(idempotency_key=key, metadata={"n": "1"})
    again = await create(idempotency_key=key, metadata={"n": "1"})
    assert again.sandbox_id == first.sandbox_id
    assert await again.is_running()
    with pytest.raises(SandboxException) as refused:
        await create(idempotency_key=key, metadata={"n": "2"})
    assert refused.value.status_code in (409, 422)
