"""Real daemons on a real S3 gateway: saved, killed, restored, damaged, and on a bad line."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from called import call
from ckptmgr.errors import EXIT_FELL_BACK, DamageError, StoreError
from ckptmgr.repository.catalog import Catalog
from ckptmgr.restore.check import restore_files, verify_store
from ckptmgr.store.registry import open_store
from ckptmgr.store.retry import RetryingStore
from ckptmgr.types import PAGE_BYTES, Outcome
from crash.content import content
from driven import PYTHON_PATH, Daemon, Rank, Trainer, until
from objectstore.oracle import exact_commits
from scale import FULL, scaled
from servers.buckets import Bucket
from servers.faultproxy import Fault, FaultProxy, Kind
from small_step import read_safetensors

pytestmark = [pytest.mark.reliability, pytest.mark.stores(place="s3:// on Ceph RGW")]

STEP_BYTES = 1 << 20
FAULTS = {
    **{kind.name.lower(): Fault(kind) for kind in Kind if kind is not Kind.STATUS},
    **{str(code): Fault(Kind.STATUS, status=code) for code in (403, 409, 412, 500, 503)},
}
OF_READING = list(FAULTS) if FULL else ["cut", "shrunk", "flip_down", "reset", "503"]


@pytest.fixture
def url(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> str:
    """The job's URL; a try of an operation has 1 s."""
    monkeypatch.setenv("CKPTMGR_STORE_TIMEOUT_SECONDS", "1")
    return f"s3://{bucket.name}/jobs/run7"


async def commits(bucket: Bucket, tmp_path: Path) -> list[tuple[int, int]]:
    return await exact_commits(bucket, "jobs/run7", tmp_path / "copy")


def restored(to: Path) -> bytes:
    """The bytes of a step of crash/content.py that `ckptmgr restore` wrote."""
    found = read_safetensors(to / "state.safetensors")
    return found["words"][2] + found["floats"][2]


