"""The n-th operation of a save or a restore fails, for every n: nothing wrong is ever committed,
nothing ends, and what was sealed is committed as soon as the store is back.

Twice: at the store's face, where every error can be asked for before or after its operation took
effect, and below it, where the n-th system call fails. The writer, its retries, retention and the
reader are the daemon's own.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import random
import secrets
import shutil
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.config import open_private_dir
from ckptmgr.daemon import committer, writer
from ckptmgr.daemon.intake import Held, Intake
from ckptmgr.daemon.job import Job
from ckptmgr.daemon.pipeline import Pipeline
from ckptmgr.daemon.reader import Reader
from ckptmgr.daemon.session import Session
from ckptmgr.daemon.writer import Writer
from ckptmgr.errors import (
    CkptmgrError,
    DamageError,
    StoreError,
    StoreFullError,
    StorePermissionError,
    StoreUnreachableError,
)
from ckptmgr.metrics import Metrics
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.restore.check import restore_files, verify_store
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.store import local, posix, tree
from ckptmgr.store.base import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.store.retry import RetryingStore
from ckptmgr.testing import Fault, FaultyStore, dead
from ckptmgr.types import Outcome, StepId
from reading import bring
from scale import FULL, scaled
from small_step import (
    Objects,
    SavedStep,
    encode_state,
    fill_slot,
    host_buffer,
    made_in_memory,
    memory_store,
    same_bits,
    save_steps,
    small_state,
    write_tree,
)

pytestmark = pytest.mark.reliability

ERRORS = {
    "unreachable": StoreUnreachableError,
    "full": StoreFullError,
    "refused": StorePermissionError,
}
NEW, NEXT = 30, 40
PATIENCE_SECONDS = 60.0

_metrics = Metrics()


@pytest.fixture(scope="module")
def base() -> tuple[list[SavedStep], Objects]:
    """Steps 10 and 20, so that step 30 is followed by the retirement of step 10."""
    return made_in_memory(save_steps)


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(f"/dev/shm/ckptmgr-test-{secrets.token_hex(6)}")
    open_private_dir(path)
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (writer, committer):
        monkeypatch.setattr(module, "RETRY_SECONDS_MIN", 0.001)
        monkeypatch.setattr(module, "RETRY_SECONDS_MAX", 0.002)


@dataclass
class Stage:
    """A job with one host buffer, whose writer runs."""

    store: Store
    held: Held
    job: Job
    task: asyncio.Task[None]
    nonce: str

    def seal(self, step: int) -> None:
        encoded = encode_state(small_state(step))
        slot = 0 if step == NEW else 1
        fill_slot(self.held.buffer, slot, encoded, attempt=1, nonce=self.nonce, step=step)
        self.held.wake.set()

    async def settled(self, step: int) -> Outcome:
        """What became of a step; the writer must still be alive."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            decided = asyncio.ensure_future(self.held.wait_decided())
            await asyncio.wait([decided, self.task], return_when=asyncio.FIRST_COMPLETED)
            assert not self.task.done(), f"the writer ended: {self.task}"
            await decided
            if self.job._retention is not None:
                await asyncio.wait([self.job._retention])
        return self.held.results[self.nonce, step][0]


@asynccontextmanager
async def staged(store: Store, nonce: str) -> AsyncIterator[Stage]:
    """The daemon's writer of one buffer on `store`; tasks that fail unseen fail the test."""
    pool = BufferPool(1 << 27)
    unseen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: unseen.append(context))
    job = Job(store.url, store, Catalog(store), "test", _metrics, pool)
    nbytes = len(encode_state(small_state(NEW)).data)
    with host_buffer(store.url, nbytes) as buffer:
        held = Held(buffer, writer_alive=True)
        task = asyncio.create_task(Writer(held, job, Pipeline(pool), lambda: None).run())
        try:
            yield Stage(store, held, job, task, nonce)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await job.aclose()
    assert not unseen, unseen


