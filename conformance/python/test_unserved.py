"""What the SDKs offer and this server doesn't serve yet: a clear error that names it, from the SDK's own call.

As each is built, its test moves to a module of its own and asserts the opposite.
"""

import httpx
import pytest
from e2b import PtySize, SandboxException

from service import assert_error


@pytest.mark.parametrize(
    "names, options",
    [
        ("autoPause", {"lifecycle": {"on_timeout": "pause"}}),
        ("volumeMounts", {"volume_mounts": {"/mnt": "data"}}),
        ("denyOut", {"network": {"deny_out": ["1.1.1.1"]}}),
        ("iam", {"iam": {"tokens": {"aws": {"audience": "sts", "token_type": "JWT-SVID"}}}}),
    ],
)
async def test_create_option(Sandbox, names, options):
    with pytest.raises(SandboxException, match=f"(?i){names}") as refused:
        await Sandbox.create(**options)
    assert 400 <= refused.value.status_code < 600


async def test_create_with_mcp(Sandbox):
    # The SDK asks for another template as well; either is the reason.
    with pytest.raises(SandboxException, match="(?i)mcp"):
        await Sandbox.create(mcp={"browserbase": {}})


async def test_create_without_internet(create):
    """Either the sandbox is refused by name, or it really has no internet."""
    try:
        sandbox = await create(allow_internet_access=False)
    except SandboxException as refused:
        assert "allow_internet_access" in str(refused)
        return
    result = await sandbox.commands.run("curl -s -m 5 https://pypi.org >/dev/null && echo reached; true")
    assert result.stdout == ""


@pytest.mark.parametrize(
    "names, call",
    [
        ("paus", lambda sandbox: sandbox.pause()),
        ("snapshot", lambda sandbox: sandbox.create_snapshot()),
        ("fork", lambda sandbox: sandbox.fork()),
        ("network", lambda sandbox: sandbox.update_network({"deny_out": ["1.1.1.1"]})),
    ],
)
async def test_sandbox_method(sandbox, names, call):
    with pytest.raises(SandboxException, match=f"(?i){names}"):
        await call(sandbox)
    assert await sandbox.is_running()


async def test_pty(Sandbox, sandbox):
    # Only the asynchronous flavour takes its listener at once.
    listener = {"on_data": print} if isinstance(Sandbox, type) else {}
    with pytest.raises(SandboxException, match="(?i)pty"):
        await sandbox.pty.create(PtySize(rows=24, cols=80), **listener)
    assert (await sandbox.commands.run("echo fine")).stdout == "fine\n"


async def test_watch(Sandbox, sandbox):
    listener = {"on_event": print} if isinstance(Sandbox, type) else {}
    with pytest.raises(SandboxException, match="(?i)watch"):
        await sandbox.files.watch_dir("/tmp", **listener)
    assert (await sandbox.commands.run("echo fine")).stdout == "fine\n"


async def test_signed_url(service, sandbox):
    await sandbox.files.write("/tmp/shared", "content")
    async with httpx.AsyncClient() as client:
        response = await client.get(sandbox.download_url("/tmp/shared"))
    assert_error(response, 400, 401, 404, 501)


async def test_code_interpreter(service, sandbox):
    async with httpx.AsyncClient(base_url=service.sandbox_url) as client:
        response = await client.post(
            "/execute", headers={"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49999"}, json={"code": "1"}
        )
    assert response.status_code == 502
    assert "port is not open" in response.json()["message"]
