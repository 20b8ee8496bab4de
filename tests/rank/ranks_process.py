"""One of several ranks, started by test_ranks.py; prints JSON lines.

`python ranks_process.py SCENARIO URL RENDEZVOUS`: RENDEZVOUS is "env" or a file for a FileStore.
Without RANK in its environment it forks all ranks, and ends as they do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ckptmgr
from ckptmgr.rank.registers import StoreRegisters
from ckptmgr.staging.control import Client

WORLD = int(os.environ["WORLD_SIZE"])


def fork_ranks() -> int:
    """The rank of this process, one of `WORLD` from here on; one more waits for them."""
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if not child:
            return rank
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if statuses == [-signal.SIGKILL] * WORLD:
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(max(map(abs, statuses)))


RANK = int(os.environ["RANK"]) if "RANK" in os.environ else fork_ranks()
os.environ["RANK"] = str(RANK)


def say(**what: object) -> None:
    """One line to the test."""
    sys.stdout.write(json.dumps({"rank": RANK, **what}) + "\n")
    sys.stdout.flush()


class Net:
    """DDP training whose state differs by rank in its own counter and generator."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.net = DistributedDataParallel(nn.Linear(8, 8))
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-2)
        self.own = {"rank": RANK, "seen": 0}
        torch.manual_seed(100 + RANK)
        self.state: dict[str, Any] = {
            "net": self.net,
            "optimizer": self.optimizer,
            "own": self.own,
        }

    def train(self) -> None:
        """One step, with its collective."""
        self.optimizer.zero_grad()
        self.net(torch.randn(4, 8)).square().mean().backward()
        self.optimizer.step()
        self.own["seen"] += 1

    def digest(self) -> list[float]:
        """What must come back exactly."""
        weights = [float(p.detach().double().sum()) for p in self.net.parameters()]
        return [*weights, float(self.own["seen"]), float(torch.rand(1))]


class Watch:
    """Notes the forbidden calls that the training thread makes while `inside`."""

    def __init__(self) -> None:
        self.inside = False
        self.calls: list[str] = []
        self.elsewhere: set[str] = set()
        self.touched: set[str] = set()

    def wrap(self, owner: Any, name: str) -> None:
        """Replace a function by one that tells on its caller."""
        real: Callable[..., Any] = getattr(owner, name)

        def told(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                if self.inside:
                    self.calls.append(f"{owner.__name__}.{name}")
            else:
                self.elsewhere.add(name)
            return real(*arguments, **options)

        setattr(owner, name, told)

    def wrap_all(self) -> None:
        """Collectives, sockets, and the key-value store at every level."""
        for name in ("broadcast", "all_reduce", "all_gather", "barrier", "gather", "scatter"):
            self.wrap(dist, name)
        for name in ("send", "sendall", "recv", "recv_into", "connect", "sendmsg", "recvmsg"):
            self.wrap(socket.socket, name)
        for name in ("decide", "read", "count", "forget", "twin"):
            self.wrap(StoreRegisters, name)
        for kind in (dist.Store, dist.PrefixStore, dist.TCPStore, dist.FileStore):
            for name in ("get", "set", "add", "check", "wait", "compare_set", "delete_key"):
                self.wrap(kind, name)
        self.wrap(Client, "ask")

    def audit(self, place: str) -> None:
        """Note whatever any thread of this process does below a directory."""

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if arguments and isinstance(arguments[0], str) and arguments[0].startswith(place):
                self.touched.add(f"{event} {arguments[0]}")

        sys.addaudithook(hook)


def collectives() -> int:
    """How many collectives the process group has begun."""
    return int(dist.distributed_c10d._get_default_group()._get_sequence_number_for_group())


def quiet(url: str) -> None:
    """Save often; nothing may leave the training thread on the way."""
    net, watch = Net(), Watch()
    watch.audit(url.removeprefix("file://"))
    begun = 0
    with ckptmgr.Checkpointer(url, net.state, every=5) as ckpt:
        ckpt.restore()
        watch.wrap_all()
        taken = []
        for step in range(1, 101):
            net.train()
            before, watch.inside = collectives(), True
            handle = ckpt.step(step, tags={"loss": 1.5} if RANK == 0 else {"bad": object()})
            watch.inside = False
            begun += collectives() - before
            if handle is not None:
                taken.append(step)
    modules = [name for name in sys.modules if name.startswith("ckptmgr.store")]
    store = [*modules, *sorted(watch.touched)]
    elsewhere = sorted(watch.elsewhere)
    counted = collectives() > 0
    say(
        taken=taken,
        calls=watch.calls,
        elsewhere=elsewhere,
        store=store,
        begun=begun,
        counted=counted,
    )


def train(url: str, until: int, *, crash: bool) -> None:
    """Resume, and train on; end by SIGKILL amid everything if `crash`."""
    net = Net()
    with ckptmgr.Checkpointer(url, net.state, every=4) as ckpt:
        start = ckpt.restore()
        say(start=start, source=ckpt.restored.source if ckpt.restored else "")
        for step in range(start + 1, until + 1):
            net.train()
            handle = ckpt.step(step)
            if handle is not None:
                handle.committed(60)
        if crash:
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
    say(digest=net.digest())


def differ(url: str) -> None:
    """Give other arguments than rank 0."""
    try:
        ckptmgr.Checkpointer(url, {"x": torch.ones(2)}, every=5 + RANK).__enter__()
    except ckptmgr.CkptmgrError as error:
        say(error=type(error).__name__, message=str(error))


def refuse(url: str) -> None:
    """Hold something on rank 1 that can not be stored."""
    state = {"x": torch.ones(2), "bad": (lambda: 0) if RANK == WORLD - 1 else 0}
    try:
        ckptmgr.Checkpointer(url, state).__enter__()
    except ckptmgr.CkptmgrError as error:
        say(error=type(error).__name__, message=str(error))


def cut_by_hand(url: str) -> None:
    """Hold half of each tensor, which another rank has too, under the name of the whole one."""
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    torch.manual_seed(RANK % 2)
    net = DistributedDataParallel(nn.Linear(8, 8), process_group=halves[RANK % 2])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()

    def held() -> list[torch.Tensor]:
        states = optimizer.state.values()
        kept = [*net.parameters(), *(state["momentum_buffer"] for state in states)]
        return [tensor.detach() for tensor in kept]

    expected = [tensor.clone() for tensor in held()]
    with ckptmgr.Checkpointer(url, {"net": net, "optimizer": optimizer}, every=None) as ckpt:
        ckpt.save(1)
    for tensor in held():
        tensor.zero_()
    with ckptmgr.Checkpointer(url, {"net": net, "optimizer": optimizer}, every=None) as ckpt:
        start = ckpt.restore()
    exact = [torch.equal(one, other) for one, other in zip(held(), expected, strict=True)]
    say(start=start, exact=exact)


def main() -> None:
    """Join the others, act, leave."""
    scenario, url, rendezvous = sys.argv[1:]
    torch.set_num_threads(1)
    where = "env://" if rendezvous == "env" else f"file://{rendezvous}"
    dist.init_process_group("gloo", init_method=where, rank=RANK, world_size=WORLD)
    {
        "quiet": quiet,
        "differ": differ,
        "refuse": refuse,
        "cut": cut_by_hand,
        "whole": lambda url: train(url, 20, crash=False),
        "first": lambda url: train(url, 14, crash=True),
        "second": lambda url: train(url, 20, crash=False),
    }[scenario](url)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
