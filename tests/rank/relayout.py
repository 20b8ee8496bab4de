"""One training state under one parallelism after the other; run by `ranks.run_ranks`.

Each layout is made anew with other numbers, takes what the layout before it saved, is compared with
the truth by torch's own collectives, trains on from there (to see that torch can), is put back, and
saved. Nothing but the placing can have brought the right bits.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import ckptmgr
from ckptmgr.rank.capture import Capture
from ckptmgr.rank.place import Placing, Saved, plan_placing
from ckptmgr.staging.layout import decode_layout

WIDTH, WORDS, HIDDEN = 8, 13, 20
"""13 rows over 2 and 4 ranks are uneven shards."""

State = dict[str, Any]


class Block(nn.Module):
    """A feed-forward part with a scale of one element."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, batch: Tensor) -> Tensor:
        """One step of the residual stream."""
        found: Tensor = batch + self.down(torch.relu(self.up(batch))) * self.scale
        return found


class Net(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self, blocks: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleDict({str(at): Block() for at in blocks})
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Numbers for each token."""
        batch = self.embed(tokens)
        for block in self.blocks.values():
            batch = block(batch)
        found: Tensor = self.head(self.norm(batch.mean(1)))
        return found


def train(model: nn.Module, optimizer: Any, seed: int) -> None:
    """One step."""
    tokens = torch.randint(0, WORDS, (4, 5), generator=torch.Generator().manual_seed(seed))
    model(tokens).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def one_process(seed: int, steps: int = 0) -> State:
    """The training without any parallelism."""
    torch.manual_seed(seed)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=seed / 100)
    for step in range(steps):
        train(model, optimizer, step)
    return {"model": model, "optimizer": optimizer}


def numbers(state: State) -> dict[str, Tensor]:
    """Parameters and optimizer state of a training without parallelism, by name."""
    found = {}
    for name, param in state["model"].named_parameters():
        found[name] = param.detach()
        kept = state["optimizer"].state[param]
        found |= {f"{name}/{key}": item for key, item in kept.items()}
    return found


# -- layouts --------------------------------------------------------------------------------------


def _ddp(seed: int) -> State:
    torch.manual_seed(seed)
    model = DistributedDataParallel(Net())
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1.0)}


def _zero(seed: int) -> State:
    torch.manual_seed(seed)
    model = DistributedDataParallel(Net())
    kind: Any = ZeroRedundancyOptimizer
    return {"model": model, "optimizer": kind(model.parameters(), torch.optim.AdamW, lr=1.0)}


def _fsdp1(strategy: ShardingStrategy, *, orig: bool) -> Callable[[int], State]:
    def make(seed: int) -> State:
        torch.manual_seed(seed)
        group = None
        if strategy == ShardingStrategy.HYBRID_SHARD:
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
            group = mesh["inner"].get_group(), mesh["outer"].get_group()
        model = FullyShardedDataParallel(
            Net(),
            auto_wrap_policy=ModuleWrapPolicy({Block}),
            use_orig_params=orig,
            sharding_strategy=strategy,
            process_group=group,
            device_id=torch.device("cpu"),
        )
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1.0)}

    return make


def fsdp2(*shape: int) -> Callable[[int], State]:
    """Fully sharded over a mesh of this shape."""

    def make(seed: int) -> State:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[: len(shape)])
        torch.manual_seed(seed)
        model = Net()
        for block in model.blocks.values():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1.0)}

    return make


def _tensor_parallel(seed: int) -> State:
    world = dist.get_world_size()
    mesh: Any = init_device_mesh("cpu", (world,))
    data = None
    if world >= 4:
        both = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("outer", "inner"))
        mesh, data = both["inner"], both["outer"]
    torch.manual_seed(seed)
    model = Net()
    for block in model.blocks.values():
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if data is not None:
            fully_shard(block, mesh=data)
    if data is not None:
        fully_shard(model, mesh=data)
    # One kind of tensor in each foreach operation.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, foreach=False)
    return {"model": model, "optimizer": optimizer}


def _pipeline(seed: int) -> State:
    """A block for each rank; the second has no embedding, the first no head."""
    torch.manual_seed(seed)
    rank = dist.get_rank()
    model: Any = Net((rank,))
    for name in ("norm", "head") if rank == 0 else ("embed",):
        delattr(model, name)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=1.0)}


LAYOUTS: dict[str, Callable[[int], State]] = {
    "ddp": _ddp,
    "zero": _zero,
    "fsdp1_flat": _fsdp1(ShardingStrategy.FULL_SHARD, orig=False),
    "fsdp1_orig": _fsdp1(ShardingStrategy.FULL_SHARD, orig=True),
    "fsdp1_whole": _fsdp1(ShardingStrategy.NO_SHARD, orig=True),
    "fsdp1_hybrid": _fsdp1(ShardingStrategy.HYBRID_SHARD, orig=True),
    "fsdp2": fsdp2(2),
    "fsdp2_four": fsdp2(4),
    "hsdp": fsdp2(2, 2),
    "tp": _tensor_parallel,
    "tp_fsdp2": _tensor_parallel,
    "pipeline": _pipeline,
}

# -- looking at what is there -----------------------------------------------------------------


def _bare(name: str) -> str:
    for part in ("module.", "_fsdp_wrapped_module."):
        name = name.replace(part, "")
    return name


def live_numbers(state: State) -> dict[str, Tensor]:
    """As `numbers`, of any layout, by torch's own ways."""
    model, optimizer = state["model"], state["optimizer"]
    if isinstance(model, FullyShardedDataParallel):
        return _fsdp1_numbers(model, optimizer)
    found: dict[str, Tensor] = {}
    local = getattr(optimizer, "optim", optimizer)
    for name, param in model.named_parameters():
        found[_bare(name)] = _full(param)
        for key, item in local.state.get(param, {}).items():
            found[f"{_bare(name)}/{key}"] = _full(item)
    return found


def _full(item: Any) -> Tensor:
    found: Tensor = item.full_tensor() if isinstance(item, DTensor) else item
    return found.detach().clone()


def _fsdp1_numbers(model: Any, optimizer: Any) -> dict[str, Tensor]:
    """torch gathers parameters; so what the optimizer keeps is made parameters for a moment.

    (Its full_optim_state_dict gives exp_avg_sq for exp_avg on a CPU.)
    """
    found = _gathered(model, "")
    with torch.no_grad():
        before = {param: param.clone() for param in optimizer.state}
        for kept in ("exp_avg", "exp_avg_sq"):
            for param, items in optimizer.state.items():
                param.copy_(items[kept])
            found |= _gathered(model, f"/{kept}")
        for param, numbers_before in before.items():
            param.copy_(numbers_before)
    for name in [name for name in found if "/" not in name]:
        found[f"{name}/step"] = next(iter(optimizer.state.values()))["step"].clone()
    return found


def _gathered(model: Any, suffix: str) -> dict[str, Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {_bare(n) + suffix: p.detach().clone() for n, p in model.named_parameters()}


def _compare(found: dict[str, Tensor], truth: dict[str, Tensor], layout: str, state: State) -> None:
    if layout == "pipeline":
        assert set(found) < set(truth)
    elif layout == "zero":
        assert {name for name in truth if "/" not in name} <= set(found) < set(truth)
    else:
        assert set(found) == set(truth), (layout, sorted(set(found) ^ set(truth)))
    for name, item in found.items():
        assert item.dtype == truth[name].dtype, (layout, name)
        assert torch.equal(item, truth[name]), (layout, name)
    if state:
        (group,) = state["optimizer"].param_groups
        assert group["lr"] == 0.01, layout


# -- files ----------------------------------------------------------------------------------------


def write(place: Path, layout: str, rank: int, state: State) -> None:
    """Capture, and write down what this rank's slot would hold."""
    captured = Capture(state, rng=False, overlap=False)
    prepared = captured.prepare()
    data = bytearray(prepared.data_bytes)
    captured.copy(prepared, memoryview(data), lambda _: None).wait(60.0)
    captured.close()
    (place / f"{layout}.{rank}.layout").write_bytes(prepared.layout_bytes)
    (place / f"{layout}.{rank}.values").write_bytes(prepared.values)
    (place / f"{layout}.{rank}.bin").write_bytes(data)


def read(place: Path, layout: str) -> list[Saved]:
    """What all ranks of a layout wrote."""
    found = []
    for rank in range(len(list(place.glob(f"{layout}.*.layout")))):
        one = place / f"{layout}.{rank}"
        decoded = decode_layout(one.with_name(f"{one.name}.layout").read_bytes(), subject=layout)
        values = one.with_name(f"{one.name}.values").read_bytes()
        data = memoryview(one.with_name(f"{one.name}.bin").read_bytes())
        found.append(Saved(decoded, values, data, rank))
    return found


def _memory(state: State) -> list[int]:
    local = getattr(state["optimizer"], "optim", state["optimizer"])
    tensors = [*state["model"].parameters()]
    for items in local.state.values():
        tensors += [items["exp_avg"], items["exp_avg_sq"]]
    return [t.to_local().data_ptr() if isinstance(t, DTensor) else t.data_ptr() for t in tensors]


def take(saved: list[Saved], state: State) -> Placing:
    """Place what an earlier layout saved; of its data only the needed bytes are there."""
    plan = plan_placing(
        state,
        [one.table for one in saved],
        rank=dist.get_rank(),
        saved_world=len(saved),
        rng=False,
        alone=False,
    )
    lent = {}
    for one in saved:
        memory = bytearray(b"\xee" * len(one.data))
        for start, stop in plan.needs.get(one.rank, ()):
            memory[start:stop] = one.data[start:stop]
        lent[one.rank] = memoryview(memory)
    plan.verify(lent)
    plan.apply()
    return plan


def _follow(place: Path, before: str, layout: str, truth: dict[str, Tensor]) -> None:
    state = LAYOUTS[layout](7)
    take(read(place, before), state)
    _compare(live_numbers(state), truth, layout, state)
    if layout != "pipeline":  # whose stages can not be stepped alone
        train(state["model"], state["optimizer"], 9)
        found = live_numbers(state)
        assert not torch.equal(found["head.weight"], truth["head.weight"]), layout
        memory = _memory(state)
        take(read(place, before), state)
        assert _memory(state) == memory, f"{layout}: what exists is written in place"
        _compare(live_numbers(state), truth, layout, state)
    write(place, layout, dist.get_rank(), state)
    dist.barrier()


def chain(place: Path) -> list[str]:
    """Go through the layouts that stand in the file `chain.json`, two directories up."""
    home = place.parent.parent
    names: list[str] = json.loads((home / "chain.json").read_text())
    truth = torch.load(home / "truth.pt", weights_only=True)
    for before, layout in itertools.pairwise(names):
        _follow(home, before, layout, truth)
    return names[1:]


def saved_by_fsdp2(place: Path) -> bool:
    """Train under FSDP2, save through the daemon, and write the truth down."""
    state = LAYOUTS["fsdp2"](1)
    train(state["model"], state["optimizer"], dist.get_rank())
    with ckptmgr.Checkpointer(place.parent / "store", state) as ckpt:
        assert ckpt.restore() == 0
        handle = ckpt.save(7)
        assert handle is not None
        told = handle.committed(60)
    found = live_numbers(state)
    if dist.get_rank() == 0:
        torch.save(found, place.parent / "truth.pt")
    return bool(told)


def restored_by_tensor_parallel(place: Path) -> int:
    """Restore the same job under tensor parallelism."""
    state = LAYOUTS["tp"](2)
    with ckptmgr.Checkpointer(place.parent / "store", state) as ckpt:
        step = ckpt.restore()
    truth = torch.load(place.parent / "truth.pt", weights_only=True)
    _compare(live_numbers(state), truth, "tp", {})
    return step
