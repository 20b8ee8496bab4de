"""OpenStack Swift with its S3 gateway: four nodes, three copies, and nothing that repairs them.

    with swift(place) as cluster:
        cluster.environment()           what a client of S3 needs
        cluster.nodes[0].kill()         its copies are out of reach; `revive` brings them back, old

Swift is eventually consistent: it answers what one of the copies says. Conditional writes are
decided by whoever is asked, so that several writers may win; deletions and new objects that a dead
node has missed are not known to it when it is back. No replicator runs: what is stale stays so.
PyPI: swift.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

NODES = 4
KINDS = ("account", "container", "object")
USER, ACCOUNT_PASSWORD = "t:t", "test-only"
READY_SECONDS_MAX = 180.0
FORGIVEN_SECONDS = 2
"""After so long the proxy asks a node again that was dead; a day's worth of 60 s by default."""

CLUSTER = """
[swift-hash]
swift_hash_path_suffix = a
swift_hash_path_prefix = b
[swift-constraints]
max_header_size = 16384
"""

SERVER = """
[DEFAULT]
bind_ip = {address}
bind_port = {port}
devices = {devices}
mount_check = false
swift_dir = {etc}
user = {user}
workers = 0
disable_fallocate = true
log_level = WARNING
log_address = {etc}/no-syslog
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""

PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
swift_dir = {etc}
user = {user}
workers = 0
log_level = WARNING
log_address = {etc}/no-syslog
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck listing_formats s3api tempauth slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
conn_timeout = 1
node_timeout = 5
error_suppression_interval = {forgiven}
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:healthcheck]
use = egg:swift#healthcheck
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false
[filter:tempauth]
use = egg:swift#tempauth
user_t_t = {password} .admin .reseller_admin
[filter:slo]
use = egg:swift#slo
minimum_segment_size = 1
[filter:dlo]
use = egg:swift#dlo
"""


@dataclass
class Node:
    """One machine: a server of accounts, of containers and of objects, and their disk."""

    commands: list[list[str]]
    log: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def revive(self) -> None:
        """Start its servers, on what the disk holds."""
        with self.log.open("ab") as log:
            # Killed with this process, however that ends.
            prefix = ["setpriv", "--pdeathsig", "KILL"]
            self.processes = [
                subprocess.Popen(
                    [*prefix, *command], stdout=log, stderr=log, stdin=subprocess.DEVNULL
                )
                for command in self.commands
            ]

    def kill(self) -> None:
        """SIGKILL its servers and wait for their end."""
        for process in self.processes:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Swift:
    """A running cluster behind one proxy."""

    port: int
    nodes: list[Node]
    addresses: list[list[tuple[str, int]]]

    @property
    def endpoint(self) -> str:
        """Where clients of S3 find it."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """The standard variables for clients of S3."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": ACCOUNT_PASSWORD,
        }

    def revive_all(self) -> None:
        """Start every node that is not running, and wait until all of them answer."""
        for node in self.nodes:
            if not node.processes or any(one.poll() is not None for one in node.processes):
                node.kill()
                node.revive()
        deadline = time.monotonic() + READY_SECONDS_MAX
        for place in (place for places in self.addresses for place in places):
            _await_port(place, deadline)


def needs_swift() -> None:
    """Skip the calling test, with the reason, where Swift is not installed."""
    if not shutil.which("swift-proxy-server", path=_programs()):
        pytest.skip("SWIFT NOT CHECKED: run `pip install -e .[stores]`")


@contextmanager
def swift(place: Path) -> Iterator[Swift]:
    """A new cluster; its disks lie below `place`."""
    etc = place / "etc"
    etc.mkdir(parents=True)
    (etc / "swift.conf").write_text(CLUSTER)
    common = {"etc": etc, "user": os.environ.get("USER", "root")}
    ports = {kind: [_free_port(_address(n)) for n in range(NODES)] for kind in KINDS}
    _make_rings(etc, ports)
    nodes = [
        _node(place, n, {kind: ports[kind][n] for kind in KINDS}, common) for n in range(NODES)
    ]
    port = _free_port("127.0.0.1")
    (etc / "proxy.conf").write_text(
        PROXY.format(port=port, forgiven=FORGIVEN_SECONDS, password=ACCOUNT_PASSWORD, **common)
    )
    addresses = [[(_address(n), ports[kind][n]) for kind in KINDS] for n in range(NODES)]
    proxy = Node([[_program("swift-proxy-server"), str(etc / "proxy.conf")]], place / "proxy.log")
    cluster = Swift(port, nodes, [*addresses, [("127.0.0.1", port)]])
    with ExitStack() as stack:
        for node in (*nodes, proxy):
            stack.callback(node.kill)
        proxy.revive()
        cluster.revive_all()
        yield cluster


def _programs() -> str:
    """Where pip has put Swift's programs, and then wherever else they may be."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _program(name: str) -> str:
    return shutil.which(name, path=_programs()) or name


def _address(node: int) -> str:
    return f"127.0.0.{node + 1}"


def _free_port(address: str) -> int:
    with socket.socket() as one:
        one.bind((address, 0))
        return int(one.getsockname()[1])


def _await_port(place: tuple[str, int], deadline: float) -> None:
    while True:
        try:
            socket.create_connection(place, 1.0).close()
        except OSError:
            assert time.monotonic() < deadline, f"nothing answers at {place}"
            time.sleep(0.1)
        else:
            return


def _make_rings(etc: Path, ports: dict[str, list[int]]) -> None:
    places = {
        kind: [(_address(n), port, f"disk{n}") for n, port in enumerate(found)]
        for kind, found in ports.items()
    }
    script = Path(__file__).with_name("swift_rings.py")
    # -P: the directory of the script holds a module that is called swift, too.
    command = [sys.executable, "-P", script, etc, json.dumps(places)]
    subprocess.run(command, check=True, timeout=120)


def _node(place: Path, number: int, ports: dict[str, int], common: dict[str, object]) -> Node:
    devices = place / f"node{number}"
    (devices / f"disk{number}").mkdir(parents=True)
    commands = []
    for kind, port in ports.items():
        config = place / "etc" / f"{kind}-{number}.conf"
        known = {"kind": kind, "port": port, "address": _address(number), "devices": devices}
        config.write_text(SERVER.format(**known, **common))
        commands.append([_program(f"swift-{kind}-server"), str(config)])
    return Node(commands, place / f"node{number}.log")
