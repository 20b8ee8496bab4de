"""The units of one job: collect, read back, examine; by a user of the moment or by the owner."""

from __future__ import annotations

import json

import pytest

from servers.machine import Machine
from systemd.conftest import Tenant

pytestmark = pytest.mark.root


@pytest.fixture
def job(booted: Machine, tenant: Tenant) -> str:
    """The name of a job with four committed steps in a store that everybody may read."""
    tenant.start()
    for committed in (2, 4):
        with tenant.train(2, keep=9) as training:
            training.await_event("finished")
            tenant.await_event("committed", committed)
    booted.systemctl("stop", tenant.socket, tenant.service)
    booted.run("chmod", "-R", "a+rX", tenant.home)
    name = f"job{tenant.uid}"
    text = f"CKPTMGR_URL=file://{tenant.home}/store\nCKPTMGR_KEEP=2\n"
    booted.write(f"/etc/ckptmgr/jobs/{name}.env", text, mode=0o600)
    return name


def log_of(booted: Machine, unit: str) -> str:
    return booted.path(
        f"/var/log/{unit.removesuffix('.service').replace('@', '-')}.log"
    ).read_text()


def test_a_timer_reads_back_as_a_user_who_owns_nothing(booted: Machine, job: str) -> None:
    service, timer = f"ckptmgr-verify@{job}.service", f"ckptmgr-verify@{job}.timer"
    at_once = ["OnCalendar=", "OnActiveSec=0", "RandomizedDelaySec=0", "AccuracySec=1us"]
    booted.drop_in(timer, "Timer", *at_once)
    booted.systemctl("daemon-reload")
    assert booted.property(service, "DynamicUser") == "yes"
    booted.systemctl("start", timer)
    booted.await_property(service, "Result", "success")
    booted.await_property(service, "ExecMainCode", "1")  # CLD_EXITED
    booted.await_property(service, "ActiveState", "inactive")
    assert booted.property(service, "ExecMainStatus") == "0", log_of(booted, service)
    booted.systemctl("stop", timer)


def test_damage_fails_the_unit(booted: Machine, tenant: Tenant, job: str) -> None:
    newest = max((tenant.rig.path / "data/00000002").iterdir())
    for pack in (path for path in newest.rglob("*") if path.is_file()):
        pack.write_bytes(b"x" * pack.stat().st_size)
    service = f"ckptmgr-verify@{job}.service"
    assert booted.run("systemctl", "start", service).returncode
    assert booted.property(service, "Result") == "exit-code"
    assert booted.property(service, "ExecMainStatus") == "3", log_of(booted, service)


def test_a_job_without_a_step_is_no_failure(booted: Machine, tenant: Tenant) -> None:
    name, url = f"empty{tenant.uid}", f"file://{tenant.home}/none"
    booted.write(f"/etc/ckptmgr/jobs/{name}.env", f"CKPTMGR_URL={url}\n")
    assert booted.ckptmgr("verify", url).returncode == 4
    for what in ("gc", "verify"):
        booted.systemctl("start", f"ckptmgr-{what}@{name}.service")
        assert "is not a ckptmgr store" in log_of(booted, f"ckptmgr-{what}@{name}.service")


def standing(booted: Machine, tenant: Tenant) -> list[str]:
    ran = booted.ckptmgr("ls", "--json", f"file://{tenant.home}/store", uid=tenant.uid)
    assert ran.returncode == 0, ran.stderr
    return [s["id"] for s in json.loads(ran.stdout) if s["state"] in ("committed", "verified")]


def test_collection_runs_as_the_owner_of_the_store(
    booted: Machine, tenant: Tenant, job: str
) -> None:
    assert standing(booted, tenant) == ["2.4", "2.3", "1.2", "1.1"]
    service = f"ckptmgr-gc@{job}.service"
    assert booted.run("systemctl", "start", service).returncode, "nobody's store but the owner's"
    installed = booted.ckptmgr("install-units", "--write-path=/srv", f"--run-as={tenant.uid}")
    assert installed.returncode == 0, installed.stderr
    booted.systemctl("daemon-reload")
    try:
        booted.systemctl("start", service)
        # The second attempt may go back once more to what it resumed from.
        assert standing(booted, tenant) == ["2.4", "2.3", "1.2"]
        examine(booted, f"ckptmgr-doctor@{job}.service")
    finally:
        booted.ckptmgr("install-units", "--write-path=/srv")
        booted.systemctl("daemon-reload")


def examine(booted: Machine, service: str) -> None:
    if booted.ckptmgr("doctor", "--help").returncode:
        pytest.skip("DOCTOR'S UNIT NOT RUN: there is no `ckptmgr doctor`")
    ran = booted.run("systemctl", "start", service)
    # What it finds is the machine's business; here it must have been understood, and run.
    if ran.returncode:
        assert booted.property(service, "ExecMainStatus") == "1", log_of(booted, service)
