#!/usr/bin/env python3
"""How long an agent waits: from `Sandbox.create()` to the output of its first command, through E2B's official SDK.

Needs a server in E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY; `make bench` starts one. Prints the distribution of each
part, in milliseconds.
"""

import statistics
import sys
import time

from e2b import Sandbox

ROUNDS = 40
# The first sandbox after a start of the server meets cold caches; it is printed, and left out of the distribution.
WARM_UP = 1


def main():
    parts = {"create": [], "first command": [], "create to first output": [], "second command": [], "kill": []}
    for number in range(WARM_UP + ROUNDS):
        moments = [time.perf_counter()]
        sandbox = Sandbox.create("base", timeout=60)
        try:
            moments.append(time.perf_counter())
            assert sandbox.commands.run("echo hello").stdout == "hello\n"
            moments.append(time.perf_counter())
            sandbox.commands.run("true")
            moments.append(time.perf_counter())
        finally:
            sandbox.kill()
        moments.append(time.perf_counter())
        create, first, second, kill = (1000 * (after - before) for before, after in zip(moments, moments[1:]))
        if number < WARM_UP:
            print(f"warm-up: create {create:.0f} ms, first command {first:.0f} ms")
            continue
        for name, value in zip(parts, (create, first, create + first, second, kill)):
            parts[name].append(value)
        print(f"\r{number + 1 - WARM_UP}/{ROUNDS}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"{'ms':24} {'p50':>7} {'p90':>7} {'max':>7}")
    for name, values in parts.items():
        deciles = statistics.quantiles(values, n=10)
        print(f"{name:24} {statistics.median(values):7.1f} {deciles[8]:7.1f} {max(values):7.1f}")


if __name__ == "__main__":
    main()
