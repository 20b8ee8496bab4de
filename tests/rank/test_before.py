"""Back to before silent corruption: `Checkpointer.restore(before=...)`, with torch and a daemon."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckptmgr
from ckptmgr.errors import NothingToRestoreError, UsageError

SPIKE = "loss > 4"


def resumed(url: str, before: str, losses: list[float]) -> tuple[int, float]:
    """Resume, save one step for each loss, and return what was resumed from and its value."""
    state = {"x": torch.zeros(4)}
    with ckptmgr.Checkpointer(url, state, every=1, keep=20) as ckpt:
        start = ckpt.restore(before=before)
        found = float(state["x"].unique())
        for step, loss in enumerate(losses, start=start + 1):
            state["x"].fill_(step + loss)
            handle = ckpt.step(step, tags={"loss": loss})
            assert handle is not None
            handle.committed(30)
    return start, found


def test_it_comes_back_to_before_the_spike_and_may_stay_in_the_script(
    runtime: Path, store_url: str
) -> None:
    assert resumed(store_url, SPIKE, [0.5, 0.25, 9.0, 8.0]) == (0, 0.0)
    # Host memory has the newest steps still; where they belong, only their tags say.
    assert resumed(store_url, SPIKE, [0.125, 0.0625]) == (2, 2.25)
    # What the second attempt went by is past: its newest step is where the job is.
    assert resumed(store_url, SPIKE, []) == (4, 4.0625)
    assert resumed(store_url, "", []) == (4, 4.0625)


def test_where_the_first_step_has_the_spike_there_is_nothing(runtime: Path, store_url: str) -> None:
    assert resumed(store_url, "", [9.0, 0.5]) == (0, 0.0)
    with pytest.raises(NothingToRestoreError, match="no step before loss > 4"):
        resumed(store_url, SPIKE, [])


@pytest.mark.parametrize("wrong", ["loss >", "loss ~ 4", "4"])
def test_what_is_no_expression_is_refused_and_nothing_is_restored(
    runtime: Path, store_url: str, wrong: str
) -> None:
    assert resumed(store_url, "", [0.5]) == (0, 0.0)
    state = {"x": torch.full((4,), -1.0)}
    with (
        ckptmgr.Checkpointer(store_url, state) as ckpt,
        pytest.raises(UsageError, match=wrong.split(maxsplit=1)[0]),
    ):
        ckpt.restore(before=wrong)
    assert state["x"].tolist() == [-1.0] * 4
