"""What is whole, by what its writer leaves last; what only looks like it is told why."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ckptmgr.types import STEP_MAX
from ckptmgr.watch.found import Kind, opened_root, scan, scan_one
from ckptmgr.watch.whole import flaw_of, said_of
from watch.trainer_writer import Files, files_of, saved_by_safetensors, saved_by_torch

Change = Callable[[Path], object]

TICK_SECONDS = 0.05
"""Longer than the unit in which file systems tell times."""


def write(place: Path, files: Files) -> Path:
    """In the order of `files`, each with a time of its own."""
    place.mkdir(parents=True, exist_ok=True)
    for number, (name, content) in enumerate(files.items()):
        (place / name).parent.mkdir(exist_ok=True, parents=True)
        (place / name).write_bytes(content)
        os.utime(place / name, ns=(0, 10**18 + number))
    return place


def flaw(root: Path, name: str) -> str:
    found = scan_one(root, name)
    assert found is not None
    with opened_root(root) as descriptor:
        return flaw_of(descriptor, found)


def trainer(root: Path) -> Path:
    return write(root / "checkpoint-20", files_of(20, 1, 8))


def dcp(root: Path) -> Path:
    shards = {f"__{rank}_0.distcp": b"shard" * 99 for rank in range(2)}
    return write(root / "step7", {**shards, ".metadata": b"\x80\x02}q\x00."})


def cut(path: Path) -> None:
    time_ns = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(time_ns, time_ns))


def append(path: Path, content: bytes = b"x") -> None:
    time_ns = path.stat().st_mtime_ns
    with path.open("ab") as file:
        file.write(content)
    os.utime(path, ns=(time_ns, time_ns))


def index(place: Path, *shards: str) -> None:
    document = {"weight_map": {str(n): one for n, one in enumerate(shards)}}
    (place / "model.safetensors.index.json").write_text(json.dumps(document))
    os.utime(place / "model.safetensors.index.json", ns=(0, 10**18))


def test_what_is_whole_has_no_flaw(tmp_path: Path) -> None:
    for place in (trainer(tmp_path), dcp(tmp_path)):
        assert flaw(tmp_path, place.name) == ""
    index(tmp_path / "checkpoint-20", "model.safetensors")
    assert flaw(tmp_path, "checkpoint-20") == ""
    (tmp_path / "model-5.pt").write_bytes(saved_by_torch(b"x" * 100))
    (tmp_path / "model-6.safetensors").write_bytes(saved_by_safetensors(b"x" * 100))
    (tmp_path / f"at-{STEP_MAX + 1}.pt").write_bytes(saved_by_torch(b"x"))  # no step: too great
    for name in ("model-5.pt", "model-6.safetensors"):
        assert flaw(tmp_path, name) == ""
    kinds = {one.name: (one.kind, one.number) for one in scan(tmp_path)}
    assert kinds == {
        "checkpoint-20": (Kind.TRAINER, 20),
        "step7": (Kind.DCP, 7),
        "model-5.pt": (Kind.FILE, 5),
        "model-6.safetensors": (Kind.FILE, 6),
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: (p / "trainer_state.json").unlink(), "has no trainer_state.json yet"),
        (lambda p: cut(p / "trainer_state.json"), "trainer_state.json that is cut short"),
        (lambda p: p.rename(p.with_name("checkpoint-30")), "of another step"),
        (lambda p: (p / "model.safetensors").touch(), "is being written again"),
        (lambda p: (p / "optimizer.pt").unlink(), "has lost a file"),
        (lambda p: cut(p / "model.safetensors"), "model.safetensors is cut short"),
        (lambda p: append(p / "model.safetensors"), "model.safetensors is cut short"),
        (lambda p: cut(p / "optimizer.pt"), "optimizer.pt is cut short"),
        (lambda p: append(p / "optimizer.pt"), "optimizer.pt is cut short"),
        (lambda p: index(p, "a.safetensors"), "has no checkpoint-20/a.safetensors yet"),
        (lambda p: (p / "link").symlink_to("/etc/passwd"), "holds a link or a special file"),
        (lambda p: os.mkfifo(p / "pipe"), "holds a link or a special file"),
    ],
)  # fmt: skip
def test_a_directory_of_a_trainer_that_is_not_whole(
    tmp_path: Path, change: Change, told: str
) -> None:
    place = trainer(tmp_path)
    time.sleep(TICK_SECONDS)
    change(place)
    (name,) = (one.name for one in tmp_path.iterdir())
    assert told in flaw(tmp_path, name)


def test_a_part_of_dcp_in_it_needs_its_own_end(tmp_path: Path) -> None:
    files = files_of(20, 1, 8)
    state = files.pop("trainer_state.json")
    part = {"pytorch_model_fsdp_0/__0_0.distcp": b"x" * 50}
    place = write(tmp_path / "checkpoint-20", {**files, **part, "trainer_state.json": state})
    assert "has no checkpoint-20/pytorch_model_fsdp_0/.metadata yet" in flaw(tmp_path, place.name)
    shutil.rmtree(place)
    part["pytorch_model_fsdp_0/.metadata"] = b"}."
    write(place, {**files, **part, "trainer_state.json": state})
    assert flaw(tmp_path, place.name) == ""


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda p: (p / ".metadata").unlink(), "has no .metadata yet"),
        (lambda p: cut(p / ".metadata"), "cut short"),
        (lambda p: (p / "__1_0.distcp").touch(), "is being written again"),
        (lambda p: (p / "__1_0.distcp").unlink(), "has lost a file"),
    ],
)
def test_a_directory_of_dcp_that_is_not_whole(tmp_path: Path, change: Change, told: str) -> None:
    place = dcp(tmp_path)
    time.sleep(TICK_SECONDS)
    change(place)
    assert told in flaw(tmp_path, place.name)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_file_is_whole_at_one_length_only(tmp_path: Path, suffix: str) -> None:
    make = {"pt": saved_by_torch, "safetensors": saved_by_safetensors}[suffix]
    content = make(b"x" * 300)
    path = tmp_path / f"model-1.{suffix}"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert flaw(tmp_path, path.name), f"{length} of {len(content)} bytes were taken for all"
    path.write_bytes(content + b"\0")
    assert flaw(tmp_path, path.name)


def test_a_file_that_does_not_say_where_it_ends_is_never_taken(tmp_path: Path) -> None:
    (tmp_path / "model-1.pt").write_bytes(b"\x80\x02}q\x00.")
    assert "its end can not be told" in flaw(tmp_path, "model-1.pt")


def test_what_is_no_candidate_is_not_looked_at(tmp_path: Path) -> None:
    for name in ("notes.txt", ".hidden-1.pt", "model.safetensors", "model-00001-of-00002.bin"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "runs").mkdir()
    assert scan(tmp_path) == []
    assert [one.name for one in scan(tmp_path, ["model.*"])] == ["model.safetensors"]
    (tmp_path / "a-1.pt").symlink_to("notes.txt")
    assert scan(tmp_path)[0].refusal == "is a link or a special file"
    (tmp_path / "a-1.pt").unlink()
    os.mkdir(os.fsencode(tmp_path) + b"/checkpoint-5")
    (tmp_path / "checkpoint-5" / os.fsdecode(b"\xff")).touch()
    assert scan(tmp_path)[0].refusal == "has a name that is not UTF-8"
    assert scan(tmp_path / "gone") == []


def test_a_link_in_the_place_of_a_directory_is_not_followed(tmp_path: Path) -> None:
    trainer(tmp_path / "elsewhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoint-20").symlink_to(tmp_path / "elsewhere/checkpoint-20")
    assert scan(tmp_path / "out") == []


def test_what_a_trainer_logged_becomes_tags(tmp_path: Path) -> None:
    place = trainer(tmp_path)
    state = json.loads((place / "trainer_state.json").read_text())
    state["log_history"].append({"step": 20, "eval_loss": float("nan"), "odd": [1], "big": 2**70})
    state["log_history"].append({"step": 10, "loss": 99.0})
    state["log_history"].append({"step": 20, "\ud800 is no character": 1.0, "two\nlines": 2.0})
    (place / "trainer_state.json").write_text(json.dumps(state))
    found = scan_one(tmp_path, place.name)
    assert found is not None
    assert said_of(tmp_path, found) == {
        "epoch": 0.2,
        "grad_norm": 1.5,
        "loss": 0.05,
        "eval_loss": "nan",
    }
