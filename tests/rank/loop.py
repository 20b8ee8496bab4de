"""A small training loop, and what a snapshot of it must hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ckptmgr.rank.capture import Capture, Prepared
from ckptmgr.rank.place import Saved, rebuild
from ckptmgr.staging.hostbuffer import HostBuffer
from rank.shape import difference, tensors
from rank.slot import read, seal

WAIT_SECONDS_MAX = 60.0


class Loop:
    """A small training loop with everything that changes tensors in a different way."""

    def __init__(self, width: int = 24) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 8))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.999)
        self.ema = AveragedModel(self.model)
        self.array = np.zeros(5)
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "ema": self.ema,
            "array": self.array,
            "counter": torch.zeros(3, dtype=torch.int64),
            "steps": 0,
        }
        self.step()

    def forward(self) -> None:
        """BatchNorm's buffers change, gradients are made."""
        self.optimizer.zero_grad()
        self.model(torch.randn(4, 8)).square().sum().backward()

    def step(self) -> None:
        self.forward()
        self.optimizer.step()
        self.scheduler.step()
        self.ema.update_parameters(self.model)
        self.array += 1
        self.state["counter"] += 1
        self.state["steps"] += 1

    def change_all_by_hand(self) -> None:
        with torch.no_grad():
            for _, tensor in tensors(self.state):
                tensor.add_(1)
        self.array -= 3


def reference(state: dict[str, Any]) -> dict[str, Any]:
    """Clones of every tensor, made in the same instant."""
    return {path: tensor.detach().clone() for path, tensor in tensors(state)}


def differs(saved: Saved, expected: dict[str, Any]) -> list[str]:
    found = dict(tensors(rebuild(saved)))
    return [path for path in expected if difference(expected[path], found.get(path))]


def sealed_differs(
    buffer: HostBuffer, slot: int, prepared: Prepared, expected: dict[str, Any]
) -> list[str]:
    """Seal what was copied into a slot, and compare what a reader finds there."""
    seal(buffer, slot, prepared)
    saved = read(buffer, slot)
    try:
        return differs(saved, expected)
    finally:
        saved.data.release()


def copied(capture: Capture, prepared: Prepared, data: memoryview) -> list[BaseException | None]:
    heard: list[BaseException | None] = []
    capture.copy(prepared, data, heard.append).wait(WAIT_SECONDS_MAX)
    return heard
