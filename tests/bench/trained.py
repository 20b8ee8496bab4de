"""State of a model that was really trained: how well floats shrink depends on that."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

CONTEXT, WIDTH, STEPS, BATCH = 32, 512, 150, 64


def trained_state(dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Weights and AdamW state of a byte-level model of Python's own sources, as raw integers.

    About 48 MiB in float32, and half of that in bfloat16, all of it in that type.
    """
    model, optimizer = _train()
    tensors: dict[str, Tensor] = dict(model.state_dict())
    names = [name for name, _ in model.named_parameters()]
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"{key}/{names[number]}": state[key] for key in ("exp_avg", "exp_avg_sq")}
    return {name: _raw(tensor.to(dtype)) for name, tensor in sorted(tensors.items())}


def _raw(tensor: Tensor) -> np.ndarray:
    """Bytes as an array of half or single floats: only the size of an element is looked at."""
    kind = np.float16 if tensor.element_size() == 2 else np.float32
    integer = torch.int16 if tensor.element_size() == 2 else torch.int32
    return tensor.contiguous().view(integer).numpy().view(kind)


def _train() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on a busy machine two wait for each other
    text = b"".join(
        path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    )
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    model = nn.Sequential(
        nn.Embedding(256, 128),
        nn.Flatten(),
        nn.Linear(CONTEXT * 128, 640),
        nn.GELU(),
        nn.Linear(640, WIDTH),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 1024),
        nn.GELU(),
        nn.Linear(1024, 256),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        at = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1))
        window = data[at + torch.arange(CONTEXT + 1)]
        loss = functional.cross_entropy(model(window[:, :-1]), window[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, optimizer
