"""`sandbox.commands`: output, exit codes, input, users, timeouts, many at once."""

import asyncio
import hashlib
import json
import uuid

import pytest
from e2b import (
    AuthenticationException,
    CommandExitException,
    InvalidArgumentException,
    NotFoundException,
    TimeoutException,
)

from waiting import eventually


async def is_running(sandbox, marker):
    """Whether a process with the marker on its command line is left; the brackets keep pgrep from finding itself."""
    result = await sandbox.commands.run(f"pgrep -f '[{marker[0]}]{marker[1:]}' || true")
    return result.stdout != ""


class TestOutput:
    async def test_stdout_and_stderr(self, sandbox):
        result = await sandbox.commands.run("echo out; echo err >&2")
        assert (result.stdout, result.stderr, result.exit_code, result.error) == ("out\n", "err\n", 0, None)

    async def test_no_output(self, sandbox):
        result = await sandbox.commands.run("true")
        assert (result.stdout, result.stderr) == ("", "")

    async def test_chunks_arrive_while_the_command_runs(self, sandbox, directory):
        loop, ready, chunks = asyncio.get_running_loop(), asyncio.Event(), []

        def on_stdout(chunk):
            chunks.append(chunk)
            loop.call_soon_threadsafe(ready.set)

        await sandbox.files.make_dir(directory)
        # The command waits for a file that is written only when its first line has come through.
        run = asyncio.create_task(
            sandbox.commands.run(
                "echo first; until [ -e go ]; do sleep 0.05; done; echo second", cwd=directory, on_stdout=on_stdout
            )
        )
        await asyncio.wait_for(ready.wait(), 30)
        await sandbox.files.write(f"{directory}/go", "")
        assert (await run).stdout == "first\nsecond\n"
        assert "".join(chunks) == "first\nsecond\n"

    async def test_callbacks_are_called_in_order(self, sandbox):
        out, err = [], []
        result = await sandbox.commands.run(
            "for i in $(seq 200); do echo out $i; echo err $i >&2; done", on_stdout=out.append, on_stderr=err.append
        )
        assert "".join(out) == result.stdout == "".join(f"out {i}\n" for i in range(1, 201))
        assert "".join(err) == result.stderr == "".join(f"err {i}\n" for i in range(1, 201))

    async def test_ten_megabytes_without_loss(self, sandbox):
        lines = "".join(f"{number}\n" for number in range(1, 1_480_000))
        expected = hashlib.sha256(lines.encode()).hexdigest()
        result = await sandbox.commands.run("seq 1479999")
        assert len(result.stdout) == len(lines) > 10 * 1024 * 1024
        assert hashlib.sha256(result.stdout.encode()).hexdigest() == expected

    async def test_both_streams_full(self, sandbox):
        # A command that fills one pipe while nobody reads it would hang.
        result = await sandbox.commands.run("seq 200000 >&2; seq 200000")
        assert result.stdout == result.stderr
        assert result.stdout.endswith("\n200000\n")

    async def test_character_split_between_chunks(self, sandbox):
        result = await sandbox.commands.run(
            r"printf '\xe2'; sleep 0.3; printf '\x82'; sleep 0.3; printf '\xac'; printf '\xf0\x9f' >&2; sleep 0.3; printf '\xab\x99' >&2"
        )
        assert (result.stdout, result.stderr) == ("€", "🫙")

    async def test_binary_noise(self, sandbox, directory):
        await sandbox.files.make_dir(directory)
        result = await sandbox.commands.run("head -c 300000 /dev/urandom | tee noise", cwd=directory)
        noise = bytes(await sandbox.files.read(f"{directory}/noise", format="bytes"))
        assert len(noise) == 300_000
        assert result.stdout == noise.decode(errors="replace")

    async def test_output_can_be_dropped(self, sandbox):
        chunks = []
        result = await sandbox.commands.run("echo heard", on_stdout=chunks.append, retain_output=False)
        assert chunks == ["heard\n"]
        assert result.stdout is None


