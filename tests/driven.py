"""Real daemons and ranks for tests: a daemon in a process of its own, a rank without torch."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from asking import Came, bring
from ckptmgr.errors import DaemonUnreachableError
from ckptmgr.rank.link import Link, Wanted
from ckptmgr.staging.control import (
    Done,
    Release,
    Restore,
    Stated,
    Status,
    Wait,
    Waited,
)
from ckptmgr.staging.hostbuffer import TAGS_BYTES_MAX, HostBuffer, table_bytes_needed
from ckptmgr.staging.launch import connect
from ckptmgr.staging.slots import free_slot
from ckptmgr.types import Snapshot, Tags
from crash.content import content, fault_in, layout_of, values_of
from nursery import Forked, nursery
from rigged import Rig

TREE = Path(__file__).parents[1]
PYTHON_PATH = os.pathsep.join(map(str, [TREE, TREE / "tests", *(TREE / "plugins").iterdir()]))
PATIENCE_SECONDS = 60.0
"""Bound of every wait: far above what is ever needed, so that only a hang meets it."""


def until(holds: Callable[[], Any], what: str, pause_seconds: float = 0.005) -> Any:
    """Wait for something that another process will do; its first true value."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        found = holds()
        if found:
            return found
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(pause_seconds)


def files_below(place: Path) -> list[Path]:
    """All files in a tree, from which another process may remove directories meanwhile."""
    return [Path(root, name) for root, _, names in os.walk(place) for name in names]


def events_of(log: Path) -> list[dict[str, Any]]:
    """The JSON lines of a daemon's log; whatever else is in it is left out."""
    with contextlib.suppress(FileNotFoundError):
        lines = log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]
    return []


class Daemon:
    """`ckptmgr daemon` as a process, below `prefix`; `log` is what it writes to stderr."""

    def __init__(
        self,
        runtime: Path,
        *arguments: str,
        program: Sequence[str] = ("ckptmgr.cli", "daemon"),
        environment: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
        wait: bool = True,
    ) -> None:
        self.runtime = runtime
        self.log = runtime / "daemon.log"
        before = len(self.events("started"))
        environment = {
            "PYTHONPATH": PYTHON_PATH,
            **(environment or dict(os.environ)),
            "CKPTMGR_RUNTIME_DIR": str(runtime),
        }
        self.process: subprocess.Popen[bytes] | Forked = (
            self._started(
                [*prefix, sys.executable, "-m", *program, *arguments], environment, pass_fds
            )
            if prefix or pass_fds
            else self._forked([*program, *arguments], environment)
        )
        if wait:
            until(lambda: len(self.events("started")) > before or self.gone(), "daemon starts")
            until(self.answers, "daemon answers")

    def _forked(self, program: Sequence[str], environment: dict[str, str]) -> Forked:
        with self.log.open("ab") as log:
            return nursery().start(program, env=environment, stdout=log, stderr=log)

    def _started(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        pass_fds: Sequence[int],
    ) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                env=environment,
                pass_fds=pass_fds,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def gone(self) -> bool:
        return self.process.poll() is not None

    def answers(self) -> bool:
        assert not self.gone(), self.log.read_text()
        try:
            connect(self.runtime).close()
        except DaemonUnreachableError:
            return False
        return True

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        return [e for e in events_of(self.log) if name in (None, e["event"])]

    def await_event(self, name: str, count: int = 1) -> dict[str, Any]:
        """Wait for the `count`-th event of a name in the log of this runtime directory."""
        until(lambda: len(self.events(name)) >= count, f"event {name} in\n{self.log.read_text()}")
        return self.events(name)[count - 1]

    def status(self) -> dict[str, Any]:
        with connect(self.runtime) as client:
            return client.ask(Status(), Stated).state

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stopped, as a host that hangs, and continued at the end."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait for its end; returns its exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


