"""On a GPU: what snapshots and restores cost a transformer that trains, beside bare copies.

`PYTHONPATH=tests python -m bench.gpu_bench`. Weights, gradients' moments and batches are real;
training is bf16 autocast over fp32 weights. Every figure is a ratio of things measured in this run.
A way to save is measured amid steps, which go on until the bytes are durable: what it lost is the
time of those steps less that of as many undisturbed ones before and after it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nf

import ckptmgr
from bench.beside.disk import sync
from ckptmgr.rank.bench import bare_read, bare_write, drop_cache, end_daemon, seconds

GIB = 1 << 30
WINDOW_STEPS = 10
State = dict[str, Any]


class Block(nn.Module):
    """Attention and a feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.mix(self.before(x)).view(batch, length, 3, width // 64, 64)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = nf.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nf.gelu(self.up(self.after(x))))


class Transformer(nn.Module):
    """A decoder like GPT-2, with a table of positions as a buffer."""

    def __init__(self, layers: int, width: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.end = nn.LayerNorm(width)
        at, of = torch.arange(length)[:, None], torch.arange(width)[None]
        self.register_buffer("places", torch.sin(at / 10_000 ** (of / width)))

    def forward(self, codes: Tensor) -> Tensor:
        x = self.end(self.blocks(self.words(codes) + self.places[: codes.shape[1]]))
        return x @ self.words.weight.T


class Training:
    """A model, its optimizer and batches; `step` waits for nothing."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.model = Transformer(args.layers, args.width, 32_000, args.length).cuda()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = args.batch, args.length

    @property
    def state(self) -> State:
        return {"model": self.model, "optimizer": self.optimizer}

    def step(self) -> None:
        codes = torch.randint(0, 32_000, self.batch, device="cuda")
        self.optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            logits = self.model(codes)
        nf.cross_entropy(logits.flatten(0, 1).float(), codes.flatten()).backward()
        self.optimizer.step()

    def steps(self, count: int) -> float:
        """Seconds that these take until the GPU is through."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            self.step()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def tensors(self) -> list[Tensor]:
        """All that is saved and is on the GPU."""
        moments = [one for state in self.optimizer.state.values() for one in state.values()]
        found = [*self.model.state_dict().values(), *moments]
        return [one.detach() for one in found if one.is_cuda]


# -- limits -------------------------------------------------------------------------------------


def timed(work: Callable[[], object], repeat: int) -> float:
    """Median seconds until the GPU is through."""

    def whole() -> None:
        work()
        torch.cuda.synchronize()

    torch.cuda.synchronize()
    return statistics.median(seconds(whole) for _ in range(repeat))


def limits(tensors: list[Tensor], directory: Path, repeat: int) -> dict[str, float]:
    """Bare copies of the same tensors, to and from locked memory, and a bare write."""
    nbytes = sum(one.nbytes for one in tensors)
    host = torch.empty(nbytes + 64 * len(tensors), dtype=torch.uint8, pin_memory=True)
    loose = torch.empty(nbytes + 64 * len(tensors), dtype=torch.uint8).fill_(1)
    device = torch.empty(min(GIB, len(host)), dtype=torch.uint8, device="cuda")
    head = host[: len(device)]

    def over(memory: Tensor) -> list[Tensor]:
        at, views = 0, []
        for one in tensors:
            piece = memory[at : at + one.nbytes]
            views.append(piece.view(one.dtype).view(one.shape))
            at += (one.nbytes + 63) // 64 * 64
        return views

    locked, pageable = over(host), over(loose)

    def copy(to: list[Tensor], source: list[Tensor]) -> None:
        for a, b in zip(to, source, strict=True):
            a.copy_(b, non_blocking=True)

    copy(locked, tensors)
    torch.cuda.synchronize()
    loose.copy_(host)  # what goes back are the weights, whichever way
    return {
        "state_gib": nbytes / GIB,
        "one_copy_gib_s": len(device)
        / GIB
        / timed(lambda: head.copy_(device, non_blocking=True), repeat),
        "d2h_s": timed(lambda: copy(locked, tensors), repeat),  # after it, the weights are there
        "h2d_s": timed(lambda: copy(tensors, locked), repeat),
        "h2d_pageable_s": timed(lambda: copy(tensors, pageable), repeat),
        "register_s": registered(loose),
        "write_s": bare_write(directory, nbytes >> 20, 2),
    }


def registered(memory: Tensor) -> float:
    """Seconds to lock the pages of memory that is there already."""
    runtime: Any = torch.cuda.cudart()
    took = seconds(lambda: runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
    runtime.cudaHostUnregister(memory.data_ptr())
    return took


# -- ways to save -------------------------------------------------------------------------------

Save = Callable[[int], Callable[[], object]]
"""Begins to save a step; what it returns waits until the bytes are durable."""


@contextmanager
def by_us(training: Training, directory: Path, **options: Any) -> Iterator[Save]:
    """`ckptmgr`, with a daemon of its own."""
    with ckptmgr.Checkpointer(
        directory / "store", training.state, every=None, keep=2, **options
    ) as ckpt:
        assert ckpt._link is not None
        ckpt._link.wait_populated(0)
        ckpt._link.wait_populated(1)

        def save(step: int) -> Callable[[], object]:
            handle = ckpt.save(step)

            def committed() -> None:
                if not handle.committed(300.0):
                    raise RuntimeError(f"step {step} was not committed")

            return committed

        yield save


@contextmanager
def by_torch_save(training: Training, directory: Path) -> Iterator[Save]:
    """`torch.save`, synced by the harness."""

    def save(step: int) -> Callable[[], object]:
        path = directory / "torch.pt"
        torch.save({name: one.state_dict() for name, one in training.state.items()}, path)
        return partial(sync, path)

    yield save


WAYS: dict[str, Callable[[Training, Path], Any]] = {
    "ckptmgr": by_us,
    "ckptmgr, overlap=False": partial(by_us, overlap=False),
    "ckptmgr, codec none": partial(by_us, codec="none"),
    "torch.save": by_torch_save,
}


def snapshot(training: Training, save: Save, step: int) -> dict[str, float]:
    """One snapshot amid steps; the GPU is idle when the call comes, so that only it is timed."""
    before = training.steps(WINDOW_STEPS) / WINDOW_STEPS
    start = time.perf_counter()
    durable = save(step)
    stall = time.perf_counter() - start
    done: list[float] = []

    def finish() -> None:
        durable()
        done.append(time.perf_counter() - start)

    waiting = threading.Thread(target=finish)
    waiting.start()
    count = 0
    while count < WINDOW_STEPS or waiting.is_alive():
        training.step()
        count += 1
        if count % 4 == 0:
            torch.cuda.synchronize()  # not more steps are queued than that
    torch.cuda.synchronize()
    took = time.perf_counter() - start
    waiting.join()
    after = training.steps(WINDOW_STEPS) / WINDOW_STEPS
    if not done:
        raise RuntimeError("was not durable")
    step_s = (before + after) / 2
    return {
        "stall_s": stall,
        "lost_s": took - count * step_s,
        "durable_s": done[0],
        "step_s": step_s,
        "steps": count,
    }


def measured(training: Training, way: str, directory: Path, repeat: int) -> dict[str, float]:
    """The first snapshot, and medians of those after it."""
    directory.mkdir()
    start = time.perf_counter()
    with WAYS[way](training, directory) as save:
        opened = time.perf_counter() - start
        found = [snapshot(training, save, step) for step in range(1, repeat + 2)]
    shutil.rmtree(directory)
    rest = {name: statistics.median(one[name] for one in found[1:]) for name in found[0]}
    return {"open_s": opened, "first_stall_s": found[0]["stall_s"], **rest}


# -- restores -----------------------------------------------------------------------------------


class LeftError(Exception):
    """Ends a block as a crash would."""


def restores(training: Training, directory: Path, runtime: Path, repeat: int) -> dict[str, float]:
    """Out of host memory some times, then cold; every one is compared bit by bit."""
    store, state = directory / "store", training.state
    with suppress(LeftError), ckptmgr.Checkpointer(store, state, every=None) as ckpt:
        if not ckpt.save(1).committed(300.0):
            raise RuntimeError("was not committed")
        expected = [one.clone() for one in training.tensors()]
        raise LeftError

    def once(source: str) -> tuple[float, float]:
        for one in training.tensors():
            one.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        with suppress(LeftError), ckptmgr.Checkpointer(store, state, every=None) as ckpt:
            entered = time.perf_counter()
            ckpt.restore(required=True)
            torch.cuda.synchronize()
            restored = time.perf_counter()
            assert ckpt.restored is not None
            assert ckpt.restored.source == source, ckpt.restored
            same = zip(training.tensors(), expected, strict=True)
            assert all(torch.equal(live, one) for live, one in same)
            raise LeftError
        return entered - start, restored - entered

    memory = [once("memory") for _ in range(repeat)]
    end_daemon(runtime)
    runtime.mkdir(mode=0o700)
    read = bare_read(store)
    drop_cache(store)
    cold = once("store")
    return {
        "memory_enter_s": statistics.median(enter for enter, _ in memory),
        "memory_s": statistics.median(took for _, took in memory),
        "read_s": read,
        "cold_s": sum(cold),
    }


# -- the table ----------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    bare, rows = found["limits"], found["ways"]
    copy, size = bare["d2h_s"], bare["state_gib"]
    lines = [
        f"- {found['machine']}",
        f"- {size:.2f} GiB in {found['tensors']} tensors, a step of {found['step_s'] * 1e3:.0f} ms",
        f"- bare copy to locked memory: {copy * 1e3:.0f} ms, {size / copy:.1f} GiB/s",
        f"- one copy of 1 GiB: {bare['one_copy_gib_s']:.1f} GiB/s",
        f"- bare copy back: {bare['h2d_s'] * 1e3:.0f} ms",
        f"- back from memory that is not locked: {bare['h2d_pageable_s'] * 1e3:.0f} ms",
        f"- locking it: {bare['register_s'] * 1e3:.0f} ms",
        f"- bare write and fsync: {bare['write_s']:.2f} s",
        "",
        "| way | first stall | stall | x copy | lost | x copy | durable | x write |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way, one in rows.items():
        if "why" in one:
            lines.append(f"| {way} | {one['why']} |")
            continue
        lines.append(
            f"| {way} | {one['first_stall_s'] * 1e3:.0f} ms | {one['stall_s'] * 1e3:.0f} ms "
            f"| {one['stall_s'] / copy:.2f} | {one['lost_s'] * 1e3:.0f} ms "
            f"| {one['lost_s'] / copy:.2f} | {one['durable_s']:.2f} s "
            f"| {one['durable_s'] / bare['write_s']:.2f} |"
        )
    back = found.get("restores")
    if back:
        enter = back["memory_enter_s"]
        lines += [
            "",
            "| restore | s | bare | x bare |",
            "|---|---|---|---|",
            restored("out of host memory", back["memory_s"], bare["h2d_s"]),
            restored("the same with entering", back["memory_s"] + enter, bare["h2d_s"]),
            restored("cold with entering", back["cold_s"], back["read_s"]),
        ]
    return "\n".join(lines) + "\n"


def restored(what: str, took: float, bare: float) -> str:
    return f"| {what} | {took:.3f} | {bare:.3f} | {took / bare:.2f} |"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.gpu_bench", description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--directory", default=None, help="where stores are made")
    parser.add_argument("--way", nargs="*", choices=WAYS, default=list(WAYS))
    return parser.parse_args()


def machine() -> str:
    """The GPU, and what drives it."""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, check=False, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name()
    return f"{name}, {os.cpu_count()} cores, driver {driver}, torch {torch.__version__}"


def main() -> None:
    args = parse()
    directory = Path(tempfile.mkdtemp(prefix="ckptmgr-gpu-", dir=args.directory))
    runtime = Path(tempfile.mkdtemp(prefix="ckptmgr-gpu-", dir="/dev/shm"))
    os.environ["CKPTMGR_RUNTIME_DIR"] = str(runtime)
    try:
        training = Training(args)
        training.steps(5)
        found: dict[str, Any] = {"machine": machine(), "ways": {}}
        found["step_s"] = training.steps(WINDOW_STEPS) / WINDOW_STEPS
        tensors = training.tensors()
        found["tensors"] = len(tensors)
        found["limits"] = limits(tensors, directory, args.repeat)
        print(found["limits"], file=sys.stderr, flush=True)
        for way in args.way:
            try:
                found["ways"][way] = measured(training, way, directory / "way", args.repeat)
            except Exception as error:  # a row of its own costs no other one
                found["ways"][way] = {"why": f"{type(error).__name__}: {error}"[:160]}
                shutil.rmtree(directory / "way", ignore_errors=True)
            print(way, found["ways"][way], file=sys.stderr, flush=True)
        found["restores"] = restores(training, directory, runtime, args.repeat)
        print(table(found))
    finally:
        end_daemon(runtime)
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
