"""What a handle says is true of its own snapshot, for as long as somebody keeps it."""

from __future__ import annotations

import gc
import threading
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptmgr
from ckptmgr.errors import HostMemoryError, TornSnapshotError
from ckptmgr.rank.overlap import Job, Turn
from driven import PATIENCE_SECONDS, Daemon, until
from rigged import Rig


def test_a_handle_never_tells_of_a_step_in_a_later_buffer(runtime: Path, tmp_path: Path) -> None:
    """Slots and generations begin anew in it."""
    rig = Rig(tmp_path)
    rig.obey(("put_new", "data/00000001/000000000001/", "hold"))
    state: dict[str, Any] = {"w": torch.zeros(4)}
    with (
        Daemon(runtime, environment=rig.environment()),
        ckptmgr.Checkpointer(rig.url, state, every=None) as ckpt,
    ):
        first = ckpt.save(1)
        assert not first.committed(0.1)
        state["more"] = torch.ones(1 << 20)
        second = ckpt.save(2)
        assert second.committed(PATIENCE_SECONDS)
        assert first.snapshot is not None
        assert second.snapshot is not None
        places = [(one.snapshot.slot, one.snapshot.generation) for one in (first, second)]
        assert places[0] == places[1]
        assert not first.committed(0.1)
        rig.obey()
        assert first.committed(PATIENCE_SECONDS)


@pytest.mark.parametrize("overlap", [False, True])
def test_handles_keep_no_tensor_that_training_has_dropped(
    runtime: Path, store_url: str, overlap: bool
) -> None:
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state: dict[str, Any] = {"net": net, "optimizer": optimizer, "hidden": torch.zeros(1)}
    seen: list[weakref.ref[torch.Tensor]] = []
    handles = []
    with ckptmgr.Checkpointer(store_url, state, every=None, overlap=overlap) as ckpt:
        for step in range(1, 5):
            state["hidden"] = torch.full((3,), float(step))
            net.weight = torch.nn.Parameter(torch.ones(2, 2))
            optimizer.param_groups[0]["params"] = list(net.parameters())
            seen += [weakref.ref(state["hidden"]), weakref.ref(net.weight)]
            handles.append(ckpt.save(step))
            assert handles[-1].committed(PATIENCE_SECONDS)
        gc.collect()
        assert [tensor() is not None for tensor in seen] == [False] * 6 + [True] * 2
    del state["hidden"], net.weight
    optimizer.param_groups.clear()
    gc.collect()
    assert len(handles) == 4
    assert not any(tensor() is not None for tensor in seen), "the last one's, too"


def test_a_torn_snapshot_keeps_no_tensor_either(runtime: Path, store_url: str) -> None:
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    state: dict[str, Any] = {"net": net, "optimizer": optimizer, "hidden": torch.zeros(1)}
    seen = weakref.ref(state["hidden"])
    with (
        pytest.warns(RuntimeWarning, match="was changed while it was copied"),
        ckptmgr.Checkpointer(store_url, state, every=None, overlap=True) as ckpt,
    ):
        torn = ckpt.save(1)
        with torch.no_grad():
            net.weight += 1
        with pytest.raises(TornSnapshotError):
            torn.sealed()
        state["hidden"] = torch.ones(1)
        assert ckpt.save(2).committed(PATIENCE_SECONDS)
        gc.collect()
        assert seen() is None


@pytest.mark.parametrize("warnings_raise", [False, True])
def test_a_copy_that_fails_behind_training_fails_its_own_step_only(
    runtime: Path, store_url: str, monkeypatch: pytest.MonkeyPatch, warnings_raise: bool
) -> None:
    """Also one that fails by a surprise, and where a warning about it is an error."""
    net = torch.nn.Linear(2, 2)
    state: dict[str, Any] = {"net": net, "optimizer": torch.optim.SGD(net.parameters(), lr=0.1)}
    begin = threading.Event()

    def fail(job: Job, turn: Turn) -> None:
        begin.wait(PATIENCE_SECONDS)
        raise RuntimeError("out of something")

    with (
        ckptmgr.Checkpointer(store_url, state, every=1, overlap=True) as ckpt,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error" if warnings_raise else "ignore")
        with monkeypatch.context() as patch:
            patch.setattr(Job, "_copy", fail)
            first = ckpt.step(1)
            assert first is not None
            begin.set()
            until(lambda: first.failure, "it fails")
        third = ckpt.step(3)
        assert third is not None
        assert third.committed(PATIENCE_SECONDS)
        for ask in (first.sealed, first.committed):
            with pytest.raises(HostMemoryError, match=r"step 1: was not copied: RuntimeError"):
                ask()
        assert ckpt.stats.failures == 1
