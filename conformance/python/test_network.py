"""What a sandbox reaches: the internet, and nothing else."""

import asyncio
import contextlib
import ipaddress
import json
import socket
import subprocess
import urllib.request
from pathlib import Path

import pytest
from e2b import CommandExitException

# The packet filter is under test, not the SDK.
SDK_FLAVOURS = ("async",)

PROBE = (Path(__file__).parent / "guest" / "probe.py").read_text()
REGISTRY = "https://pypi.org/simple/iniconfig/"

# One address in each range that no sandbox may enter.
CLOSED_ADDRESSES = [
    "10.0.0.1",
    "10.255.255.254",
    "100.64.0.1",
    "172.16.0.1",
    "172.31.255.254",
    "192.168.0.1",
    "192.168.255.254",
    "169.254.1.1",
    "169.254.169.254",
    "169.254.169.253",
    "255.255.255.255",
    "fd00::1",
    "fe80::1",
]


async def probe(sandbox, targets, protocol="tcp"):
    """Which of the targets, `(host, port)`, let the sandbox in."""
    await sandbox.files.write("probe.py", PROBE)
    await sandbox.files.write("targets.json", json.dumps([list(target) for target in targets]))
    result = await sandbox.commands.run(f"python3 probe.py {protocol} < targets.json", timeout=90)
    return [tuple(target) for target in json.loads(result.stdout)]


def host_addresses():
    """Every address of the machine's interfaces, and of the other ends of its point-to-point links."""
    listed = json.loads(subprocess.run(["ip", "-json", "address"], check=True, capture_output=True).stdout)
    found = set()
    for interface in listed:
        for entry in interface["addr_info"]:
            if entry.get("scope") == "host":  # the sandbox has a loopback of its own
                continue
            found.add(entry["local"])
            network = ipaddress.ip_interface(f"{entry['local']}/{entry['prefixlen']}").network
            if network.version == 4 and network.prefixlen >= 30:
                found.update(str(address) for address in network)
    return sorted(found)


@contextlib.contextmanager
def listening_on_the_host(kind):
    """A socket of the test's own on every address of this machine, IPv4 and IPv6."""
    with socket.socket(socket.AF_INET6, kind) as listener:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", 0))
        if kind == socket.SOCK_STREAM:
            listener.listen(128)
        listener.setblocking(False)
        yield listener, listener.getsockname()[1]


@pytest.fixture(scope="module")
def on_this_machine(service):
    if not service.is_on_this_machine:
        pytest.skip("the addresses of the server's machine are not known here")


@pytest.fixture(scope="module")
async def internet():
    """Skips where this machine itself has no way to the registry; a sandbox can't have one then."""
    try:
        await asyncio.to_thread(lambda: urllib.request.urlopen(REGISTRY, timeout=20).close())
    except OSError as error:
        pytest.skip(f"this machine doesn't reach {REGISTRY}: {error}")


class TestOpen:
    async def test_names_are_resolved(self, internet, sandbox):
        assert (await sandbox.commands.run("getent hosts pypi.org")).stdout
        with pytest.raises(CommandExitException):
            await sandbox.commands.run("getent hosts no-such-name.invalid")

    async def test_names_are_resolved_over_tcp(self, internet, sandbox):
        result = await sandbox.commands.run(
            """python3 - <<'END'
import socket, struct
name = b"".join(bytes([len(part)]) + part for part in (b"pypi", b"org")) + b"\\0"
query = struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + name + struct.pack(">HH", 1, 1)
server = next(line.split()[1] for line in open("/etc/resolv.conf") if line.startswith("nameserver"))
with socket.create_connection((server, 53), 10) as connection:
    connection.sendall(struct.pack(">H", len(query)) + query)
    answer = connection.makefile("rb")
    length, = struct.unpack(">H", answer.read(2))
    print(struct.unpack(">HHHHHH", answer.read(length)[:12])[3] > 0)
END"""
        )
        assert result.stdout == "True\n"

    async def test_a_package_is_installed(self, internet, sandbox):
        await sandbox.commands.run(
            "python3 -m venv /tmp/net && /tmp/net/bin/pip install --quiet --no-deps iniconfig", timeout=100
        )
        assert (await sandbox.commands.run("/tmp/net/bin/python -c 'import iniconfig; print(1)'")).stdout == "1\n"

    async def test_own_loopback_and_name(self, sandbox):
        result = await sandbox.commands.run(
            "python3 -m http.server 8090 >/dev/null 2>&1 &"
            " until curl -s -o /dev/null http://127.0.0.1:8090/; do sleep 0.1; done;"
            ' for host in localhost 127.0.0.1 "$(hostname)"; do curl -s -o /dev/null -w "%{http_code} " http://$host:8090/; done; kill %1'
        )
        assert result.stdout == "200 200 200 "


