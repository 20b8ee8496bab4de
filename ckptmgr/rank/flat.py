"""The parameters of FSDP1 modules, found in the flat shard that this rank has of them.

FSDP1's own state_dict gathers every parameter from all ranks. Here nobody is asked: a rank's part
of a parameter is a run of its elements, and torch keeps note of where it starts.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ckptmgr.errors import UnsupportedLeafError
from ckptmgr.rank.names import unwrapped
from ckptmgr.rank.parts import FlatRun


@dataclass(frozen=True, slots=True, eq=False)
class Original:
    """A parameter that was made part of a flat one.

    `run` has its elements in the shard; `stepped` is what an optimizer knows instead of it, and
    `state_run` its elements in what the optimizer keeps of that, `state_count` elements long.
    """

    name: str
    run: FlatRun
    stepped: Tensor
    state_run: FlatRun
    state_count: int


def _flat_modules(module: nn.Module) -> Iterator[tuple[str, Any]]:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, kind):
            yield name, part


def is_flat(module: nn.Module) -> bool:
    """Whether there is an FSDP1 module in it."""
    return any(True for _ in _flat_modules(module))


def free_gathered(module: nn.Module) -> None:
    """Free the whole parameters that FSDP1 has kept, as those of its root after a forward under
    no_grad: the next forward would take them, and not what was put into the shards meanwhile.
    """
    for _, part in _flat_modules(module):
        handle = part._handle
        if handle is None or not hasattr(handle.flat_param, "_full_param_padded"):
            continue  # it has not been forward yet
        if handle.uses_sharded_strategy and not handle.needs_unshard():
            handle._free_unsharded_flat_param()


def originals(module: nn.Module) -> Iterator[Original]:
    """The parameters below the FSDP1 modules in `module`, under their names without wrappers.

    Raises:
        UnsupportedLeafError: one that was not contiguous when it was flattened.
    """
    for prefix, part in _flat_modules(module):
        flat = part._flat_param
        if flat is not None:
            ranks = _holders(part)
            for at, name in enumerate(flat._fqns):
                full = _joined(prefix, name)
                if not flat._contiguities[at]:
                    raise UnsupportedLeafError("was flattened in another order", subject=full)
                yield _original(full, flat, at, ranks)


def _holders(part: Any) -> tuple[int, ...]:
    """The ranks that hold the same shard of an FSDP1 module."""
    strategy = part.sharding_strategy.name
    if strategy == "NO_SHARD":
        return tuple(dist.get_process_group_ranks(part.process_group))
    if "HYBRID" in strategy:
        return tuple(dist.get_process_group_ranks(part._inter_node_pg))
    return (dist.get_rank(),)


def _original(name: str, flat: Any, at: int, ranks: tuple[int, ...]) -> Original:
    held = flat._shard_param_infos[at]
    shape = tuple(flat._shapes[at])
    count, start = (held.numel_in_shard, held.intra_param_start_idx) if held.in_shard else (0, 0)
    first = held.offset_in_shard if held.in_shard else 0
    shard = getattr(flat, "_local_shard", flat)  # it is not set before the first forward
    # Version counters count what is done to the very tensors that an optimizer has.
    if flat.data_ptr() == shard.data_ptr():
        shard = flat.detach()
    run = FlatRun(shard.view(-1), first, count, shape, start, ranks)
    if flat._params is None:
        return Original(name, run, flat, run, shard.numel())
    param = flat._params[at]
    own = FlatRun(param.detach().reshape(-1), 0, count, shape, start, ranks)
    here = shard.data_ptr() + first * shard.element_size()
    is_sharded = param.numel() == count and (not count or param.data_ptr() == here)
    return Original(name, own if is_sharded else run, param, own, count)


def flat_state(module: nn.Module) -> OrderedDict[str, Any]:
    """What `module.state_dict()` would give, with a FlatRun for each flattened parameter.

    Raises:
        UnsupportedLeafError: two tensors have one name, or as for `originals`.
    """
    found: OrderedDict[str, Any] = OrderedDict()
    versions: OrderedDict[str, Any] = OrderedDict()
    found._metadata = versions  # type: ignore[attr-defined]
    shards = {id(entry.stepped) for entry in originals(module)}
    for prefix, part in module.named_modules(remove_duplicate=False):
        name = unwrapped(prefix)
        versions[name] = {"version": part._version}
        here: dict[str, Any] = {}
        part._save_to_state_dict(here, "", keep_vars=True)
        for key, item in here.items():
            if id(item) not in shards:
                full = _joined(name, key)
                _refuse_twice(found, full)
                found[full] = item.detach() if isinstance(item, Tensor) else item
    for entry in originals(module):
        _refuse_twice(found, entry.name)
        found[entry.name] = entry.run
    for alias, name in _aliases(module):
        found[alias] = found[name]
    return found


def _refuse_twice(found: OrderedDict[str, Any], name: str) -> None:
    if name in found:
        raise UnsupportedLeafError("is the name of two tensors without wrappers", subject=name)


def _aliases(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Further names of flattened parameters, and the first name of each."""
    for prefix, part in _flat_modules(module):
        flat = part._flat_param
        for tied in flat._shared_param_infos if flat is not None else ():
            names = (
                (tied.module_name, tied.param_name),
                (tied.prim_module_name, tied.prim_param_name),
            )
            alias, name = (_joined(prefix, *pair) for pair in names)
            yield alias, name


def _joined(*parts: str) -> str:
    return unwrapped(".".join(filter(None, parts)))
