"""Tries to reach addresses from inside a sandbox: `python3 probe.py tcp|udp` with a JSON list of [host, port] on stdin.

For TCP it prints, as JSON, those that accepted a connection. (A refusal proves nothing: a packet filter may refuse in
the target's name.) For UDP it sends each a datagram with its own address in it.
"""

import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

TIMEOUT_SECONDS = 2


def tcp(target):
    try:
        socket.create_connection(target, TIMEOUT_SECONDS).close()
        return target
    except OSError:
        return None


def udp(target):
    family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(target[0].encode(), tuple(target))
        except OSError:
            pass


attempt = {"tcp": tcp, "udp": udp}[sys.argv[1]]
with ThreadPoolExecutor(256) as pool:
    reached = list(pool.map(attempt, json.load(sys.stdin)))
print(json.dumps([target for target in reached if target]))
