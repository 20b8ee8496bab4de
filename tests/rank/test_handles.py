"""What a handle says is true of its own snapshot, for as long as somebody keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import ckptmgr
from driven import PATIENCE_SECONDS, Daemon
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
