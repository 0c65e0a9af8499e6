"""Uses a belljar sandbox through E2B's own SDK (`pip install e2b`).

It is told where belljar is by E2B_API_URL, E2B_SANDBOX_URL and E2B_API_KEY; nothing in this file knows of belljar.
"""

import time
from contextlib import contextmanager

from e2b import Sandbox

FIZZBUZZ = """\
for n in range(1, 16):
    print("FizzBuzz" if n % 15 == 0 else "Fizz" if n % 3 == 0 else "Buzz" if n % 5 == 0 else n, end=" ")
"""


@contextmanager
def step(title):
    """Prints what is done, what came back, and how long it took."""
    print(f"\n{title}")
    started = time.perf_counter()
    yield
    print(f"    ({(time.perf_counter() - started) * 1000:.0f} ms)")


def show(text):
    for line in str(text).rstrip().splitlines():
        print(f"    {line}")


def main():
    with step("Create a sandbox"):
        sandbox = Sandbox.create(timeout=120)
        show(sandbox.sandbox_id)

    try:
        with step("Which system is this?"):
            show(sandbox.commands.run("uname --operating-system --kernel-release; . /etc/os-release; echo $PRETTY_NAME").stdout)

        with step("Who am I, where, and what do I have?"):
            show(sandbox.commands.run('echo "$(whoami) in $(pwd), $(nproc) CPUs"; free --mebi | head -n 2').stdout)

        with step("Run Python"):
            show(sandbox.commands.run("python3 -c 'import sys; print(sys.version)'").stdout)

        with step("Run Node.js"):
            show(sandbox.commands.run("node -e 'console.log(process.version, [3, 1, 2].toSorted())'").stdout)

        with step("Write a file, and run it"):
            sandbox.files.write("fizzbuzz.py", FIZZBUZZ)
            show(sandbox.commands.run("python3 fizzbuzz.py | tee result.txt").stdout)

        with step("Read what it wrote, and list the directory"):
            show(sandbox.files.read("result.txt"))
            show(", ".join(sorted(entry.name for entry in sandbox.files.list("."))))

        with step("Watch output while it comes"):
            sandbox.commands.run("for i in 1 2 3; do echo tick $i; sleep 0.2; done", on_stdout=show)
    finally:
        with step("Kill the sandbox"):
            show("gone" if sandbox.kill() else "it was gone already")


if __name__ == "__main__":
    main()
