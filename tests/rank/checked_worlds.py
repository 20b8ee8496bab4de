"""What ranks check for themselves, over the modules of `worlds`; run by `ranks.run_ranks`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy

from ckptmgr.rank.capture import Capture
from ckptmgr.rank.place import plan_placing
from ckptmgr.rank.sources import Table
from rank.slot import snapshot
from rank.worlds import WORDS, made_fsdp1, no_collective, train


def evaluated(place: Path) -> str:
    """After a forward under no_grad, FSDP1 keeps whole parameters: those from before a restore."""
    for strategy in (ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP):
        for orig in (True, False):
            _evaluated(strategy, orig=orig)
    return "done"


def _evaluated(strategy: ShardingStrategy, *, orig: bool) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = made_fsdp1(strategy, orig=orig)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    train(model, optimizer, seed=rank)
    with snapshot(state) as saved:
        wanted = _answer(model)
        train(model, optimizer, seed=rank)
        assert not torch.equal(_answer(model), wanted)
        plan = plan_placing(
            state,
            [Table(rank, saved.layout, saved.values)],
            rank=rank,
            saved_world=world,
            alone=False,
        )
        plan.verify({rank: saved.data})
        with no_collective():
            plan.load()
            plan.write()
        assert torch.equal(_answer(model), wanted), (strategy, orig)
        train(model, optimizer, seed=rank)  # and it goes on


def _answer(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(torch.arange(WORDS)[:, None])
    model.train()
    return found


class Averaging(torch.optim.SGD):
    """One that talks to the other ranks in its step."""

    def step(self, closure: Any = None) -> Any:
        """Average, and step."""
        for group in self.param_groups:
            for param in group["params"]:
                dist.all_reduce(param.grad)
        return super().step(closure)


def forecast_alone(place: Path) -> str:
    """Rank 0 asks what a snapshot will need while the others wait for its answer."""
    model = nn.Linear(3, 2)
    state = {"model": model, "optimizer": Averaging(model.parameters(), lr=0.1, momentum=0.9)}
    if dist.get_rank() == 0:
        Capture(state, rng=False).predict()
    dist.barrier()
    return "done"
