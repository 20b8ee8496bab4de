"""This product, as its users call it."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.beside.disk import files
from bench.beside.peer import Peer
from ckptmgr import Checkpointer
from ckptmgr.config import runtime_dir
from ckptmgr.staging.launch import connect_or_start


class Ours(Peer):
    """Copied inside `save`; the daemon it starts writes."""

    durable = keeps = True
    overlap = False

    @property
    def store(self) -> Path:
        return self.directory / "store"

    def open(self) -> None:
        block = Checkpointer(
            str(self.store), self.contents(), every=None, rng=False, overlap=self.overlap
        )
        self.block = block.__enter__()

    def contents(self) -> dict[str, object]:
        return {"state": self.state}

    def save(self, step: int) -> None:
        self.handle = self.block.save(step)

    def wait(self) -> None:
        self.handle.committed()

    def path(self, step: int) -> Path:
        return self.store / f"data/{self.block.attempt:08d}/{step:012d}"

    def stored(self, step: int) -> int:
        """All objects of a step: packs, manifests, the commit and its record."""
        return sum(path.stat().st_size for path in files(self.store) if f"{step:012d}" in str(path))

    def open_reader(self) -> None:
        self.open()

    def restore(self, step: int) -> None:
        found = self.block.restore(required=True)
        assert found == step, f"restored step {found}, not {step}"
        assert self.block.restored is not None
        self.source = self.block.restored.source


class Served(Ours):
    """The daemon is there before the trainer, as under systemd."""

    def load(self) -> None:
        connect_or_start(runtime_dir()).close()


class Overlapped(Ours):
    """Parameters are copied during the next forward; the optimizer's step waits for them."""

    overlap = True

    def load(self) -> None:
        """The first optimizer imports the compiler of torch, which is not our time."""
        nothing = torch.nn.Parameter(torch.zeros(1))
        torch.optim.SGD([nothing], lr=0.0).step()

    def contents(self) -> dict[str, object]:
        module = torch.nn.Module()
        for name, tensor in self.state.items():
            module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        return {"model": module, "optimizer": self.optimizer}

    def mutable(self) -> None:
        self.optimizer.step()
