"""Libraries whose savers are processes of their own: nvidia-resiliency-ext and DLRover."""

from __future__ import annotations

import os
import threading
from importlib import import_module
from pathlib import Path

import torch

from bench.beside.gauge import TOKEN
from bench.beside.peer import Peer
from bench.beside.plain import TorchSave

LOOK_SECONDS = 0.02


class Resiliency(TorchSave):
    """TorchAsyncCheckpoint: torch.save in a process that is kept. It copies only what is on a GPU,
    so the clone stands for that copy; torch.cuda's calls are made harmless.
    """

    on_trainer = True
    needs_group = True

    def load(self) -> None:
        torch.cuda.synchronize = lambda *_, **__: None
        torch.cuda.current_device = lambda: torch.device("cpu")
        self.library = import_module("nvidia_resiliency_ext.checkpointing.async_ckpt.torch_ckpt")

    def open(self) -> None:
        self.saver = self.library.TorchAsyncCheckpoint()

    def save(self, step: int) -> None:
        copies = {name: tensor.clone() for name, tensor in self.state.items()}
        self.saver.async_save(copies, self.of_rank(step, ".pt"))

    def ready(self) -> bool:
        self.saver.finalize_async_save(blocking=False)
        return self.saver._async_calls_queue.get_num_unfinalized_calls() == 0

    def wait(self) -> None:
        self.saver.finalize_async_save(blocking=True)


class DLRover(Peer):
    """DdpCheckpointer to the disk, without dlrover-run: its saver is a child of the trainer."""

    def load(self) -> None:
        os.environ["TORCHELASTIC_RUN_ID"] = os.environ[TOKEN]  # names its memory and its sockets
        os.environ["DLROVER_LOG_LEVEL"] = "ERROR"
        self.library = import_module("dlrover.trainer.torch.flash_checkpoint.ddp")

    def open(self) -> None:
        self.keeper = self.library.DdpCheckpointer(str(self.directory))

    def save(self, step: int) -> None:
        self.step = step
        disk = self.library.StorageType.DISK
        self.keeper.save_checkpoint(step, dict(self.state), storage_type=disk)
        if self.keeper._engine._cached_step != step:
            raise RuntimeError("it skipped the snapshot: the one before is still being written")

    def wait(self) -> None:
        """Its record of the newest step is all that tells."""
        tracker, never = self.directory / "dlrover_latest.txt", threading.Event()
        while not tracker.exists() or tracker.read_text() != str(self.step):
            never.wait(LOOK_SECONDS)

    def path(self, step: int) -> Path:
        return self.directory / str(step)

    def restore(self, step: int) -> None:
        loaded = torch.load(self.path(step) / "rank_0.pt", map_location="cpu")
        self.copy_in(loaded.get("model_states", loaded))
