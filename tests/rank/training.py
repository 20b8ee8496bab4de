"""A small real training whose every random and mutable thing must come back exactly."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ckptmgr
from called import call
from ckptmgr.rank.handle import RestoredStep

STEPS = 24


class Batches:
    """A stateful loader: its own generator and position."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(7)
        self.position = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.position += 1
            yield torch.randn(16, 12, generator=self.generator)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]
        self.generator.set_state(state["generator"])


@dataclass
class Training:
    """Model with BatchNorm, dropout and tied weights, AdamW, scheduler, EMA, loader."""

    model: nn.Module = field(init=False)
    losses: dict[int, str] = field(default_factory=dict)
    resumed: RestoredStep | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        tied = nn.Linear(12, 12)
        self.model = nn.Sequential(tied, nn.BatchNorm1d(12), nn.Dropout(0.2), nn.Linear(12, 12))
        self.model[3].weight = tied.weight
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.ema = torch.optim.swa_utils.AveragedModel(self.model)
        self.loader = Batches()
        self._batches = iter(self.loader)

    @property
    def state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "ema": self.ema,
            "loader": self.loader,
        }

    def train_one_step(self, step: int) -> float:
        batch = next(self._batches)
        loss = ((self.model(batch) - batch) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.ema.update_parameters(self.model)
        self.losses[step] = loss.item().hex()
        return loss.item()

    def digest(self) -> str:
        """One hash over every tensor and number that training depends on."""
        found = hashlib.sha256()
        for tensor in [*self.model.state_dict().values(), *self.ema.state_dict().values()]:
            found.update(tensor.numpy().tobytes())
        for state in self.optimizer.state_dict()["state"].values():
            for tensor in state.values():
                found.update(tensor.numpy().tobytes())
        found.update(repr(self.scheduler.state_dict()).encode())
        found.update(repr(self.loader.position).encode())
        found.update(self.loader.generator.get_state().numpy().tobytes())
        found.update(torch.get_rng_state().numpy().tobytes())
        return found.hexdigest()


def uninterrupted(steps: int) -> Training:
    """The truth that a resumed run is compared with."""
    training = Training()
    for step in range(1, steps + 1):
        training.train_one_step(step)
    return training


def command(*arguments: str) -> str:
    """Run `ckptmgr` and return what it prints."""
    done = call(*arguments, runtime=Path(os.environ["CKPTMGR_RUNTIME_DIR"]))
    assert done.status == 0, done
    return done.out


class CrashError(Exception):
    """Stands for whatever ends a training."""


def run(url: str, until: int, *, every: int = 5, crash: bool = False, **options: Any) -> Training:
    """Train to `until`, resuming first; leave by an exception if `crash`."""
    training = Training()
    try:
        with ckptmgr.Checkpointer(url, training.state, every=every, **options) as ckpt:
            step = ckpt.restore()
            for number in range(step + 1, until + 1):
                loss = training.train_one_step(number)
                handle = ckpt.step(number, tags={"loss": loss})
                if handle is not None:
                    handle.committed(30)
            if crash:
                raise CrashError
    except CrashError:
        pass
    training.resumed = ckpt.restored
    return training


def ls(url: str) -> list[dict[str, Any]]:
    """What `ckptmgr ls --json` says."""
    found: list[dict[str, Any]] = json.loads(command("ls", url, "--json"))
    return found


def committed(url: str) -> list[str]:
    """The steps that can be restored, newest first."""
    return [row["id"] for row in ls(url) if row["state"] in ("committed", "verified")]
