"""What no SDK would send, over plain HTTP: each gets a clear error, and leaves nothing behind.

The client waits for an answer no longer than ANSWER_TIMEOUT_SECONDS, so that a hang fails.
"""

import asyncio
import uuid
from datetime import datetime

import httpx
import pytest

from service import assert_error

CREATE_PATHS = ["/sandboxes", "/v2/sandboxes"]
MEGABYTE = 1024 * 1024

# A create body, the word that the message has to name, and what may be answered.
REFUSED_BODIES = {
    "no template": ({}, "templateID", [400]),
    "template is null": ({"templateID": None}, "templateID", [400]),
    "template is a number": ({"templateID": 7}, "templateID", [400]),
    "template is empty": ({"templateID": ""}, "template", [400, 404]),
    "template is unknown": ({"templateID": "no-such-template"}, "no-such-template", [400, 404]),
    "template is a path": ({"templateID": "../../etc/passwd"}, "template", [400, 404]),
    "template is very long": ({"templateID": "x" * 100_000}, "template", [400, 404]),
    "timeout is negative": ({"templateID": "base", "timeout": -1}, "timeout", [400]),
    "timeout is text": ({"templateID": "base", "timeout": "60"}, "timeout", [400]),
    "timeout is a fraction": ({"templateID": "base", "timeout": 1.5}, "timeout", [400]),
    "timeout is beyond 32 bits": ({"templateID": "base", "timeout": 2**31}, "timeout", [400]),
    "timeout is beyond 64 bits": ({"templateID": "base", "timeout": 10**30}, "timeout", [400]),
    "metadata is a list": ({"templateID": "base", "metadata": ["a"]}, "metadata", [400]),
    "metadata value is a number": ({"templateID": "base", "metadata": {"a": 1}}, "metadata", [400]),
    "metadata is a megabyte": ({"templateID": "base", "metadata": {"a": "x" * MEGABYTE}}, "metadata", [400, 413]),
    "metadata has 100,000 keys": (
        {"templateID": "base", "metadata": {str(number): "" for number in range(100_000)}},
        "metadata",
        [400, 413],
    ),
    "variables are text": ({"templateID": "base", "envVars": "A=1"}, "envVars", [400]),
    "variable is a number": ({"templateID": "base", "envVars": {"A": 1}}, "envVars", [400]),
    "variable's name has an equals sign": ({"templateID": "base", "envVars": {"A=B": "1"}}, "envVars", [400]),
    "variable's name is empty": ({"templateID": "base", "envVars": {"": "1"}}, "envVars", [400]),
    "variable has a zero byte": ({"templateID": "base", "envVars": {"A": "1\0"}}, "envVars", [400]),
    "variables are a megabyte": ({"templateID": "base", "envVars": {"A": "x" * MEGABYTE}}, "envVars", [400, 413]),
    "an unknown field": ({"templateID": "base", "teleport": True}, "teleport", [400]),
}

# What E2B has and this server doesn't serve yet. Each must be refused by name: a sandbox that silently lacks what
# was asked for is worse than none.
UNSERVED_FIELDS = {
    "autoPause": {"autoPause": True},
    "autoResume": {"autoResume": {"enabled": True}},
    "mcp": {"mcp": {"browserbase": {}}},
    "iam": {"iam": {"tokens": {"aws": {"audience": "sts", "tokenType": "JWT-SVID"}}}},
    "volumeMounts": {"volumeMounts": [{"name": "data", "path": "/mnt"}]},
    "denyOut": {"network": {"denyOut": ["1.1.1.1"]}},
    "allowOut": {"network": {"allowOut": ["1.1.1.1"]}},
    "rules": {"network": {"rules": {"example.com": [{"transform": {"headers": {"A": "b"}}}]}}},
    "egressProxy": {"network": {"egressProxy": {"address": "proxy.example.com:1080"}}},
    "maskRequestHost": {"network": {"maskRequestHost": "localhost"}},
    "allowPublicTraffic": {"network": {"allowPublicTraffic": False}},
}

# What the SDKs say to ask for nothing special.
HARMLESS_FIELDS = {
    "kill at the end": {"autoPause": False, "autoResume": {"enabled": False}},
    "internet": {"allow_internet_access": True},
    "no volumes": {"volumeMounts": []},
    "no mcp": {"mcp": None},
    "public traffic": {"network": {"allowPublicTraffic": True}},
    "empty network": {"network": {}},
    "no variables": {"metadata": {}, "envVars": {}},
}


