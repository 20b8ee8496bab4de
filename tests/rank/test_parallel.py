"""What all ranks put into their slots is together every tensor, bit by bit, and no more."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckptmgr.rank.frame import LEAF_ALIGN_BYTES
from ckptmgr.staging.boxes import box_of, gap, whole_shape
from ckptmgr.staging.layout import decode_layout
from ckptmgr.staging.revive import decode_tree, decode_values
from ckptmgr.staging.values import External
from ckptmgr.types import PAGE_BYTES, Layout, Leaf
from ranks import run_ranks


@dataclass(frozen=True)
class Slot:
    """What one rank captured."""

    layout: Layout
    values: bytes
    data: bytes

    def array(self, leaf: Leaf) -> np.ndarray[Any, Any]:
        """The elements of a leaf."""
        dtype = np.dtype(leaf.dtype)
        raw = self.data[leaf.offset : leaf.offset + leaf.nbytes]
        return np.frombuffer(raw, dtype).reshape(leaf.shape)

    def tree(self) -> Any:
        """The state with paths of leaves for tensors."""
        leaves = self.layout.leaves
        values = decode_values(self.values)
        return decode_tree(self.layout.tree, values, lambda index, _: leaves[index].path)


@dataclass(frozen=True)
class World:
    """What all ranks captured of one case, and the whole tensors by path."""

    slots: list[Slot]
    whole: dict[str, np.ndarray[Any, Any]]

    def shared(self) -> dict[str, list[tuple[Slot, Leaf]]]:
        """All leaves that are parts of a tensor of several ranks, by path."""
        found: dict[str, list[tuple[Slot, Leaf]]] = {}
        for slot in self.slots:
            for leaf in slot.layout.leaves:
                if leaf.global_shape is not None:
                    found.setdefault(leaf.path, []).append((slot, leaf))
        return found

    def private(self, rank: int) -> set[str]:
        """Paths of the leaves that belong to one rank alone."""
        leaves = self.slots[rank].layout.leaves
        return {leaf.path for leaf in leaves if leaf.global_shape is None}


def _read(place: Path, case: str, world: int) -> World:
    slots = []
    whole: dict[str, np.ndarray[Any, Any]] = {}
    for rank in range(world):
        files = {
            suffix: place / f"{case}.{rank}.{suffix}" for suffix in ("layout", "values", "bin")
        }
        raw = {suffix: path.read_bytes() for suffix, path in files.items()}
        layout = decode_layout(raw["layout"], subject=case)
        slots.append(Slot(layout, raw["values"], raw["bin"]))
        with np.load(place / f"{case}.{rank}.npz") as arrays:
            for name in arrays.files:
                whole.setdefault(name.replace("|", "/"), arrays[name])
    return World(slots, whole)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks left what they captured."""
    place = tmp_path_factory.mktemp("two")
    assert run_ranks("rank.worlds", "two", 2, place) == ["done"] * 2
    return place / "two-2"


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where four ranks left what they captured."""
    place = tmp_path_factory.mktemp("four")
    assert run_ranks("rank.worlds", "four", 4, place) == ["done"] * 4
    return place / "four-4"


TWO = [
    *("ddp", "in_backward", "fsdp1_orig", "fsdp1_flat", "fsdp1_whole", "fsdp2"),
    *("fsdp2_evaluated", "tp", "pipeline", "zero", "patterns"),
]
FOUR = ["fsdp2_four", "hsdp", "tp_fsdp2", "fsdp1_hybrid"]
SAVED_TWICE = {"tp_fsdp2"}
"""There, what no plan shards over the inner mesh is held by ranks that no DTensor knows of."""


@pytest.fixture(params=[*TWO, *FOUR])
def world(request: pytest.FixtureRequest) -> tuple[str, World]:
    """Each case in turn."""
    case = request.param
    size, fixture = (2, "two") if case in TWO else (4, "four")
    return case, _read(request.getfixturevalue(fixture), case, size)


def test_the_boxes_of_all_ranks_are_the_whole_tensors(world: tuple[str, World]) -> None:
    case, found = world
    shared = found.shared()
    private = found.private(0).union(*(found.private(at) for at in range(len(found.slots))))
    assert shared.keys() | private >= found.whole.keys()
    if case not in ("pipeline", "tp"):
        assert shared.keys() >= found.whole.keys()
    for path, parts in shared.items():
        assert len({whole_shape(leaf) for _, leaf in parts}) == 1, path
        shape = whole_shape(parts[0][1])
        assert gap(shape, [box_of(leaf) for _, leaf in parts]) is None, path
        for slot, leaf in parts:
            box = box_of(leaf)
            inside = tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))
            expected = np.ascontiguousarray(found.whole[path][inside])
            assert slot.array(leaf).tobytes() == expected.tobytes(), path


def test_each_byte_is_saved_once(world: tuple[str, World]) -> None:
    case, found = world
    for path, parts in found.shared().items():
        elements = sum(box_of(leaf).count for _, leaf in parts)
        whole = int(np.prod(whole_shape(parts[0][1]), dtype=np.int64))
        if case in SAVED_TWICE:
            assert elements in (whole, 2 * whole), path
        elif whole_shape(parts[0][1]):
            assert elements == whole, path


@pytest.mark.parametrize("case", ["ddp", "in_backward", "patterns", "fsdp1_whole"])
def test_replicas_share_the_work_evenly(two: Path, case: str) -> None:
    found = _read(two, case, 2)
    shared = [parts for parts in found.shared().values() if whole_shape(parts[0][1])]
    sums = [
        sum(leaf.nbytes for parts in shared for slot, leaf in parts if slot is own)
        for own in found.slots
    ]
    row_bytes = max(
        4 * int(np.prod(whole_shape(parts[0][1])[1:], dtype=np.int64)) for parts in shared
    )
    assert abs(sums[0] - sums[1]) <= 2 * row_bytes


def test_every_tensor_has_its_place_in_every_tree(world: tuple[str, World]) -> None:
    case, found = world
    if case in ("pipeline", "zero") or case.startswith("fsdp1"):
        return  # a rank has other modules, or no state of what is not in its part
    first, *others = (slot.tree() for slot in found.slots)
    for other in others:
        assert _keys(other) == _keys(first)


def _keys(item: Any) -> Any:
    if isinstance(item, External):
        return {name: _keys(child) for name, child in item.children.items()}
    if isinstance(item, dict):
        return {key: _keys(child) for key, child in item.items()}
    if isinstance(item, (list, tuple)):
        return [_keys(child) for child in item]
    return item if isinstance(item, str) else None


MODELS = {"in_backward": "nets/model/"}


def test_parameters_have_one_name_under_every_parallelism(two: Path, four: Path) -> None:
    names = {}
    for case in [*TWO, *FOUR]:
        if case in ("pipeline", "patterns", "in_backward"):
            continue
        place, size = (two, 2) if case in TWO else (four, 4)
        found = _read(place, case, size)
        names[case] = {leaf.path for slot in found.slots for leaf in slot.layout.leaves}
        names[case] -= {path for path in names[case] if path.endswith("/step") or path == "rank"}
    expected = names["ddp"]
    assert "model/blocks.1.query.weight" in expected
    assert "optimizer/state/blocks.1.query.weight/exp_avg" in expected
    assert {case: found ^ expected for case, found in names.items() if found != expected} == {}


def test_buffers_steps_and_plain_tensors_stay_with_their_rank(two: Path) -> None:
    found = _read(two, "ddp", 2)
    own = {path for path in found.private(1) if not path.endswith("/step")}
    assert own == {
        *("rank", "model/norm.running_mean", "model/norm.running_var"),
        "model/norm.num_batches_tracked",
    }
    ranks = [slot.array(leaf).tolist() for slot in found.slots for leaf in slot.layout.leaves
             if leaf.path == "rank"]  # fmt: skip
    assert ranks == [[0], [1]]
    shared = found.shared()
    (step,) = {slot.tree()["optimizer"].children["state"]["embed.weight"]["step"]
               for slot in found.slots}  # fmt: skip
    assert step == "optimizer/state/embed.weight/step"
    assert step not in shared


def test_stages_have_names_of_their_own(two: Path) -> None:
    found = _read(two, "pipeline", 2)
    assert not found.shared()
    assert all(path.startswith(("stage1/", "optimizer/")) for path in found.private(1))
    for path, array in found.whole.items():
        slot = found.slots[int(path[len("stage")])]
        (leaf,) = [leaf for leaf in slot.layout.leaves if leaf.path == path]
        assert slot.array(leaf).tobytes() == array.tobytes()


def test_a_partitioned_optimizer_saves_only_its_own_part(two: Path) -> None:
    found = _read(two, "zero", 2)
    held = [
        {leaf.path for leaf in slot.layout.leaves if leaf.path.startswith("optimizer/")}
        for slot in found.slots
    ]
    assert held[0]
    assert held[1]
    assert not held[0] & held[1]
    groups = [slot.tree()["optimizer"].children["param_groups"] for slot in found.slots]
    assert groups[0] == groups[1]
    assert "blocks.0.query.weight" in groups[0][0]["params"]


def test_fsdp1_computes_with_what_was_restored_after_an_evaluation(tmp_path: Path) -> None:
    assert run_ranks("rank.checked_worlds", "evaluated", 2, tmp_path) == ["done"] * 2


def test_a_forecast_on_one_rank_waits_for_no_other(tmp_path: Path) -> None:
    """An optimizer's twin is not stepped where its step might talk to other ranks."""
    assert run_ranks("rank.checked_worlds", "forecast_alone", 2, tmp_path) == ["done"] * 2


