"""One rank on the GPU: `ranks_on_gpu.py LAYOUT PHASE URL`; prints a digest of the whole model."""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import ckptmgr
from rank.shape import bytes_of

STEPS = 3


def made(layout: str) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).cuda()
    if layout == "gloo-ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in (model[0], model[2]):
        fully_shard(layer)
    return fully_shard(model)


def digest(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    found = hashlib.sha256()
    states = [one for state in optimizer.state_dict()["state"].values() for one in state.values()]
    for tensor in [*model.state_dict().values(), *states]:
        whole: Any = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found.update(bytes_of(whole))
    return found.hexdigest()


def main() -> None:
    layout, phase, url = sys.argv[1:]
    torch.cuda.set_device(0)
    dist.init_process_group(
        layout.split("-", maxsplit=1)[0],
        init_method=os.environ["MEETING"],
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    model = made(layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with ckptmgr.Checkpointer(url, {"model": model, "optimizer": optimizer}) as ckpt:
        if phase == "save":
            for step in range(1, STEPS + 1):
                optimizer.zero_grad()
                model(torch.full((8, 64), float(step), device="cuda")).square().sum().backward()
                optimizer.step()
                handle = ckpt.save(step)
            assert handle.committed(60.0)
        else:
            assert ckpt.restore() == STEPS
    sys.stdout.write(digest(model, optimizer) + "\n")
    sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