@pytest.fixture
async def api(service):
    async with service.api() as client:
        yield client


@pytest.fixture(autouse=True)
async def nothing_is_left(api):
    """The server answers as before, and no sandbox has come into being."""

    async def sandboxes():
        return {item["sandboxID"] for item in (await api.get("/v2/sandboxes")).json()}

    before = await sandboxes()
    yield
    assert (await api.get("/health")).is_success
    assert await sandboxes() <= before


class TestCreate:
    @pytest.mark.parametrize("path", CREATE_PATHS)
    @pytest.mark.parametrize("case", REFUSED_BODIES)
    async def test_refused(self, api, path, case):
        body, names, statuses = REFUSED_BODIES[case]
        response = await api.post(path, json=body)
        # A body that is too large as a whole is refused before anything in it is read.
        assert_error(response, *statuses, names=None if response.status_code == 413 else names)

    @pytest.mark.parametrize("path", CREATE_PATHS)
    @pytest.mark.parametrize("field", UNSERVED_FIELDS)
    async def test_unserved_field_is_named(self, api, path, field):
        response = await api.post(path, json={"templateID": "base", **UNSERVED_FIELDS[field]})
        assert_error(response, 400, 422, 501, names=field)

    @pytest.mark.parametrize("path", CREATE_PATHS)
    @pytest.mark.parametrize("case", HARMLESS_FIELDS)
    async def test_harmless_field_is_accepted(self, api, path, case):
        response = await api.post(path, json={"templateID": "base", "timeout": 60, **HARMLESS_FIELDS[case]})
        assert response.status_code == 201, response.text
        assert (await api.delete(f"/sandboxes/{response.json()['sandboxID']}")).status_code == 204

    @pytest.mark.parametrize("path", CREATE_PATHS)
    @pytest.mark.parametrize(
        "body", [b"", b"{", b"null", b"[]", b'"base"', b"\xff\xfe", b'{"templateID": "base",}', b"[" * 100_000]
    )
    async def test_no_json_object(self, api, path, body):
        response = await api.post(path, content=body, headers={"Content-Type": "application/json"})
        assert_error(response, 400)

    @pytest.mark.parametrize("path", CREATE_PATHS)
    async def test_fifty_megabytes(self, api, path):
        async def pieces():
            yield b'{"templateID": "'
            for _ in range(50):
                yield b"x" * MEGABYTE

        # Refused before it is read to the end: the connection may be cut while this side still sends.
        try:
            response = await api.post(path, content=pieces(), headers={"Content-Type": "application/json"})
        except (httpx.WriteError, httpx.ReadError):
            return
        assert_error(response, 400, 413)

    async def test_bad_idempotency_key(self, api):
        for key in ("", "x" * 256, "ü".encode()):
            response = await api.post("/v2/sandboxes", json={"templateID": "base"}, headers={"Idempotency-Key": key})
            assert_error(response, 400, names="idempotency")

    async def test_the_first_version_defaults_to_fifteen_seconds(self, api):
        made = (await api.post("/sandboxes", json={"templateID": "base"})).json()
        info = (await api.get(f"/sandboxes/{made['sandboxID']}")).json()
        lifetime = datetime.fromisoformat(info["endAt"]) - datetime.fromisoformat(info["startedAt"])
        await api.delete(f"/sandboxes/{made['sandboxID']}")
        assert 10 <= lifetime.total_seconds() <= 20


@pytest.fixture(scope="module")
async def sandbox_id(service):
    async with service.api() as api:
        made = (await api.post("/v2/sandboxes", json={"templateID": "base", "timeout": 300})).json()["sandboxID"]
        yield made
        await api.delete(f"/sandboxes/{made}")