async def check_whole(store: Store, newest: int, steps: set[str], directory: Path) -> None:
    """Everything that is committed holds, and the newest step comes back bit by bit."""
    catalog = Catalog(store)
    reports = await verify_store(catalog, None, every=True, quick=False, progress=lambda _: None)
    assert not [damage for report in reports for damage in report["damage"]], reports
    assert {report["id"] for report in reports if report["committed"]} == steps
    for path in directory.iterdir():
        path.unlink()
    document = await restore_files(catalog, None, "safetensors", directory, lambda _: None)
    assert document["id"] == f"1.{newest}"
    state = small_state(newest)
    saved = SavedStep(StepId(1, newest), state, encode_state(state), None)  # type: ignore[arg-type]
    assert same_bits(directory, saved), "SILENTLY WRONG"


def retrying(store: Store) -> RetryingStore:
    return RetryingStore(store, timeout_seconds=5.0, deadline_seconds=30.0, jitter=lambda: 0.0)


async def operations_of_a_save(base: tuple[list[SavedStep], Objects]) -> list[tuple[Any, str]]:
    faulty = FaultyStore(memory_store(base[1]))
    async with staged(faulty, base[0][0].decision.nonce) as stage:
        stage.seal(NEW)
        assert await stage.settled(NEW) is Outcome.COMMITTED
    return faulty.operations


def spread(cases: list[Any], sample: int) -> list[Any]:
    """All cases in a full run, else a sample of them."""
    return cases if FULL or len(cases) <= sample else random.sample(cases, sample)


@pytest.mark.parametrize("layer", ["retried", "bare"])
def test_any_failing_operation_of_a_save_delays_it_and_no_more(
    base: tuple[list[SavedStep], Objects], directory: Path, layer: str
) -> None:
    """With retries the writer does not even see it; without, its own loop must carry on."""
    counts: Counter[str] = Counter()

    async def one(at: int, error: type[StoreError], when: Any) -> None:
        inner = memory_store(base[1])
        faulty = FaultyStore(inner, [Fault(error("by the test's will"), at=at, when=when)])
        store = retrying(faulty) if layer == "retried" else faulty
        async with staged(store, base[0][0].decision.nonce) as stage:
            stage.seal(NEW)
            assert await stage.settled(NEW) is Outcome.COMMITTED
            faulty.plan(())
            await check_whole(inner, NEW, {"1.30", "1.20"} | standing(inner), directory)
            stage.seal(NEXT)
            assert await stage.settled(NEXT) is Outcome.COMMITTED
            await check_whole(inner, NEXT, {"1.40", "1.30"}, directory)
        counts[error.__name__] += 1

    def standing(inner: Any) -> set[str]:
        """Step 10 may still be there: what retention could not do is done after the next save."""
        return set() if "retired/00000001/000000000010" in inner._shelf else {"1.10"}

    async def main() -> None:
        operations = await operations_of_a_save(base)
        kinds = {operation for operation, _ in operations}
        assert kinds == {"put_new", "get", "list", "delete", "make_durable"}
        cases = list(
            itertools.product(range(1, len(operations) + 1), ERRORS.values(), ("before", "after"))
        )
        for case in spread(cases, 120):
            await one(*case)
        print(f"\n{layer}: {len(operations)} operations in a save, {dict(counts)}")

    asyncio.run(main())


def test_an_outage_from_any_operation_on_ends_with_a_commit(
    base: tuple[list[SavedStep], Objects], directory: Path
) -> None:
    """Everything fails from the n-th operation on, until the writer has met it three times."""

    async def one(at: int, error: type[StoreError]) -> None:
        inner = memory_store(base[1])
        gone = [Fault(error("by the test's will"), at=at, and_later=True)]
        faulty = FaultyStore(inner, gone)
        async with staged(faulty, base[0][0].decision.nonce) as stage:
            stage.seal(NEW)
            async with asyncio.timeout(PATIENCE_SECONDS):
                while len(faulty.operations) < at + 3 and not stage.held.results:
                    await asyncio.sleep(0)
            assert not stage.task.done()
            faulty.plan(())
            assert await stage.settled(NEW) is Outcome.COMMITTED
            stage.seal(NEXT)
            assert await stage.settled(NEXT) is Outcome.COMMITTED
            await check_whole(inner, NEXT, {"1.40", "1.30"}, directory)

    async def main() -> None:
        count = len(await operations_of_a_save(base))
        cases = list(itertools.product(range(1, count + 1), ERRORS.values()))
        for case in spread(cases, 40):
            await one(*case)

    asyncio.run(main())


