"""Hosts that a test makes: network namespaces on one bridge, with links that fail as networks do.

    with network("a", "b") as net:
        net["a"].run("command")         a process whose network is that host's
        net["a"].cut()                  its cable is out; `join` puts it back

Nothing leaves the bridge, and nothing is left of it. Needs root and `ip`.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import pytest

from processes import needs_root
from servers.filesystems import run

NET = "10.213.7"
BURST_BYTES = 32 << 10
QUEUE_MILLISECONDS = 200
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True)
class Host:
    """One network namespace; `port` is its end of the cable to the bridge."""

    space: str
    address: str
    port: str

    def command(self, *command: str) -> list[str]:
        """`command` with this host's network; files and processes are those of the machine.

        Not `ip netns exec`: what that mounts, nobody else sees.
        """
        return ["nsenter", f"--net=/run/netns/{self.space}", "--", *command]

    def run(self, *command: str) -> str:
        """Run a command to its end; what it printed."""
        return run(*self.command(*command))

    def listen(self) -> socket.socket:
        """A socket that listens in this host's network, for a server of this process."""
        with ThreadPoolExecutor(1, initializer=self._enter) as inside:
            return inside.submit(socket.create_server, (self.address, 0), backlog=256).result()

    def _enter(self) -> None:
        """Move the calling thread into this host's network, for the rest of its life."""
        libc = ctypes.CDLL(None, use_errno=True)
        fd = os.open(f"/run/netns/{self.space}", os.O_RDONLY)
        failed = libc.setns(fd, CLONE_NEWNET)
        os.close(fd)
        assert not failed, os.strerror(ctypes.get_errno())

    def cut(self) -> None:
        """Pull the cable out: what was on its way is lost, and no error tells of it."""
        self.run("ip", "link", "set", self.port, "down")

    def join(self) -> None:
        """Put the cable back."""
        self.run("ip", "link", "set", self.port, "up")

    def limit(self, megabits: int) -> None:
        """Let no more than this leave the host, in each second."""
        rate = ["rate", f"{megabits}mbit", "burst", str(BURST_BYTES)]
        queue = ["latency", f"{QUEUE_MILLISECONDS}ms"]
        self.run("tc", "qdisc", "replace", "dev", self.port, "root", "tbf", *rate, *queue)

    def lose(self, share: float) -> None:
        """Drop this share of the packets that reach the host, at random."""
        self.run("nft", "add", "table", "inet", "loss")
        hook = "{ type filter hook input priority 0; }"
        self.run("nft", "add", "chain", "inet", "loss", "in", hook)
        match = ["iifname", self.port, "numgen", "random", "mod", "1000", "<"]
        drop = [str(round(1000 * share)), "counter", "drop"]
        self.run("nft", "add", "rule", "inet", "loss", "in", *match, *drop)

    def packets_lost(self) -> int:
        """Packets that `lose` has dropped."""
        told = json.loads(self.run("nft", "--json", "list", "table", "inet", "loss"))
        rules = [entry["rule"]["expr"] for entry in told["nftables"] if "rule" in entry]
        return sum(part["counter"]["packets"] for part in rules[0] if "counter" in part)

    def heal(self) -> None:
        """End `limit` and `lose`."""
        for repair in (
            ("tc", "qdisc", "del", "dev", self.port, "root"),
            ("nft", "delete", "table", "inet", "loss"),
        ):
            subprocess.run(self.command(*repair), capture_output=True, check=False)

    def bytes_sent(self) -> int:
        """Bytes that have left the host."""
        (link,) = json.loads(self.run("ip", "-json", "-statistics", "link", "show", self.port))
        return int(link["stats64"]["tx"]["bytes"])


class Network(Protocol):
    """Servers of a store, and the hosts that use them."""

    @property
    def hosts(self) -> Mapping[str, Host]:
        """By their names."""


def needs_network(*tools: str) -> None:
    """Skip the calling test, with the reason, where hosts can not be made."""
    needs_root()
    missing = [tool for tool in ("ip", "nsenter", *tools) if not shutil.which(tool)]
    if missing:
        pytest.skip(f"NO NETWORK OF HOSTS CAN BE MADE: there is no {', '.join(missing)}")


@contextmanager
def network(names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """Hosts of these names, which reach each other and nothing else."""
    tag = secrets.token_hex(3)
    with ExitStack() as stack:
        switch = f"ckptmgr-{tag}-switch"
        _space(stack, switch)
        run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "bridge", "up")
        hosts = {}
        for number, name in enumerate(names, start=1):
            host = Host(f"ckptmgr-{tag}-{name}", f"{NET}.{number}", f"ck{tag}{number}")
            _space(stack, host.space)
            _cable(host, switch, f"to{number}")
            hosts[name] = host
        yield hosts


def _space(stack: ExitStack, space: str) -> None:
    run("ip", "netns", "add", space)
    stack.callback(run, "ip", "netns", "del", space)
    run("ip", "-n", space, "link", "set", "lo", "up")


def _cable(host: Host, switch: str, plug: str) -> None:
    """A pair of interfaces is removed with the namespace of either end."""
    peer = ["peer", "name", plug, "netns", switch]
    run("ip", "-n", host.space, "link", "add", host.port, "type", "veth", *peer)
    run("ip", "-n", switch, "link", "set", plug, "master", "bridge", "up")
    run("ip", "-n", host.space, "addr", "add", f"{host.address}/24", "dev", host.port)
    run("ip", "-n", host.space, "link", "set", host.port, "up")