class TestExit:
    async def test_exit_code(self, sandbox):
        with pytest.raises(CommandExitException) as exit:
            await sandbox.commands.run("echo out; echo err >&2; exit 42")
        assert (exit.value.exit_code, exit.value.stdout, exit.value.stderr) == (42, "out\n", "err\n")

    async def test_unknown_command(self, sandbox):
        with pytest.raises(CommandExitException, match="command not found") as exit:
            await sandbox.commands.run("no-such-command")
        assert exit.value.exit_code == 127

    async def test_death_by_signal(self, sandbox):
        with pytest.raises(CommandExitException) as exit:
            await sandbox.commands.run("echo last words; kill -KILL $$")
        assert exit.value.stdout == "last words\n"
        assert exit.value.exit_code != 0
        assert exit.value.error

    async def test_quoting_is_the_shells(self, sandbox):
        result = await sandbox.commands.run("""printf '%s|' "a  b" 'c"d' $((6 * 7)) "€"; # a comment""")
        assert result.stdout == 'a  b|c"d|42|€|'

    async def test_login_shell(self, sandbox):
        assert (await sandbox.commands.run("shopt -q login_shell && echo yes")).stdout == "yes\n"


class TestBackground:
    async def test_wait(self, sandbox):
        handle = await sandbox.commands.run("sleep 0.5; echo done", background=True)
        assert handle.pid > 0
        assert (await handle.wait()).stdout == "done\n"

    async def test_wait_tells_the_exit_code(self, sandbox):
        handle = await sandbox.commands.run("exit 3", background=True)
        with pytest.raises(CommandExitException) as exit:
            await handle.wait()
        assert exit.value.exit_code == 3

    async def test_kill(self, sandbox):
        handle = await sandbox.commands.run("sleep 987001", background=True)
        assert await handle.kill() is True
        with pytest.raises(CommandExitException) as exit:
            await handle.wait()
        assert exit.value.exit_code != 0
        assert not await is_running(sandbox, "sleep 987001")
        assert await sandbox.commands.kill(handle.pid) is False

    async def test_kill_by_pid(self, sandbox):
        handle = await sandbox.commands.run("sleep 987002", background=True)
        assert await sandbox.commands.kill(handle.pid) is True
        with pytest.raises(CommandExitException):
            await handle.wait()

    async def test_listed_while_running(self, sandbox):
        command = f"sleep 987003 # {uuid.uuid4().hex}"
        handle = await sandbox.commands.run(command, background=True, cwd="/tmp", envs={"MARK": "x"})
        listed = {process.pid: process for process in await sandbox.commands.list()}
        process = listed[handle.pid]
        assert (process.cmd, process.args) == ("/bin/bash", ["-l", "-c", command])
        assert (process.cwd, process.envs["MARK"]) == ("/tmp", "x")
        await handle.kill()

        async def is_unlisted():
            return handle.pid not in [process.pid for process in await sandbox.commands.list()]

        await eventually(is_unlisted, "a killed command leaves the list")

    async def test_disconnect_and_connect(self, sandbox, directory):
        await sandbox.files.make_dir(directory)
        handle = await sandbox.commands.run(
            "until [ -e go ]; do sleep 0.05; done; echo late words; exit 5", background=True, cwd=directory
        )
        await handle.disconnect()
        again = await sandbox.commands.connect(handle.pid)
        assert again.pid == handle.pid
        await sandbox.files.write(f"{directory}/go", "")
        with pytest.raises(CommandExitException) as exit:
            await again.wait()
        assert (exit.value.exit_code, exit.value.stdout) == (5, "late words\n")

    async def test_two_listeners(self, sandbox, directory):
        await sandbox.files.make_dir(directory)
        handle = await sandbox.commands.run(
            "until [ -e go ]; do sleep 0.05; done; seq 1000", background=True, cwd=directory
        )
        other = await sandbox.commands.connect(handle.pid)
        await sandbox.files.write(f"{directory}/go", "")
        first, second = await asyncio.gather(handle.wait(), other.wait())
        assert first.stdout == second.stdout
        assert first.stdout.endswith("1000\n")

    async def test_unknown_pid(self, sandbox):
        assert await sandbox.commands.kill(4_000_000) is False
        with pytest.raises(NotFoundException):
            await sandbox.commands.connect(4_000_000)
        with pytest.raises(NotFoundException):
            await sandbox.commands.send_stdin(4_000_000, "hello")

    async def test_processes_of_the_agent_itself_cannot_be_killed(self, sandbox):
        assert await sandbox.commands.kill(1) is False
        assert await sandbox.is_running()


