"""The random generators of the process: read with the state, put back last."""

from __future__ import annotations

import random
from collections.abc import Container
from typing import Any

import numpy as np
import torch

from ckptmgr.errors import StateMismatchError, UsageError
from ckptmgr.rank.externals import new_bit_generator, refuse_unknown

RNG_KEY = "rng"
"""Reserved name in the state for the generators of the process."""


def check_names(state: Container[Any]) -> None:
    """Refuse a state in which the name of the generators is taken.

    Raises:
        UsageError: it is.
    """
    if RNG_KEY in state:
        raise UsageError(
            "is reserved for the generators of the process",
            subject=RNG_KEY,
            hint="Give it another name in `state`, or leave the generators out: rng=False.",
        )


def read_generators() -> dict[str, Any]:
    """States of torch (CPU, and each CUDA device once CUDA is in use), Python and NumPy.

    Raises:
        UnsupportedLeafError: NumPy was given a bit generator of another library.
    """
    return {
        "python": random.getstate(),
        "numpy": _numpy_state(),
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
        _numpy_like(saved["numpy"]).set_state(saved["numpy"])
        torch.Generator().set_state(saved["torch"].clone())
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        return [f"{RNG_KEY}: {error}"]
    return []


def _numpy_like(state: Any) -> np.random.RandomState:
    """A generator that can have this state."""
    return np.random.RandomState(new_bit_generator(state["bit_generator"]))


def _numpy_state() -> Any:
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - it is the global one
    refuse_unknown(state["bit_generator"], ((None, RNG_KEY), "numpy"))
    return state


def _write_numpy(state: Any) -> None:
    now: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - it is the global one
    name = state["bit_generator"]
    if now["bit_generator"] != name:
        np.random.set_bit_generator(new_bit_generator(name))  # type: ignore[attr-defined]
    np.random.set_state(state)  # noqa: NPY002 - it is the global one


def write_generators(saved: Any) -> None:
    """Put generators back; states of CUDA devices that are not here are left out.

    Raises:
        StateMismatchError: a CUDA generator refuses its state.
    """
    random.setstate(saved["python"])
    _write_numpy(saved["numpy"])
    torch.set_rng_state(saved["torch"].clone())
    if not torch.cuda.is_available():
        return
    for device, state in zip(range(torch.cuda.device_count()), saved["cuda"], strict=False):
        try:
            torch.cuda.set_rng_state(state.clone(), device)
        except RuntimeError as error:
            raise StateMismatchError(str(error), subject=f"{RNG_KEY}/cuda/{device}") from error
