"""Fixtures of more than one test file."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, settings

from ckptmgr.config import open_private_dir
from ckptmgr.staging import launch
from nursery import nursery
from processes import end_processes_of

# How long an example takes says how busy the machine is.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_configure() -> None:
    """Ctrl-C ends what tests start, though a shell ignores it in what it starts behind itself."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where tests are shared out to several processes, each begins with its part of the long ones:
    at the end of the run only short ones are left to take over.
    """
    workers: int = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    modules: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("reliability"):
            modules.setdefault(item.path, []).append(item)
    long = list(modules.values())
    short = [item for item in items if not item.get_closest_marker("reliability")]
    shared = []
    for worker in range(workers):
        share = slice(worker * len(short) // workers, (worker + 1) * len(short) // workers)
        shared += [*chain.from_iterable(long[worker::workers]), *short[share]]
    items[:] = shared


@pytest.fixture(autouse=True, scope="session")
def quick_daemons() -> None:
    """Daemons that ranks of this process start are forks; `real_daemons` is for the real thing."""
    forks = SimpleNamespace(Popen=nursery().popen, DEVNULL=subprocess.DEVNULL)
    vars(launch)["subprocess"] = forks


@pytest.fixture
def real_daemons(monkeypatch: pytest.MonkeyPatch) -> None:
    """Daemons that ranks of this process start are started as users' are."""
    monkeypatch.setattr(launch, "subprocess", subprocess)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make a private runtime directory on tmpfs; its daemons are killed when the test ends."""
    path = Path(f"/dev/shm/ckptmgr-test-{os.getpid()}-{secrets.token_hex(4)}")
    open_private_dir(path)
    monkeypatch.setenv("CKPTMGR_RUNTIME_DIR", str(path))
    yield path
    end_processes_of(path)
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def hosts(runtime: Path) -> list[Path]:
    """Four runtime directories: four hosts, as far as daemons can tell."""
    found = [runtime / f"h{number}" for number in range(4)]
    for path in found:
        path.mkdir(mode=0o700)
    return found


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Return the URL of a fresh local store."""
    return f"file://{tmp_path}/store"