def test_a_store_that_hangs_at_any_operation_is_given_up_and_tried_again(
    base: tuple[list[SavedStep], Objects], directory: Path
) -> None:
    """The n-th operation never ends: the deadline of one try ends it."""

    async def one(at: int) -> None:
        inner = memory_store(base[1])
        faulty = FaultyStore(inner, [Fault(at=at, gate=asyncio.Event())])
        store = RetryingStore(
            faulty, timeout_seconds=0.05, deadline_seconds=30.0, jitter=lambda: 0.0
        )
        async with staged(store, base[0][0].decision.nonce) as stage:
            stage.seal(NEW)
            assert await stage.settled(NEW) is Outcome.COMMITTED
            stage.seal(NEXT)
            assert await stage.settled(NEXT) is Outcome.COMMITTED
            await check_whole(inner, NEXT, {"1.40", "1.30"}, directory)

    async def main() -> None:
        count = len(await operations_of_a_save(base))
        for at in spread(list(range(1, count + 1)), 12):
            await one(at)

    asyncio.run(main())


# -- below the store's face -----------------------------------------------------------------------

CALLS = ("open", "pwritev", "fsync", "link", "unlink", "mkdir", "preadv", "fstat", "scandir")

NUMBERS = ("EIO", "ENOSPC", "EDQUOT", "ESTALE", "EINTR", "ETIMEDOUT")


