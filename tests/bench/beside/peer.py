"""What every library is asked to do, so that one harness measures them all alike."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.beside.disk import files

State = dict[str, torch.Tensor]


class Peer:
    """One library, saving one rank's state below `directory`; a step is in `path(step)`."""

    durable = False
    """Promises that a step is on the disk when `wait` returns, by fsync of its files and folders;
    the harness syncs the others."""

    keeps = False
    """Deletes old steps itself; those of the others are deleted by the harness."""

    on_trainer = False
    """`ready` and `wait` must be called by the thread that trains, between steps."""

    needs_group = False
    """Wants torch.distributed even with one rank."""

    def __init__(self, directory: Path, state: State, rank: int, world: int) -> None:
        self.directory, self.state, self.rank, self.world = directory, state, rank, world

    def load(self) -> None:
        """Import the library; never timed."""

    def open(self) -> None:
        """Start what saving needs, as a training script does before its loop."""

    def save(self, step: int) -> None:
        """The call of the training thread."""
        raise NotImplementedError

    def mutable(self) -> None:
        """Wait until the training thread may change the state."""

    def ready(self) -> bool:
        """Whether `wait` would return at once; asked only `on_trainer`."""
        return True

    def wait(self) -> None:
        """Wait until the library says that the step is complete; raise what it failed with."""

    def open_reader(self) -> None:
        """Start what restoring needs, in a new process."""

    def restore(self, step: int) -> None:
        """Put a step into the tensors of `state`."""
        raise NotImplementedError

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.directory / f"step-{step:08d}"

    def of_rank(self, step: int, suffix: str) -> Path:
        """The file of this rank in a step's folder, which is made."""
        folder = self.path(step)
        folder.mkdir(exist_ok=True)
        return folder / f"rank{self.rank}{suffix}"

    def stored(self, step: int) -> int:
        """Bytes of all files of a step, of all ranks."""
        return sum(path.stat().st_size for path in files(self.path(step)))

    def copy_in(self, loaded: State) -> None:
        """Copy loaded tensors into those of the state."""
        for name, tensor in self.state.items():
            tensor.copy_(loaded[name])
