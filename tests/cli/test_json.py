"""docs/cli-json.md is true: every field that a command prints, with its type, and no other."""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from called import call, make_store, spoil
from ckptmgr import demo
from ckptmgr.config import open_private_dir
from ckptmgr.types import Outcome
from driven import TREE, Daemon, Rank, until
from knowing.jobs import trained
from rigged import Rig

SECTION = re.compile(r"^## ([\w-]+)$", re.MULTILINE)
ROW = re.compile(r"^\| `([^`]+)` \| ([a-z ]+) \| .+ \|$", re.MULTILINE)
FREE = {"tags", "stall", "restored[]"}
"""Objects whose fields are not ours to name."""

Fields = dict[str, set[str]]


def documented() -> dict[str, Fields]:
    """Command -> field -> types, as the document has them."""
    parts = SECTION.split((TREE / "docs/cli-json.md").read_text())[1:]
    return {
        command: {field: set(kinds.split(" or ")) for field, kinds in ROW.findall(text)}
        for command, text in zip(parts[::2], parts[1::2], strict=True)
    }


def type_of(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number"}
    names |= {list: "array", dict: "object", type(None): "null"}
    return names[type(value)]


def fields_of(value: Any, path: str = "") -> Fields:
    """Field -> types, of one document."""
    found: Fields = defaultdict(set)
    if path:
        found[path].add(type_of(value))
    children: list[tuple[str, Any]] = []
    if isinstance(value, list):
        children = [(f"{path}[]", child) for child in value]
    elif isinstance(value, dict) and path.removeprefix("[].") not in FREE:
        children = [(f"{path}.{name}".lstrip("."), child) for name, child in value.items()]
    for name, child in children:
        for field, kinds in fields_of(child, name).items():
            found[field] |= kinds
    return found


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Any]]]:
    """Command -> documents that it printed in every state that there is."""
    runtime = Path(f"/dev/shm/ckptmgr-test-{secrets.token_hex(6)}")
    open_private_dir(runtime)
    place = tmp_path_factory.mktemp("json")
    found: dict[str, list[Any]] = defaultdict(list)

    def note(command: str, *arguments: object, status: int = 0) -> Any:
        called = call(command, *arguments, "--json", runtime=runtime)
        assert called.status == status, called
        found[command].append(called.document)
        return called.document

    try:
        daemon_side(runtime, place, note)
        spool_side(runtime, place, note)
        ranks_side(runtime, place, note)
        store_side(make_store(place, runtime), runtime, place, note)
        watched_side(place, note)
        yield found
    finally:
        shutil.rmtree(runtime)


def daemon_side(runtime: Path, place: Path, note: Any) -> None:
    (place / "rig").mkdir()
    rig = Rig(place / "rig")
    with Daemon(runtime, environment=rig.environment()):
        note("status")
    with (
        Daemon(runtime, environment=rig.environment()),
        Rank(runtime, rig.url, codec="auto") as rank,
    ):
        note("status")
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rig.obey(("put_new", "data/", "full"))
        rank.save(2)
        until(lambda: rig.asked("put_new", "data/00000001/000000000002"), "it is tried")
        note("status")
        note("drain", "--timeout=0.1", status=1)
        rig.obey(("put_new", "data/", "hold"))
        until(lambda: note("status")["jobs"][0]["buffers"][0]["writing"], "it is written")
        rig.obey()
        note("drain")
        (runtime / "host2").mkdir(mode=0o700)
        with Daemon(runtime / "host2", environment=rig.environment()):
            with Rank(runtime / "host2", rig.url) as newer:
                newer.save(1)
                assert newer.wait(1).outcome == Outcome.COMMITTED
            rank.save(3)
            assert rank.wait(3).outcome == Outcome.ABORTED
            note("status")
            note("drain", status=6)


def spool_side(runtime: Path, place: Path, note: Any) -> None:
    """An outage of the store, while the daemon has a spool, a mirror and a key."""
    (place / "spooled").mkdir()
    rig = Rig(place / "spooled")
    key = place / "key"
    key.touch(0o600)
    key.write_text(secrets.token_hex(32))
    given = ["--spool", place / "spool", "--spool-max-gib=1", "--mirror", place / "mirror"]
    environment = rig.environment(CKPTMGR_SPOOL_SECONDS="0.3", CKPTMGR_KEY_FILE=str(key))
    with (
        Daemon(runtime, *map(str, given), environment=environment),
        Rank(runtime, rig.url) as rank,
    ):
        rank.save(1)
        assert rank.wait(1).outcome == Outcome.COMMITTED
        rig.obey(("put_new", "data/", "dead"))
        rank.save(2)
        until(lambda: note("status")["jobs"][-1]["spool"]["parts"], "it is spooled")
        rig.obey()
        assert rank.wait(2).outcome == Outcome.COMMITTED
    note("verify", rig.file_url, "--all")


