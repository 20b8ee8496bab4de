"""Our codecs beside zipnn, on the state of a model that was really trained: ratio and CPU time.

`PYTHONPATH=tests python -m bench.codec_bench` prints the table of docs/performance.md; zipnn has
rows if it can be imported. All work on the same chunks of 4 MiB, in turns; CPU time is that of all
threads of this process, the median of the repetitions. Every chunk is compared bit by bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import torch

from bench.trained import trained_state
from ckptmgr.config import GIB, MIB
from ckptmgr.repository.chunk import Cut
from ckptmgr.repository.codec import Codec, decode, encode

CHUNK_BYTES = 4 * MIB
WEIGHTS, MOMENTS = "weights", ("exp_avg", "exp_avg_sq")


@dataclass(slots=True)
class Figures:
    """CPU seconds of each repetition, and what was stored."""

    encode: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    stored: int = 0


class Ours:
    """A codec between buffers that are there, as in the pipeline and in a restore."""

    def __init__(self, codec: Codec, itemsize: int, chunks: list[memoryview]) -> None:
        self._codec, self._itemsize, self._chunks = codec, itemsize, chunks
        self._rooms = [memoryview(bytearray(bytes(chunk))) for chunk in chunks]
        self._lengths = [0] * len(chunks)
        self.back = [memoryview(bytearray(bytes(chunk))) for chunk in chunks]

    def encode(self) -> int:
        """Returns what is stored: a chunk that does not shrink is stored raw."""
        for at, (raw, room) in enumerate(zip(self._chunks, self._rooms, strict=True)):
            cut = Cut(0, len(raw), self._itemsize, True)
            self._lengths[at] = encode(self._codec, raw, cut, room)
        return sum(n or len(raw) for n, raw in zip(self._lengths, self._chunks, strict=True))

    def decode(self) -> None:
        for at, length in enumerate(self._lengths):
            if length:
                decode(self._codec, self._rooms[at][:length], self.back[at], subject="bench")
            else:
                self.back[at][:] = self._chunks[at]


class Zipnn:
    """Its own way: bytes in, which it changes, bytes out. ImportError where it is not installed."""

    def __init__(self, itemsize: int, chunks: list[memoryview]) -> None:
        from zipnn import ZipNN

        kind = {2: "bfloat16", 4: "float32"}[itemsize]
        self._coder = ZipNN(bytearray_dtype=kind, input_format="byte", threads=1)
        self._chunks = chunks
        self._stored: list[bytes] = []
        self.back: list[bytes] = []

    def encode(self) -> int:
        self._stored = [self._coder.compress(bytes(chunk)) for chunk in self._chunks]
        return sum(map(len, self._stored))

    def decode(self) -> None:
        self.back = [self._coder.decompress(one) for one in self._stored]


def chunks_of(arrays: list[np.ndarray]) -> list[memoryview]:
    whole = memoryview(np.concatenate([array.ravel() for array in arrays]).view(np.uint8))
    return [whole[at : at + CHUNK_BYTES] for at in range(0, len(whole), CHUNK_BYTES)]


def measure(chunks: list[memoryview], itemsize: int, repeat: int) -> dict[str, Figures]:
    """Every codec on every chunk, `repeat` times in turns, after one turn that does not count."""
    coders: dict[str, Ours | Zipnn] = {
        "planes": Ours(Codec.PLANES, itemsize, chunks),
        "zstd": Ours(Codec.ZSTD, itemsize, chunks),
    }
    with suppress(ImportError):
        coders["zipnn"] = Zipnn(itemsize, chunks)
    found = {name: Figures() for name in coders}
    for turn in range(repeat + 1):
        for name, coder in coders.items():
            start = time.process_time()
            found[name].stored = coder.encode()
            middle = time.process_time()
            coder.decode()
            end = time.process_time()
            assert all(one == raw for one, raw in zip(coder.back, chunks, strict=True)), name
            if turn:
                found[name].encode.append(middle - start)
                found[name].decode.append(end - middle)
    return found


def main() -> None:
    """Train, measure, and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=5)
    repeat = parser.parse_args().repeat
    print("| state | codec | ratio | CPU s / GiB | beside zipnn | to decode | beside zipnn |")
    print("|---|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        states: dict[str, list[np.ndarray]] = {}
        for name, array in trained_state(dtype).items():
            kind = next((one for one in MOMENTS if name.startswith(f"{one}/")), WEIGHTS)
            states.setdefault(kind, []).append(array)
        for kind, arrays in sorted(states.items(), reverse=True):
            chunks = chunks_of(arrays)
            show(f"{dtype} {kind}", sum(map(len, chunks)), measure(chunks, dtype.itemsize, repeat))


def show(state: str, nbytes: int, found: dict[str, Figures]) -> None:
    """One row for each codec."""
    other = found.get("zipnn")
    for name, one in found.items():
        row = [state.removeprefix("torch."), name, f"{nbytes / one.stored:.3f}"]
        for own, theirs in (
            (one.encode, other and other.encode),
            (one.decode, other and other.decode),
        ):
            seconds = statistics.median(own)
            row.append(f"{seconds / nbytes * GIB:.2f}")
            row.append(f"{statistics.median(theirs) / seconds:.2f} x as fast" if theirs else "")
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
