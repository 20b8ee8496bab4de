"""The pair of units of one user, under a user manager of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from crash.peek import slots_below
from driven import until
from servers.machine import ENVIRONMENT, PYTHON, Machine
from systemd.conftest import Tenant

pytestmark = pytest.mark.root

UNITS = ["ckptmgr.service", "ckptmgr.socket"] + [
    f"ckptmgr-{job}@run7.{kind}"
    for job in ("gc", "verify", "doctor")
    for kind in ("service", "timer")
]


class UserManager:
    """`systemd --user` of a tenant, started as logind would."""

    def __init__(self, machine: Machine, tenant: Tenant) -> None:
        self.machine, self.tenant = machine, tenant
        self.unit = f"manager-{tenant.uid}.service"
        runtime, config = f"/run/user/{tenant.uid}", f"{tenant.home}/config"
        self.variables = [f"XDG_RUNTIME_DIR={runtime}", f"XDG_CONFIG_HOME={config}"]
        for path in (runtime, config):
            machine.run("install", "-d", "-m", "700", "-o", str(tenant.uid), path)
        variables = [*self.variables, *(f"{k}={v}" for k, v in ENVIRONMENT.items())]
        machine.run(
            *("systemd-run", "--quiet", f"--unit={self.unit}", f"--uid={tenant.uid}"),
            *("--property=Delegate=yes", "--property=Type=notify"),
            *(f"--setenv={variable}" for variable in variables),
            *("/lib/systemd/systemd", "--user", "--unit=default.target"),
        )
        machine.await_property(self.unit, "ActiveState", "active")

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self.machine.run("env", *self.variables, *command, uid=self.tenant.uid)

    def systemctl(self, *arguments: str) -> str:
        ran = self.run("systemctl", "--user", *arguments)
        assert ran.returncode == 0, ran.stderr + self.run("systemctl", "--user", "status").stdout
        return ran.stdout.strip()


@pytest.fixture
def manager(booted: Machine, tenant: Tenant) -> Iterator[UserManager]:
    found = UserManager(booted, tenant)
    installed = found.run(PYTHON, "-m", "ckptmgr.cli", "install-units", "--user")
    assert installed.returncode == 0, installed.stderr
    found.systemctl("daemon-reload")
    yield found
    booted.run("systemctl", "stop", found.unit)


def test_systemd_finds_nothing_to_complain_about_in_them(manager: UserManager) -> None:
    checked = manager.run("systemd-analyze", "--user", "verify", *UNITS)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_they_serve_their_user_and_a_kill_costs_nothing(
    booted: Machine, tenant: Tenant, manager: UserManager
) -> None:
    manager.systemctl("start", "ckptmgr.socket")
    show = ("show", "--property=MainPID", "--value", "ckptmgr.service")
    assert manager.systemctl(*show) == "0"
    with tenant.train(2, url=f"file://{tenant.home}/store") as training:
        training.await_event("finished")
        first = manager.systemctl(*show)
        assert first != "0"
        booted.run("kill", "-KILL", first)
        until(lambda: manager.systemctl(*show) not in ("0", first), "another daemon")
        committed = tenant.rig.path / "commit/00000001"
        until(lambda: len(list(committed.glob("*"))) == 2, "both steps are committed")
    assert slots_below(booted.path(tenant.runtime)), "host memory is still there"
    assert os.path.exists(booted.path(f"{tenant.runtime}/control.sock"))
    manager.systemctl("stop", "ckptmgr.socket", "ckptmgr.service")
    assert not os.path.exists(booted.path(f"{tenant.runtime}/control.sock"))
