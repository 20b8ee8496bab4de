"""The random generators of the process: read with the state, put back last."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import StateMismatchError

RNG_KEY = "rng"
"""Reserved name in the state for the generators of the process."""


def read_generators() -> dict[str, Any]:
    """States of torch (CPU, and each CUDA device once CUDA is in use), Python and NumPy."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - it is the global one
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(),
    }


class Generators:
    """The generators as an object of the state: read when the walk comes to it.

    It is the last one, because a state_dict may draw numbers (a loader that starts its iterator).
    """

    def state_dict(self) -> dict[str, Any]:
        """See `read_generators`."""
        return read_generators()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `write_generators`."""
        write_generators(state)


def _cuda_states() -> list[torch.Tensor]:
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if in_use else []


def check_generators(saved: Any) -> list[str]:
    """What is wrong with saved generators; empty if they can be put back."""
    if not isinstance(saved, dict) or set(saved) != {"python", "numpy", "torch", "cuda"}:
        return [f"{RNG_KEY}: is not a set of generator states"]
    try:
        random.Random().setstate(saved["python"])  # noqa: S311 - a trial
        np.random.RandomState(0).set_state(saved["numpy"])
        torch.Generator().set_state(saved["torch"].clone())
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        return [f"{RNG_KEY}: {error}"]
    return []


def write_generators(saved: Any) -> None:
    """Put generators back; states of CUDA devices that are not here are left out.

    Raises:
        StateMismatchError: a CUDA generator refuses its state.
    """
    random.setstate(saved["python"])
    np.random.set_state(saved["numpy"])  # noqa: NPY002 - it is the global one
    torch.set_rng_state(saved["torch"].clone())
    if not torch.cuda.is_available():
        return
    for device, state in zip(range(torch.cuda.device_count()), saved["cuda"], strict=False):
        try:
            torch.cuda.set_rng_state(state.clone(), device)
        except RuntimeError as error:
            raise StateMismatchError(str(error), subject=f"{RNG_KEY}/cuda/{device}") from error
