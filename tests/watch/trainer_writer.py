"""A process that writes checkpoints as the Trainer of transformers 5.24 with safetensors 0.8 does
(seen by strace): the same files in the same order; model.safetensors under a temporary name in the
directory, and renamed; all others opened, written and closed in place; nothing is synced; old ones
go by rmtree. What it does not have is torch: a file of torch.save is a zip that holds noise.

Its bytes are a function of (step, generation): a restart begins a new generation, and goes back by
some steps, as a training run that resumes does.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

Files = dict[str, bytes]


def noise(name: str, step: int, generation: int, kib: int) -> bytes:
    return random.Random(f"{name} {step} {generation}").randbytes(kib << 10)


def saved_by_torch(content: bytes) -> bytes:
    """A stored zip, as torch.save writes it."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo("archive/data/0"), content)
    return made.getvalue()


def saved_by_safetensors(content: bytes) -> bytes:
    entry = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "weight": entry}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content


def files_of(step: int, generation: int, kib: int) -> Files:
    """All files of a checkpoint, in the order in which they are written."""

    def of(name: str, share: int) -> bytes:
        return noise(name, step, generation, max(1, kib // share))

    logged = {"epoch": step / 100, "grad_norm": 1.5, "loss": 1 / step, "step": step}
    state = {"global_step": step, "log_history": [logged], "generation": generation}
    return {
        "config.json": json.dumps({"model_type": "noise", "generation": generation}).encode(),
        "model.safetensors": saved_by_safetensors(of("model", 1)),
        "training_args.bin": saved_by_torch(of("arguments", 100)),
        "optimizer.pt": saved_by_torch(of("optimizer", 1) + of("more", 1)),
        "scheduler.pt": saved_by_torch(of("scheduler", 100)),
        "rng_state.pth": saved_by_torch(of("rng", 20)),
        "trainer_state.json": (json.dumps(state, indent=2, sort_keys=True) + "\n").encode(),
    }


def pieces(content: bytes) -> Iterator[bytes]:
    for at in range(0, len(content), 16 << 10):
        yield content[at : at + (16 << 10)]


def save(root: Path, step: int, generation: int, kib: int, pause: float) -> None:
    place = root / f"checkpoint-{step}"
    place.mkdir(parents=True, exist_ok=True)
    for name, content in files_of(step, generation, kib).items():
        renamed = name.endswith(".safetensors")
        path = place / (f".tmp{generation}" if renamed else name)
        with path.open("wb", buffering=0) as file:
            for piece in pieces(content):
                file.write(piece)
                time.sleep(pause)
        if renamed:
            path.rename(place / name)


def rotate(root: Path, limit: int) -> None:
    """As save_total_limit: the ones written first go."""
    found = sorted(root.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    for path in found[:-limit]:
        shutil.rmtree(path)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True)
    for name in ("first", "count", "generation", "kib", "limit"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--between", type=float, default=0.0)
    options = parser.parse_args()
    for step in range(options.first, options.first + 10 * options.count, 10):
        save(options.root, step, options.generation, options.kib, options.pause)
        rotate(options.root, options.limit)
        print(step, flush=True)
        time.sleep(options.between)


if __name__ == "__main__":
    main()
