"""Who holds what: the names of leaves under every parallelism, and which ranks have the same bytes.

All of it is read off the live objects; no rank asks another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ckptmgr.rank.names import unwrapped
from ckptmgr.rank.objects import Objects
from ckptmgr.rank.optimizers import is_partitioned, parameters_of
from ckptmgr.rank.parts import PLAIN_TYPES, FlatRun, mesh_replicas
from ckptmgr.rank.replicas import averaged_by, hooks_of, is_replicated, keeps_alike
from ckptmgr.staging.paths import Trail, render
from ckptmgr.staging.tree import StructureChangedError

Ranks = tuple[int, ...]
"""Global ranks that hold the same bytes, in an order on which all of them agree."""


def ranks_of_job(group: dist.ProcessGroup | None) -> Ranks:
    """The global ranks that save together: those of a group, of all, or none without any."""
    if not dist.is_available() or not dist.is_initialized():
        return ()
    return tuple(dist.get_process_group_ranks(group))


@dataclass(slots=True)
class Parallel:
    """What the objects of a state tell of its leaves.

    `rank` is this rank in a job of the ranks `job`, all of them global. `_held` has the ranks that
    hold what lies at a place, and the shape that a tensor there must have to be among it.
    """

    rank: int
    job: Ranks
    globs: tuple[str, ...]
    _module_trails: set[Trail] = field(default_factory=set)
    _held: dict[Trail, tuple[tuple[int, ...] | None, Ranks]] = field(default_factory=dict)
    _hooks: list[tuple[DistributedDataParallel, tuple[Any, ...]]] = field(default_factory=list)
    _parties: dict[str, set[Ranks]] = field(default_factory=dict)

    def parties(self) -> dict[str, int]:
        """Modules that only some ranks of the job keep alike, by path: how many such groups of
        ranks this rank is the first of. Another group may have another module of that path.
        """
        return {
            path: sum(min(ranks) == self.rank for ranks in groups)
            for path, groups in self._parties.items()
        }

    def check(self) -> None:
        """Look whether gradients are still communicated as they were.

        Raises:
            StructureChangedError: a module has got a communication hook.
        """
        if any(hooks_of(module) != hooks for module, hooks in self._hooks):
            raise StructureChangedError

    def _is_of_one(
        self, path: str, module: DistributedDataParallel, of_one: Container[str] | None
    ) -> bool:
        """Whether no other ranks have another module of this path."""
        members = set(dist.get_process_group_ranks(module.process_group))
        ranks = tuple(rank for rank in self.job if rank in members)
        if len(ranks) == len(self.job):
            return True
        self._parties.setdefault(path, set()).add(ranks)
        return of_one is None or path in of_one

    def paths(self, trails: Sequence[Trail]) -> list[str]:
        """The path of each leaf; names in modules without wrappers, where that is unambiguous."""
        bare = [render(self._bare(trail)) for trail in trails]
        count = Counter(bare)
        pairs = zip(bare, trails, strict=True)
        return [path if count[path] == 1 else render(trail) for path, trail in pairs]

    def _bare(self, trail: Trail) -> Trail:
        if trail is None:
            return None
        parent, key = trail
        if parent in self._module_trails and type(key) is str:
            return parent, unwrapped(key) or key
        return self._bare(parent), key

    def holders(self, leaf: Any, trail: Trail, path: str) -> Ranks | None:
        """The ranks that hold the same boxes of a leaf; None if it belongs to this rank alone."""
        if len(self.job) <= 1:
            return None
        ranks = self._holders(leaf, trail, path)
        return None if ranks is None else tuple(rank for rank in ranks if rank in self.job)

    def _holders(self, leaf: Any, trail: Trail, path: str) -> Ranks | None:
        if type(leaf) is FlatRun:
            return leaf.ranks
        if type(leaf) not in PLAIN_TYPES:
            return mesh_replicas(leaf)
        shape, ranks = self._held.get(trail) or self._held_below(trail)
        if ranks and shape in (None, tuple(leaf.shape)):
            return ranks
        if any(fnmatchcase(path, glob) for glob in self.globs):
            return self.job
        return None

    def _held_below(self, trail: Trail) -> tuple[tuple[int, ...] | None, Ranks]:
        """As it was told of the state of a parameter, of which this is an entry."""
        return self._held.get(trail[0], _NOBODY) if trail is not None else _NOBODY


_NOBODY: tuple[None, Ranks] = (None, ())


def look_around(
    objects: Objects, globs: Sequence[str], job: Ranks, of_one: Container[str] | None = None
) -> Parallel:
    """What the objects of a state, process groups and the user's patterns tell of its leaves.

    Args:
        objects: those of the state.
        globs: patterns of paths of tensors that every rank has alike.
        job: the ranks that save together.
        of_one: paths of modules that are known to be of one group of ranks, of those that only some
            ranks of the job keep alike; by default all of them.
    """
    rank = dist.get_rank() if len(job) > 1 else 0
    found = Parallel(rank, job, tuple(globs))
    found._module_trails.update(trail for trail, _ in objects.modules)
    if len(job) <= 1:
        return found
    replicas: dict[int, Ranks] = {}
    averaged = set[int]().union(*(averaged_by(optimizer) for _, optimizer in objects.optimizers))
    for trail, module in objects.modules:
        for prefix, part in _replicating(module):
            found._hooks.append((part, hooks_of(part)))
            if is_replicated(part, averaged) and found._is_of_one(render(trail), part, of_one):
                for name, param, ranks in _replicated_parameters(prefix, part):
                    found._held[trail, name] = None, ranks
                    replicas[id(param)] = ranks
    for trail, optimizer in objects.optimizers:
        alone = (rank,) if is_partitioned(optimizer) else None
        if not (alone or keeps_alike(optimizer)):
            continue
        pairs = zip(objects.names(optimizer), parameters_of(optimizer), strict=True)
        for called, param in pairs:
            if id(param) in replicas:
                ranks = alone or replicas[id(param)]
                for name, _ in called:
                    found._held[(trail, "state"), name] = tuple(param.shape), ranks
    return found


def _replicating(module: nn.Module) -> list[tuple[str, DistributedDataParallel]]:
    """Each DistributedDataParallel in a module, with its name there."""
    named = module.named_modules(remove_duplicate=False)
    return [(name, part) for name, part in named if isinstance(part, DistributedDataParallel)]


def _replicated_parameters(
    prefix: str, part: DistributedDataParallel
) -> list[tuple[str, Tensor, Ranks]]:
    """Name in the module that has `part` as `prefix`, tensor and ranks of each parameter in it."""
    ranks = tuple(dist.get_process_group_ranks(part.process_group))
    return [
        (".".join(filter(None, (prefix, "module", name))), param, ranks)
        for name, param in part.module.named_parameters(remove_duplicate=False)
        if name not in part.parameters_to_ignore
    ]