class FailingCalls:
    """Stands in for `os` in the store: the n-th of its system calls fails, or writes short."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.at = 0
        self.number = errno.EIO
        self.when = "before"
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return self._failing(name, real) if name in CALLS else real

    def _failing(self, name: str, real: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            with self._lock:
                self.made.append(name)
                struck = len(self.made) == self.at
            if not struck:
                return real(*arguments, **named)
            if self.when == "short" and name == "pwritev":
                descriptor, buffers, offset = arguments
                return os.pwritev(descriptor, [buffers[0][: max(1, len(buffers[0]) // 2)]], offset)
            if self.when == "after":
                made = real(*arguments, **named)
                if name == "open":
                    os.close(made)
                elif name == "scandir":
                    made.close()
            raise OSError(self.number, os.strerror(self.number))

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> FailingCalls:
    failing = FailingCalls()
    for module in (local, posix, tree):
        monkeypatch.setattr(module, "os", failing)
    return failing


def test_any_failing_system_call_of_a_save_delays_it_and_no_more(
    base: tuple[list[SavedStep], Objects], directory: Path, calls: FailingCalls
) -> None:
    counts: Counter[str] = Counter()
    out = directory / "out"
    out.mkdir()

    async def one(at: int, number: str, when: str) -> int:
        root = directory / "store"
        shutil.rmtree(root, ignore_errors=True)
        write_tree(root, base[1])
        store = retrying(LocalStore(str(root)))
        calls.made.clear()
        calls.at, calls.number, calls.when = at, getattr(errno, number), when
        async with staged(store, base[0][0].decision.nonce) as stage:
            stage.seal(NEW)
            assert await stage.settled(NEW) is Outcome.COMMITTED
            made = len(calls.made)
            calls.at = 0
            stage.seal(NEXT)
            assert await stage.settled(NEXT) is Outcome.COMMITTED
            await check_whole(store, NEXT, {"1.40", "1.30"}, out)
        counts[f"{number} {when}"] += 1
        return made

    async def main() -> None:
        count = await one(0, "EIO", "before")
        assert set(calls.made) == set(CALLS)
        cases = list(itertools.product(range(1, count + 1), NUMBERS, ("before", "after")))
        cases += [(at, "EIO", "short") for at in range(1, count + 1)]
        for case in spread(cases, 100):
            await one(*case)
        print(f"\n{count} system calls in a save, {sum(counts.values())} runs: {dict(counts)}")

    asyncio.run(main())


# -- the way back ---------------------------------------------------------------------------------


async def restored(store: Store, directory: Path, attempt: int) -> tuple[str, list[str]]:
    """What a trainer's (or with attempt 0 a reader's) restore gives; its bits are compared."""
    job = Job(store.url, store, Catalog(store), "test", _metrics, BufferPool(1 << 27))
    session = Session(job, 0, attempt=attempt, nonce="00" * 16)
    try:
        answer = await bring(Reader(Intake(directory), directory), session)
        with HostBuffer.open(Path(answer.path)) as buffer:
            (snapshot,) = buffer.snapshots()
            with buffer.data(snapshot.slot) as data:
                assert bytes(data) == encode_state(small_state(answer.step)).data, "SILENTLY WRONG"
    finally:
        await session.release()
    return f"{answer.attempt}.{answer.step}", [step for step, _ in answer.skipped]


@pytest.mark.parametrize("layer", ["retried", "bare"])
def test_any_failing_operation_of_a_restore_is_an_error_or_nothing(
    base: tuple[list[SavedStep], Objects], directory: Path, layer: str
) -> None:
    """Never another step: a store that can not be read is no reason to go back."""
    counts: Counter[str] = Counter()

    async def one(at: int, error: type[StoreError], when: Any) -> int:
        faulty = FaultyStore(
            memory_store(base[1]), [Fault(error("by the test's will"), at=at, when=when)]
        )
        store = retrying(faulty) if layer == "retried" else faulty
        try:
            found = await restored(store, directory, 2)
        except StoreUnreachableError:
            counts["told"] += 1
        else:
            assert found == ("1.20", [])
            counts["exact"] += 1
        made = faulty.operations[:]
        faulty.plan(())
        assert await restored(store, directory, 3) == ("1.20", [])
        if not any(key.startswith("holds/") for _, key in made[at - 1 : at]):
            assert await store.list("holds/") == [], "a hold was left behind"
        return len(made)

    async def main() -> None:
        count = await one(0, StoreUnreachableError, "before")
        cases = list(itertools.product(range(1, count + 1), ERRORS.values(), ("before", "after")))
        for case in spread(cases, 60):
            await one(*case)
        print(f"\n{layer}: {count} operations in a restore: {dict(counts)}")
        assert counts["exact"] > 0

    asyncio.run(main())


def test_any_failing_system_call_of_a_restore_is_an_error_or_nothing(
    base: tuple[list[SavedStep], Objects], directory: Path, calls: FailingCalls
) -> None:
    counts: Counter[str] = Counter()
    root = directory / "store"
    lent = directory / "lent"
    lent.mkdir()

    async def one(at: int, number: str, when: str) -> int:
        shutil.rmtree(root, ignore_errors=True)
        write_tree(root, base[1])
        store = LocalStore(str(root))
        calls.made.clear()
        calls.at, calls.number, calls.when = at, getattr(errno, number), when
        try:
            found = await restored(store, lent, 2)
        except StoreError:
            counts["told"] += 1
        else:
            assert found == ("1.20", []), "a failing call made it go back"
            counts["exact"] += 1
        made = len(calls.made)
        calls.at = 0
        assert await restored(store, lent, 3) == ("1.20", [])
        await store.aclose()
        return made

    async def main() -> None:
        count = await one(0, "EIO", "before")
        cases = list(itertools.product(range(1, count + 1), NUMBERS, ("before", "after")))
        for case in spread(cases, 120):
            await one(*case)
        print(f"\n{count} system calls in a restore: {dict(counts)}")

    asyncio.run(main())


def test_a_full_store_can_still_be_read(
    base: tuple[list[SavedStep], Objects], directory: Path
) -> None:
    """Reading puts a hold where it can, and does without where there is no room."""

    async def main() -> None:
        for error in (StoreFullError, StorePermissionError):
            fault = Fault(error("by the test's will"), operation="put_new", and_later=True)
            store = FaultyStore(memory_store(base[1]), [fault])
            assert await restored(store, directory, 0) == ("1.20", [])
            out = directory / error.__name__
            out.mkdir()
            document = await restore_files(Catalog(store), None, "safetensors", out, lambda _: None)
            assert document["id"] == "1.20"

    asyncio.run(main())


def test_nothing_is_decided_on_a_store_that_does_not_answer(
    base: tuple[list[SavedStep], Objects], directory: Path
) -> None:
    async def main() -> None:
        store = FaultyStore(memory_store(base[1]), dead())
        with pytest.raises(StoreUnreachableError):
            await restored(store, directory, 2)
        with pytest.raises(StoreUnreachableError):
            await restore_files(Catalog(store), None, "safetensors", directory, lambda _: None)
        assert not issubclass(StoreUnreachableError, DamageError)
        assert issubclass(StoreUnreachableError, CkptmgrError)

    asyncio.run(main())
    assert scaled(1, 2)
