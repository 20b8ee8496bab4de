"""One machine for all tests of a process; each test uses a user of its own."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, Self

import pytest

from driven import events_of, until
from rigged import Rig
from servers.machine import ENVIRONMENT, HERE, PYTHON, Machine, machine

PYTHON_PATH = ENVIRONMENT["PYTHONPATH"]

_uids = itertools.count(4001)


@pytest.fixture(scope="session")
def booted() -> Iterator[Machine]:
    """A machine on which the units are installed, by our own command."""
    with machine() as found:
        installed = found.ckptmgr("install-units", "--write-path=/srv")
        assert installed.returncode == 0, installed.stderr
        variables = [f"Environment={name}={value}" for name, value in ENVIRONMENT.items()]
        found.drop_in("ckptmgr@.socket", "Socket", *variables)
        log = "StandardError=append:/var/log/ckptmgr-%i.log"
        found.drop_in("ckptmgr@.service", "Service", *variables, log)
        log = "StandardError=append:/var/log/%p-%i.log"
        found.drop_in("ckptmgr-.service", "Service", *variables, log)
        found.path("/var/log").mkdir(exist_ok=True)
        found.systemctl("daemon-reload")
        yield found


class Tenant:
    """A user of the machine who trains on it, with a rigged store below /srv."""

    def __init__(self, machine: Machine, uid: int) -> None:
        machine.add_user(uid)
        self.machine = machine
        self.uid = uid
        self.service = f"ckptmgr@{uid}.service"
        self.socket = f"ckptmgr@{uid}.socket"
        self.runtime = f"/dev/shm/ckptmgr-{uid}"
        self.log = machine.path(f"/var/log/ckptmgr-{uid}.log")
        self.home = f"/srv/{uid}"
        outside = machine.path(self.home)
        outside.mkdir(parents=True)
        self.rig = Rig(outside)
        self.url = f"rigged://{self.home}/store"
        machine.run("chown", "--recursive", str(uid), self.home)
        rigged = f"Environment=PYTHONPATH={self.home}/site:{PYTHON_PATH}"
        self.change("Service", rigged, name="55-rigged")

    def change(self, section: str, *lines: str, name: str = "60-test") -> None:
        """Change the daemon's unit of this user alone."""
        self.machine.drop_in(self.service, section, *lines, name=name)
        self.machine.systemctl("daemon-reload")

    def start(self) -> int:
        """Start the daemon, with its socket; its pid on this machine."""
        self.machine.systemctl("start", self.service)
        return self.pid()

    def pid(self) -> int:
        """The daemon's process, as the tests see it."""
        groups = self.machine.path("/sys/fs/cgroup").rglob(f"{self.service}/cgroup.procs")
        pids = [pid for group in groups for pid in group.read_text().split()]
        assert len(pids) == 1, self.machine.told(self.service)
        return int(pids[0])

    def status(self) -> dict[str, Any]:
        """What `ckptmgr status` tells the user."""
        ran = self.machine.ckptmgr("status", "--json", uid=self.uid)
        assert ran.returncode == 0, ran.stderr
        state: dict[str, Any] = json.loads(ran.stdout)
        return state

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        return [e for e in events_of(self.log) if name in (None, e["event"])]

    def await_event(self, name: str, count: int = 1) -> dict[str, Any]:
        def found() -> bool:
            return len(self.events(name)) >= count

        try:
            until(found, f"event {name}, {count} times")
        except AssertionError as error:
            text = self.log.read_text() if self.log.exists() else "no log"
            raise AssertionError(f"{error}\n{text}\n{self.machine.told(self.service)}") from None
        return self.events(name)[count - 1]

    def train(self, steps: int, url: str = "", keep: int = 3) -> Training:
        """A trainer that saves, and then waits to be killed. Two steps are never one too many."""
        return Training(self, steps, url or self.url, keep)


class Training:
    """crash/writer.py in the machine; it tells its events on its standard output."""

    def __init__(self, tenant: Tenant, steps: int, url: str, keep: int) -> None:
        options = {
            "runtime": tenant.runtime,
            "url": url,
            "codec": "none",
            "seed": 1,
            "mib": 1,
            "keep": keep,
            "pipe": 1,
            "steps": steps,
        }
        self.process = subprocess.Popen(
            tenant.machine.command(
                PYTHON,
                f"{HERE}/tree/tests/crash/writer.py",
                "--linger",
                *(f"--{name}={value}" for name, value in options.items()),
                uid=tenant.uid,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def await_event(self, name: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        assert self.process.stderr is not None
        raise AssertionError(f"no {name}:\n{self.process.stderr.read()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def tenant(booted: Machine) -> Iterator[Tenant]:
    """A user whom no other test knows; its daemon is stopped afterwards."""
    found = Tenant(booted, next(_uids))
    yield found
    booted.run("systemctl", "kill", "--signal=KILL", found.service)
    booted.run("systemctl", "stop", found.socket, found.service)
    booted.run("systemctl", "reset-failed", found.socket, found.service)
    shutil.rmtree(booted.path(found.runtime), ignore_errors=True)
