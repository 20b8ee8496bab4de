"""A job of several ranks, each a process, and what its store holds."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from ckptmgr.repository.catalog import Catalog, StepEntry
from ckptmgr.store.registry import open_store
from ckptmgr.types import Outcome, StepId
from driven import PYTHON_PATH
from nursery import Forked, nursery
from rigged import Rig

MEMBER = Path(__file__).with_name("member.py")
LOOK_SECONDS = 0.05


class Member:
    """One rank, as a process (member.py); it has joined when this returns."""

    def __init__(
        self, runtime: Path, url: str, rank: int, world: int, claimed: tuple[int, str]
    ) -> None:
        self._log = runtime / f"rank{rank}.log"
        arguments = [runtime, url, rank, world, *claimed]
        with self._log.open("ab") as log:
            self.process = nursery().start(
                [str(MEMBER), *map(str, arguments)],
                env={"PYTHONPATH": PYTHON_PATH, **os.environ, "CKPTMGR_RUNTIME_DIR": str(runtime)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        joined = self.hear()
        self.claimed: tuple[int, str] = joined["attempt"], joined["nonce"]

    def tell(self, order: str, *numbers: int) -> None:
        """Give an order, and do not wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join([order, *map(str, numbers)]) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """The next answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._log.read_text()
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, order: str, *numbers: int) -> dict[str, Any]:
        """Give an order and wait until it is carried out."""
        self.tell(order, *numbers)
        return self.hear()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@contextmanager
def started(url: str, *places: Path) -> Iterator[list[Member]]:
    """All ranks of one new attempt, one at each place; killed at the end."""
    with ExitStack() as stack:
        world = len(places)
        found = [stack.enter_context(Member(places[0], url, 0, world, (0, "")))]
        for rank, place in enumerate(places[1:], start=1):
            found.append(stack.enter_context(Member(place, url, rank, world, found[0].claimed)))
        yield found


def commit(job: list[Member], step: int) -> None:
    """Every rank saves a step, and hears that it is committed."""
    for member in job:
        member.ask("save", step)
    for member in job:
        told = member.ask("wait", step)
        assert told["outcome"] == Outcome.COMMITTED, told


def resumed(job: list[Member], step: int = 0) -> tuple[str, set[str], list[int]]:
    """The one step that all ranks get, where it came from, and the ranks that had saved it."""
    came = [member.ask("restore", step) for member in job]
    steps = {tuple(one["id"]) for one in came}
    assert len(steps) == 1, f"a mix of steps: {came}"
    assert len({tuple(one["saved"]) for one in came}) == 1
    attempt, number = steps.pop()
    return f"{attempt}.{number}", {one["source"] for one in came}, came[0]["saved"]


def kill(job: list[Member]) -> None:
    for member in job:
        member.kill()


def lose_memory(*places: Path) -> None:
    """What a host that goes away takes with it; no daemon may run there."""
    for place in places:
        for path in (place / "buffers").iterdir():
            path.unlink()


# ---- the store -----------------------------------------------------------------


def entries(rig: Rig) -> dict[str, StepEntry]:
    """All steps of a rigged store, by their names."""
    return entries_at(rig.file_url)


def entries_at(url: str) -> dict[str, StepEntry]:
    """All steps of a store, by their names."""

    async def read() -> dict[str, StepEntry]:
        store = open_store(url)
        try:
            return {str(entry.id): entry for entry in await Catalog(store).entries()}
        finally:
            await store.aclose()

    return asyncio.run(read())


async def _latest(rig: Rig) -> StepId | None:
    store = open_store(rig.file_url)
    try:
        return await Catalog(store).latest()
    finally:
        await store.aclose()


def latest(rig: Rig) -> str:
    """The last consistent step; "None" if there is none."""
    return str(asyncio.run(_latest(rig)))


class Watcher:
    """Looks at the last consistent step all along; it must never go back."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.seen: list[StepId] = []
        self.faults: list[str] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher")

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            try:
                found = asyncio.run(_latest(self._rig))
            except Exception as error:
                self.faults.append(repr(error))
                continue
            last = self.seen[-1] if self.seen else None
            if last is not None and (found is None or found < last):
                self.faults.append(f"{last} became {found}")
            elif found is not None and found != last:
                self.seen.append(found)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


# ---- whole incarnations ---------------------------------------------------------


def stop(processes: list[Forked]) -> None:
    """SIGSTOP them, and wait until each has stopped."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    for process in processes:
        while _state(process.pid) != "T":
            time.sleep(0.001)


def go_on(processes: list[Forked]) -> None:
    for process in processes:
        process.send_signal(signal.SIGCONT)


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
