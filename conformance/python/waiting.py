"""Waiting for what happens on its own."""

import asyncio
import time
from typing import Awaitable, Callable


async def eventually(condition: Callable[[], Awaitable[bool]], what: str, within_seconds: float = 30) -> None:
    """Poll until the condition holds; fail, and say what did not happen, if it never does."""
    deadline = time.monotonic() + within_seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not within {within_seconds} s: {what}"
        await asyncio.sleep(0.1)
