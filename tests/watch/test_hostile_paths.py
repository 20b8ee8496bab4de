"""A manifest whose files would lie elsewhere, or over each other: refused before one is made."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ckptmgr.errors import RecordDamagedError
from ckptmgr.repository import keys
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.adopted import DTYPE, write_adopted
from ckptmgr.staging.layout import encode_layout
from ckptmgr.store.memory import MemoryStore
from ckptmgr.types import Layout, Leaf, StepId

FILE = Leaf("checkpoint-10/weights.bin", DTYPE, (0,), 0, 0)


def adopted(*leaves: Leaf) -> Manifest:
    """A manifest that says it has these files."""
    layout = encode_layout(Layout((FILE, *leaves), (), 0, b"\x94\x90\x90\x00\xc4\x00"))
    tags = {"watch.source": "checkpoint-10"}
    return Manifest(1, 10, "00" * 16, 0, 1, "host", layout, b"", (), (), 0, 0, 0.0, tags)


def named(path: str) -> Leaf:
    return Leaf(path, DTYPE, (0,), 0, 0)


@pytest.mark.parametrize(
    ("leaf", "told"),
    [
        (named("../outside"), "leads out"),
        (named("checkpoint-10/../../outside"), "leads out"),
        (named("/etc/outside"), "leads out"),
        (named("checkpoint-10//outside"), "leads out"),
        (named("./outside"), "leads out"),
        (named(""), "leads out"),
        (named("a\0b"), "leads out"),
        (named("x" * 256), "too long"),
        (named("é" * 128), "too long"),
        (named(FILE.path), "is not one file"),
        (named(f"{FILE.path}/below"), "is below a file"),
        (named("checkpoint-10"), "is below a file"),
        (Leaf("tensor", "float32", (0,), 0, 0), "is not one file"),
        (Leaf("matrix", DTYPE, (0, 0), 0, 0), "is not one file"),
    ],
)
def test_a_file_that_would_lie_elsewhere_is_named_and_nothing_is_written(
    tmp_path: Path, leaf: Leaf, told: str
) -> None:
    directory = tmp_path / "restored"
    directory.mkdir()
    store, pool = MemoryStore("hostile"), BufferPool(1)
    with pytest.raises(RecordDamagedError, match=told) as caught:
        asyncio.run(write_adopted(store, adopted(leaf), directory, pool, lambda _: None))
    assert caught.value.subject == keys.manifest(StepId(1, 10), 0)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert list(tmp_path.iterdir()) == [directory]


def test_without_it_the_file_is_written(tmp_path: Path) -> None:
    asyncio.run(
        write_adopted(MemoryStore("hostile"), adopted(), tmp_path, BufferPool(1), lambda _: None)
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / FILE.path]
