"""`ckptmgr watch`, from files to commits and back to the same files."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from called import call
from ckptmgr.cli import app
from ckptmgr.commands.watching import _watch
from ckptmgr.daemon.retain import retire
from ckptmgr.errors import (
    LockedError,
    StorePermissionError,
    StoreUnreachableError,
    SupersededError,
    UsageError,
)
from ckptmgr.keep import Keep
from ckptmgr.repository.keyring import KEY_FILE
from ckptmgr.store.base import Buffers, PutResult, Store
from ckptmgr.store.local import LocalStore
from ckptmgr.types import StepId
from ckptmgr.watch import adopting, watcher
from ckptmgr.watch.found import Candidate
from driven import files_below
from security.forged import OURS, RING
from small_step import made_in_memory, save_steps, write_tree
from watch.test_whole import dcp, trainer, write
from watch.trainer_writer import files_of, saved_by_safetensors, saved_by_torch
from watch.watching import PATIENCE_SECONDS, Watch, commits_of, restored, tree_of


async def watched_until_commit(root: Path, store: Path, step: int) -> None:
    """Watch in this process until a step that ends in this digit is committed."""
    given = root, str(store), Keep.of("3"), [], 0.1, "auto"
    watch = asyncio.create_task(_watch(*given, once=False))
    while not any(path.name.endswith(str(step)) for path in files_below(store / "commit")):
        await asyncio.sleep(0.05)
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)


def adopt(root: Path, store: Path, keep: str = "3") -> Any:
    """What `watch --once --json` prints; in this process, because a command takes a second."""
    return asyncio.run(_watch(root, str(store), Keep.of(keep), [], 0.1, "auto", once=True))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "output"
    made.mkdir()
    return made


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def below(root: Path, name: str) -> dict[str, str]:
    return {path: digest for path, digest in tree_of(root).items() if path.startswith(name)}


def test_every_kind_comes_back_byte_for_byte(root: Path, store: Path, tmp_path: Path) -> None:
    trainer(root)
    dcp(root)
    (root / "model-5.pt").write_bytes(saved_by_torch(os.urandom(9_000_000)))
    (root / "model-6.safetensors").write_bytes(saved_by_safetensors(b""))
    (root / "checkpoint-20/empty.txt").touch()
    os.utime(root / "checkpoint-20/empty.txt", ns=(0, 10**18))
    document = adopt(root, store, "100")
    kinds = {one["source"]: one["kind"] for one in document["adopted"]}
    assert kinds == {
        "checkpoint-20": "trainer",
        "step7": "dcp",
        "model-5.pt": "file",
        "model-6.safetensors": "file",
    }
    for one in document["adopted"]:
        assert restored(store, StepId(one["attempt"], one["step"])) == below(root, one["source"])
    out = tmp_path / "out"
    (newest,) = document["adopted"][-1:]
    found = call("restore", store, "--to", out, "--json").document
    assert found["id"] == newest["id"]
    assert tree_of(out) == below(root, newest["source"])
    assert adopt(root, store, "100") == {"adopted": [], "left": []}, "adopted twice"


def test_with_a_key_every_run_adopts_what_is_new(
    root: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit tells what was adopted by its tags, which are sealed where it is put."""
    key = tmp_path / "key"
    key.touch(mode=0o600)
    key.write_text(OURS.secret.hex())
    monkeypatch.setenv(KEY_FILE, str(key))
    for step in (1, 2):
        for name in (f"model-{step}.pt", f"model-{step}0.pt"):
            (root / name).write_bytes(saved_by_torch(b"x" * step))
        sources = [one["source"] for one in adopt(root, store, "100")["adopted"]]
        assert sources == [f"model-{step}.pt", f"model-{step}0.pt"]
    assert adopt(root, store, "100") == {"adopted": [], "left": []}, "adopted twice"


def test_a_run_that_goes_back_gets_another_attempt(root: Path, store: Path) -> None:
    for step in (10, 20):
        write(root / f"checkpoint-{step}", files_of(step, 1, 4))
        newest = 10**18 + step * 10**9
        os.utime(root / f"checkpoint-{step}/trainer_state.json", ns=(0, newest))
    assert [one["id"] for one in adopt(root, store)["adopted"]] == ["1.10", "1.20"]
    for path in (root / "checkpoint-20").iterdir():
        path.touch()  # the bytes stay the same
    (root / "checkpoint-20/trainer_state.json").touch()
    assert adopt(root, store) == {"adopted": [], "left": []}
    shutil.rmtree(root / "checkpoint-10")
    place = root / "checkpoint-10"
    place.mkdir()
    for name, content in files_of(10, 2, 4).items():
        (place / name).write_bytes(content)
    assert [one["id"] for one in adopt(root, store)["adopted"]] == ["2.10"]
    assert restored(store, StepId(2, 10)) == below(root, "checkpoint-10")
    write(root / "checkpoint-5", files_of(5, 1, 4))
    assert adopt(root, store)["left"] == [
        {"source": "checkpoint-5", "why": "is older than what was adopted already"}
    ]


