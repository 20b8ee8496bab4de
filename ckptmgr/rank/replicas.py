"""Which DistributedDataParallel modules keep their parameters alike on all ranks of their group."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ckptmgr.rank.optimizers import parameters_of

_HOOKS = "torch.distributed.algorithms.ddp_comm_hooks."
_BY_GROUP = frozenset(
    {
        "default_hooks.allreduce_hook",
        "default_hooks.fp16_compress_hook",
        "default_hooks.bf16_compress_hook",
    }
)
"""Hooks of torch that give each rank of a process group, their state, the same gradient."""

_BY_REDUCER = frozenset(
    {
        "mixed_precision_hooks._reducer_allreduce_and_upcast_hook",
        "optimizer_overlap_hooks.apply_optim_in_backward_hook",
    }
)
"""Those that DDP registers itself: its reducer gives them the same gradient."""

_WRAPPERS = frozenset(
    {
        "default_hooks.fp16_compress_wrapper_hook",
        "default_hooks.bf16_compress_wrapper_hook",
    }
)
"""Those that call another one, with the same state."""


def hooks_of(module: DistributedDataParallel) -> tuple[Any, ...]:
    """What communicates gradients instead of DDP itself: pairs of a hook and its state."""
    return tuple(module._comm_hooks)


def is_replicated(module: DistributedDataParallel, averaged: Iterable[int]) -> bool:
    """Whether every rank of the module's group has the same parameters after each step.

    Args:
        module: one whose ranks began with the same parameters, as DDP sees to.
        averaged: ids of the parameters that ranks step apart, and average now and then.
    """
    if not {id(param) for param in module.module.parameters()}.isdisjoint(averaged):
        return False
    ranks = set(dist.get_process_group_ranks(module.process_group))
    return all(_gives_all_the_same(hook, state, ranks) for hook, state in hooks_of(module))


def _gives_all_the_same(hook: Any, state: Any, ranks: set[int]) -> bool:
    """Whether a communication hook is known to give all of these ranks the same gradients."""
    function = hook.func if type(hook) is partial else hook
    place = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"
    name = place.removeprefix(_HOOKS)
    if name in _WRAPPERS:
        inner = inspect.getclosurevars(function).nonlocals["hook"]
        return _gives_all_the_same(inner, state, ranks)
    if name in _BY_REDUCER:
        return True
    over = dist.group.WORLD if state is None else state
    return name in _BY_GROUP and ranks.issubset(dist.get_process_group_ranks(over))


def averaged_by(optimizer: Optimizer) -> set[int]:
    """Ids of the parameters that a PostLocalSGDOptimizer steps: they differ until it averages."""
    module = sys.modules.get("torch.distributed.optim.post_localSGD_optimizer")
    if not isinstance(optimizer, getattr(module, "PostLocalSGDOptimizer", ())):
        return set()
    return set(map(id, parameters_of(optimizer)))


def keeps_alike(optimizer: Optimizer) -> bool:
    """Whether it keeps the same state on ranks that have the same parameters and gradients.

    Of torch's own that is known. Any other may keep what is a rank's own, as an error feedback.
    """
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")