class TestInput:
    async def test_without_stdin_the_command_reads_an_end(self, sandbox):
        assert (await sandbox.commands.run("cat; echo end")).stdout == "end\n"

    async def test_send_and_close(self, sandbox):
        handle = await sandbox.commands.run("cat", background=True, stdin=True)
        await sandbox.commands.send_stdin(handle.pid, "one\n")
        await handle.send_stdin("zwei €\n")
        await handle.send_stdin(b"\x33\n")
        await handle.close_stdin()
        assert (await handle.wait()).stdout == "one\nzwei €\n3\n"

    async def test_command_answers_before_the_end(self, sandbox):
        handle = await sandbox.commands.run("read name; echo hello $name; read name; echo bye $name", background=True, stdin=True)
        await handle.send_stdin("Ada\n")
        await handle.send_stdin("Grace\n")
        assert (await handle.wait()).stdout == "hello Ada\nbye Grace\n"

    async def test_a_megabyte(self, sandbox):
        data = "".join(f"{number:07}\n" for number in range(131_072))
        handle = await sandbox.commands.run("sha256sum", background=True, stdin=True)
        for start in range(0, len(data), 65_536):
            await handle.send_stdin(data[start : start + 65_536])
        await handle.close_stdin()
        assert (await handle.wait()).stdout.split()[0] == hashlib.sha256(data.encode()).hexdigest()

    async def test_stream_of_input(self, Sandbox, sandbox):
        pieces = [f"{number}\n" for number in range(500)]
        handle = await sandbox.commands.run("head -n 500 | sha256sum", background=True, stdin=True)
        # The one method whose shape differs: the blocking flavour takes the pieces, the other returns a handle for them.
        if isinstance(Sandbox, type):
            async with sandbox.commands.stream_input(handle.pid) as stream:
                for piece in pieces:
                    await stream.send(piece)
        else:
            await asyncio.to_thread(sandbox.commands.stream_input, handle.pid, pieces)
        assert (await handle.wait()).stdout.split()[0] == hashlib.sha256("".join(pieces).encode()).hexdigest()

    async def test_command_that_never_reads(self, sandbox):
        handle = await sandbox.commands.run("sleep 987004", background=True, stdin=True)
        await handle.send_stdin("nobody listens")
        assert await handle.kill()