class Rank:
    """One rank of a job in this process: a Link and states of crash/content.py.

    Rank 0 claims the attempt; the others are given it, by `first` or as number and nonce.
    """

    def __init__(
        self,
        runtime: Path,
        url: str,
        *,
        mib: int = 1,
        codec: str = "none",
        keep: int = 3,
        slots: int = 2,
        rank: int = 0,
        world: int = 1,
        first: Rank | None = None,
        claimed: tuple[int, str] = (0, ""),
        max_d2h_gbps: float = 0.0,
    ) -> None:
        self.rank, self.world = rank, world
        if first is not None:
            claimed = first.attempt, first.link.nonce
        self.nbytes = mib << 20
        self.k = 0
        self.tags: Tags = {}
        self.stall_seconds = 0.001
        layout, _ = layout_of(self.nbytes)
        table = table_bytes_needed(len(layout), len(values_of(0, 0)) + TAGS_BYTES_MAX)
        wanted = Wanted(
            *(url, rank, world, slots, codec, keep, table, self.nbytes), max_d2h_gbps=max_d2h_gbps
        )
        self.link = Link(runtime, wanted, claimed)

    @property
    def attempt(self) -> int:
        return self.link.attempt

    @property
    def buffer(self) -> HostBuffer:
        return self.link.buffer

    def free_slot(self) -> int:
        """A slot that may be written; waits for the daemon to free one."""

        def look() -> int | None:
            sealed = [(s, self.buffer.outcome(s)) for s in self.buffer.snapshots()]
            found = free_slot(self.buffer.capacity.slots, sealed)
            return None if found is None else found + 1

        return int(until(look, "a slot is free")) - 1

    def seal(self, step: int, slot: int | None = None) -> Snapshot:
        """Copy and seal the state of a step; the daemon is not told."""
        chosen = self.free_slot() if slot is None else slot
        writer = self.buffer.begin(chosen)
        view = writer.data
        state = content(self.attempt, step, self.nbytes)
        np.frombuffer(view, np.uint8)[: self.nbytes] = state.reshape(-1).view(np.uint8)
        view.release()
        layout, layout_hash = layout_of(self.nbytes)
        return writer.seal(
            attempt=self.attempt,
            nonce=self.link.nonce,
            rank=self.rank,
            world=self.world,
            step=step,
            layout=layout,
            layout_hash=layout_hash,
            values=values_of(self.attempt, step),
            tags=self.tags or {"attempt": self.attempt, "step": step},
            data_bytes=self.nbytes,
            stall_seconds=self.stall_seconds,
        )

    def save(self, step: int, slot: int | None = None) -> Snapshot:
        """Seal a step and tell the daemon."""
        sealed = self.seal(step, slot)
        self.link.sealed()
        return sealed

    def wait(self, step: int, seconds: float = PATIENCE_SECONDS) -> Waited:
        return self.link.ask(Wait(step, seconds), Waited, seconds + PATIENCE_SECONDS)

    def restore(self, request: Restore | None = None) -> Came:
        """Ask for a step, check it bit by bit, and release it."""
        request = request or Restore()
        reply, self.k = bring(self.link.ask, request, self.k, PATIENCE_SECONDS)
        if reply.attempt:
            self.check(reply)
        self.link.ask(Release(), Done)
        return reply

    def check(self, reply: Came) -> None:
        if Path(reply.path) == self.buffer.path:
            check_slot(self.buffer, reply)
            return
        with HostBuffer.open(Path(reply.path)) as other:
            check_slot(other, reply)

    def close(self, *, clean: bool = False) -> None:
        self.link.close(clean=clean)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextlib.contextmanager
def ranks(url: str, *places: Path, **options: Any) -> Iterator[list[Rank]]:
    """A rank at each place, all of one new attempt; `options` are those of Rank."""
    with contextlib.ExitStack() as stack:
        world = len(places)
        found = [stack.enter_context(Rank(places[0], url, world=world, **options))]
        for number, place in enumerate(places[1:], start=1):
            rank = Rank(place, url, rank=number, world=world, first=found[0], **options)
            found.append(stack.enter_context(rank))
        yield found


@contextlib.contextmanager
def half_stored(
    rig: Rig, url: str, places: tuple[Path, Path], step: int
) -> Iterator[tuple[Daemon, list[Rank]]]:
    """Two ranks, of which the first has stored its part of `step` and looks for the register, which
    the store holds back; `rig.obey()` lets it go on.
    """
    rig.obey(("make_durable", "commit/", "hold"))
    with Daemon(places[0]) as first, Daemon(places[1]), ranks(url, *places) as job:
        job[0].save(step)
        until(lambda: rig.asked("make_durable", "commit/"), "its manifest is there")
        yield first, job


def check_slot(buffer: HostBuffer, reply: Came) -> None:
    """Every bit of a restored slot is that of its step."""
    snapshot = buffer.snapshot(reply.slot)
    assert snapshot is not None
    assert (snapshot.attempt, snapshot.step) == (reply.attempt, reply.step)
    table = buffer.table(snapshot)
    view = buffer.data(reply.slot)
    found = bytes(view[: snapshot.data_bytes])
    view.release()
    assert not fault_in(found, reply.attempt, reply.step, snapshot.data_bytes)
    assert table.values == values_of(reply.attempt, reply.step)
    assert table.tags == {"attempt": reply.attempt, "step": reply.step}


class Trainer:
    """crash/writer.py as a child: saves `steps` steps, then waits to be killed."""

    def __init__(
        self,
        runtime: Path,
        url: str,
        *,
        steps: int,
        environment: dict[str, str],
        mib: int = 1,
        fork: bool = False,
    ) -> None:
        read, write = os.pipe()
        options = {
            "runtime": runtime,
            "url": url,
            "codec": "none",
            "seed": 1,
            "mib": mib,
            "keep": 3,
            "pipe": write,
            "steps": steps,
        }
        self._log = runtime / "trainer.log"
        with self._log.open("ab") as log:
            self.process = nursery().start(
                [
                    str(TREE / "tests/crash/writer.py"),
                    "--linger",
                    *(["--fork"] if fork else []),
                    *(f"--{name}={value}" for name, value in options.items()),
                ],
                env={**environment, "CKPTMGR_RUNTIME_DIR": str(runtime)},
                pass_fds=[write],
                stdout=log,
                stderr=log,
            )
        os.close(write)
        self._lines = os.fdopen(read, "r")

    @classmethod
    def of(cls, runtime: Path, rig: Rig, *, steps: int, fork: bool = False) -> Trainer:
        """A trainer that saves into a rigged store."""
        return cls(runtime, rig.url, steps=steps, environment=rig.environment(), fork=fork)

    def await_event(self, name: str) -> dict[str, Any]:
        """Read on until the trainer tells an event of this name."""
        for line in self._lines:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        raise AssertionError(f"no {name}:\n{self._log.read_text()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._lines.close()
