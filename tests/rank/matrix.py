"""A small transformer under every number of ranks and parallelism; run by `ranks.run_forked`.

`save` trains each layout of its world and writes what the slots would hold, and the truth, which
torch's own collectives give. `restore` takes each of these saves into each layout of its world.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer imports it: here once, instead of in every fork
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from ckptmgr.rank import sources
from ckptmgr.rank.place import Placing
from ckptmgr.rank.sources import Origin, ranges_needed
from ckptmgr.staging.boxes import whole_shape
from rank.relayout import State, live_numbers, read, take, write
from rank.shape import bytes_of

WIDTH = 10
"""Uneven over 3, 4 and 8 ranks; the last three of 8 hold nothing of it."""

WORDS = 29
"""Uneven, but each of 8 ranks has a row: torch looks nothing up in an embedding without rows."""

WIDE = 33_001
"""Uneven over all; the half of a row of so many numbers is longer than what is fetched along."""

LARGE_BYTES = 256 << 10


class Block(nn.Module):
    """Attention and a feed-forward part, whose columns may lie on several ranks."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, batch: Tensor) -> Tensor:
        """One step of the residual stream."""
        seen = self.before(batch)
        weights = torch.softmax(self.query(seen) @ self.key(seen).transpose(-1, -2), -1)
        batch = batch + self.out(weights @ self.value(seen))
        found: Tensor = batch + self.down(torch.relu(self.up(self.between(batch))))
        return found


class Net(nn.Module):
    """Two blocks, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(21), Block(WIDE)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Numbers for each word that could come next."""
        batch = self.embed(tokens)
        for block in self.blocks:
            batch = block(batch)
        found: Tensor = self.head(self.norm(batch))
        return found


# -- layouts --------------------------------------------------------------------------------------


def world_of(layout: str) -> int:
    """How many ranks it is for: "tp-3" is for 3."""
    return int(layout.split("-")[1])


def _tensor_parallel(net: Net, mesh: Any) -> None:
    # Between the linears the columns stay DTensors: only these know that shards are uneven.
    columns, rows = ColwiseParallel(use_local_output=False), RowwiseParallel()
    plan: dict[str, Any] = dict.fromkeys(("query", "key", "value", "up"), columns)
    plan |= dict.fromkeys(("out", "down"), rows)
    for block in net.blocks:
        parallelize_module(block, mesh, plan)
    ends = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(net, mesh, ends)
    net.head.weight = net.embed.weight  # each was spread alone


def make(layout: str, seed: int, rate: float) -> State:
    """A training state under a layout of this world."""
    torch.manual_seed(seed)
    net: Any = Net()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    kind, _ = layout.split("-")
    if kind == "ddp":
        net = DistributedDataParallel(net)
    elif kind == "fsdp2":
        for part in (*net.blocks, net):
            fully_shard(part, mesh=mesh)
    elif kind == "tp":
        _tensor_parallel(net, mesh)
    # Tensor parallelism leaves plain tensors beside DTensors, and no foreach operation takes both.
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, foreach=kind != "tp")
    return {"model": net, "optimizer": optimizer}


def _layouts(place: Path) -> tuple[list[str], list[str]]:
    """All of them, and those of this world; the test has written them down."""
    every: list[str] = json.loads((place.parent / "layouts.json").read_text())
    return every, [one for one in every if world_of(one) == dist.get_world_size()]


# -- saving ---------------------------------------------------------------------------------------


def _train(model: nn.Module, optimizer: Any, seed: int) -> None:
    tokens = torch.randint(0, WORDS, (8, 5), generator=torch.Generator().manual_seed(seed))
    expected = tokens.roll(-1, 1).flatten()
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), expected).backward()
    optimizer.step()
    optimizer.zero_grad()


