"""`auto` against every fixed codec, on stores of several rates, through the real pipeline.

`PYTHONPATH=tests python -m bench.auto_codec_bench` prints the table of docs/performance.md.

Every codec has a pipeline of its own, which has written one snapshot before. Repetitions take turns
so that what else the machine does meets all codecs alike; figures are medians. The state is of
a trained model, repeated to the wanted size.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.throttled import SinkStore, ThrottledStore
from bench.trained import trained_state
from ckptmgr.config import BUDGET_BYTES, MIB
from ckptmgr.daemon.pipeline import Pipeline, Source
from ckptmgr.heap import keep_freed_memory
from ckptmgr.repository.budget import BufferPool
from ckptmgr.store.base import Store
from ckptmgr.store.local import LocalStore
from small_step import HOST, Encoded, encode_state, fill_slot, host_buffer

CODECS = ("auto", "none", "zstd", "planes")
NONCE = "ab" * 16


@dataclass(slots=True)
class Figures:
    """What the snapshots of one codec took, and what they stored."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    stored: int = 0


def state_of(dtype: torch.dtype, mib: int) -> Encoded:
    """A trained state, repeated until it has the size; chunks do not see the repetition."""
    once = np.concatenate([array.ravel() for array in trained_state(dtype).values()])
    return encode_state({"state": np.tile(once, max(1, round(mib * MIB / once.nbytes)))})


@contextmanager
def opened(rate: float, directory: str | None) -> Iterator[Store]:
    """A store of `rate` MiB/s; 0 is the disk as it is, `inf` one that takes no time."""
    if rate == float("inf"):
        yield SinkStore("bench")
    elif rate:
        yield ThrottledStore("bench", rate * MIB)
    else:
        with tempfile.TemporaryDirectory(dir=directory) as place:
            yield LocalStore(str(Path(place) / "store"))


async def measure(store: Store, encoded: Encoded, repeat: int) -> dict[str, Figures]:
    """One unmeasured snapshot and `repeat` measured ones for each codec, in turns."""
    pipelines = {codec: Pipeline(BufferPool(BUDGET_BYTES)) for codec in CODECS}
    found = {codec: Figures() for codec in CODECS}
    with host_buffer(store.url, len(encoded.data)) as buffer:
        for turn in range(repeat + 1):
            for at in range(len(CODECS)):
                codec = CODECS[(at + turn) % len(CODECS)]
                of: Any = {"attempt": 1, "nonce": NONCE, "step": turn * len(CODECS) + at + 1}
                snapshot = fill_slot(buffer, 0, encoded, **of)
                start, cpu = time.perf_counter(), time.process_time()
                source = Source(buffer, snapshot, store, HOST)
                sealed = await pipelines[codec].write(source, codec, lambda _raw, _stored: None)
                if turn:
                    found[codec].seconds.append(time.perf_counter() - start)
                    found[codec].cpu_seconds.append(time.process_time() - cpu)
                found[codec].stored = sealed.manifest.stored_bytes
                for key in await store.list(""):
                    await store.delete(key)
    await store.aclose()
    return found


def row(name: str, rate: float, found: dict[str, Figures], raw: int) -> str:
    """One line of the table."""
    seconds = {codec: statistics.median(figures.seconds) for codec, figures in found.items()}
    cpu = {codec: statistics.median(figures.cpu_seconds) for codec, figures in found.items()}
    best = min(CODECS[1:], key=lambda codec: seconds[codec])
    cells = [name, f"{rate:.0f} MiB/s" if rate else "disk"]
    cells += [f"{seconds[codec]:.2f}" for codec in CODECS]
    cells += [f"{seconds['auto'] / seconds[best]:.3f} x {best}"]
    cells += [f"{cpu['auto']:.2f} / {cpu[best]:.2f}", f"{raw / found['auto'].stored:.2f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=512, help="size of a snapshot")
    parser.add_argument("--repeat", type=int, default=5, help="measured snapshots of each codec")
    parser.add_argument("--rates", default="50,200,1024,0", help="MiB/s; 0 is the disk as it is")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--directory", default=None, help="on the disk to be measured")
    args = parser.parse_args()
    keep_freed_memory()  # as the daemon does
    print("| state | store | auto, s | none | zstd | planes | auto / best | CPU s | ratio |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in args.dtypes.split(","):
        encoded = state_of(getattr(torch, name), args.mib)
        raw = len(encoded.data)
        for rate in map(float, args.rates.split(",")):
            with opened(rate, args.directory) as store:
                found = asyncio.run(measure(store, encoded, args.repeat))
            print(row(f"{name}, {raw / MIB:.0f} MiB", rate, found, raw), flush=True)


if __name__ == "__main__":
    main()
