"""The server under test, as the environment describes it, and what is asked of it without an SDK."""

import json
import os
import subprocess
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

# Far above what any answer may take; a test that waits this long fails.
ANSWER_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class Service:
    api_url: str
    sandbox_url: str
    api_key: str

    @classmethod
    def from_environment(cls) -> "Service":
        return cls(
            api_url=os.environ["E2B_API_URL"].rstrip("/"),
            sandbox_url=os.environ["E2B_SANDBOX_URL"].rstrip("/"),
            api_key=os.environ["E2B_API_KEY"],
        )

    @property
    def listener(self) -> tuple[str, int]:
        """Host and port that sandbox traffic is sent to."""
        parts = urlsplit(self.sandbox_url)
        return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)

    @property
    def is_on_this_machine(self) -> bool:
        return urlsplit(self.api_url).hostname in ("localhost", "127.0.0.1", "::1")

    def api(self, api_key: str | None = None) -> httpx.AsyncClient:
        """A plain HTTP client of the control plane. An empty key sends no key at all."""
        key = self.api_key if api_key is None else api_key
        return httpx.AsyncClient(
            base_url=self.api_url,
            headers={"X-API-KEY": key} if key else {},
            timeout=ANSWER_TIMEOUT_SECONDS,
        )

    def envd(self, sandbox_id: str, token: str | None) -> httpx.AsyncClient:
        """A plain HTTP client of a sandbox's agent, routed by headers as the SDKs do it."""
        headers = {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": "49983"}
        if token is not None:
            headers["X-Access-Token"] = token
        return httpx.AsyncClient(base_url=self.sandbox_url, headers=headers, timeout=ANSWER_TIMEOUT_SECONDS)


def assert_error(response: httpx.Response, *statuses: int, names: str | None = None) -> dict:
    """The answer is an error of E2B's shape, with one of the statuses, and says the given word."""
    assert response.status_code in statuses, f"{response.status_code}: {response.text[:500]}"
    assert response.headers["content-type"].split(";")[0] == "application/json"
    body = response.json()
    assert body["code"] == response.status_code
    assert isinstance(body["message"], str) and body["message"]
    if names is not None:
        assert names.lower() in body["message"].lower(), body["message"]
    return body


class Operator:
    """Whoever runs the server: makes and revokes API keys with the `belljar` command."""

    def __init__(self, program: str, state_dir: str):
        self._program = program
        self._state_dir = state_dir

    @classmethod
    def from_environment(cls) -> "Operator | None":
        program, state_dir = os.environ.get("BELLJAR_BIN"), os.environ.get("BELLJAR_CONFORMANCE_STATE_DIR")
        return cls(program, state_dir) if program and state_dir else None

    def _run(self, *arguments: str) -> str:
        command = [self._program, *arguments, "--state-dir", self._state_dir]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout

    def create_key(self, team: str | None = None) -> dict:
        """A new API key, as `{"id": …, "key": "e2b_…"}`; for another team if one is named."""
        return json.loads(self._run("key", "create", "--json", *(["--team", team] if team else [])))

    def revoke_key(self, key_id: str) -> None:
        self._run("key", "revoke", key_id)
