"""One Prometheus for all drills of a process, and a rigged store for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drills.watched import Prometheus, Watch, needs_prometheus
from driven import Daemon
from rigged import Rig

WatchDaemon = Callable[[Daemon], Watch]


@pytest.fixture(scope="session")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    needs_prometheus()
    found = Prometheus(tmp_path_factory.mktemp("prometheus"))
    yield found
    found.close()


@pytest.fixture
def watch(prometheus: Prometheus) -> WatchDaemon:
    """Scrape a daemon until the block is over."""
    return lambda daemon: prometheus.watch(daemon.status()["metrics_port"])


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    """A rigged store that every process started from here on can open."""
    found = Rig(tmp_path)
    monkeypatch.setenv("PYTHONPATH", found.python_path)
    # Deadlines and patience of a store in drill time, too.
    monkeypatch.setenv("CKPTMGR_STORE_TIMEOUT_SECONDS", "0.4")
    return found
