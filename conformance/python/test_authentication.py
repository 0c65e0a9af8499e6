"""Who may do what: API keys, teams, and the tokens of the sandboxes themselves."""

import json

import pytest
from e2b import AuthenticationException, ConnectionConfig, SandboxException, SandboxNotFoundException
from packaging.version import Version

from service import assert_error

# Keys and tokens are checked by the server; what the SDK makes of a refusal is the same in both flavours.
SDK_FLAVOURS = ("async",)

WRONG_KEYS = [
    "e2b_" + "0" * 40,
    "e2b_",
    "e2b_short",
    "E2B_" + "0" * 40,
    "sk_" + "0" * 40,
    "e2b_" + "z" * 40,
    "e2b_" + "0" * 5000,
    "' OR 1=1 --",
]

ROUTES = [
    ("GET", "/sandboxes"),
    ("GET", "/v2/sandboxes"),
    ("POST", "/sandboxes"),
    ("POST", "/v2/sandboxes"),
    ("GET", "/sandboxes/inosuchsandboxatall0"),
    ("DELETE", "/sandboxes/inosuchsandboxatall0"),
    ("POST", "/sandboxes/inosuchsandboxatall0/timeout"),
    ("POST", "/sandboxes/inosuchsandboxatall0/refreshes"),
    ("POST", "/sandboxes/inosuchsandboxatall0/connect"),
    ("POST", "/v2/sandboxes/inosuchsandboxatall0/connect"),
]


class TestApiKeys:
    @pytest.mark.parametrize("method, path", ROUTES)
    async def test_every_route_asks_for_a_key(self, service, method, path):
        for key in ("", WRONG_KEYS[0]):
            async with service.api(key) as api:
                # The body is checked only for those who may send one.
                response = await api.request(method, path, content=b"{" if method == "POST" else None)
            assert_error(response, 401)

    async def test_health_asks_for_none(self, service):
        async with service.api("") as api:
            assert (await api.get("/health")).status_code == 204

    @pytest.mark.parametrize("key", WRONG_KEYS, ids=range(len(WRONG_KEYS)))
    async def test_wrong_key(self, Sandbox, key):
        for call in (
            lambda: Sandbox.create(api_key=key),
            lambda: Sandbox.list(api_key=key).next_items(),
            lambda: Sandbox.kill("inosuchsandboxatall0", api_key=key),
        ):
            with pytest.raises(AuthenticationException):
                await call()

    async def test_key_that_is_no_text(self, service):
        async with service.api("") as api:
            response = await api.get("/v2/sandboxes", headers=[(b"X-API-KEY", b"\xff\xfe\x80")])
        assert_error(response, 400, 401)

    async def test_revoked_key(self, operator, Sandbox, create):
        sandbox = await create()
        made = operator.create_key()
        assert (await Sandbox.get_info(sandbox.sandbox_id, api_key=made["key"])).sandbox_id == sandbox.sandbox_id
        operator.revoke_key(made["id"])
        with pytest.raises(AuthenticationException):
            await Sandbox.get_info(sandbox.sandbox_id, api_key=made["key"])
        with pytest.raises(AuthenticationException):
            await Sandbox.create(api_key=made["key"])
        assert await sandbox.is_running()


@pytest.fixture(scope="module")
def strangers_key(operator):
    made = operator.create_key(team="strangers")
    yield made["key"]
    operator.revoke_key(made["id"])


class TestTeams:
    async def test_a_strangers_sandbox_does_not_exist(self, Sandbox, create, strangers_key):
        sandbox = await create(metadata={"whose": "mine"})
        sandbox_id = sandbox.sandbox_id
        for call in (
            lambda: Sandbox.get_info(sandbox_id, api_key=strangers_key),
            lambda: Sandbox.set_timeout(sandbox_id, 1, api_key=strangers_key),
            lambda: Sandbox.connect(sandbox_id, api_key=strangers_key),
        ):
            with pytest.raises(SandboxNotFoundException):
                await call()
        assert await Sandbox.kill(sandbox_id, api_key=strangers_key) is False
        assert await Sandbox.list(api_key=strangers_key).next_items() == []
        assert await sandbox.is_running()

    async def test_and_the_other_way_round(self, Sandbox, create, strangers_key):
        theirs = await create(api_key=strangers_key)
        assert theirs.sandbox_id not in [item.sandbox_id for item in await Sandbox.list().next_items()]
        with pytest.raises(SandboxNotFoundException):
            await Sandbox.get_info(theirs.sandbox_id)
        listed = await Sandbox.list(api_key=strangers_key).next_items()
        assert [item.sandbox_id for item in listed] == [theirs.sandbox_id]

    async def test_a_list_token_of_another_team(self, Sandbox, create, strangers_key):
        for _ in range(2):
            await create()
        mine = Sandbox.list(limit=1)
        await mine.next_items()
        try:
            stolen = await Sandbox.list(next_token=mine.next_token, api_key=strangers_key).next_items()
        except SandboxException as refused:
            assert refused.status_code == 400
        else:
            assert stolen == []


