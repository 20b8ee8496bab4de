"""The training script of `ckptmgr demo`: a character GPT on the sources of Python's own library.

Writes one JSON object per line to stdout: `ready`, `restored`, one `step` per step, `stall`, and
`done` with digests of the final state. Run by ckptmgr/demo.py, which kills it; see there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import ckptmgr

VOCABULARY = 128
"""ASCII; what is not is replaced by '?'."""

CONTEXT = 64
WIDTH = 128
HEADS = 4
LAYERS = 3
DROPOUT = 0.1
BATCH = 8
TEXT_BYTES = 48 << 10
"""Little enough that a run of 120 steps crosses the end of an epoch."""


class Block(nn.Module):
    """A transformer block: causal attention, then a feed-forward layer, both residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(WIDTH)
        self.project_in = nn.Linear(WIDTH, 3 * WIDTH)
        self.project_out = nn.Linear(WIDTH, WIDTH)
        self.norm_feed = nn.LayerNorm(WIDTH)
        self.feed = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(DROPOUT)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, WIDTH) to the same shape."""
        batch, length, _ = x.shape
        heads = self.project_in(self.norm_attention(x)).view(batch, length, 3, HEADS, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=DROPOUT if self.training else 0.0, is_causal=True
        )
        x = x + self.project_out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        grown: Tensor = x + self.feed(self.norm_feed(x))
        return grown


class CharGPT(nn.Module):
    """Predicts the next character; the embedding is tied to the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.drop = nn.Dropout(DROPOUT)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.output = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.apply(start_small)
        self.output.weight = self.characters.weight

    def forward(self, x: Tensor) -> Tensor:
        """Characters (batch, CONTEXT) to logits (batch, CONTEXT, VOCABULARY)."""
        places = torch.arange(x.shape[1])
        hidden = self.drop(self.characters(x) + self.positions(places))
        logits: Tensor = self.output(self.norm(self.blocks(hidden)))
        return logits


def start_small(module: nn.Module) -> None:
    """Draw weights so that the first loss is about log(VOCABULARY)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


class TextBatches:
    """Batches of windows of a text in an order shuffled anew for each epoch; resumable anywhere."""

    def __init__(self, text: bytes, seed: int) -> None:
        windows = (len(text) - 1) // CONTEXT
        codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.inputs = codes[: windows * CONTEXT].view(windows, CONTEXT)
        self.targets = codes[1 : windows * CONTEXT + 1].view(windows, CONTEXT)
        self.generator = torch.Generator().manual_seed(seed)
        self.start_epoch()

    def start_epoch(self) -> None:
        """Shuffle; the generator's state before that is what brings the same order back."""
        self.epoch_state = self.generator.get_state()
        self.order = torch.randperm(len(self.inputs), generator=self.generator)
        self.position = 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """The next BATCH windows and what follows each of their characters."""
        if self.position + BATCH > len(self.order):
            self.start_epoch()
        chosen = self.order[self.position : self.position + BATCH]
        self.position += BATCH
        return self.inputs[chosen], self.targets[chosen]

    def state_dict(self) -> dict[str, Any]:
        """Position and order, without the text."""
        return {"epoch_state": self.epoch_state, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly behind the batch that was last served when `state` was taken."""
        self.generator.set_state(state["epoch_state"])
        self.start_epoch()
        self.position = state["position"]


def library_text() -> bytes:
    """The first TEXT_BYTES of the sources of Python's standard library."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_bytes()
        if len(text) >= TEXT_BYTES:
            break
    return bytes(code if code < VOCABULARY else ord("?") for code in text[:TEXT_BYTES])


class Training:
    """The model and all that trains it; one `advance()` is one step."""

    def __init__(self, steps: int, seed: int) -> None:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(mode=True)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - the global state is what many training scripts use
        self.model = CharGPT()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)
        self.loader = TextBatches(library_text(), seed)

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, besides the random state."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "loader": self.loader,
        }

    def advance(self) -> float:
        """Train on one batch; returns its loss."""
        inputs, targets = self.loader.next_batch()
        logits = self.model(inputs)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.scheduler.step()
        value = loss.item()
        if not math.isfinite(value):
            raise ArithmeticError(f"loss is {value}")
        return value

    def digests(self) -> dict[str, str]:
        """What the state is, to the last bit; independent of how ckptmgr reads it."""
        return {
            "parameters": digest(self.model.state_dict()),
            "optimizer": digest(self.optimizer.state_dict()),
            "scheduler": digest(self.scheduler.state_dict()),
            "loader": digest(self.loader.state_dict()),
            "random": digest(
                [torch.get_rng_state(), random.getstate(), np.random.get_state()]  # noqa: NPY002
            ),
        }


def digest(state: object) -> str:
    """BLAKE2b of nested state: of keys, types and every bit of every number, in order."""
    seen = hashlib.blake2b(digest_size=16)
    for piece in pieces(state):
        seen.update(len(piece).to_bytes(8, "little") + piece)
    return seen.hexdigest()


def pieces(state: object) -> Iterator[bytes]:
    """Flatten nested state into bytes."""
    yield type(state).__name__.encode()
    if isinstance(state, Tensor):
        yield f"{state.dtype}{tuple(state.shape)}".encode()
        yield state.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(state, np.ndarray):
        yield f"{state.dtype}{state.shape}".encode() + state.tobytes()
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from (repr(key).encode(), *pieces(value))
    elif isinstance(state, list | tuple):
        for value in state:
            yield from pieces(value)
    else:
        yield (state.hex() if isinstance(state, float) else repr(state)).encode()


def say(event: str, **fields: object) -> None:
    """Write one event; flushed, so that it is known even if the next instruction is the last."""
    sys.stdout.write(json.dumps({"event": event, **fields}) + "\n")
    sys.stdout.flush()


def train(training: Training, first: int, last: int) -> Iterator[tuple[int, float]]:
    """Train the steps `first` to `last`, telling each; yields (step, loss)."""
    for step in range(first, last + 1):
        loss = training.advance()
        say("step", step=step, loss=loss.hex())
        yield step, loss


def train_with_ckptmgr(training: Training, arguments: argparse.Namespace) -> None:
    """The loop of the README."""
    with ckptmgr.Checkpointer(
        arguments.url, state=training.state, every=arguments.every, keep=3
    ) as ckpt:
        begin = time.perf_counter()
        step = ckpt.restore()
        seconds = time.perf_counter() - begin
        source = ckpt.restored.source if ckpt.restored else ""
        say("restored", step=step, source=source, seconds=seconds)
        for done, loss in train(training, step + 1, arguments.steps):
            ckpt.step(done, tags={"loss": loss})
        stats = ckpt.stats
    mean = stats.stall_seconds / max(1, stats.snapshots)
    say("stall", snapshots=stats.snapshots, delayed=stats.delayed, mean_seconds=mean)


def main() -> None:
    """Train, from the command line that ckptmgr/demo.py writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--url", default="", help="train with ckptmgr; without, never interrupted")
    parser.add_argument("--every", type=int, default=10)
    arguments = parser.parse_args()
    training = Training(arguments.steps, arguments.seed)
    say("ready", parameters=sum(p.numel() for p in training.model.parameters()))
    if arguments.url:
        train_with_ckptmgr(training, arguments)
    else:
        for _ in train(training, 1, arguments.steps):
            pass
    state = (training.model.state_dict(), training.optimizer.state_dict())
    say("done", digests=training.digests(), state_bytes=sum(map(len, pieces(state))))


if __name__ == "__main__":
    main()
