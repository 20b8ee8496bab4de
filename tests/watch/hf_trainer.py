"""A real `transformers.Trainer`, which trains a small GPT-2 and saves it; it may be killed.

Whenever the Trainer says that a save is finished (`on_save`, after the last file and the deletion
of old ones), the digest of every file of it goes into a ledger beside the output directory: what
`watch` took is judged by it, and not by what `watch` itself takes for whole.

It resumes as people do: from the newest checkpoint that can be loaded, or one before it, and so
saves once more into directories that are there, finished or not. The data are those of the
generation, so no two saves are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from watch.watching import tree_of

VOCABULARY, TOKENS = 512, 8
EXAMPLES = 1 << 20


class Noise(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __init__(self, generation: int) -> None:
        self._generation = generation

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        chance = torch.Generator().manual_seed(self._generation << 32 | index)
        tokens = torch.randint(VOCABULARY, (TOKENS,), generator=chance)
        return {"input_ids": tokens, "labels": tokens}


class Ledger(TrainerCallback):
    """One line for each save that the Trainer has finished."""

    def __init__(self, path: Path, generation: int, pause: float) -> None:
        self._path, self._generation, self._pause = path, generation, pause

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        time.sleep(self._pause)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        name = f"checkpoint-{state.global_step}"
        files = tree_of(Path(str(args.output_dir)) / name)
        line = {"name": name, "generation": self._generation, "files": files}
        with self._path.open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")


def whole(checkpoint: Path) -> bool:
    """Whether every file can be loaded, and is of the step of the directory."""
    step = int(checkpoint.name.split("-")[1])
    try:
        load_file(checkpoint / "model.safetensors")
        for name in ("training_args.bin", "rng_state.pth"):
            torch.load(checkpoint / name, weights_only=False)
        optimizer = torch.load(checkpoint / "optimizer.pt", weights_only=False)
        schedule = torch.load(checkpoint / "scheduler.pt", weights_only=False)
        state = json.loads((checkpoint / "trainer_state.json").read_bytes())
    except Exception:  # whatever a file that is cut short makes of it
        return False
    steps = {int(one["step"]) for one in optimizer["state"].values()}
    return steps == {step} == {schedule["last_epoch"]} == {state["global_step"]}


def resumed_from(root: Path, back: int) -> str | None:
    """The newest checkpoint that can be loaded, or so many before it; None: begin anew."""
    found = sorted(root.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    return next(iter([str(path) for path in found if whole(path)][back:]), None)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("root", "ledger"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("generation", "save-steps", "limit", "back"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--pause", type=float, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = {"n_embd": 96, "n_layer": 2, "n_head": 2, "n_positions": TOKENS}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    trainer = Trainer(
        model=GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **ends)),
        args=TrainingArguments(
            output_dir=str(options.root),
            max_steps=EXAMPLES,
            per_device_train_batch_size=1,
            save_steps=options.save_steps,
            logging_steps=options.save_steps,
            save_total_limit=options.limit,
            ignore_data_skip=True,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Noise(options.generation),
        callbacks=[Ledger(options.ledger, options.generation, options.pause)],
    )
    trainer.train(resume_from_checkpoint=resumed_from(options.root, options.back))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
