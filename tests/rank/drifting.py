"""Training under DistributedDataParallel that keeps ranks alike, and such that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks as hooks
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import (
    PostLocalSGDState,
    post_localSGD_hook,
)
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from ckptmgr.rank.capture import Capture

State = dict[str, Any]


class Compressing(SGD):
    """Somebody's optimizer: that it is made of one of torch says nothing of what it keeps."""


def state_of(
    build: Callable[[Any], Optimizer] = SGD, hook: Any = None, of: Any = None, among: Any = None
) -> State:
    """A model that communicates by a hook, and an optimizer as after a step."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(8, 8, bias=False), process_group=among)
    if hook is not None:
        # Torch registers one of bfloat16 only with NCCL.
        model._comm_hooks.append((hook, of))
    optimizer = build(model.parameters())
    held = torch.full_like(model.module.weight, float(dist.get_rank()))
    optimizer.state[model.module.weight] = {"momentum_buffer": held}
    return {"m": model, "o": optimizer}


def shared_paths(capture: Capture) -> list[str]:
    """What this rank saves only a part of, by its path."""
    leaves = capture.prepare().layout.leaves
    return sorted(leaf.path for leaf in leaves if leaf.global_shape is not None)


def averaged_now_and_then(params: Any) -> Optimizer:
    """Torch's post-local SGD without its hook, as where `no_sync` stands for it."""
    averager = PeriodicModelAverager(period=4, warmup_steps=1)
    return PostLocalSGDOptimizer(optim=SGD(params), averager=averager)


def two(place: Path) -> dict[str, list[str]]:
    """What two ranks share out in each case."""
    alone = dist.new_subgroups(group_size=1)[0]
    local = PostLocalSGDState(None, alone, start_localSGD_iter=1)
    states = {
        "no hook": state_of(),
        "allreduce": state_of(hook=hooks.allreduce_hook),
        "fp16": state_of(hook=hooks.fp16_compress_hook, of=dist.group.WORLD),
        "bf16": state_of(hook=hooks.bf16_compress_hook),
        "wrapped": state_of(hook=hooks.fp16_compress_wrapper(hooks.allreduce_hook)),
        "among some": state_of(hook=hooks.allreduce_hook, of=alone),
        "wrapped, among some": state_of(
            hook=hooks.bf16_compress_wrapper(hooks.allreduce_hook), of=alone
        ),
        "somebody's hook": state_of(hook=lambda _, bucket: bucket),
        "local SGD": state_of(hook=post_localSGD_hook, of=local),
        "wrapped local SGD": state_of(
            hook=hooks.fp16_compress_wrapper(post_localSGD_hook), of=local
        ),
        "averaged": state_of(averaged_now_and_then),
        "somebody's optimizer": state_of(Compressing),
    }
    found = {case: shared_paths(Capture(state, rng=False)) for case, state in states.items()}
    known = Capture(states["somebody's optimizer"], rng=False, replicated=["o/state/*"])
    found["somebody's optimizer, known"] = shared_paths(known)
    state = state_of()
    capture = Capture(state, rng=False)
    found["before a hook"] = shared_paths(capture)
    state["m"].register_comm_hook(local, post_localSGD_hook)
    found["after it"] = shared_paths(capture)
    return found


def four(place: Path) -> dict[str, list[str]]:
    """What four ranks share out that are two pairs, before they know of each other and after."""
    store = _get_default_store()
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    pair = dist.get_rank() % 2
    own = state_of(among=pairs[pair])
    state: State = {"both": state_of(), "one": own["m"], "o": own["o"]}
    state[f"stage{pair}"] = state_of(among=pairs[pair])["m"]
    capture = Capture(state, rng=False)
    found = {"before": shared_paths(capture)}
    capture.predict()
    capture.tell_parties(store.add)
    dist.barrier()
    capture.heed_parties(store.add)
    found["after"] = shared_paths(capture)
    state["later"] = state_of(among=pairs[pair])["m"]
    found["later"] = shared_paths(capture)
    return found
