"""Orbax, on NumPy views of the tensors."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import torch

from bench.beside.peer import Peer
from bench.beside.state import SIGNS


class Orbax(Peer):
    """AsyncCheckpointer of a PyTree. What NumPy has no type for is saved as integers."""

    def load(self) -> None:
        self.library = import_module("orbax.checkpoint")

    def open(self) -> None:
        self.saver = self.library.AsyncCheckpointer(self.library.PyTreeCheckpointHandler())

    def arrays(self) -> dict[str, np.ndarray]:
        views = {}
        for name, tensor in self.state.items():
            plain = tensor.dtype is torch.float32
            views[name] = (
                tensor if plain else tensor.view(SIGNS[tensor.element_size()][0])
            ).numpy()
        return views

    def save(self, step: int) -> None:
        self.saver.save(self.path(step), args=self.library.args.PyTreeSave(self.arrays()))

    def wait(self) -> None:
        self.saver.wait_until_finished()

    def open_reader(self) -> None:
        self.saver = self.library.Checkpointer(self.library.PyTreeCheckpointHandler())

    def restore(self, step: int) -> None:
        loaded = self.saver.restore(self.path(step))
        for name, view in self.arrays().items():
            np.copyto(view, np.asarray(loaded[name]))
