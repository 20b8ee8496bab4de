"""MooseFS: a master and three chunkservers on hosts of their own, mounted by hosts of the test.

    with moosefs(place, ["a", "b"]) as cluster:
        cluster.mounts["a"]             a directory; what is in it crosses the network of host a
        cluster.servers["chunks1"]      a process to stop, to kill and to start again

The data lies below `place`. Debian: moosefs-master, moosefs-chunkserver, moosefs-client.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from servers.network import NET, Host, needs_network, network

MASTER = "master"
CHUNKSERVERS = ("chunks1", "chunks2", "chunks3")
COPIES = 2
EMPTY = b"MFSM NEW"
"""The metadata of a master that has none yet."""

READY_SECONDS_MAX = 180.0


@dataclass
class Server:
    """One process of the cluster, on its host."""

    host: Host
    command: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        """Start it, for the first time or again."""
        with self.log.open("ab") as log:
            # Killed with this process, however that ends.
            command = ["setpriv", "--pdeathsig", "KILL", *self.host.command(*self.command)]
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def kill(self) -> None:
        """SIGKILL it and wait for its end."""
        self._signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM it and wait for its end; a master writes its metadata."""
        self._signal(signal.SIGTERM)
        assert self.process is not None
        self.process.wait(READY_SECONDS_MAX)

    def freeze(self) -> None:
        """SIGSTOP it: its connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT it."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)


@dataclass(frozen=True)
class Cluster:
    """A file system that several hosts have mounted."""

    place: Path
    hosts: dict[str, Host]
    servers: dict[str, Server]
    mounts: dict[str, Path]

    def await_servers(self) -> None:
        """Wait until every chunkserver has told the master of its disk."""
        _await_space(next(iter(self.mounts.values())), self.place)


def needs_moosefs() -> None:
    """Skip the calling test, with the reason, where MooseFS can not run."""
    needs_network("setpriv")
    missing = [tool for tool in ("mfsmaster", "mfschunkserver", "mfsmount") if not _find(tool)]
    missing += [path for path in ("/dev/fuse",) if not os.path.exists(path)]
    if missing:
        pytest.skip(f"MOOSEFS NOT CHECKED: there is no {', '.join(missing)}")


@contextmanager
def moosefs(place: Path, clients: Sequence[str]) -> Iterator[Cluster]:
    """A new cluster whose file system every client has mounted."""
    with ExitStack() as stack:
        hosts = stack.enter_context(network([MASTER, *CHUNKSERVERS, *clients]))
        master = _master(hosts[MASTER], place)
        chunks = {name: _chunkserver(hosts, name, place) for name in CHUNKSERVERS}
        servers = {MASTER: master, **chunks}
        for server in servers.values():
            stack.callback(server.kill)
            server.start()
        mounts = {}
        for name in clients:
            mounts[name] = place / f"mnt-{name}"
            stack.enter_context(_mounted(hosts, name, mounts[name]))
        cluster = Cluster(place, hosts, servers, mounts)
        cluster.await_servers()
        first = clients[0]
        hosts[first].run(_find("mfssetgoal"), str(COPIES), str(mounts[first]))
        yield cluster


def _find(tool: str) -> str:
    """Where a tool is; daemons are not in the PATH of every user."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return shutil.which(tool, path=path) or ""


def _settings(path: Path, **settings: str) -> Path:
    path.mkdir(parents=True)
    everyone = {"WORKING_USER": "root", "WORKING_GROUP": "root", "DATA_PATH": str(path)}
    everyone |= {"SYSLOG_MIN_LEVEL": "WARNING", **settings}
    config = path / "server.cfg"
    config.write_text("".join(f"{name}={value}\n" for name, value in everyone.items()))
    return config


def _master(host: Host, place: Path) -> Server:
    home = place / MASTER
    exports, topology = home / "exports.cfg", home / "topology.cfg"
    config = _settings(
        home,
        EXPORTS_FILENAME=str(exports),
        TOPOLOGY_FILENAME=str(topology),
        REPLICATIONS_DELAY_INIT="5",  # seconds before lost copies are made anew, not 60
    )
    exports.write_text(f"{NET}.0/24 / rw,alldirs,maproot=0\n")
    topology.write_text("")
    (home / "metadata.mfs").write_bytes(EMPTY)
    # -a: a master that was killed has its changes in the log only, and takes them from there.
    command = [_find("mfsmaster"), "-a", "-f", "-c", str(config), "start"]
    return Server(host, command, place / "master.log")


def _chunkserver(hosts: dict[str, Host], name: str, place: Path) -> Server:
    home = place / name
    disks = home / "disks.cfg"
    config = _settings(
        home,
        HDD_CONF_FILENAME=str(disks),
        HDD_FSYNC_BEFORE_CLOSE="1",  # else fsync of a client ends in the memory of chunkservers
        MASTER_HOST=hosts[MASTER].address,
        MASTER_RECONNECTION_DELAY="1",
    )
    disk = home / "disk"
    disk.mkdir()
    disks.write_text(f"~{disk}\n")  # whose size may change: other things are on it
    command = [_find("mfschunkserver"), "-f", "-c", str(config), "start"]
    return Server(hosts[name], command, place / f"{name}.log")


@contextmanager
def _mounted(hosts: dict[str, Host], name: str, directory: Path) -> Iterator[None]:
    directory.mkdir()
    target = [str(directory), "-H", hosts[MASTER].address]
    log = directory.with_suffix(".log")
    client = Server(hosts[name], [_find("mfsmount"), "-f", *target], log)
    with ExitStack() as stack:
        stack.callback(client.kill)
        client.start()
        stack.callback(subprocess.run, ["umount", "-l", str(directory)], check=False)
        deadline = time.monotonic() + READY_SECONDS_MAX
        while not os.path.ismount(directory):
            assert time.monotonic() < deadline, f"it is not mounted:\n{log.read_text()}"
            if client.process is not None and client.process.poll() is not None:
                client.start()  # the master was not there yet
            time.sleep(0.05)
        yield


def _await_space(mount: Path, place: Path) -> None:
    """All chunkservers are on the disk of `place`, and each of them tells of all its room."""
    disk = os.statvfs(place)
    each = (disk.f_blocks - disk.f_bfree + disk.f_bavail) * disk.f_frsize
    wanted = (len(CHUNKSERVERS) - 0.5) * each
    deadline = time.monotonic() + READY_SECONDS_MAX
    while True:
        found = os.statvfs(mount)
        if found.f_blocks * found.f_frsize > wanted:
            return
        assert time.monotonic() < deadline, "a chunkserver has no room"
        time.sleep(0.05)
