"""The units on a real systemd: started on demand, watched, killed, upgraded, stopped, sandboxed."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest

from crash.peek import slots_below
from driven import TREE, until
from servers.machine import PYTHON, Machine
from systemd.conftest import Tenant

pytestmark = pytest.mark.root

UNITS = TREE / "systemd"
JOBS = ("gc", "verify", "doctor")
EXPOSURE_MAX = 2.0
DATA = "data/"


def commits(tenant: Tenant) -> list[str]:
    """The commit records in the store, as `attempt/step`."""
    top = tenant.rig.path / "commit"
    return sorted(f"{int(p.parent.name)}/{int(p.name)}" for p in top.glob("*/*"))


# ---- what systemd says of the files ----------------------------------------


def test_systemd_finds_nothing_to_complain_about(booted: Machine, tenant: Tenant) -> None:
    jobs = [f"ckptmgr-{job}@run7.{kind}" for job in JOBS for kind in ("service", "timer")]
    booted.write("/etc/ckptmgr/jobs/run7.env", "CKPTMGR_URL=s3://bucket/run7\n")
    checked = booted.run("systemd-analyze", "verify", tenant.service, tenant.socket, *jobs)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_systemd_complains_where_there_is_reason_to(booted: Machine, tenant: Tenant) -> None:
    """So that the silence above means something: its exit status does not."""
    tenant.change("Service", "WatchdogSecs=3")
    checked = booted.run("systemd-analyze", "verify", tenant.service)
    assert "Unknown key 'WatchdogSecs'" in checked.stderr


@pytest.mark.parametrize(
    "unit", ["ckptmgr@4001.service", *(f"ckptmgr-{j}@x.service" for j in JOBS)]
)
def test_the_sandbox_is_tight_and_every_gap_has_its_reason(booted: Machine, unit: str) -> None:
    booted.write("/etc/ckptmgr/jobs/x.env", "CKPTMGR_URL=s3://bucket/x\n")
    told = booted.run("systemd-analyze", "security", "--no-pager", unit).stdout
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", told)
    assert exposure is not None, told
    print(f"exposure of {unit}: {exposure[1]}")
    assert float(exposure[1]) <= EXPOSURE_MAX, told
    if not unit.startswith("ckptmgr@"):
        return
    reasons = (UNITS / "system/ckptmgr@.service").read_text().partition("still counts")[2]
    gaps = re.findall(r"^✗ (\w+)=(\S*)", told, re.MULTILINE)
    assert gaps
    for name, value in gaps:
        family = re.search(r"AF_\(?([A-Z]+)", value)
        reason = f"AF_{family[1]}" if family else name
        assert re.search(rf"^#   .*\b{reason}\b.*:", reasons, re.MULTILINE), reason


# ---- life ------------------------------------------------------------------


def test_the_first_client_starts_it_and_it_ends_when_idle(booted: Machine, tenant: Tenant) -> None:
    tenant.change(
        "Service",
        "Environment=CKPTMGR_IDLE_SECONDS=2",
        "ExecStart=",
        f"ExecStart={PYTHON} -m ckptmgr.cli daemon",
    )
    booted.write(f"/etc/ckptmgr/{tenant.uid}.env", "CKPTMGR_MAX_STORE_GBPS=8\n", mode=0o600)
    booted.systemctl("start", tenant.socket)
    assert booted.property(tenant.service, "ActiveState") == "inactive"
    state = tenant.status()  # the client is in the queue of systemd's socket while it starts
    assert state["runtime_dir"] == tenant.runtime
    assert state["max_store_gbps"] == 8.0, "the settings that root alone can read"
    tenant.await_event("idle")
    booted.await_property(tenant.service, "ActiveState", "inactive")
    assert booted.property(tenant.service, "Result") == "success"
    assert booted.property(tenant.socket, "SubState") == "listening"
    assert tenant.status()["pid"] != state["pid"]


def test_it_tells_systemd_how_it_is(booted: Machine, tenant: Tenant) -> None:
    tenant.change("Service", "WatchdogSec=1")
    tenant.start()
    assert booted.property(tenant.service, "SubState") == "running"
    booted.await_property(tenant.service, "StatusText", "0 jobs, 0 trainers, 0 snapshots undecided")
    with tenant.train(1) as training:
        training.await_event("finished")
        words = "1 jobs, 1 trainers, 0 snapshots undecided"
        booted.await_property(tenant.service, "StatusText", words)


def test_a_daemon_that_hangs_is_killed_and_replaced(booted: Machine, tenant: Tenant) -> None:
    tenant.change("Service", "WatchdogSec=2")
    pid = tenant.start()
    time.sleep(4.0)  # signs of life are given: it is not killed without a reason
    assert tenant.pid() == pid
    os.kill(pid, signal.SIGSTOP)
    booted.await_property(tenant.service, "NRestarts", "1")
    until(lambda: len(tenant.events("started")) == 2, "another one starts")
    assert tenant.pid() != pid


# ---- host memory -----------------------------------------------------------


def test_snapshots_outlive_a_kill_though_their_trainer_is_dead(
    booted: Machine, tenant: Tenant
) -> None:
    tenant.start()
    tenant.rig.obey(("put_new", DATA, "hold"))
    with tenant.train(2) as training:
        training.await_event("finished")
    tenant.await_event("trainer_died")
    undecided = [s.id for s in slots_below(booted.path(tenant.runtime)) if s.undecided]
    assert sorted(undecided) == [(1, 1), (1, 2)]
    os.kill(tenant.pid(), signal.SIGKILL)
    tenant.await_event("started", 2)
    assert tenant.await_event("adopted")["snapshots"] == 2
    tenant.rig.obey()
    tenant.await_event("committed", 2)
    assert commits(tenant) == ["1/1", "1/2"]


@pytest.fixture
def small_memory(booted: Machine) -> object:
    """A /dev/shm that is too small for any buffer, as that of a container."""
    mounted = booted.run("mount", "-o", "remount,size=1M", "/dev/shm")
    assert mounted.returncode == 0, mounted.stderr
    yield
    booted.run("mount", "-o", "remount,size=50%", "/dev/shm")


def test_buffers_without_a_name_outlive_a_kill_by_the_descriptor_store(
    booted: Machine, tenant: Tenant, small_memory: object
) -> None:
    tenant.start()
    tenant.rig.obey(("put_new", DATA, "hold"))
    with tenant.train(2) as training:
        training.await_event("finished")
    tenant.await_event("shared_memory_small")
    tenant.await_event("trainer_died")
    assert booted.property(tenant.service, "NFileDescriptorStore") == "1"
    assert not slots_below(booted.path(tenant.runtime)), "nothing has a name"
    os.kill(tenant.pid(), signal.SIGKILL)
    tenant.await_event("started", 2)
    assert tenant.await_event("adopted")["snapshots"] == 2
    tenant.rig.obey()
    tenant.await_event("committed", 2)
    verified = booted.ckptmgr(
        "verify", "--all", "--json", f"file://{tenant.home}/store", uid=tenant.uid
    )
    assert [(r["id"], r["damage"]) for r in json.loads(verified.stdout)] == [
        ("1.2", []),
        ("1.1", []),
    ]


def test_an_upgrade_keeps_the_memory_of_a_trainer_that_goes_on(
    booted: Machine, tenant: Tenant, small_memory: object
) -> None:
    """`systemctl restart`: another process, another installation perhaps, and the same memory."""
    tenant.change("Service", "Environment=CKPTMGR_MEMORY_SECONDS=1")
    tenant.start()
    with tenant.train(2) as training:
        training.await_event("finished")
        tenant.await_event("committed", 2)
        booted.systemctl("restart", tenant.service)
        assert tenant.await_event("adopted")["snapshots"] == 2
        assert tenant.await_event("attached", 2)["new"] is False
        assert booted.property(tenant.service, "NFileDescriptorStore") == "1"
    tenant.await_event("freed")
    booted.await_property(tenant.service, "NFileDescriptorStore", "0")


# ---- the end ---------------------------------------------------------------


def test_a_stop_waits_for_the_drain_beyond_its_timeout(booted: Machine, tenant: Tenant) -> None:
    tenant.change("Service", "TimeoutStopSec=1")
    pid = tenant.start()
    tenant.rig.obey(("put_new", DATA, "hold"))
    with tenant.train(1) as training:
        training.await_event("finished")
    booted.systemctl("stop", "--no-block", tenant.service)
    tenant.await_event("draining")
    booted.await_property(tenant.service, "SubState", "stop-sigterm")
    time.sleep(3.0)
    assert tenant.pid() == pid
    tenant.rig.obey()
    booted.await_property(tenant.service, "ActiveState", "inactive")
    assert booted.property(tenant.service, "Result") == "success"
    assert commits(tenant) == ["1/1"]
    names = [e["event"] for e in tenant.events()]
    assert names.index("committed") < names.index("drained") < names.index("ended")


# ---- who may ---------------------------------------------------------------


def test_a_store_where_it_may_not_write_is_told(booted: Machine, tenant: Tenant) -> None:
    """A private /tmp would take the steps and lose them with the unit."""
    tenant.start()
    with tenant.train(1, url="file:///tmp/run7") as training:
        assert training.process.stderr is not None
        assert "Read-only file system" in training.process.stderr.read()


def test_a_directory_of_somebody_else_is_refused(booted: Machine, tenant: Tenant) -> None:
    there = booted.path(tenant.runtime)
    there.mkdir(mode=0o777)
    ran = booted.run("systemctl", "start", tenant.socket)
    assert ran.returncode
    assert "is not a directory of this user with mode 0700" in booted.told(tenant.socket)
    assert list(there.iterdir()) == []
    there.rmdir()


def test_a_daemon_that_a_trainer_started_is_not_cut_off(booted: Machine, tenant: Tenant) -> None:
    with tenant.train(1, url=f"file://{tenant.home}/store") as training:
        training.await_event("finished")
        ran = booted.run("systemctl", "start", tenant.socket)
        assert ran.returncode
        why = "another daemon serves this runtime directory"
        until(lambda: why in booted.told(tenant.socket), "its journal has come to it")
        ended = booted.ckptmgr("drain", "--stop", uid=tenant.uid)
        assert ended.returncode == 0, ended.stderr
