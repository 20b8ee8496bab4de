"""Optimizers whose steps wait until what they change was copied."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ckptmgr.rank.pagelocks import cuda_in_use


def can_wait(optimizer: Optimizer) -> bool:
    """Whether its steps can be made to wait. One that wraps another, and was not initialised as an
    optimizer itself (torch's PostLocalSGDOptimizer), has no hooks.
    """
    return hasattr(optimizer, "_optimizer_step_pre_hooks")


@dataclass(slots=True)
class Gate:
    """One optimizer, whether it has come to its gate since that was asked, and whether its step was
    recorded in a CUDA graph, which runs it again without coming here.
    """

    optimizer: Optimizer
    wait: Callable[[], None]
    has_come: bool = False
    is_recorded: bool = False

    def __call__(self, *_: Any) -> None:
        """Called by the optimizer before it steps."""
        self.has_come = True
        if _is_recording():
            self.is_recorded = True
        else:
            self.wait()


def _is_recording() -> bool:
    return cuda_in_use() and torch.cuda.is_current_stream_capturing()


class Gates:
    """The gates of all optimizers in a state; `wait` waits for the copy.

    While they hang, every other optimizer waits in the thread that hung them, too: it may share
    parameters with one in the state, and PyTorch does not count what its fused steps write.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait
        self._hung: dict[int, tuple[Gate, Any]] = {}
        self._trainer = threading.get_ident()
        self._before_all: Any = None

    def hang(self, optimizers: Iterable[Optimizer]) -> None:
        """Let these optimizers wait before they step, and with them all that are in no state."""
        wanted = {id(one): one for one in optimizers if can_wait(one)}
        self._trainer = threading.get_ident()
        if wanted and self._before_all is None:
            self._before_all = register_optimizer_step_pre_hook(self._before_any)
        elif not wanted and self._before_all is not None:
            self._before_all.remove()
            self._before_all = None
        for key in self._hung.keys() - wanted.keys():
            self._hung.pop(key)[1].remove()
        for key in wanted.keys() - self._hung.keys():
            gate = Gate(wanted[key], self._wait)
            self._hung[key] = gate, gate.optimizer.register_step_pre_hook(gate)

    def _before_any(self, optimizer: Optimizer, *_: Any) -> None:
        """Called before any optimizer of this process steps."""
        known = id(optimizer) in self._hung
        if not known and threading.get_ident() == self._trainer and not _is_recording():
            self._wait()

    def passed(self) -> list[Optimizer]:
        """Those that came to their gate, and always do, since this was asked before.

        One that did not is stepped by a graph, or by a wrapper that calls no hooks, or not at all.
        """
        found = [gate for gate, _ in self._hung.values() if gate.has_come and not gate.is_recorded]
        for gate, _ in self._hung.values():
            gate.has_come = False
        return [gate.optimizer for gate in found]