class TestSurroundings:
    async def test_default_user(self, sandbox):
        result = await sandbox.commands.run("whoami; pwd; echo $HOME $USER $LOGNAME; id -un")
        assert result.stdout == "user\n/home/user\n/home/user user user\nuser\n"

    async def test_root(self, sandbox):
        result = await sandbox.commands.run("whoami; id -u; echo $HOME; touch /etc/by-root", user="root")
        assert result.stdout == "root\n0\n/root\n"

    async def test_user_is_not_root(self, sandbox):
        with pytest.raises(CommandExitException, match="Permission denied"):
            await sandbox.commands.run("touch /etc/by-user")

    async def test_sudo_without_password(self, sandbox):
        assert (await sandbox.commands.run("sudo -n whoami")).stdout == "root\n"

    async def test_unknown_user(self, sandbox):
        with pytest.raises((AuthenticationException, InvalidArgumentException), match="nobody-we-know"):
            await sandbox.commands.run("true", user="nobody-we-know")

    async def test_cwd(self, sandbox):
        assert (await sandbox.commands.run("pwd", cwd="/usr/lib")).stdout == "/usr/lib\n"
        await sandbox.files.make_dir("somewhere/else")
        assert (await sandbox.commands.run("pwd", cwd="somewhere/else")).stdout == "/home/user/somewhere/else\n"
        assert (await sandbox.commands.run("pwd", cwd="~/somewhere")).stdout == "/home/user/somewhere\n"

    async def test_missing_cwd(self, sandbox):
        with pytest.raises((InvalidArgumentException, NotFoundException), match="/no/such/directory"):
            await sandbox.commands.run("pwd", cwd="/no/such/directory")

    async def test_environment(self, sandbox):
        envs = {"PLAIN": "1", "SPACED": " a  b ", "DOLLAR": "$HOME", "LINES": "x\ny", "UNICODE": "€", "EMPTY": ""}
        result = await sandbox.commands.run(
            "python3 -c 'import json, os; print(json.dumps(dict(os.environ)))'", envs=envs
        )
        seen = json.loads(result.stdout)
        assert {name: seen.get(name) for name in envs} == envs

    async def test_command_environment_goes_before_the_sandboxs(self, create):
        sandbox = await create(envs={"A": "sandbox", "B": "sandbox"})
        result = await sandbox.commands.run("echo $A $B", envs={"B": "command"})
        assert result.stdout == "sandbox command\n"
        assert (await sandbox.commands.run("echo $A $B")).stdout == "sandbox sandbox\n"

    async def test_environment_says_where_it_is(self, sandbox):
        result = await sandbox.commands.run("echo $E2B_SANDBOX $E2B_SANDBOX_ID")
        assert result.stdout == f"true {sandbox.sandbox_id}\n"

    async def test_tools_of_the_base_template(self, sandbox):
        result = await sandbox.commands.run(
            "python3 --version && python3 -m venv /tmp/venv && /tmp/venv/bin/pip --version && node --version && npm --version"
            " && git --version && curl --version && gcc --version && make --version",
            timeout=100,
        )
        assert result.exit_code == 0


class TestTimeout:
    async def test_command_is_cut_off(self, sandbox):
        with pytest.raises(TimeoutException):
            await sandbox.commands.run("sleep 987005", timeout=2)

        async def is_gone():
            return not await is_running(sandbox, "sleep 987005")

        await eventually(is_gone, "a command ends with its timeout")

    async def test_output_until_then_arrives(self, sandbox):
        chunks = []
        with pytest.raises(TimeoutException):
            await sandbox.commands.run("echo early; sleep 987006", timeout=2, on_stdout=chunks.append)
        assert chunks == ["early\n"]

    async def test_zero_is_without_limit(self, sandbox):
        assert (await sandbox.commands.run("sleep 2; echo done", timeout=0)).stdout == "done\n"


class TestManyAtOnce:
    async def test_twenty_side_by_side(self, sandbox, directory):
        # Each waits until all have started: they pass only if twenty really run at the same time.
        await sandbox.files.make_dir(directory)
        results = await asyncio.gather(
            *(
                sandbox.commands.run(
                    f"touch started-{number}; until [ $(ls started-* | wc -l) -ge 20 ]; do sleep 0.1; done; echo {number}",
                    cwd=directory,
                    timeout=90,
                )
                for number in range(20)
            )
        )
        assert [result.stdout for result in results] == [f"{number}\n" for number in range(20)]

    async def test_two_hundred_in_a_row(self, sandbox):
        for number in range(200):
            assert (await sandbox.commands.run(f"echo {number}")).stdout == f"{number}\n"

    async def test_zombies_are_collected(self, sandbox):
        # The parent leaves at once; the orphan ends later and has only the sandbox's init to wait for it.
        await sandbox.commands.run("for i in $(seq 20); do (setsid sh -c 'exec >&- 2>&-; sleep 0.2' &); done")

        async def no_zombies():
            result = await sandbox.commands.run("grep -l '^State:.*Z' /proc/[0-9]*/status 2>/dev/null || true")
            return result.stdout == ""

        await eventually(no_zombies, "the sandbox's init collects orphans")
