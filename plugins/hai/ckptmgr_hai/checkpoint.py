"""The idiom of hfai.checkpoint, kept by a Checkpointer: `init`, and the model's `try_save`.

    start_epoch, start_step, others = checkpoint.init(model, optimizer, ckpt_path="...")
    for epoch in range(start_epoch, epochs):
        for step, batch in enumerate(loader, start_step):
            ...
            model.try_save(epoch, step + 1, others=...)

All ranks call both alike. Where hfai saved in `try_save` once the flag was up, this snapshots every
few minutes as well, so that a failure costs no more than that.
"""

from __future__ import annotations

import atexit
import sys
import warnings
from typing import Any

import ckptmgr
from ckptmgr.config import DRAIN_SECONDS
from ckptmgr.errors import CkptmgrError
from ckptmgr_hai import SuspendSource, awake, carried_step

Start = tuple[int, int, Any]
"""Epoch, step in it, and what the user saved beside."""


def init(
    model: Any,
    optimizer: Any,
    *,
    scheduler: Any = None,
    amp_scaler: Any = None,
    ckpt_path: str,
    every: int | str | None = "5m",
    source: SuspendSource | None = None,
) -> Start:
    """Resume, and give the model its `try_save`; (0, 0, None) if there is nothing yet.

    Args:
        model: a module, wrapped or not.
        optimizer: its optimizer.
        scheduler: a scheduler, if there is one.
        amp_scaler: a GradScaler, if there is one.
        ckpt_path: where the job's steps are kept, as of Checkpointer.
        every: cadence of snapshots beside suspensions.
        source: who tells of suspensions; the platform if left out.
    """
    parts = {"scheduler": scheduler, "amp_scaler": amp_scaler}
    state = {"model": model, "optimizer": optimizer}
    state |= {name: part for name, part in parts.items() if part is not None}
    saving = TrySave(state, ckpt_path, every, source or SuspendSource())
    model.try_save = saving
    return saving.start


class TrySave:
    """What `model.try_save` is; `start` is where training goes on."""

    def __init__(
        self, state: dict[str, Any], url: str, every: int | str | None, source: SuspendSource
    ) -> None:
        self._state = {**state, "progress": {"calls": 0, "epoch": 0, "step": 0, "others": None}}
        self._checkpointer = ckptmgr.Checkpointer(
            url, self._state, every=every, preemption=[source]
        )
        with awake("resuming"):
            self._checkpointer.__enter__()
            # The last step is not left behind, however the training ends.
            atexit.register(self._at_exit)
            restored = self._checkpointer.restore()
        if restored < carried_step():
            warnings.warn(
                f"step {carried_step()} was carried over, and step {restored} was found",
                RuntimeWarning,
                stacklevel=3,
            )
        found = self._state["progress"]
        self._calls = int(found["calls"])
        self.start: Start = (found["epoch"], found["step"], found["others"])

    def __call__(self, epoch: int, step: int, others: Any = None, *, force: bool = False) -> bool:
        """Say that training goes on at `step` of `epoch`; whether this was snapshotted.

        With `force` it is snapshotted and committed when this returns.
        """
        self._calls += 1
        self._state["progress"] = {
            "calls": self._calls,
            "epoch": epoch,
            "step": step,
            "others": others,
        }
        if not force:
            return self._checkpointer.step(self._calls) is not None
        if not self._checkpointer.save(self._calls).committed(DRAIN_SECONDS):
            raise CkptmgrError("is not committed in time; see `ckptmgr status`", subject="try_save")
        return True

    def close(self) -> None:
        """Commit the last snapshot and leave; done by itself when the process ends."""
        self._leave(None)

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        """A copy of the model, and one that is pickled, has None in its place."""
        return _nothing, ()

    def _at_exit(self) -> None:
        # What ended the process, if an exception did: then nothing is waited for, as in a block.
        self._leave(getattr(sys, "last_value", None))

    def _leave(self, error: BaseException | None) -> None:
        atexit.unregister(self._at_exit)
        kind = None if error is None else type(error)
        self._checkpointer.__exit__(kind, error, None)


def _nothing() -> None:
    return None
