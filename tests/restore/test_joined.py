"""A step of several ranks as one file: every shared tensor whole, and what each has for itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptmgr.errors import DamageError, RecordDamagedError
from ckptmgr.rank.saved import Saved
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.check import restore_files, verify_store
from ckptmgr.restore.joined import join
from ckptmgr.staging.layout import encode_layout
from ckptmgr.types import Group, Layout, Leaf
from rank.cut import Cut, by_columns, by_rows, cut
from small_step import (
    Encoded,
    Objects,
    arrays_of,
    commit_ranks,
    encode_state,
    memory_store,
    objects_of,
    read_safetensors,
    save_steps,
    small_state,
)

WORLD = 3
STATE = small_state(7)


def parts_of(how: Cut) -> list[Encoded]:
    """What each of three ranks would have in its slot."""
    whole = encode_state(STATE)
    saved = Saved(whole.layout, whole.values, memoryview(bytearray(whole.data)), 0)
    return [
        Encoded(one.layout, encode_layout(one.layout), one.values, bytes(one.data))
        for one in cut(saved, WORLD, how)
    ]


def stored(parts: Sequence[Encoded]) -> Objects:
    """A store with one step of one rank, and after it one of three."""

    async def main() -> Objects:
        store = memory_store({})
        (first,) = await save_steps(store, (1,))
        await commit_ranks(store, 1, first.decision.nonce, 2, parts)
        return await objects_of(store)

    return asyncio.run(main())


def restored(objects: Objects, directory: Path, step: str | None = "2") -> dict[str, Any]:
    store = memory_store(objects)
    return asyncio.run(
        restore_files(Catalog(store), step, "safetensors", directory, lambda _: None)
    )


@pytest.mark.parametrize("how", [by_rows, by_columns])
def test_shared_tensors_are_whole_and_private_ones_beside(
    how: Callable[[int], Cut], tmp_path: Path
) -> None:
    restored(stored(parts_of(how(WORLD))), tmp_path)
    found = read_safetensors(tmp_path / "state.safetensors")
    arrays = arrays_of(STATE)
    private = [path for path, array in arrays.items() if not array.shape or not array.nbytes]
    assert private == ["net/empty", "scale"]
    expected = {
        **arrays,
        **{f"ranks/{rank}/{path}": arrays[path] for rank in (1, 2) for path in private},
    }
    assert {name: entry[1:] for name, entry in found.items()} == {
        name: (array.shape, array.tobytes()) for name, array in expected.items()
    }


def test_plain_values_of_each_rank_name_the_tensors_of_the_file(tmp_path: Path) -> None:
    restored(stored(parts_of(by_rows(WORLD))), tmp_path)
    names = ["state.safetensors", "values-1.json", "values-2.json", "values.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    values = json.loads((tmp_path / "values-2.json").read_text())
    assert values["net"]["weight"] == {"tensor": "net/weight"}
    assert values["scale"] == {"tensor": "ranks/2/scale"}
    assert values["note"] == STATE["note"]


def test_a_part_that_nobody_saved_is_named(tmp_path: Path) -> None:
    """No committer lets it through; a reader does not rely on that."""
    parts = parts_of(by_rows(WORLD))
    leaves = tuple(leaf for leaf in parts[1].layout.leaves if leaf.path != "net/weight")
    groups, data_bytes = parts[1].layout.groups, parts[1].layout.data_bytes
    layout = Layout(leaves, groups, data_bytes, parts[1].layout.tree)
    parts[1] = Encoded(layout, encode_layout(layout), parts[1].values, parts[1].data)
    objects = stored(parts)
    with pytest.raises(RecordDamagedError, match=r"\[10, 50\] at \[10, 0\] of net/weight"):
        restored(objects, tmp_path)
    document = restored(objects, tmp_path, None)
    assert (document["id"], [one["id"] for one in document["skipped"]]) == ("1.1", ["1.2"])


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize("kind", ["data", "man"])
def test_damage_of_any_rank_is_named(rank: int, kind: str, tmp_path: Path) -> None:
    objects = stored(parts_of(by_rows(WORLD)))
    prefix = f"{kind}/00000001/000000000002/{rank:06d}"
    (key,) = (key for key in objects if key.startswith(prefix))
    blob = bytearray(objects[key])
    blob[4096 if kind == "data" else -1] ^= 1
    spoiled = {**objects, key: bytes(blob)}
    (report,) = asyncio.run(
        verify_store(
            Catalog(memory_store(spoiled)), "2", every=False, quick=False, progress=lambda _: None
        )
    )
    assert [one["key"] for one in report["damage"]] == [key]
    with pytest.raises(DamageError, match=key):
        restored(spoiled, tmp_path)
    assert not list(tmp_path.iterdir())


def manifest(rank: int, *leaves: Leaf) -> Manifest:
    layout = encode_layout(Layout(leaves, (Group(0, 4096, 1, False),), 4096, b"\xc0"))
    return Manifest(1, 1, "", rank, 2, "", layout, b"\x90", (), (), 0, 0, 0.0)


def test_what_only_one_rank_has_keeps_its_path() -> None:
    """As stages of a pipeline do."""
    own = [Leaf("step", "int64", (), 0, 8)]
    joined = join(
        [
            manifest(0, *own, Leaf("stage0", "int8", (2,), 0, 2)),
            manifest(1, *own, Leaf("stage1", "int8", (2,), 0, 2)),
        ]
    )
    assert {tensor.name for tensor in joined.tensors} == {
        "step",
        "ranks/1/step",
        "stage0",
        "stage1",
    }


def test_of_replicas_one_is_read_and_an_empty_stand_in_is_no_tensor() -> None:
    joined = join(
        [
            manifest(0, Leaf("x", "int8", (2,), 0, 2, (2,), (0,)), Leaf("y", "int8", (0,), 0, 0)),
            manifest(
                1, Leaf("x", "int8", (2,), 0, 2, (2,), (0,)), Leaf("y", "int8", (), 0, 1, (), ())
            ),
        ]
    )
    assert [(t.name, t.shape, t.nbytes) for t in joined.tensors] == [("x", (2,), 2), ("y", (), 1)]
    of_each = {rank: [one.leaf.path for one in found] for rank, found in joined.placed.items()}
    assert of_each == {0: ["x"], 1: ["y"]}
    assert np.prod(joined.tensors[1].shape) == 1