def test_retention_and_tags(root: Path, store: Path, tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        place = write(root / f"checkpoint-{step}", files_of(step, 1, 2))
        os.utime(place / "trainer_state.json", ns=(0, 10**18 + step * 10**9))
    adopt(root, store, "last=2,best=loss:max:1")
    assert [entry.id.step for entry in commits_of(store)] == [10, 60, 70]
    found = call("restore", store, "--before", "loss < 0.016", "--to", tmp_path / "o", "--json")
    assert (found.document["id"], found.document["broke_out"]) == ("1.60", "1.70")


def test_what_is_not_whole_is_left_and_told(root: Path, store: Path) -> None:
    (trainer(root) / "trainer_state.json").unlink()
    (root / "model-5.pt").symlink_to("/etc/passwd")
    document = adopt(root, store)
    assert document["adopted"] == []
    assert [one["source"] for one in document["left"]] == ["checkpoint-20", "model-5.pt"]
    assert not store.exists(), "a store was made for nothing"


@pytest.mark.parametrize("at", ["flaw_of", "Pieces"])
def test_what_can_not_be_read_is_left_and_holds_nothing_up(
    root: Path, store: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Of another user's files, for example; with --once it must end all the same."""
    for step in (7, 8):
        (root / f"model-{step}.safetensors").write_bytes(saved_by_safetensors(b"whole"))
        os.utime(root / f"model-{step}.safetensors", (step, step))
    module: Any = {"flaw_of": watcher, "Pieces": adopting}[at]
    reads = getattr(module, at)

    def refused(where: Any, candidate: Candidate) -> Any:
        if candidate.number == 7:
            raise PermissionError(13, "Permission denied", candidate.name)
        return reads(where, candidate)

    async def once() -> Any:
        watching = _watch(root, str(store), Keep(), [], 0.1, "auto", once=True)
        return await asyncio.wait_for(watching, PATIENCE_SECONDS)

    monkeypatch.setattr(module, at, refused)
    document = asyncio.run(once())
    assert [one["source"] for one in document["adopted"]] == ["model-8.safetensors"]
    (left,) = document["left"]
    assert left["source"] == "model-7.safetensors"
    assert left["why"].startswith("can not be read: ")
    assert "Permission denied" in left["why"]


@pytest.mark.parametrize(("number", "tries"), [(errno.ESTALE, 2), (errno.EMFILE, 1)])
def test_what_can_not_be_read_for_a_moment_is_read_again(
    root: Path, store: Path, monkeypatch: pytest.MonkeyPatch, number: int, tries: int
) -> None:
    """Nothing changes a file on a mount that was away: whoever waits for that waits for ever."""
    (root / "model-7.safetensors").write_bytes(saved_by_safetensors(b"whole"))
    errors, flaw_of = [OSError(number, os.strerror(number))] * tries, watcher.flaw_of

    def away(where: Any, candidate: Candidate) -> str:
        if errors:
            raise errors.pop()
        return flaw_of(where, candidate)

    monkeypatch.setattr(watcher, "flaw_of", away)
    document = adopt(root, store)
    assert [one["source"] for one in document["adopted"]] == ["model-7.safetensors"]


def test_once_ends_over_what_can_never_be_read(
    root: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "model-7.safetensors").write_bytes(saved_by_safetensors(b"whole"))

    def away(where: Any, candidate: Candidate) -> str:
        raise OSError(errno.EIO, f"{candidate.name}: Input/output error")

    monkeypatch.setattr(watcher, "flaw_of", away)
    (left,) = adopt(root, store)["left"]
    assert left["why"].startswith("can not be read: ")


def test_a_directory_that_can_not_be_listed_for_a_moment_is_listed_again(
    root: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, scan = 0, watcher.scan

    def away(where: Path, patterns: Any) -> list[Candidate]:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise OSError(errno.ESTALE, "Stale file handle")
        return scan(where, patterns)

    monkeypatch.setattr(watcher, "scan", away)
    (root / "model-7.safetensors").write_bytes(saved_by_safetensors(b"whole"))
    asyncio.run(asyncio.wait_for(watched_until_commit(root, store, 7), PATIENCE_SECONDS))
    looks = 1
    with pytest.raises(StoreUnreachableError, match="can not be listed: Stale file handle"):
        adopt(root, store)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{gone}", "--to", "{store}"], "is not a directory"),
        (["{root}", "--to", "{store}", "--json"], "has no document before it ends"),
        (["{root}", "--to", "{store}", "--quiet-seconds=nan"], "nan is not allowed"),
        (["{root}", "--to", "{store}", "--codec=planes"], "'planes' is not allowed"),
    ],
)
def test_wrong_uses_are_refused(root: Path, store: Path, arguments: list[str], told: str) -> None:
    places = {"root": root, "store": store, "gone": root / "gone"}
    command = typer.main.get_command(app)
    with pytest.raises(UsageError, match=told):
        command.main(
            ["watch", *(one.format(**places) for one in arguments)], "x", standalone_mode=False
        )


def test_the_steps_of_a_job_are_not_mixed_with(root: Path, tmp_path: Path) -> None:
    _, objects = made_in_memory()
    write_tree(tmp_path / "job", objects)
    trainer(root)
    with pytest.raises(UsageError, match="which watch did not put there"):
        adopt(root, tmp_path / "job")
    with pytest.raises(UsageError, match="is a state, and not files"):
        restored(tmp_path / "job", StepId(1, 20))


def test_a_key_whose_steps_are_all_retired_may_go(root: Path, store: Path) -> None:
    async def use(work: Callable[[Store], Awaitable[object]]) -> None:
        opened = LocalStore(str(store))
        await work(opened)
        await opened.aclose()

    trainer(root)
    asyncio.run(use(lambda opened: save_steps(opened, (10,), keyring=RING)))
    with pytest.raises(LockedError, match=f"step 1.10: was encrypted with key {OURS.id}"):
        adopt(root, store)
    asyncio.run(use(lambda opened: retire(opened, StepId(1, 10), "by the test")))
    assert [one["id"] for one in adopt(root, store)["adopted"]] == ["2.20"]


def test_it_hears_of_what_appears_and_ends_when_told(root: Path, store: Path) -> None:
    with Watch(root, store, quiet=0.2) as watch:
        watch.await_event("watching")
        trainer(root)
        watch.await_event("watch_adopted", "checkpoint-20")
        watch.process.send_signal(signal.SIGTERM)
        assert watch.process.wait(60) == 143
    assert [str(entry.id) for entry in commits_of(store)] == ["1.20"]


def test_of_two_that_watch_for_one_store_the_older_ends(root: Path, store: Path) -> None:
    async def main() -> None:
        first = asyncio.ensure_future(_watch(root, str(store), Keep(), [], 0.1, "auto", once=False))
        write(root / "checkpoint-10", files_of(10, 1, 2))
        while not store.exists() or not list(store.glob("tags/*/*")):
            await asyncio.sleep(0.05)
        second = write(root.parent / "other/checkpoint-20", files_of(20, 1, 2)).parent
        done = await _watch(second, str(store), Keep(), [], 0.1, "auto", once=True)
        assert [one["id"] for one in done["adopted"]] == ["2.20"]
        write(root / "checkpoint-30", files_of(30, 1, 2))
        with pytest.raises(SupersededError):
            await first

    asyncio.run(main())


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    root: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_new, lost = LocalStore.put_new, 0

    async def lose_an_answer(self: LocalStore, key: str, buffers: Buffers) -> PutResult:
        nonlocal lost
        found = await put_new(self, key, buffers)
        if key.startswith("commit/") and not lost:
            lost += 1
            (root / "model-8.safetensors").write_bytes(saved_by_safetensors(b"next"))
            raise StorePermissionError("no", subject=key)
        return found

    monkeypatch.setattr(LocalStore, "put_new", lose_an_answer)
    (root / "model-7.safetensors").write_bytes(saved_by_safetensors(b"first"))
    asyncio.run(watched_until_commit(root, store, 8))
    assert [entry.id.step for entry in commits_of(store)] == [7, 8]


def test_files_that_are_replaced_after_their_manifest_was_put_are_adopted_as_they_are(
    root: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit fails, and before the next try the writer has written the same name again."""
    monkeypatch.setenv("CKPTMGR_STORE_TIMEOUT_SECONDS", "0.05")
    put_new, refused = LocalStore.put_new, 0

    async def refuse_once(self: LocalStore, key: str, buffers: Buffers) -> PutResult:
        nonlocal refused
        if key.startswith("commit/") and not refused:
            refused += 1
            replace(b"second")
            raise StorePermissionError("no", subject=key)
        return await put_new(self, key, buffers)

    def replace(content: bytes) -> None:
        (tmp_path / "new").write_bytes(saved_by_safetensors(content))
        (tmp_path / "new").rename(root / "model-7.safetensors")

    monkeypatch.setattr(LocalStore, "put_new", refuse_once)
    replace(b"first")
    asyncio.run(watched_until_commit(root, store, 7))
    assert refused == 1
    (found,) = commits_of(store)
    assert restored(store, found.id) == tree_of(root)