class TestOneSandbox:
    @pytest.mark.parametrize("body", [{}, {"timeout": -1}, {"timeout": "x"}, {"timeout": None}, {"timeout": 10**30}])
    async def test_timeout(self, api, sandbox_id, body):
        assert_error(await api.post(f"/sandboxes/{sandbox_id}/timeout", json=body), 400, names="timeout")

    @pytest.mark.parametrize("body", [{"timeout": -1}, {"timeout": "x"}, {"timeout": 10**30}])
    async def test_connect(self, api, sandbox_id, body):
        for path in CREATE_PATHS:
            assert_error(await api.post(f"{path}/{sandbox_id}/connect", json=body), 400, names="timeout")

    async def test_first_connect_needs_a_timeout(self, api, sandbox_id):
        assert_error(await api.post(f"/sandboxes/{sandbox_id}/connect", json={}), 400, names="timeout")

    @pytest.mark.parametrize("body", [{"duration": -1}, {"duration": 3601}, {"duration": "x"}])
    async def test_refresh(self, api, sandbox_id, body):
        assert_error(await api.post(f"/sandboxes/{sandbox_id}/refreshes", json=body), 400, names="duration")

    async def test_refresh_extends(self, api, sandbox_id):
        before = (await api.get(f"/sandboxes/{sandbox_id}")).json()["endAt"]
        assert (await api.post(f"/sandboxes/{sandbox_id}/refreshes", json={"duration": 3000})).status_code == 204
        assert (await api.get(f"/sandboxes/{sandbox_id}")).json()["endAt"] > before

    async def test_it_still_runs(self, api, sandbox_id):
        assert (await api.get(f"/sandboxes/{sandbox_id}")).json()["state"] == "running"


class TestPaths:
    @pytest.mark.parametrize(
        "sandbox_id", ["inosuchsandboxatall0", "UPPER", "a", "x" * 5000, "%00", "..%2F..%2Fetc", "a%20b", "%F0%9F%AB%99"]
    )
    @pytest.mark.parametrize("method, suffix", [("GET", ""), ("DELETE", ""), ("POST", "/timeout")])
    async def test_no_such_sandbox(self, api, sandbox_id, method, suffix):
        body = {"timeout": 60} if suffix else None
        assert_error(await api.request(method, f"/sandboxes/{sandbox_id}{suffix}", json=body), 404)

    @pytest.mark.parametrize("path", ["/", "/nothing", "/v2", "/v9/sandboxes", "/sandboxes/", "/admin", "/init"])
    async def test_no_such_route(self, api, path):
        assert_error(await api.get(path), 404)

    @pytest.mark.parametrize("method, path", [("PUT", "/sandboxes"), ("PATCH", "/v2/sandboxes"), ("DELETE", "/sandboxes")])
    async def test_no_such_method(self, api, method, path):
        assert_error(await api.request(method, path), 404, 405)

    @pytest.mark.parametrize(
        "query, names",
        [
            ("limit=0", "limit"),
            ("limit=-1", "limit"),
            ("limit=101", "limit"),
            ("limit=ten", "limit"),
            ("state=sleeping", "state"),
            ("order=sideways", "order"),
            ("startedAfter=yesterday", "startedAfter"),
            ("nextToken=%00", "nextToken"),
            ("nextToken=" + "x" * 3000, "nextToken"),
        ],
    )
    async def test_list_query(self, api, query, names):
        assert_error(await api.get(f"/v2/sandboxes?{query}"), 400, names=names)

    async def test_list_of_the_first_version(self, api):
        mark = uuid.uuid4().hex
        made = (await api.post("/sandboxes", json={"templateID": "base", "timeout": 60, "metadata": {"m k": mark}})).json()
        listed = await api.get("/sandboxes", params={"metadata": f"m%20k={mark}"})
        assert [item["sandboxID"] for item in listed.json()] == [made["sandboxID"]]
        assert (await api.get("/sandboxes", params={"metadata": "m%20k=other"})).json() == []
        await api.delete(f"/sandboxes/{made['sandboxID']}")


class TestConnections:
    async def test_enormous_head(self, api):
        # The connection may be cut while this side still sends.
        try:
            response = await api.get("/v2/sandboxes", headers={"X-Large": "x" * 1_000_000})
        except (httpx.WriteError, httpx.ReadError):
            return
        assert 400 <= response.status_code < 500

    @pytest.mark.parametrize(
        "sent", [b"\0" * 4096, b"GET", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", b"POST /sandboxes HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n"]
    )
    async def test_what_is_no_http(self, service, sent):
        reader, writer = await asyncio.open_connection(*service.listener)
        # Whatever it says, it ends the connection, perhaps while this side still sends.
        try:
            writer.write(sent)
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 30)
        except TimeoutError:
            raise
        except OSError:
            pass
        writer.close()

    async def test_a_thousand_silent_connections(self, api, service):
        connections = await asyncio.gather(*(asyncio.open_connection(*service.listener) for _ in range(1000)))
        try:
            assert (await api.get("/v2/sandboxes")).status_code == 200
        finally:
            for _, writer in connections:
                writer.close()
