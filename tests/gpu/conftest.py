"""Tests that need a GPU. Where there is none they are skipped, and say so."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gpu.loop import Loop


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """Skip without a GPU; a test that breaks CUDA fails itself and not the one after it."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here: the CUDA paths were not run")
    yield
    torch.cuda.synchronize()


@pytest.fixture
def loop() -> Loop:
    return Loop()