async def envd_token(service, sandbox):
    async with service.api() as api:
        return (await api.get(f"/sandboxes/{sandbox.sandbox_id}")).json()["envdAccessToken"]


async def ask_agent(client, what):
    """One request of each kind that the agent serves."""
    if what == "read":
        return await client.get("/files", params={"path": "/etc/hostname"})
    if what == "write":
        return await client.post("/files", params={"path": "/tmp/written"}, files={"file": b"x"})
    if what == "list":
        return await client.post("/filesystem.Filesystem/ListDir", json={"path": "/", "depth": 1})
    if what == "processes":
        return await client.post("/process.Process/List", json={})
    message = json.dumps({"process": {"cmd": "/bin/true"}, "stdin": False}).encode()
    envelope = b"\0" + len(message).to_bytes(4, "big") + message
    return await client.post(
        "/process.Process/Start", content=envelope, headers={"Content-Type": "application/connect+json"}
    )


@pytest.fixture(scope="module")
async def token(service, sandbox):
    return await envd_token(service, sandbox)


class TestAccessTokens:
    @pytest.mark.parametrize("what", ["read", "write", "list", "processes", "start"])
    async def test_agent_asks_for_the_sandboxs_token(self, service, sandbox, create, token, what):
        async with service.envd(sandbox.sandbox_id, token) as client:
            assert (await ask_agent(client, what)).status_code == 200
        others_token = await envd_token(service, await create())
        assert others_token != token
        for wrong in (None, "", "wrong", token[:-1], token + "0", token.swapcase() + "x", others_token, service.api_key):
            async with service.envd(sandbox.sandbox_id, wrong) as client:
                response = await ask_agent(client, what)
            # The streaming protocol may put its error into an answer of status 200.
            refused = response.status_code == 401 or b'"unauthenticated"' in response.content
            assert refused, f"{what} with {wrong!r}: {response.status_code} {response.text[:200]}"

    async def test_the_sdk_recognises_the_refusal(self, service, Sandbox, sandbox, create):
        others_token = await envd_token(service, await create())
        # An intruder knows the id of a sandbox and has the token of its own.
        intruder = Sandbox(
            sandbox_id=sandbox.sandbox_id,
            sandbox_domain=sandbox.sandbox_domain,
            envd_version=Version("0.6.4"),
            envd_access_token=others_token,
            traffic_access_token=None,
            connection_config=ConnectionConfig(
                extra_sandbox_headers={
                    "X-Access-Token": others_token,
                    "E2b-Sandbox-Id": sandbox.sandbox_id,
                    "E2b-Sandbox-Port": "49983",
                }
            ),
        )
        for call in (
            lambda: intruder.commands.run("true"),
            lambda: intruder.commands.list(),
            lambda: intruder.files.read("/etc/hostname"),
            lambda: intruder.files.list("/"),
            lambda: intruder.files.write("/tmp/x", "x"),
        ):
            with pytest.raises(AuthenticationException):
                await call()

    async def test_connect_gives_the_same_token(self, service, sandbox, token):
        async with service.api() as api:
            for path in ("/sandboxes", "/v2/sandboxes"):
                response = await api.post(f"{path}/{sandbox.sandbox_id}/connect", json={"timeout": 60})
                assert response.status_code == 200
                assert response.json()["envdAccessToken"] == token

    async def test_tokens_are_not_in_lists(self, service, sandbox, token):
        async with service.api() as api:
            for path in ("/sandboxes", "/v2/sandboxes"):
                assert token not in (await api.get(path)).text

    async def test_the_first_api_version_can_leave_it_open(self, service):
        async with service.api() as api:
            made = (await api.post("/sandboxes", json={"templateID": "base", "timeout": 60, "secure": False})).json()
            try:
                assert "envdAccessToken" not in made
                async with service.envd(made["sandboxID"], None) as client:
                    for what in ("read", "write", "list", "processes", "start"):
                        assert (await ask_agent(client, what)).status_code == 200
            finally:
                await api.delete(f"/sandboxes/{made['sandboxID']}")