async def test_saved_killed_and_restored(
    runtime: Path, url: str, bucket: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    """The trainer dies after its last seal, its daemon amid the upload; the next daemon finishes
    from host memory, and when that is lost too, the bucket is enough.
    """
    proxy.plan(Fault(Kind.STALL, "PUT", "/data/"))
    environment = {**os.environ, "PYTHONPATH": PYTHON_PATH}
    with (
        Daemon(runtime) as daemon,
        Trainer(runtime, url, steps=2, environment=environment) as trainer,
    ):
        trainer.await_event("finished")
        until(lambda: proxy.struck[Kind.STALL], "an upload is under way")
        trainer.kill()
        daemon.end(signal.SIGKILL)
    proxy.plan()
    with Daemon(runtime) as adopting:
        adopting.await_event("committed", 2)
        adopting.end()
    assert await commits(bucket, tmp_path) == [(1, 1), (1, 2)]
    shutil.rmtree(runtime / "buffers")
    with Daemon(runtime), Rank(runtime, url) as rank:
        reply = rank.restore()
        assert (reply.attempt, reply.step, reply.source) == (1, 2, "store")
    done = call("restore", url, "--to", tmp_path / "out", "--json")
    assert (done.status, done.document["id"]) == (0, "1.2"), done.err
    assert restored(tmp_path / "out") == content(1, 2, STEP_BYTES).tobytes()


async def test_every_damaged_object_is_found_and_none_comes_back(
    runtime: Path, url: str, bucket: Bucket, tmp_path: Path
) -> None:
    with Daemon(runtime), Rank(runtime, url, keep=9) as rank:
        rank.restore()
        for step in (1, 2):
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED
    assert await commits(bucket, tmp_path) == [(1, 1), (1, 2)]
    newest = [key for key in bucket.keys("jobs/run7") if "/000000000002" in key]
    pack = next(key for key in newest if "/data/" in key)
    manifest = next(key for key in newest if "/man/" in key)
    register = next(key for key in newest if "/commit/" in key)
    for number, (key, spoil) in enumerate(
        [
            (pack, lambda blob: flipped(blob, PAGE_BYTES + 5)),
            (pack, lambda blob: blob[:-PAGE_BYTES]),
            (pack, None),
            (manifest, lambda blob: flipped(blob, len(blob) // 2)),
            (manifest, None),
            (register, lambda blob: blob[:-1]),
        ]
    ):
        whole = bucket.read(key)
        if spoil is None:
            bucket.remove(key)
        else:
            bucket.write(key, spoil(whole))
        assert key.removeprefix("jobs/run7/") in await damaged_keys(url)
        to = tmp_path / f"out{number}"
        to.mkdir()
        told = await restore(url, to)
        assert (told["id"], [one["id"] for one in told["skipped"]]) == ("1.1", ["1.2"])
        assert restored(to) == content(1, 1, STEP_BYTES).tobytes()
        if number == 0:
            assert call("verify", url, "--all").status == DamageError.exit_status
            assert call("restore", url, "--to", tmp_path / "out").status == EXIT_FELL_BACK
        bucket.write(key, whole)
    assert await damaged_keys(url) == set()


async def damaged_keys(url: str) -> set[str]:
    """What `ckptmgr verify --all` names."""
    store = retrying(url)
    reports = await verify_store(
        Catalog(store), None, every=True, quick=False, progress=lambda _: None
    )
    return {one["key"] for report in reports for one in report["damage"]}


async def restore(url: str, to: Path) -> dict[str, Any]:
    """What `ckptmgr restore` does, with less patience."""
    return await restore_files(Catalog(retrying(url)), None, "safetensors", to, lambda _: None)


def retrying(url: str) -> RetryingStore:
    return RetryingStore(open_store(url), timeout_seconds=1, deadline_seconds=8)


def flipped(blob: bytes, at: int) -> bytes:
    return blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]


async def test_a_daemon_saves_through_every_fault_and_commits_nothing_wrong(
    runtime: Path, url: str, bucket: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    step = save_through(list(FAULTS.values()), runtime, url, proxy)
    assert await commits(bucket, tmp_path) == [(1, number + 1) for number in range(step)]


def save_through(faults: list[Fault], runtime: Path, url: str, proxy: FaultProxy) -> int:
    """Some requests in a row go wrong while two steps are saved; what is left over is committed
    when the fault ends. Returns the last step.
    """
    step = 0
    with Daemon(runtime) as daemon, Rank(runtime, url, keep=10_000) as rank:
        rank.restore()
        for fault in faults:
            for _ in range(scaled(1, 20)):
                proxy.struck.clear()
                proxy.plan(replace(fault, times=scaled(3, 10)))
                rank.save(step + 1)
                rank.save(step := step + 2)
                until(lambda: proxy.struck.total() >= 3, "requests go wrong")
                proxy.plan()
                assert rank.wait(step).outcome == Outcome.COMMITTED
        assert not daemon.gone()
    return step


@pytest.mark.parametrize(
    ("path", "what"), [("/data/", "Chunk"), ("/man/", "Record"), ("/commit/", "Record")]
)
async def test_one_flipped_byte_of_an_answer_costs_no_step(
    path: str, what: str, runtime: Path, url: str, proxy: FaultProxy
) -> None:
    with Daemon(runtime), Rank(runtime, url) as rank:
        for step in (1, 2):
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED
    for buffer in (runtime / "buffers").iterdir():
        buffer.unlink()
    with Daemon(runtime) as daemon, Rank(runtime, url, world=2) as rank:  # which prefetches nothing
        proxy.plan(Fault(Kind.FLIP_DOWN, "GET", path, times=1))
        reply = rank.restore()
        assert (reply.step, reply.source, reply.skipped) == (2, "store", ())
        assert proxy.struck == {Kind.FLIP_DOWN: 1}
        kinds = [event["kind"] for event in daemon.events("store_failed")]
        assert kinds.count(f"{what}DamagedError") == 1


async def test_a_restore_over_a_bad_line_is_exact_or_an_error(
    runtime: Path, url: str, bucket: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    with Daemon(runtime), Rank(runtime, url) as rank:
        rank.restore()
        for step in (1, 2, 3):
            rank.save(step)
            assert rank.wait(step).outcome == Outcome.COMMITTED
    exact = {f"1.{step}": content(1, step, STEP_BYTES).tobytes() for step in (1, 2, 3)}
    for number in range(scaled(1, 5)):
        for name in OF_READING:
            proxy.plan(replace(FAULTS[name], chance=0.3))
            to = tmp_path / f"{name}{number}"
            to.mkdir()
            try:
                told = await restore(url, to)
            except (DamageError, StoreError):
                assert not (to / "state.safetensors").exists()
                continue
            assert restored(to) == exact[told["id"]]
            skipped = {one["id"] for one in told["skipped"]}
            assert skipped == {one for one in exact if one > told["id"]}
    proxy.plan()
    (tmp_path / "whole").mkdir()
    assert (await restore(url, tmp_path / "whole"))["skipped"] == []
    assert restored(tmp_path / "whole") == exact["1.3"]
