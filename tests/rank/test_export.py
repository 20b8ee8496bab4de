"""Files for torch hold what all ranks have together, and beside it what each has for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckptmgr.rank.export import export, private_states
from ckptmgr.rank.place import Saved
from ckptmgr.staging.bufferfile import Capacity
from ckptmgr.staging.hostbuffer import HostBuffer, round_up
from ckptmgr.staging.layout import encode_layout
from ckptmgr.types import PAGE_BYTES, Binding, Leaf
from rank.cut import by_rows, cut
from rank.slot import snapshot
from rank.test_place_ranks import saved_of, sharded, stages, trained


def buffers_of(saved: list[Saved], directory: Path) -> list[Path]:
    """A host buffer with one slot for each rank."""
    found = []
    for one in saved:
        layout = encode_layout(one.layout)
        table_bytes = round_up(len(layout) + len(one.values) + 2 * PAGE_BYTES, PAGE_BYTES)
        capacity = Capacity(2, table_bytes, max(PAGE_BYTES, len(one.data)))
        buffer = HostBuffer.create(directory, Binding("file:///x", one.rank, len(saved)), capacity)
        writer = buffer.begin(0)
        with writer.data as data:
            data[: len(one.data)] = one.data
        writer.seal(
            attempt=1,
            nonce="0" * 32,
            rank=one.rank,
            world=len(saved),
            step=1,
            layout=layout,
            layout_hash=_hash(layout),
            values=one.values,
            tags={},
            data_bytes=one.layout.data_bytes,
            stall_seconds=0.0,
        )
        found.append(buffer.path)
        buffer.close()
    return found


def _hash(layout: bytes) -> bytes:
    import xxhash

    return xxhash.xxh3_128_digest(layout)


@pytest.fixture
def ranks() -> list[Saved]:
    """A training of three ranks that hold rows of its parameters."""
    with snapshot(trained(1), rng=True) as saved:
        return cut(saved, 3, sharded(by_rows(3)))


def test_torch_files(ranks: list[Saved], tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    export("torch", target, list(reversed(buffers_of(ranks, tmp_path))))
    truth = trained(1)
    state: dict[str, Any] = torch.load(target / "state.pt", weights_only=False)
    for name, tensor in truth["model"].state_dict().items():
        assert torch.equal(state["model"][name], tensor)
    moments = state["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moments, truth["optimizer"].state_dict()["state"][0]["exp_avg"])
    own = torch.load(target / "ranks" / "2" / "state.pt", weights_only=False)
    assert sorted(own["model"]) == ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    assert sorted(own["optimizer"]["0.weight"]) == ["step"]
    assert own["rng"]["torch"].dtype == torch.uint8
    assert sorted(path.name for path in (target / "ranks").iterdir()) == ["1", "2"]


def test_dcp_files(ranks: list[Saved], tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    export("dcp", target, buffers_of(ranks, tmp_path))
    assert (target / "dcp" / ".metadata").exists()
    assert (target / "ranks" / "1" / "dcp" / ".metadata").exists()


def test_what_only_one_stage_has_is_not_told_twice() -> None:
    saved = saved_of(stages(1))
    assert private_states(saved) == {}


def test_one_rank_has_nothing_beside(ranks: list[Saved], tmp_path: Path) -> None:
    with snapshot({"x": torch.ones(3)}) as saved:
        (one,) = cut(saved, 1, lambda leaf: None if isinstance(leaf, Leaf) else [])
    target = tmp_path / "out"
    target.mkdir()
    export("torch", target, buffers_of([one], tmp_path))
    assert [path.name for path in target.iterdir()] == ["state.pt"]
