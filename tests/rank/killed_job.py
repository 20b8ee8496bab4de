"""One rank of a training that is killed again and again: by torchrun, or forked.

`python killed_job.py LAYOUT URL STEPS SAID`: trains to STEPS, with its checkpoints at URL (none if
it is empty), and appends a line of JSON to SAID/RANK.said for everything that it does. A line is in
the file before a kill can land behind it. Each step's line has the batch, the bits of the loss, and
a digest of every tensor and number that this rank trains with.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import sys
import types
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import ckptmgr
from ckptmgr.errors import CkptmgrError
from rank import relayout

BATCH, ITEMS, TOKENS = 4, 61, 5
BALLAST_BYTES = 2 << 20
"""Enough of it that kills land inside a copy and inside a write."""

EVERY, KEEP = 4, 3


class Sampler:
    """A stateful sampler: its own generator, a permutation of the items, a place in it."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[int] = []
        self.epoch = 0

    def __next__(self) -> list[int]:
        if len(self.order) < BATCH:
            self.order += torch.randperm(ITEMS, generator=self.generator).tolist()
            self.epoch += 1
        batch, self.order = self.order[:BATCH], self.order[BATCH:]
        return batch

    def state_dict(self) -> dict[str, Any]:
        state = self.generator.get_state()
        return {"order": list(self.order), "epoch": self.epoch, "generator": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.epoch = list(state["order"]), state["epoch"]
        self.generator.set_state(state["generator"])


def tokens_of(ids: list[int]) -> Tensor:
    """What the items are."""
    return (torch.tensor(ids)[:, None] * 7 + torch.arange(TOKENS) * 5) % relayout.WORDS


def summed_in_order(bucket: Any) -> Any:
    """Mean of gradients that does not depend on how torch fills its buckets, which it does in
    another way in the first step of a process: the order of a ring would change the last bit.
    """
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    found = torch.futures.Future[Tensor]()
    found.set_result(functools.reduce(torch.add, parts) / len(parts))
    return found


def dropped(module: nn.Module, _: Any, batch: Tensor) -> Tensor:
    """Dropout behind a block: the default generator matters in every step."""
    return nn.functional.dropout(batch, 0.1, module.training)


def staged(self: Any, batch: Tensor) -> Tensor:
    """The forward of a pipeline stage: whatever of the net this rank has."""
    if hasattr(self, "embed"):
        batch = self.embed(batch)
    for block in self.blocks.values():
        batch = block(batch)
    if hasattr(self, "head"):
        batch = self.head(self.norm(batch.mean(1)))
    return batch


def made(layout: str, world: int) -> relayout.State:
    """Model and optimizer of a layout."""
    make = relayout.fsdp2(world) if layout == "fsdp2" else relayout.LAYOUTS[layout]
    return make(3)


class Training:
    """A training whose every random and mutable thing must come back exactly."""

    def __init__(self, layout: str, rank: int, world: int) -> None:
        self.state = made(layout, world)
        self.model, self.optimizer = self.state["model"], self.state["optimizer"]
        bare = getattr(self.model, "module", self.model)
        for block in bare.blocks.values():
            block.register_forward_hook(dropped)
        self.replicated: list[str] = []
        if layout == "ddp":
            self.model.register_comm_hook(None, lambda _, bucket: summed_in_order(bucket))
            # Nobody but us knows that this hook gives all ranks the same gradients.
            names = [name for name, _ in bare.named_parameters()]
            self.replicated = [f"model/{name}" for name in names]
            self.replicated += [f"optimizer/state/{name}/exp_avg*" for name in names]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01
        # Ranks that hold parts of one replica see one batch and drop the same numbers.
        replica = {"tp_fsdp2": rank // 2, "pipeline": 0}.get(layout, rank)
        self.sampler = Sampler(40 + replica)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 50)
        self.ballast = torch.zeros(BALLAST_BYTES // 4)
        self.state |= {
            "sampler": self.sampler,
            "scheduler": self.scheduler,
            "ballast": self.ballast,
        }
        self.forward = self.alone
        if layout == "pipeline":
            self.forward = self.pipelined(rank, world)
            self.learn_shapes()
        torch.manual_seed(100 + replica)
        random.seed(200 + replica)
        np.random.seed(300 + replica)  # noqa: NPY002 - the generator that `rng` keeps

    def alone(self, tokens: Tensor, goal: float) -> str:
        loss = self.model(tokens).sub(goal).square().mean()
        loss.backward()
        return float(loss).hex()

    def pipelined(self, rank: int, world: int) -> Callable[[Tensor, float], str]:
        self.model.forward = types.MethodType(staged, self.model)
        stage = PipelineStage(self.model, rank, world, torch.device("cpu"))
        schedule = ScheduleGPipe(stage, 2, loss_fn=nn.functional.mse_loss)

        def forward(tokens: Tensor, goal: float) -> str:
            losses: list[Tensor] = []
            if rank == 0:
                schedule.step(tokens)
            else:
                schedule.step(target=torch.full((BATCH, 3), goal), losses=losses)
            return " ".join(float(loss).hex() for loss in losses)

        return forward

    def learn_shapes(self) -> None:
        """Before its first step torch sends an uninitialised tensor through a stage, to learn what
        comes out, and BatchNorm averages it in. So it is done before `restore` (see
        docs/guarantees.md), and undone.
        """
        before = [buffer.clone() for buffer in self.model.buffers()]
        self.forward(tokens_of(list(range(BATCH))), 0.0)
        self.optimizer.zero_grad()
        for buffer, old in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(old)

    def train(self, step: int) -> dict[str, Any]:
        """One step; what is to be said of it."""
        ids = next(self.sampler)
        goal = random.random() + float(np.random.rand())  # noqa: NPY002
        loss = self.forward(tokens_of(ids), goal)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        torch.rand(self.ballast.shape, out=self.ballast)
        return {"step": step, "ids": ids, "loss": loss, "digest": self.digest()}

    def digest(self) -> str:
        """One hash over every tensor and number that this rank trains with."""
        found = hashlib.sha256()
        tensors = [self.ballast, *self.model.buffers(), torch.get_rng_state()]
        tensors.append(self.sampler.generator.get_state())
        for param in self.model.parameters():
            tensors += [param, *self.optimizer.state[param].values()]
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            found.update(local.detach().contiguous().numpy())
        generators = [random.getstate(), np.random.get_state()]  # noqa: NPY002
        numbers = [self.scheduler.state_dict(), self.sampler.order, generators]
        found.update(repr(numbers).encode())
        found.update(repr([group["lr"] for group in self.optimizer.param_groups]).encode())
        return found.hexdigest()


class Mouth:
    """Tells the oracle, through a file."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def say(self, event: str, **what: Any) -> None:
        os.write(self.file, json.dumps({"event": event, **what}).encode() + b"\n")


def checkpointed(training: Training, url: str, steps: int, mouth: Mouth) -> None:
    """Resume and train to `steps`."""
    pending: list[Any] = []
    attempt = 0

    def acknowledge(seconds: float) -> None:
        for handle in list(pending):
            try:
                if not handle.committed(seconds):
                    continue
                mouth.say("acked", id=[attempt, handle.step])
            except CkptmgrError as error:
                mouth.say("given up", id=[attempt, handle.step], why=str(error))
            pending.remove(handle)

    options: dict[str, Any] = {"every": EVERY, "keep": KEEP, "drain_timeout": 60.0}
    options["replicated"] = training.replicated
    with ckptmgr.Checkpointer(url, training.state, **options) as ckpt:
        attempt = ckpt.attempt
        mouth.say("restoring")
        start = ckpt.restore()
        found = ckpt.restored
        mouth.say(
            "resumed",
            id=[found.attempt, found.step] if found else [0, 0],
            attempt=attempt,
            source=found.source if found else "",
            skipped=found.skipped if found else [],
            digest=training.digest(),
        )
        for step in range(start + 1, steps + 1):
            mouth.say("step", **training.train(step))
            if step % EVERY == 0:
                mouth.say("due")
            handle = ckpt.step(step)
            if handle is not None:
                mouth.say("taken", id=[attempt, step])
                pending.append(handle)
            acknowledge(0.0)
        mouth.say("leaving")
    acknowledge(0.0)


def run(layout: str, url: str, steps: int, said: str) -> None:
    """The whole life of a rank, from its environment."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mouth = Mouth(f"{said}/{rank}.said")
    mouth.say("begun", pid=os.getpid())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    training = Training(layout, rank, world)
    if url:
        checkpointed(training, url, steps, mouth)
    else:
        mouth.say("resumed", digest=training.digest())
        for step in range(1, steps + 1):
            mouth.say("step", **training.train(step))
    dist.barrier()  # nobody leaves while another still needs an answer
    mouth.say("ended", digest=training.digest())


def warm() -> None:
    """Import what torch imports only when it is used, without a thread and without a socket.

    As 12 ranks: what torch remembers of a mesh of a number that is used would be taken for it.
    """
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=12)
    for layout in ("fsdp2", "tp_fsdp2"):
        state = made(layout, 12)
        # Of other builds a backward starts threads for devices, without which a fork can do none.
        if torch.version.cuda is None and torch.version.hip is None:
            relayout.train(state["model"], state["optimizer"], 1)
    dist.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
    sys.stdout.flush()
    os._exit(0)  # the threads of gloo do not always end by themselves
