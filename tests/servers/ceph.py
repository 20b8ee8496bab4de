"""A real Ceph cluster with an S3 gateway on loopback: one monitor, one object server, one gateway.

It lives in a directory of its own on free ports and starts in about 2 s. Objects are in memory.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scale import scaled

PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "ceph", "radosgw-admin", "monmaptool", "setpriv")
MEMORY_BYTES_MAX = scaled(1, 6) << 30
"""Of objects. A cluster that is full takes no more: it answers nothing, and says nothing."""

START_SECONDS_MAX = 60.0
KEY, SECRET = "TESTKEY", "testsecret"

# The two paxos delays took 10 of 12 seconds; without tcp_nodelay every small answer takes 40 ms.
# Without the gc settings what is deleted stays in memory for 2 hours.
CONFIGURATION = """
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_port}/0]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_msgr1 = false
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
keyring = {place}/keyring
run_dir = {place}
admin_socket =
log_file = {place}/$name.log
mon_data = {place}/mon
mon_cluster_log_file = {place}/cluster.log
mon_data_avail_crit = 1
mon_allow_pool_size_one = true
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
osd_data = {place}/osd
osd_objectstore = memstore
memstore_device_bytes = {memory}
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 4
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
osd_op_num_shards = 1
osd_op_num_threads_per_shard = 2
rgw_thread_pool_size = 64
rgw_enable_usage_log = false
rgw_run_sync_thread = false
rgw_gc_obj_min_wait = 1
rgw_gc_processor_period = 1
rgw_gc_processor_max_time = 1
[client]
ms_mon_client_mode = crc secure
rgw_frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
"""


class Ceph:
    """A running cluster; `environment` is what a client needs to find it."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._running: list[subprocess.Popen[bytes]] = []
        self.port = free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def environment(self, endpoint: str = "") -> dict[str, str]:
        """The standard variables, for this gateway or for a proxy in front of it."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }

    def start(self) -> None:
        self._configure()
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", f"{self._place}/monmap")
        self._spawn("ceph-mon", "-i", "a")
        disk = new_uuid()
        self._run("ceph", "osd", "new", disk)
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._spawn("ceph-osd", "-i", "0")
        self._run(
            *("radosgw-admin", "user", "create", "--uid=t", "--display-name=t"),
            *(f"--access-key={KEY}", f"--secret-key={SECRET}"),
        )
        self._spawn("radosgw", "-n", "client.rgw.a")
        self._await_gateway()

    def stop(self) -> None:
        for process in reversed(self._running):
            process.kill()
            process.wait()

    def _configure(self) -> None:
        fsid, mon_port = new_uuid(), free_port()
        for name in ("mon", "osd"):
            (self._place / name).mkdir()
        (self._place / "keyring").touch()
        (self._place / "ceph.conf").write_text(
            CONFIGURATION.format(
                fsid=fsid,
                mon_port=mon_port,
                port=self.port,
                place=self._place,
                memory=MEMORY_BYTES_MAX,
            )
        )
        self._run(
            *("monmaptool", "--create", "--clobber", "--fsid", fsid, "--enable-all-features"),
            *("--addv", "a", f"[v2:127.0.0.1:{mon_port}/0]", f"{self._place}/monmap"),
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "CEPH_CONF": f"{self._place}/ceph.conf"}

    def _run(self, *arguments: str) -> None:
        done = subprocess.run(
            arguments, env=self._environment(), capture_output=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{arguments}: {done.stderr.decode()[-2000:]}"

    def _spawn(self, *arguments: str) -> None:
        # Killed with this process, however that ends.
        with (self._place / "out").open("ab") as out:
            self._running.append(
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *arguments, "-f"],
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                )
            )

    def _await_gateway(self) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while True:
            assert time.monotonic() < deadline, (self._place / "out").read_text()[-4000:]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)


@contextlib.contextmanager
def start_or_skip(place: Path) -> Iterator[Ceph]:
    """A running cluster below `place`; skips the caller, loudly, without its programs."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        pytest.skip(
            f"NO CEPH: object stores are not checked in this run; {', '.join(missing)} missing "
            "(apt-get install ceph-mon ceph-osd radosgw)"
        )
    cluster = Ceph(place)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def new_uuid() -> str:
    return Path("/proc/sys/kernel/random/uuid").read_text().strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