class TestClosed:
    async def test_the_probe_finds_what_is_open(self, sandbox):
        # Without this the tests below would pass with a probe that never finds anything.
        handle = await sandbox.commands.run("python3 -m http.server 8091", background=True, timeout=0)
        await sandbox.commands.run("until curl -s -o /dev/null http://127.0.0.1:8091/; do sleep 0.1; done")
        assert await probe(sandbox, [("127.0.0.1", 8091), ("127.0.0.1", 8092)]) == [("127.0.0.1", 8091)]
        await handle.kill()

    async def test_private_ranges(self, sandbox):
        targets = [(address, port) for address in CLOSED_ADDRESSES for port in (22, 53, 80, 443)]
        assert await probe(sandbox, targets) == []

    async def test_the_host_over_tcp(self, on_this_machine, service, sandbox):
        with listening_on_the_host(socket.SOCK_STREAM) as (_, port):
            targets = [(address, other) for address in host_addresses() for other in (port, service.listener[1], 22)]
            assert await probe(sandbox, targets) == []

    async def test_the_host_over_udp(self, on_this_machine, sandbox):
        with listening_on_the_host(socket.SOCK_DGRAM) as (listener, port):
            await probe(sandbox, [(address, port) for address in host_addresses()], "udp")
            await asyncio.sleep(1)
            with pytest.raises(BlockingIOError):
                listener.recv(100)

    async def test_the_gateway_answers_names_only(self, sandbox):
        # Sandboxes ask their gateway for names; whoever else listens there is the server or the host.
        nameserver = "awk '$1 == \"nameserver\" {print $2; exit}' /etc/resolv.conf"
        gateway = (await sandbox.commands.run(nameserver)).stdout.strip()
        reached = await probe(sandbox, [(gateway, port) for port in [*range(1, 1024), 3000, 8080, 49983]])
        assert reached == [(gateway, 53)]

    async def test_other_sandboxes(self, on_this_machine, sandbox, create):
        neighbour = await create()
        await neighbour.commands.run("python3 -m http.server 8093", background=True, timeout=0)
        own = (await neighbour.commands.run("hostname -I")).stdout.split()
        mine = (await sandbox.commands.run("hostname -I")).stdout.split()
        # Every sandbox may have the same address inside; one's own agent is no neighbour.
        candidates = (set(own) | set(host_addresses())) - set(mine)
        targets = [(address, port) for address in candidates for port in (8093, 49983)]
        assert await probe(sandbox, targets) == []

    async def test_the_proxy_is_no_way_around(self, on_this_machine, service, sandbox, create):
        neighbour = await create()
        result = await sandbox.commands.run(
            f"for host in {' '.join(address for address in host_addresses() if ':' not in address)}; do"
            f" curl -s -m 3 -H 'Host: {neighbour.get_host(49983)}' http://$host:{service.listener[1]}/health && echo reached $host;"
            " done; true",
            timeout=90,
        )
        assert result.stdout == ""

    async def test_root_inside_changes_nothing(self, on_this_machine, sandbox, create):
        rogue = await create()
        # Were the sandbox in the host's own network, what follows would cut the host off.
        addresses = (await rogue.commands.run("hostname -I")).stdout.split()
        assert not set(addresses) & set(host_addresses())
        try:
            await rogue.commands.run(
                "device=$(ip -o route show default | sed 's/.* dev \\([^ ]*\\).*/\\1/')"
                " && ip address add 10.255.0.2/8 dev $device && ip route add 192.168.0.0/16 dev $device",
                user="root",
            )
        except CommandExitException as refused:
            pytest.skip(f"root can't change addresses and routes inside: {refused.stderr.strip()}")
        with listening_on_the_host(socket.SOCK_STREAM) as (_, port):
            targets = [(address, port) for address in host_addresses()] + [("192.168.0.1", 80), ("169.254.169.254", 80)]
            assert await probe(rogue, targets) == []
