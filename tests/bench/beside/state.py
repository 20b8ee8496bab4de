"""The state that all libraries save: floats with the spread of weights, all new each step."""

from __future__ import annotations

import torch

from bench.beside.peer import State

MIB = 1 << 20
TILE = 1 << 22
"""Random values that are repeated from another place for each tensor: no codec that works on
chunks of some MiB sees the same twice, and filling goes at the speed of memory."""

SIGNS = {
    4: (torch.int32, -(1 << 31)),
    2: (torch.int16, -(1 << 15)),
    1: (torch.int8, -(1 << 7)),
}


def empty_state(mib: int, tensors: int, dtype: str, rank: int) -> State:
    """Tensors of equal size, zero, their memory present; names are another rank's nowhere."""
    kind = getattr(torch, dtype)
    count = max(2, mib * MIB // kind.itemsize // tensors)
    return {
        f"rank{rank}_layers{at:06d}_weight": torch.full((count,), 0.0, dtype=torch.float32).to(kind)
        for at in range(tensors)
    }


def fill(state: State) -> None:
    """Values of step 0."""
    tile = _tile(next(iter(state.values())).dtype)
    for at, tensor in enumerate(state.values()):
        _fill(tensor, tile, at)


def change(state: State, step: int) -> None:
    """From the values of the step before to those of `step`: every float changes, as in training,
    and none gets easier to compress.
    """
    for tensor in state.values():
        _change(tensor, step)


def spoil(state: State) -> None:
    """Change what was saved, as the optimizer does next: a copy that is late is found out."""
    for tensor in (next(iter(state.values())), next(reversed(state.values()))):
        tensor[0] = tensor[-1] = -1.0


def differing(state: State, step: int) -> int:
    """How many tensors are not, bit by bit, what they were at `step`."""
    first = next(iter(state.values()))
    tile, expected = _tile(first.dtype), torch.empty_like(first)
    integer = SIGNS[first.element_size()][0]
    wrong = 0
    for at, tensor in enumerate(state.values()):
        _fill(expected, tile, at)
        if step % 2 == 0:
            _change(expected, 1)  # an even number of changes
        _change(expected, step)
        wrong += not torch.equal(expected.view(integer), tensor.view(integer))
    return wrong


def _tile(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(TILE, generator=generator).mul_(0.02).to(dtype)


def _fill(tensor: torch.Tensor, tile: torch.Tensor, number: int) -> None:
    at, done = number * 7919 % len(tile), 0
    while done < len(tensor):
        count = min(len(tile) - at, len(tensor) - done)
        tensor[done : done + count].copy_(tile[at : at + count])
        at, done = 0, done + count


def _change(tensor: torch.Tensor, step: int) -> None:
    integer, sign = SIGNS[tensor.element_size()]
    tensor.view(integer).bitwise_xor_(sign)
    tensor[0] = tensor[-1] = float(step)