def test_the_harness_tells_what_a_rank_said(tmp_path: Path) -> None:
    assert run_ranks("rank.worlds", "names", 2, tmp_path) == [[0, 2, "names-2"], [1, 2, "names-2"]]
    with pytest.raises(AssertionError, match="has no attribute 'nothing'"):
        run_ranks("rank.worlds", "nothing", 2, tmp_path)
    assert json.loads((tmp_path / "names-2" / "0.json").read_text())[0] == 0


@pytest.mark.parametrize("case", ["fsdp1_flat", "fsdp2"])
def test_a_shard_takes_the_memory_of_a_shard(two: Path, case: str) -> None:
    """DLRover's FSDP engine does not keep to that: its buffers have room for all shards."""
    found = _read(two, case, 2)
    owned = [sum(leaf.nbytes for leaf in slot.layout.leaves) for slot in found.slots]
    firsts = [parts[0][1] for parts in found.shared().values()]
    whole = sum(4 * int(np.prod(whole_shape(leaf), dtype=np.int64)) for leaf in firsts)
    for slot, own in zip(found.slots, owned, strict=True):
        assert own < 0.75 * whole
        padding = PAGE_BYTES * len(slot.layout.groups) + LEAF_ALIGN_BYTES * len(slot.layout.leaves)
        assert len(slot.data) <= own + padding
