"""Memory whose pages are locked for the GPU: only then is a copy fast, and beside training."""

from __future__ import annotations

import contextlib
from typing import Any, Self

import torch

from ckptmgr.telling import tell

_PORTABLE = 1
"""cudaHostRegisterPortable: locked for every GPU of this process."""


def cuda_in_use() -> bool:
    """Whether this process has started CUDA; asking does not start it."""
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return in_use


class PageLocks:
    """Memory that CUDA was told of, as the slots of a host buffer. It may begin before CUDA does.

    Made by the thread that trains, which lets another one lock what is not written yet: locking
    takes longer than a copy. No two threads lock the same memory. CUDA keeps a device for each
    thread, and one that names none would open a context on the first, with half a gigabyte of its
    memory.
    """

    def __init__(self) -> None:
        self._device = torch.cuda.current_device() if cuda_in_use() else None
        self._places: set[int] = set()
        self._refused = False

    def lock_ahead(self, data: memoryview) -> None:
        """Lock a slot in a thread that does nothing else with CUDA."""
        if self._device is not None and len(data):
            torch.cuda.set_device(self._device)
            self._lock(data)

    def lock(self, data: memoryview) -> None:
        """Lock a slot if CUDA was started meanwhile; a refusal is warned about, once."""
        if cuda_in_use() and len(data):
            self._lock(data)

    def _lock(self, data: memoryview) -> None:
        place = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
        if place in self._places or self._refused:
            return
        status = int(_runtime().cudaHostRegister(place, len(data), _PORTABLE))
        if status == 0:
            self._places.add(place)
            return
        self._refused = True
        _forget_error()
        tell(
            f"host memory can not be page-locked (CUDA error {status}); copies from and to the GPU "
            "will be slow. Raise the limit of locked memory (ulimit -l).",
            stacklevel=2,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Unlock everything, before it is unmapped."""
        for place in self._places:
            if int(_runtime().cudaHostUnregister(place)):
                _forget_error()
        self._places.clear()


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_error() -> None:
    """CUDA tells an error again to the next kernel of the thread, which would fail for it."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")
