"""A small transformer under every parallelism, captured by each rank; run by `ranks.run_ranks`.

Each function trains two steps, captures, and leaves in its directory what the slot of this rank
would hold, and (rank 0) the full tensors that torch's own collectives give.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import (
    ZeroRedundancyOptimizer,
    _apply_optimizer_in_backward,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ckptmgr.errors import UnsupportedLeafError
from ckptmgr.rank.capture import Capture
from ckptmgr.rank.parts import local_part
from ckptmgr.rank.place import plan_placing
from ckptmgr.rank.sources import Table
from ckptmgr.types import PAGE_BYTES

WIDTH, WORDS, HIDDEN = 8, 13, 20
"""13 rows over 2 and 4 ranks are uneven shards."""


class Block(nn.Module):
    """Attention and a feed-forward part; with half the columns it is one head of two."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.value, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, batch: Tensor) -> Tensor:
        """One step of the residual stream."""
        seen = self.norm(batch)
        query, key, value = self.query(seen), self.key(seen), self.value(seen)
        weights = torch.softmax(query @ key.transpose(-1, -2), -1)
        batch = batch + self.out(weights @ value)
        return batch + self.down(torch.relu(self.up(batch))) * self.scale


class Net(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.BatchNorm1d(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Numbers for each token."""
        batch = self.embed(tokens)
        for block in self.blocks:
            batch = block(batch)
        found: Tensor = self.head(self.norm(batch.mean(1)))
        return found


def made_net() -> Net:
    torch.manual_seed(0)
    return Net()


def made_fsdp1(strategy: ShardingStrategy, *, orig: bool, group: Any = None) -> nn.Module:
    """Sharded, each block by itself."""
    return FullyShardedDataParallel(
        made_net(),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=orig,
        sharding_strategy=strategy,
        process_group=group,
        device_id=torch.device("cpu"),
    )


def train(model: nn.Module, optimizer: Any = None, *, seed: int = 0, steps: int = 2) -> None:
    """Two steps; each replica has its own batch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(0, WORDS, (4, 5), generator=generator)
        model(tokens).square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


# -- what is written down ---------------------------------------------------------------------


class Collectives(TorchDispatchMode):
    """Notes every operation that talks to another rank."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the name and let it go on."""
        if "c10d" in func.namespace:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _counts() -> list[int]:
    """How many operations each process group has started."""
    groups: Any = dist.distributed_c10d._world.pg_map
    return [group._get_sequence_number_for_group() for group in groups]


@contextmanager
def no_collective() -> Iterator[None]:
    before = _counts()
    with Collectives() as seen:
        yield
    assert seen.seen == []
    assert _counts() == before


def _check_that_a_collective_is_noticed() -> None:
    before = _counts()
    with Collectives() as seen:
        dist.all_reduce(torch.ones(1))
    assert seen.seen
    assert _counts() != before


def capture(
    case: str,
    place: Path,
    state: dict[str, Any],
    full: Callable[[], dict[str, Tensor]],
    **more: Any,
) -> None:
    """Capture twice (the second time along the fast path) and write everything down."""
    _check_that_a_collective_is_noticed()
    early = more.pop("early", None)
    captured = Capture(state, rng=False, overlap=True, **more)
    behind: list[str] = []
    with no_collective():
        first = captured.prepare()
        predicted = captured.predict()
        prepared = captured.prepare()
        assert prepared.layout is first.layout, "the frame must be found again"
        data = bytearray(prepared.data_bytes)
        heard: list[BaseException | None] = []
        later = captured._sources_for_later(prepared)
        behind += [prepared.layout.leaves[at].path for at in later]
        copy = captured.copy(prepared, memoryview(data), heard.append)
        assert copy.wait(60.0)
        captured.close()
    assert heard == [None], heard
    if case != "patterns":
        # Also shares, boxes and flat runs are known for what an optimizer changes.
        leaves = [leaf.path for leaf in prepared.layout.leaves if leaf.nbytes]
        assert len(behind) > 0.8 * len(leaves), (set(leaves) - set(behind), len(leaves))
    # FSDP1 keeps no state of what is not in its shard; the forecast allows for some.
    for forecast in (predicted, early or predicted):
        assert prepared.data_bytes <= forecast[1] <= prepared.data_bytes + 2 * PAGE_BYTES
        assert prepared.table_bytes <= forecast[0]
    rank = dist.get_rank()
    (place / f"{case}.{rank}.layout").write_bytes(prepared.layout_bytes)
    (place / f"{case}.{rank}.values").write_bytes(prepared.values)
    (place / f"{case}.{rank}.bin").write_bytes(data)
    whole = {path: item.detach().numpy() for path, item in full().items()}
    np.savez(place / f"{case}.{rank}.npz", **{p.replace("/", "|"): a for p, a in whole.items()})


def _forecast(state: dict[str, Any]) -> tuple[int, int]:
    """What a snapshot will need, asked before the first step."""
    with no_collective():
        return Capture(state, rng=False).predict()


def _full(name: str, item: Any) -> dict[str, Tensor]:
    """What a state_dict of whole tensors or DTensors holds, by path; numbers apart from steps."""
    found = {}
    for key, tensor in item.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            whole: Any = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            found[f"{name}/{key}"] = whole
    return found


def _full_state(optimizer: Any, model: nn.Module, clean: Callable[[str], str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        found |= _without_steps(f"optimizer/state/{clean(name)}", optimizer.state[param])
    return found


def _without_steps(path: str, kept: Any) -> dict[str, Tensor]:
    return _full(path, {name: item for name, item in kept.items() if name != "step"})


def _params(model: nn.Module, clean: Callable[[str], str]) -> dict[str, Tensor]:
    return _full("model", {clean(name): param for name, param in model.named_parameters()})


def _bare(name: str) -> str:
    for part in ("module.", "_fsdp_wrapped_module.", "_orig_mod."):
        name = name.replace(part, "")
    return name


# -- the worlds -------------------------------------------------------------------------------


def _ddp(place: Path) -> None:
    model = DistributedDataParallel(made_net())
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, seed=dist.get_rank())
    state = {"model": model, "optimizer": optimizer, "rank": torch.tensor([dist.get_rank()])}
    capture(
        "ddp", place, state, lambda: _params(model, _bare) | _full_state(optimizer, model, _bare)
    )


def _ddp_in_containers(place: Path) -> None:
    """Compiled, nested in a dict, with one optimizer for each parameter, stepped in backward."""
    net = made_net()
    options = {"lr": 0.01}
    _apply_optimizer_in_backward(torch.optim.Adam, net.parameters(), options)
    train(net)
    model = DistributedDataParallel(net)  # on a GPU it would step them by itself
    optimizers = {name: param._in_backward_optimizers[0] for name, param in net.named_parameters()}
    state = {"nets": {"model": torch.compile(model)}, "optimizers": optimizers}

    def full() -> dict[str, Tensor]:
        found = _full("nets/model", dict(net.named_parameters()))
        for name, optimizer in optimizers.items():
            (kept,) = optimizer.state.values()
            found |= _without_steps(f"optimizers/{name}/state/{name}", kept)
        return found

    capture("in_backward", place, state, full)


def _fsdp1(
    case: str, place: Path, strategy: ShardingStrategy, *, orig: bool, group: Any = None
) -> None:
    model = made_fsdp1(strategy, orig=orig, group=group)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    early = _forecast(state)
    train(model, optimizer, seed=dist.get_rank())

    def full() -> dict[str, Tensor]:
        """torch gathers parameters; so what the optimizer keeps is made parameters, too.

        (Its full_optim_state_dict gives exp_avg_sq for exp_avg on a CPU.)
        """
        found = _gathered("model", "", model)
        for kept in ("exp_avg", "exp_avg_sq"):
            with torch.no_grad():
                for param, items in optimizer.state.items():
                    param.copy_(items[kept])
            found |= _gathered("optimizer/state", f"/{kept}", model)
        return found

    capture(case, place, state, full, early=early)


def _gathered(path: str, end: str, model: nn.Module) -> dict[str, Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        whole = {f"{_bare(n)}{end}": param.clone() for n, param in model.named_parameters()}
    return _full(path, whole)


def _sharded(case: str, place: Path, mesh: Any, *, evaluated: bool = False) -> None:
    """Fully sharded; or as it is after an evaluation, with the parameters of the root gathered."""
    model = made_net()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"model": model, "optimizer": optimizer}
    early = _forecast(state)
    train(model, optimizer, seed=dist.get_rank())
    if evaluated:
        _place_after_evaluation(state)
        _evaluate(model)

    def full() -> dict[str, Tensor]:
        return _params(model, _bare) | _full_state(optimizer, model, _bare)

    capture(case, place, state, full, early=early)


def _evaluate(model: Any) -> None:
    with torch.no_grad():
        model(torch.zeros(4, 5, dtype=torch.int64))
    assert not isinstance(model.head.weight, DTensor), "FSDP2 was to leave the root gathered"


def _place_after_evaluation(state: dict[str, Any]) -> None:
    rank = dist.get_rank()
    prepared = Capture(state, rng=False).prepare()
    _evaluate(state["model"])
    with no_collective():
        own = Table(rank, prepared.layout, prepared.values)
        plan_placing(state, [own], rank=rank, saved_world=dist.get_world_size(), alone=False)


PLAN: dict[str, Any] = {
    "norm": SequenceParallel(use_local_output=True),
    "query": ColwiseParallel(),
    "key": ColwiseParallel(),
    "value": ColwiseParallel(),
    "out": RowwiseParallel(),
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
}


def _tensor_parallel(case: str, place: Path, mesh: Any, data: Any = None) -> None:
    model = made_net()
    for block in model.blocks:
        plan = {name: style for name, style in PLAN.items() if name != "norm"}
        parallelize_module(block, mesh, plan)
        if data is not None:
            fully_shard(block, mesh=data)
    if data is not None:
        fully_shard(model, mesh=data)
    # One kind of tensor in each foreach operation.
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    train(model, optimizer, seed=0 if data is None else data.get_local_rank())
    state = {"model": model, "optimizer": optimizer}

    def full() -> dict[str, Tensor]:
        return _params(model, _bare) | _full_state(optimizer, model, _bare)

    capture(case, place, state, full)


def _pipeline(place: Path) -> None:
    """Each rank has a stage of its own, under its own name."""
    torch.manual_seed(dist.get_rank())
    stage = Block()
    optimizer = torch.optim.AdamW(stage.parameters())
    for _ in range(2):
        stage(torch.ones(2, 3, WIDTH)).sum().backward()
        optimizer.step()
    state = {f"stage{dist.get_rank()}": stage, "optimizer": optimizer}
    capture("pipeline", place, state, lambda: _full(f"stage{dist.get_rank()}", stage.state_dict()))


def _zero(place: Path) -> None:
    model = DistributedDataParallel(made_net())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
    state = {"model": model, "optimizer": optimizer}
    early = _forecast(state)
    train(model, optimizer, seed=dist.get_rank())

    def full() -> dict[str, Tensor]:
        optimizer.consolidate_state_dict(to=0)
        found = _params(model, _bare)
        if dist.get_rank() == 0:
            names = [_bare(name) for name, _ in model.named_parameters()]
            for at, items in optimizer.state_dict()["state"].items():
                found |= _without_steps(f"optimizer/state/{names[at]}", items)
        return found

    capture("zero", place, state, full, early=early)


def _patterns(place: Path) -> None:
    """Tensors of the user that are the same everywhere, and some that are not."""
    table = torch.arange(35.0).view(7, 5)
    own = torch.full((3,), float(dist.get_rank()))
    tables = {"a": table, "b": table.clone() + 1, "scalar": torch.tensor(2.0)}
    state = {"tables": tables, "own": own}
    full = {f"tables/{name}": item for name, item in tables.items()}
    capture("patterns", place, state, lambda: full, replicated=["tables/*"])


def _refused(place: Path) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    partial = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    with pytest.raises(UnsupportedLeafError, match=r"sums/a: .* partial placement P"):
        Capture({"sums": {"a": partial}}).prepare()


def _boxes_are_those_of_torch() -> None:
    """Every element is where the boxes say, also with uneven strided shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    strided: Any = [_StridedShard(0, split_factor=2), Shard(0)]
    spread = [strided, [Shard(0), Shard(0)], [Replicate(), strided[0]], [Shard(0), Replicate()]]
    pieces = 0
    for shape in [(8, 6), (5, 3), (3, 1), (1, 7), (0, 4), (13,)]:
        whole = torch.arange(math.prod(shape)).view(shape)
        for placements in spread:
            tensor = distribute_tensor(whole, mesh, placements, src_data_rank=None)
            part = local_part(tensor)
            local: Any = tensor._local_tensor
            assert sum(piece.box.count for piece in part.pieces) == local.numel()
            for piece in part.pieces:
                inside = zip(piece.box.offset, piece.box.shape, strict=True)
                expected = whole[tuple(slice(start, start + n) for start, n in inside)]
                assert torch.equal(piece.of(local), expected)
            pieces = max(pieces, len(part.pieces))
            wanted, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
            if local.numel():
                first = part.pieces[0].box
                assert first.offset == offset
                assert wanted == tuple(local.shape)
    assert pieces > 1, "the rows of a strided shard alone are no box"


def two(place: Path) -> str:
    """Everything that two ranks can show."""
    torch.use_deterministic_algorithms(mode=True)
    _ddp(place)
    _ddp_in_containers(place)
    _fsdp1("fsdp1_orig", place, ShardingStrategy.FULL_SHARD, orig=True)
    _fsdp1("fsdp1_flat", place, ShardingStrategy.FULL_SHARD, orig=False)
    _fsdp1("fsdp1_whole", place, ShardingStrategy.NO_SHARD, orig=True)
    _sharded("fsdp2", place, init_device_mesh("cpu", (2,)))
    _sharded("fsdp2_evaluated", place, init_device_mesh("cpu", (2,)), evaluated=True)
    _tensor_parallel("tp", place, init_device_mesh("cpu", (2,)))
    _pipeline(place)
    _zero(place)
    _patterns(place)
    _refused(place)
    return "done"


def four(place: Path) -> str:
    """Everything that needs four ranks."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    _sharded("fsdp2_four", place, init_device_mesh("cpu", (4,)))
    _sharded("hsdp", place, mesh)
    _tensor_parallel("tp_fsdp2", place, mesh["inner"], mesh["outer"])
    groups = mesh["inner"].get_group(), mesh["outer"].get_group()
    _fsdp1("fsdp1_hybrid", place, ShardingStrategy.HYBRID_SHARD, orig=True, group=groups)
    _boxes_are_those_of_torch()
    return "done"


def names(place: Path) -> Any:
    """Only for the harness itself."""
    return json.loads(msgspec.json.encode([dist.get_rank(), dist.get_world_size(), place.name]))