def save(place: Path) -> dict[str, str]:
    """Train each layout of this world, each with other numbers, and write it down.

    What it returns is the digest of the truth by layout: it is the same on each rank, so also what
    a rank holds for itself.
    """
    every, own = _layouts(place)
    digests = {}
    for layout in own:
        state = make(layout, seed=every.index(layout), rate=0.01)
        for step in range(2):
            batch = 0 if layout.startswith("tp") else dist.get_rank()
            _train(state["model"], state["optimizer"], seed=10 * step + batch)
        write(place.parent, layout, dist.get_rank(), state)
        truth = live_numbers(state)
        digest = xxhash.xxh3_128()
        for name, item in truth.items():
            digest.update(name.encode())
            digest.update(bytes_of(item))
        digests[layout] = digest.hexdigest()
        if dist.get_rank() == 0:
            torch.save(truth, place.parent / f"{layout}.truth")
    return digests


# -- restoring ------------------------------------------------------------------------------------


def restore(place: Path) -> list[dict[str, Any]]:
    """Take every save into every layout of this world; what came of it on this rank."""
    every, own = _layouts(place)
    found = []
    for before in every:
        saved = read(place.parent, before)
        truth = torch.load(place.parent / f"{before}.truth", weights_only=True)
        for layout in own:
            state = make(layout, seed=100, rate=1.0)
            plan = take(saved, state)
            live = _live(state)
            wrong = _differing(live, truth)
            if state["optimizer"].param_groups[0]["lr"] != 0.01:
                wrong.append("lr")
            _check_that_one_bit_is_noticed(live, truth)
            one = {"before": before, "layout": layout, "rank": dist.get_rank(), "wrong": wrong}
            found.append(one | {"tensors": len(live)} | _bytes(plan, live))
    return found


def _live(state: State) -> dict[str, Tensor]:
    """What this rank holds, by the names of the truth."""
    found = {}
    for name, param in state["model"].named_parameters():
        bare = name.removeprefix("module.")
        found[bare] = param.detach()
        for key, item in state["optimizer"].state[param].items():
            found[f"{bare}/{key}"] = item
    return found


def _differing(live: dict[str, Tensor], truth: dict[str, Tensor]) -> list[str]:
    """Names of what is not the same bits; which part is whose torch says itself."""
    names = set(live) ^ set(truth)
    for name in set(live) & set(truth):
        item, expected = live[name], truth[name]
        if isinstance(item, DTensor):
            mesh, placements = item.device_mesh, item.placements
            if item.shape != expected.shape:
                names.add(name)
            # From nobody: each rank cuts its part out of what it is given.
            spread = distribute_tensor(expected, mesh, placements, src_data_rank=None)
            item, expected = item.to_local(), spread.to_local()
        if item.shape != expected.shape or not torch.equal(_bits(item), _bits(expected)):
            names.add(name)
    return sorted(names)


def _check_that_one_bit_is_noticed(live: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    name = "embed.weight"
    wrong = live[name].clone()
    _bits(wrong.to_local() if isinstance(wrong, DTensor) else wrong)[-1, -1] ^= 1
    assert name in _differing(live | {name: wrong}, truth)


def _bits(item: Tensor) -> Tensor:
    assert item.dtype == torch.float32
    return item.view(torch.int32)


def _bytes(plan: Placing, live: dict[str, Tensor]) -> dict[str, Any]:
    """Bytes that this rank asked for, and those its tensors hold."""
    local = [item.to_local() if isinstance(item, DTensor) else item for item in live.values()]
    leaves = defaultdict(list)
    for origin in plan.wants.origins:
        leaves[origin.leaf.path].append(origin)
    return {
        "held": sum(item.numel() * item.element_size() for item in local),
        "asked": _count(plan.needs),
        "large": _ratio(leaves),
    }


def _ratio(leaves: dict[str, list[Origin]]) -> float:
    """Bytes asked for by bytes wanted, of the large tensor where that is most."""
    ratios = [0.0]
    for origins in leaves.values():
        wanted = sum(4 * one.box.count for one in origins)
        if wanted and 4 * math.prod(whole_shape(origins[0].leaf)) >= LARGE_BYTES:
            ratios.append(_count(ranges_needed(origins)) / wanted)
    return max(ratios)


def _count(needs: dict[int, sources.Ranges]) -> int:
    return sum(stop - start for ranges in needs.values() for start, stop in ranges)
