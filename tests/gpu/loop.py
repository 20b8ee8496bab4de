"""Training on a GPU with everything that changes tensors in a different way."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from rank.shape import bytes_of, tensors

SLEEP_CYCLES = 1 << 30
"""Half a second of a GPU that does nothing else."""


class Loop:
    """130 MB: a model with BatchNorm and dropout, AdamW, its schedule, an average of the weights,
    and a counter. It has made one step; `step` waits for nothing.
    """

    def __init__(self, width: int = 4096, **options: Any) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(1024, width), nn.BatchNorm1d(width), nn.Dropout(0.1)]
        self.model = nn.Sequential(*layers, nn.Linear(width, 1024)).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, **options)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.999)
        self.ema = AveragedModel(self.model)
        self.state: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "ema": self.ema,
            "counter": torch.zeros(3, dtype=torch.int64, device="cuda"),
            "steps": 0,
        }
        self.step()

    def forward(self) -> None:
        """BatchNorm's buffers change, gradients are made, the generator of the GPU moves on."""
        self.optimizer.zero_grad()
        self.model(torch.randn(64, 1024, device="cuda")).square().sum().backward()

    def step(self) -> None:
        self.forward()
        self.optimizer.step()
        self.scheduler.step()
        self.ema.update_parameters(self.model)
        self.state["counter"] += 1
        self.state["steps"] += 1

    def digest(self) -> str:
        """All that training depends on, bit by bit."""
        found = hashlib.sha256()
        for path, tensor in sorted(tensors(self.state)):
            found.update(path.encode() + bytes_of(tensor))
        found.update(repr(self.scheduler.state_dict()).encode())
        found.update(bytes_of(torch.cuda.get_rng_state()))
        return found.hexdigest()


def reference(state: dict[str, Any]) -> dict[str, Tensor]:
    """Clones of every tensor, made on the GPU in the same instant, in its order."""
    return {path: tensor.detach().clone() for path, tensor in tensors(state)}
