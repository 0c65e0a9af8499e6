"""A sandbox against the machine and its neighbours: what it sees, and what its limits hold."""

import asyncio
import os
import socket
import time

import pytest
from e2b import CommandExitException, NotEnoughSpaceException, SandboxException, TimeoutException

from waiting import eventually

# The runtime is under test, not the SDK.
SDK_FLAVOURS = ("async",)

MEBIBYTE = 1024 * 1024

# Filling a larger disk would need as much room on the machine.
LARGEST_DISK_TO_FILL_MIB = 2048

# Every bomb here has an end of its own, well beyond its limit: a limit that doesn't hold fails the test and not the host.

# Forks until it may not, and lets the children linger so that the sandbox stays full for a while. In C, because a thousand
# copies of an interpreter meet the limit of memory first.
FORK_UNTIL_REFUSED = """
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>
int main(void) {
    int children = 0;
    for (; children < 4000; children++) {
        pid_t child = fork();
        if (child < 0) break;
        if (child == 0) { sleep(6); _exit(0); }
    }
    printf("%d\\n", children);
    fflush(stdout);
    while (wait(NULL) > 0) ;
}
"""

# Every page is written to: memory only asked for costs nothing.
ALLOCATE_UNTIL_REFUSED = """
import sys
hoard = []
while len(hoard) * 16 < 3 * int(sys.argv[1]):
    hoard.append(b"x" * (16 * 1024 * 1024))
"""

ALLOCATE_128_MIB_AND_KEEP_IT = """
import time
hoard = b"x" * (128 * 1024 * 1024)
time.sleep(600)
"""


async def detail(service, sandbox):
    async with service.api() as api:
        return (await api.get(f"/sandboxes/{sandbox.sandbox_id}")).json()


async def still_works(sandbox):
    try:
        return (await sandbox.commands.run("echo alive", timeout=10)).stdout == "alive\n"
    except SandboxException:
        return False


async def assert_well_or_ended(sandbox, after):
    """It runs commands again, or it is gone, and says so: what it must not be is in between."""

    async def is_settled():
        return await still_works(sandbox) or not await sandbox.is_running()

    await eventually(is_settled, f"the sandbox is well or gone after {after}", 60)


async def assert_gets_well(sandbox, after):
    await eventually(lambda: still_works(sandbox), f"the sandbox runs commands again after {after}", 60)


class TestSight:
    async def test_processors(self, sandbox):
        count = (await sandbox.get_info()).cpu_count
        assert (await sandbox.commands.run("nproc")).stdout == f"{count}\n"
        assert (await sandbox.commands.run("python3 -c 'import os; print(os.cpu_count())'")).stdout == f"{count}\n"

    async def test_memory(self, sandbox):
        promised = (await sandbox.get_info()).memory_mb
        seen = int((await sandbox.commands.run("free -m | awk '/^Mem:/ {print $2}'")).stdout)
        assert 0.8 * promised <= seen <= promised

    async def test_hostname(self, sandbox):
        name = (await sandbox.commands.run("hostname")).stdout.strip()
        assert name and name != socket.gethostname()
        assert (await sandbox.commands.run(f"getent hosts {name}")).stdout
        assert name in await sandbox.files.read("/etc/hosts")

    async def test_clock(self, sandbox):
        inside = float((await sandbox.commands.run("date +%s.%N")).stdout)
        assert abs(inside - time.time()) < 30

    async def test_processes_are_its_own(self, sandbox):
        result = await sandbox.commands.run("ls -d /proc/[0-9]* | wc -l; cat /proc/[0-9]*/cmdline | tr '\\0' ' '", user="root")
        count, _, commands = result.stdout.partition("\n")
        assert int(count) < 30
        assert "belljar up" not in commands and "runsc" not in commands

    async def test_files_are_its_own(self, service, sandbox, tmp_path):
        if not service.is_on_this_machine:
            pytest.skip("no file of the server's machine is known here")
        secret = tmp_path / "secret"
        secret.write_text("of the host")
        secret.chmod(0o644)
        assert not await sandbox.files.exists(str(secret))
        result = await sandbox.commands.run("ls /dev", user="root")
        devices = result.stdout.split()
        assert "null" in devices
        assert [name for name in devices if name.startswith(("sd", "vd", "nvme", "loop", "kvm", "mem"))] == []

    async def test_the_root_of_one_is_not_the_others(self, create):
        one, other = await create(), await create()
        await one.files.write("/etc/marked", "by one", user="root")
        await one.commands.run("rm -rf /usr/bin/git", user="root")
        assert not await other.files.exists("/etc/marked")
        assert (await other.commands.run("git --version")).exit_code == 0
        fresh = await create()
        assert (await fresh.commands.run("git --version")).exit_code == 0

    async def test_random_numbers_differ(self, create):
        one, other = await create(), await create()
        for command in ("od -An -tx1 -N16 /dev/urandom", "python3 -c 'import secrets; print(secrets.token_hex())'", "openssl rand -hex 16"):
            results = await asyncio.gather(*(sandbox.commands.run(command) for sandbox in (one, other)))
            assert results[0].stdout != results[1].stdout


