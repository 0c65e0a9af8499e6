"""The way from outside to a port of a sandbox, and what is answered where there is none."""

import asyncio
import contextlib
import hashlib
from pathlib import Path

import httpx
import pytest
from websockets.asyncio.client import connect as connect_websocket

from service import ANSWER_TIMEOUT_SECONDS
from waiting import eventually

# The proxy is under test, not the SDK; both flavours ask it the same way.
SDK_FLAVOURS = ("async",)

GUEST_SERVER = (Path(__file__).parent / "guest" / "web_server.py").read_text()
PORT = 8080

# The agent's routes that are the server's alone.
INTERNAL_ROUTES = ["/init", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw"]


async def start_web_server(sandbox, port=PORT):
    await sandbox.files.write("web_server.py", GUEST_SERVER)
    await sandbox.commands.run(f"python3 web_server.py {port}", background=True, timeout=0)

    async def listens():
        result = await sandbox.commands.run(f"curl -s -o /dev/null -w '%{{http_code}}' http://127.0.0.1:{port}/echo || true")
        return result.stdout == "200"

    await eventually(listens, "the guest's web server answers inside")


@pytest.fixture(scope="module")
async def web(sandbox):
    """A sandbox with a web server on PORT."""
    await start_web_server(sandbox)
    return sandbox


@pytest.fixture
async def client(service, web):
    """A client whose requests name the sandbox in `Host`, as a browser's would."""
    async with httpx.AsyncClient(
        base_url=service.sandbox_url, headers={"Host": web.get_host(PORT)}, timeout=ANSWER_TIMEOUT_SECONDS
    ) as client:
        yield client


def by_headers(sandbox_id, port):
    return {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": str(port)}


def assert_unreachable(response, says):
    """The answer by which SDKs tell a dead sandbox from a closed port."""
    assert response.status_code == 502
    body = response.json()
    assert body["code"] == 502
    assert says in body["message"]


class TestRouting:
    async def test_by_host(self, client, web):
        seen = (await client.get("/echo?a=1&b=%2Fx%20y")).json()
        assert (seen["method"], seen["path"]) == ("GET", "/echo?a=1&b=%2Fx%20y")
        assert dict(seen["headers"])["host"] == web.get_host(PORT)

    async def test_by_headers(self, service, web):
        async with httpx.AsyncClient(base_url=service.sandbox_url) as client:
            response = await client.get("/echo", headers=by_headers(web.sandbox_id, PORT))
        assert response.headers["x-from-guest"] == "yes"

    async def test_host_is_matched_without_case(self, service, web):
        async with httpx.AsyncClient(base_url=service.sandbox_url) as client:
            response = await client.get("/echo", headers={"Host": web.get_host(PORT).upper()})
        assert response.headers["x-from-guest"] == "yes"

    async def test_the_apis_paths_belong_to_the_guest_here(self, client):
        for path in ("/health", "/sandboxes", "/v2/sandboxes", "/templates"):
            response = await client.get(path)
            assert (response.status_code, response.text) == (404, "the guest has no such page"), path

    async def test_two_ports(self, service, web):
        await start_web_server(web, port=8081)
        async with httpx.AsyncClient(base_url=service.sandbox_url) as client:
            for port in (PORT, 8081):
                seen = (await client.get("/echo", headers={"Host": web.get_host(port)})).json()
                assert dict(seen["headers"])["host"].startswith(f"{port}-")

    async def test_no_key_and_no_token_are_asked_for(self, client):
        assert (await client.get("/echo")).status_code == 200


class TestHttp:
    @pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
    async def test_methods(self, client, method):
        response = await client.request(method, "/echo", content=b"body" if method != "GET" else None)
        assert response.json()["method"] == method
        assert response.json()["body_length"] == (0 if method == "GET" else 4)

    async def test_head(self, client):
        response = await client.head("/bytes?count=1000")
        assert (response.status_code, response.headers["content-length"], response.content) == (200, "1000", b"")

    @pytest.mark.parametrize("status", [201, 204, 301, 304, 404, 418, 429, 500, 502, 503])
    async def test_status_is_the_guests(self, client, status):
        response = await client.get(f"/status?code={status}")
        assert response.status_code == status
        assert response.content == b""

    async def test_headers_pass_both_ways(self, client):
        response = await client.get("/echo", headers=[("X-Twice", "1"), ("X-Twice", "2"), ("Authorization", "Bearer mine")])
        headers = response.json()["headers"]
        assert [value for name, value in headers if name == "x-twice"] in (["1", "2"], ["1, 2"])
        assert ["authorization", "Bearer mine"] in headers
        assert (await client.get("/cookies")).headers.get_list("set-cookie") == ["a=1", "b=2"]

    async def test_large_upload(self, client):
        data = bytes(range(256)) * 80_000
        seen = (await client.post("/echo", content=data)).json()
        assert (seen["body_length"], seen["body_sha256"]) == (len(data), hashlib.sha256(data).hexdigest())

    async def test_upload_of_unknown_length(self, client):
        async def pieces():
            for _ in range(50):
                yield b"x" * 10_000

        assert (await client.post("/echo", content=pieces())).json()["body_length"] == 500_000

    async def test_large_download(self, client):
        assert len((await client.get("/bytes?count=20000000")).content) == 20_000_000

    async def test_http2(self, service, web):
        async with httpx.AsyncClient(
            base_url=service.sandbox_url, http1=False, http2=True, timeout=ANSWER_TIMEOUT_SECONDS
        ) as client:
            for headers in (by_headers(web.sandbox_id, PORT), {"Host": web.get_host(PORT)}):
                response = await client.post("/echo", content=b"x" * 100_000, headers=headers)
                assert response.http_version == "HTTP/2"
                assert response.json()["body_length"] == 100_000

    async def test_a_hundred_at_once(self, client):
        responses = await asyncio.gather(*(client.get(f"/echo?{number}") for number in range(100)))
        assert [response.json()["path"] for response in responses] == [f"/echo?{number}" for number in range(100)]


class TestStreams:
    async def test_events_are_not_held_back(self, client):
        # The guest sends an event only after the one before it has arrived here and was answered.
        async with client.stream("GET", "/events?count=5") as response:
            assert response.headers["content-type"] == "text/event-stream"
            seen = []
            async for line in response.aiter_lines():
                if line:
                    seen.append(line)
                    await client.get("/continue")
        assert seen == [f"data: {number}" for number in range(5)]

    async def test_leaving_a_stream(self, client):
        for _ in range(20):
            async with client.stream("GET", "/forever") as response:
                await anext(response.aiter_lines())
        assert (await client.get("/echo")).status_code == 200

    async def test_stream_ends_with_the_sandbox(self, service, create):
        sandbox = await create()
        await start_web_server(sandbox)
        async with httpx.AsyncClient(base_url=service.sandbox_url, timeout=ANSWER_TIMEOUT_SECONDS) as client:
            async with client.stream("GET", "/forever", headers=by_headers(sandbox.sandbox_id, PORT)) as response:
                lines = response.aiter_lines()
                await anext(lines)
                await sandbox.kill()
                # A stream that merely stalls runs into the client's timeout, and that error is not caught here.
                with contextlib.suppress(httpx.RemoteProtocolError, httpx.ReadError):
                    async for _ in lines:
                        pass

    async def test_websocket(self, service, web):
        host, port = service.listener
        for routing in ({}, by_headers(web.sandbox_id, PORT)):
            # The URI gives the Host header, host and port where to connect to.
            authority = f"{host}:{port}" if routing else web.get_host(PORT)
            async with connect_websocket(
                f"ws://{authority}/websocket", host=host, port=port, additional_headers=routing, compression=None,
                max_size=None,
            ) as websocket:
                await websocket.send("Grüße")
                assert await websocket.recv() == "Grüße"
                await websocket.send(b"\x00\xff" * 500_000)
                assert await websocket.recv() == b"\x00\xff" * 500_000
                await asyncio.wait_for(await websocket.ping(), 30)
            assert websocket.close_code == 1000

    async def test_twenty_websockets(self, service, web):
        host, port = service.listener

        async def chat(number):
            async with connect_websocket(
                f"ws://{web.get_host(PORT)}/websocket", host=host, port=port, compression=None
            ) as websocket:
                for turn in range(20):
                    await websocket.send(f"{number}.{turn}")
                    assert await websocket.recv() == f"{number}.{turn}"

        await asyncio.gather(*(chat(number) for number in range(20)))


class TestNobodyThere:
    async def ask(self, service, headers, path="/"):
        async with httpx.AsyncClient(base_url=service.sandbox_url, timeout=ANSWER_TIMEOUT_SECONDS) as client:
            return await client.get(path, headers=headers)

    async def test_closed_port(self, service, web):
        for headers in (by_headers(web.sandbox_id, 9999), {"Host": web.get_host(9999)}):
            assert_unreachable(await self.ask(service, headers), "port is not open")

    async def test_killed_sandbox(self, service, create):
        sandbox = await create()
        await sandbox.kill()
        for port in (49983, PORT):
            for headers in (by_headers(sandbox.sandbox_id, port), {"Host": sandbox.get_host(port)}):
                assert_unreachable(await self.ask(service, headers), "was not found")

    async def test_sandbox_that_never_was(self, service, web):
        assert_unreachable(await self.ask(service, by_headers("inosuchsandboxatall0", PORT)), "was not found")
        host = web.get_host(PORT).replace(web.sandbox_id, "inosuchsandboxatall0")
        assert_unreachable(await self.ask(service, {"Host": host}), "was not found")

    @pytest.mark.parametrize("port", ["0", "65536", "99999999999999999999", "-1", "ssh", ""])
    async def test_port_that_is_none(self, service, web, port):
        response = await self.ask(service, by_headers(web.sandbox_id, port))
        assert response.status_code == 400
        assert response.json()["code"] == 400

    @pytest.mark.parametrize("sandbox_id", ["../../etc/passwd", "a" * 5000, "A.B.C", "%00"])
    async def test_id_that_is_none(self, service, web, sandbox_id):
        response = await self.ask(service, by_headers(sandbox_id, PORT))
        assert response.status_code in (400, 502)
        assert response.json()["code"] == response.status_code


class TestAgent:
    @pytest.mark.parametrize("path", INTERNAL_ROUTES)
    async def test_internal_routes_are_closed(self, service, web, path):
        info = await self.detail(service, web)
        for method in ("GET", "POST"):
            for spelling in (path, path + "/", "/" + path, path.upper(), path + "?x=1", path.replace("/", "/%2e/", 1)):
                async with service.envd(web.sandbox_id, info["envdAccessToken"]) as client:
                    # Sent as it stands: httpx would tidy the path up.
                    request = client.build_request(method, "/", json={"accessToken": "taken over"})
                    request.url = request.url.copy_with(raw_path=spelling.encode())
                    response = await client.send(request)
                assert 400 <= response.status_code < 500, f"{method} {spelling}: {response.status_code}"
        assert (await web.commands.run("echo unharmed")).stdout == "unharmed\n"

    async def detail(self, service, sandbox):
        async with service.api() as api:
            return (await api.get(f"/sandboxes/{sandbox.sandbox_id}")).json()

    async def test_health(self, service, web):
        async with service.envd(web.sandbox_id, None) as client:
            assert (await client.get("/health")).status_code == 204