def ranks_side(runtime: Path, place: Path, note: Any) -> None:
    """A step of two ranks, of which one has not come yet; the other came by way of the spool."""
    url, spool = f"file://{place}/ranks", f"--spool={place}/spool"
    environment = {**os.environ, "CKPTMGR_SPOOL_SECONDS": "0.001"}
    with (
        Daemon(runtime, spool, "--max-store-gbps=80", environment=environment),
        Rank(runtime, url, world=2, max_d2h_gbps=100.0) as rank,
    ):
        rank.save(1)
        until(
            lambda: any(s["ranks_missing"] == [1] and s["ranks_in_spool"] for s in note("ls", url)),
            "it waits",
        )
        note("show", url, "1")
        note("status")


def store_side(store: Path, runtime: Path, place: Path, note: Any) -> None:
    note("ls", store)
    note("doctor", store, "--probe-mib=1")
    with Daemon(runtime):
        note("prefetch", store, "--ranks=0")
        note("prefetch", place / "empty")
    note("doctor", "--state-gib=100000", status=1)
    note("advise", store)
    note("advise", place / "nothing", "--state-gib=1")
    note("report", store, "--to", place / "report.html")
    note("report", restarted_job(place), "--to", place / "report.html")
    for arguments in ((), ("1.2", "--tensors")):
        note("show", store, *arguments)
    note("verify", store, "--all")
    held = note("hold", store, "1.1")["hold"]
    note("ls", store)
    note("show", store, "1.1")
    note("release", store, "1.1", held)
    manifest = store / "man/00000003/000000000001/000000"
    manifest.parent.mkdir(parents=True)
    manifest.write_bytes(b"cut short")  # a step that was never decided
    spoil(store, 2, 2)
    note("verify", store, status=3)
    note("restore", store, "--to", place / "out", status=7)
    shutil.rmtree(manifest.parents[1])
    note("restore", store, "--before=step > 2", "--to", place / "before", status=0)
    note("gc", store, "--keep=2", "--dry-run")
    note("gc", store, "--keep=2", status=3)
    spoil(store, 1, 3, "commit")
    note("ls", store)


def watched_side(place: Path, note: Any) -> None:
    (place / "output").mkdir()
    (place / "output/model-1.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (place / "output/model-2.safetensors").touch()
    note("watch", place / "output", "--to", place / "adopted", "--once", "--quiet-seconds=0.1")


def restarted_job(place: Path) -> Path:
    """A job that was killed once, for the restarts of a report."""
    runtime = Path(f"/dev/shm/ckptmgr-test-{secrets.token_hex(6)}")
    open_private_dir(runtime)
    try:
        trained(runtime, f"file://{place}/again", 3, saved=(1, 2))
        trained(runtime, f"file://{place}/again", 3, saved=(3,), kill=False)
    finally:
        shutil.rmtree(runtime)
    return place / "again"


@pytest.mark.parametrize("command", sorted(set(documented()) - {"bench", "demo"}))
def test_the_document_is_what_is_printed(documents: dict[str, list[Any]], command: str) -> None:
    found: Fields = defaultdict(set)
    for document in documents[command]:
        for field, kinds in fields_of(document).items():
            found[field] |= kinds
    assert dict(found) == documented()[command]


def test_the_document_of_the_demo_is_what_is_printed(tmp_path: Path) -> None:
    place = demo.Place(tmp_path, tmp_path)
    run = demo.Run()
    run.restored = {"step": 1, "source": "memory", "seconds": 0.1}
    shown = demo.Demonstration(place, demo.Show(quiet=True), 1, 60, 10)
    report = {**shown.report(run, run, run, run), "seconds": 1.0}
    assert fields_of(json.loads(json.dumps(report))) == documented()["demo"]


def test_the_document_of_the_bench_is_what_is_printed() -> None:
    bench = pytest.importorskip("ckptmgr.rank.bench", reason="needs torch")
    args = argparse.Namespace(mib=1, tensors=2, codec="auto")
    saved = dict.fromkeys(("bare_copy_s", "bare_write_s", "first_stall_s", "stall_s"), 0.5)
    saved |= dict.fromkeys(("first_commit_s", "commit_s"), 0.5)
    restored = {"bare_copy_s": 0.5, "enter_s": 0.5, "restore_s": 0.5, "source": "memory"}
    report = bench.ratios(args, saved, restored, restored, 0.5)
    assert fields_of(json.loads(json.dumps(report))) == documented()["bench"]
