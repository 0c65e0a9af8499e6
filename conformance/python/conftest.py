"""What the tests are given: the server, the SDK in one or both flavours, and sandboxes that are gone afterwards."""

import asyncio
from typing import Any, Awaitable, Callable

import pytest

from flavours import FLAVOURS
from service import Operator, Service

# Sandboxes die by themselves if a run is cut short.
SANDBOX_TIMEOUT_SECONDS = 600

Create = Callable[..., Awaitable[Any]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Both flavours, unless the module tests the server more than the SDK and names the one it takes."""
    if "Sandbox" in metafunc.fixturenames:
        flavours = getattr(metafunc.module, "SDK_FLAVOURS", tuple(FLAVOURS))
        metafunc.parametrize("Sandbox", flavours, indirect=True, scope="module")


@pytest.fixture(scope="session", autouse=True)
def service() -> Service:
    """Every test asks for it, so that a run without the three variables fails for that reason and no other."""
    return Service.from_environment()


@pytest.fixture(scope="session")
def operator() -> Operator:
    operator = Operator.from_environment()
    if operator is None:
        pytest.skip("needs the server's own command and state directory, which a foreign server doesn't give")
    return operator


@pytest.fixture(scope="module")
def Sandbox(request: pytest.FixtureRequest) -> Any:
    """`e2b.Sandbox` or `e2b.AsyncSandbox`; either way its methods are awaited."""
    return FLAVOURS[request.param]


@pytest.fixture(scope="module")
async def sandbox(Sandbox: Any) -> Any:
    """A sandbox that a module's tests share. They leave it usable and keep to paths of their own."""
    sandbox = await Sandbox.create(timeout=SANDBOX_TIMEOUT_SECONDS)
    yield sandbox
    await sandbox.kill()


@pytest.fixture
async def create(Sandbox: Any) -> Any:
    """Makes sandboxes for one test and kills them after it."""
    made = []

    async def create(*arguments: Any, **options: Any) -> Any:
        sandbox = await Sandbox.create(*arguments, **{"timeout": SANDBOX_TIMEOUT_SECONDS, **options})
        made.append(sandbox)
        return sandbox

    yield create
    await asyncio.gather(*(sandbox.kill() for sandbox in made))


@pytest.fixture
def directory(request: pytest.FixtureRequest) -> str:
    """A path below the shared sandbox's home that is this test's own; it doesn't exist yet."""
    name = "".join(character if character.isalnum() else "_" for character in request.node.name)
    return f"/home/user/tests/{name}"