class TestLimits:
    async def fork_until_refused(self, sandbox):
        await sandbox.files.write("/tmp/bomb.c", FORK_UNTIL_REFUSED)
        await sandbox.commands.run("cc -o /tmp/bomb /tmp/bomb.c")
        return int((await sandbox.commands.run("/tmp/bomb", user="root", timeout=240)).stdout)

    @pytest.mark.timeout(300)
    async def test_fork_bomb_as_root(self, create):
        sandbox, neighbour = await create(), await create()
        bomb = asyncio.create_task(self.fork_until_refused(sandbox))
        await asyncio.sleep(3)
        # While it is full: the agent still answers, and the neighbour notices nothing.
        assert await sandbox.is_running()
        assert await still_works(neighbour)
        assert 100 < await bomb <= 1100
        await assert_gets_well(sandbox, "a fork bomb")

    @pytest.mark.timeout(300)
    async def test_fork_bomb_that_never_stops(self, create):
        sandbox, neighbour = await create(), await create()
        # This one has no end, so first make sure that there is a limit.
        assert await self.fork_until_refused(sandbox) <= 1100
        await assert_gets_well(sandbox, "a fork bomb")
        await sandbox.commands.run("bomb() { bomb | bomb & }; bomb", user="root", background=True, timeout=0)
        await asyncio.sleep(5)
        assert await sandbox.is_running()
        assert await still_works(neighbour)
        assert await sandbox.kill()
        assert not await sandbox.is_running()

    @pytest.mark.timeout(300)
    async def test_memory_hog(self, create):
        sandbox, neighbour = await create(), await create()
        promised = (await sandbox.get_info()).memory_mb
        await sandbox.files.write("/tmp/hog.py", ALLOCATE_UNTIL_REFUSED)
        with pytest.raises((CommandExitException, TimeoutException)):
            await sandbox.commands.run(f"python3 /tmp/hog.py {promised}", user="root", timeout=200)
        await assert_well_or_ended(sandbox, "a memory hog")
        assert await still_works(neighbour)

    @pytest.mark.timeout(300)
    async def test_memory_hog_in_pieces(self, create):
        # No single process is large.
        sandbox, neighbour = await create(), await create()
        await sandbox.files.write("hog.py", ALLOCATE_128_MIB_AND_KEEP_IT)
        await sandbox.commands.run("for i in $(seq 40); do python3 hog.py & done; wait", background=True, timeout=0)
        await asyncio.sleep(20)
        await assert_well_or_ended(sandbox, "many small hogs")
        assert await still_works(neighbour)

    @pytest.mark.timeout(300)
    @pytest.mark.parametrize("place", ["/dev/shm", "/tmp", "/run"])
    async def test_memory_that_looks_like_a_file(self, create, place):
        sandbox, neighbour = await create(), await create()
        promised = (await sandbox.get_info()).memory_mb
        fill = f"head -c {2 * promised}M /dev/zero > {place}/filler; rm -f {place}/filler"
        try:
            await sandbox.commands.run(fill, user="root", timeout=120)
        except (CommandExitException, TimeoutException):
            pass  # being refused is as good as having room on the disk
        await assert_well_or_ended(sandbox, f"filling {place}")
        assert await still_works(neighbour)

    @pytest.mark.timeout(600)
    async def test_disk_filler(self, service, create):
        sandbox, neighbour = await create(), await create()
        size = (await detail(service, sandbox))["diskSizeMB"]
        if size > LARGEST_DISK_TO_FILL_MIB:
            pytest.skip(f"the sandbox's disk has {size} MiB; configure {LARGEST_DISK_TO_FILL_MIB} MiB or less for this test")
        with pytest.raises(CommandExitException, match="No space left on device"):
            await sandbox.commands.run(f"dd if=/dev/zero of=filler bs=1M count={2 * size}", timeout=500)
        written = (await sandbox.files.get_info("filler")).size / MEBIBYTE
        assert 0.5 * size < written < size * 1.05
        with pytest.raises(NotEnoughSpaceException):
            await sandbox.files.write("more", os.urandom(32 * MEBIBYTE))
        assert await still_works(sandbox)
        await sandbox.commands.run("rm -f filler more")
        await sandbox.files.write("after", "room again")
        assert await sandbox.files.read("after") == "room again"
        assert await still_works(neighbour)

    async def test_busy_processors(self, create):
        sandbox, neighbour = await create(), await create()
        count = 4 * (await sandbox.get_info()).cpu_count
        for _ in range(count):
            await sandbox.commands.run("while :; do :; done", background=True, timeout=0)
        await assert_gets_well(neighbour, "its neighbour keeps the processors busy")
        await assert_gets_well(sandbox, "it keeps its own processors busy")

    async def test_many_open_files(self, create):
        sandbox = await create()
        script = "import os\nfiles = []\ntry:\n    while len(files) < 2_000_000: files.append(os.dup(0))\nexcept OSError as error:\n    print(error.errno)"
        result = await sandbox.commands.run(f"python3 -c '{script}'", user="root", timeout=90)
        assert result.stdout == "24\n"  # EMFILE, and long before the number tried
        assert await still_works(sandbox)


class TestManySandboxes:
    @pytest.mark.timeout(300)
    async def test_each_has_its_own(self, create):
        sandboxes = await asyncio.gather(*(create() for _ in range(5)))
        await asyncio.gather(*(box.files.write("id", box.sandbox_id) for box in sandboxes))
        results = await asyncio.gather(*(box.commands.run("cat id") for box in sandboxes))
        assert [result.stdout for result in results] == [box.sandbox_id for box in sandboxes]
