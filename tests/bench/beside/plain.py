"""Libraries that write one file from the process that trains."""

from __future__ import annotations

from concurrent.futures import Future
from importlib import import_module

import torch

from bench.beside.peer import Peer


class TorchSave(Peer):
    """torch.save and torch.load."""

    def save(self, step: int) -> None:
        torch.save(self.state, self.of_rank(step, ".pt"))

    def restore(self, step: int) -> None:
        self.copy_in(torch.load(self.of_rank(step, ".pt"), weights_only=True))


class Safetensors(Peer):
    """save_file, and one get_tensor after the other."""

    def load(self) -> None:
        self.library = import_module("safetensors")
        self.torch = import_module("safetensors.torch")

    def save(self, step: int) -> None:
        self.torch.save_file(self.state, self.of_rank(step, ".safetensors"))

    def restore(self, step: int) -> None:
        with self.library.safe_open(self.of_rank(step, ".safetensors"), "pt") as opened:
            for name, tensor in self.state.items():
                tensor.copy_(opened.get_tensor(name))


class LightningAsync(Peer):
    """AsyncCheckpointIO around TorchCheckpointIO: a clone, then a thread."""

    def load(self) -> None:
        self.library = import_module("lightning.pytorch.plugins.io")

    def open(self) -> None:
        self.io = self.library.AsyncCheckpointIO(self.library.TorchCheckpointIO())

    def save(self, step: int) -> None:
        self.io.save_checkpoint({"state_dict": self.state}, str(self.of_rank(step, ".ckpt")))
        # It hands out nothing to wait for; its one thread takes turns.
        self.behind: Future[None] = self.io._executor.submit(lambda: None)

    def wait(self) -> None:
        self.behind.result()
        if self.io._error:
            raise self.io._error

    def restore(self, step: int) -> None:
        io = self.library.TorchCheckpointIO()
        self.copy_in(io.load_checkpoint(str(self.of_rank(step, ".ckpt")))["state_dict"])
