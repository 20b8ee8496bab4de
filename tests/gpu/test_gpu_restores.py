"""On a GPU: what comes back is what was saved, and training goes on the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptmgr
from gpu.loop import Loop
from processes import end_processes_of
from rank.shape import difference

WAIT_SECONDS_MAX = 60.0
STEPS, KILLS = 120, 3
PROCESSES = Path(__file__).parent


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same kernels in the same order each time."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class CrashError(Exception):
    """Stands for whatever ends a training."""


def program(name: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """A process of this directory that can import what these tests can."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    command = [sys.executable, str(PROCESSES / name), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def wipe(runtime: Path) -> None:
    """Lose host memory, as a reboot does."""
    end_processes_of(runtime)
    subprocess.run(["rm", "-rf", str(runtime)], check=True)


@pytest.mark.parametrize("source", ["memory", "store"])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}])
def test_training_goes_on_the_same(
    runtime: Path, store_url: str, source: str, options: dict[str, Any]
) -> None:
    first = Loop(**options)
    with suppress(CrashError), ckptmgr.Checkpointer(store_url, first.state) as ckpt:
        for _ in range(3):
            first.step()
        assert ckpt.save(3).committed(WAIT_SECONDS_MAX)
        raise CrashError
    for _ in range(3):
        first.step()
    if source == "store":
        wipe(runtime)
    second = Loop(**options)
    places = {name: one.data_ptr() for name, one in second.model.state_dict().items()}
    with ckptmgr.Checkpointer(store_url, second.state) as ckpt:
        assert ckpt.restore() == 3
        assert ckpt.restored is not None
        assert ckpt.restored.source == source
        assert {n: one.data_ptr() for n, one in second.model.state_dict().items()} == places
        for _ in range(3):
            second.step()
        assert difference(first.state, second.state) == ""
    assert first.digest() == second.digest()


def test_cuda_may_be_the_default_device(runtime: Path, store_url: str) -> None:
    torch.set_default_device("cuda")
    try:
        first = Loop()
        first.state |= {"table": torch.arange(9.0), "sparse": torch.eye(4).to_sparse()}
        with ckptmgr.Checkpointer(store_url, first.state) as ckpt:
            first.step()
            assert ckpt.save(1).committed(WAIT_SECONDS_MAX)
        second = Loop()
        second.state |= {"table": torch.zeros(9), "sparse": torch.zeros(4, 4).to_sparse()}
        with ckptmgr.Checkpointer(store_url, second.state) as ckpt:
            assert ckpt.restore() == 1
        assert difference(first.state, second.state) == ""
        assert second.state["sparse"].is_cuda
    finally:
        torch.set_default_device(None)


def test_the_saved_state_can_be_loaded_without_the_gpu(
    runtime: Path, store_url: str, loop: Loop
) -> None:
    with ckptmgr.Checkpointer(store_url, loop.state) as ckpt:
        loop.step()
        assert ckpt.save(1).committed(WAIT_SECONDS_MAX)
    found = ckptmgr.load(store_url)
    weight = found["model"]["0.weight"]
    assert not weight.is_cuda
    assert torch.equal(weight, loop.model[0].weight.detach().cpu())


def save_and_restore(url: str, first: dict[str, Any], second: dict[str, Any]) -> None:
    """Bring one state into the other, bit by bit."""
    with ckptmgr.Checkpointer(url, first) as ckpt:
        assert ckpt.save(1).committed(WAIT_SECONDS_MAX)
    with ckptmgr.Checkpointer(url, second) as ckpt:
        assert ckpt.restore() == 1
    assert difference(first, second) == ""


def test_odd_tensors_go_back_to_the_gpu(runtime: Path, store_url: str) -> None:
    def make(scale: float) -> dict[str, Any]:
        plain = torch.arange(24.0, device="cuda").view(4, 6) * scale
        return {
            "transposed": plain.clone().t(),
            "channels_last": plain.clone()
            .view(1, 4, 2, 3)
            .contiguous(memory_format=torch.channels_last),
            "strided": plain.clone()[::2, 1::2],
            "conjugate": torch.complex(plain, -plain).conj(),
            "fp8": plain.to(torch.float8_e4m3fn),
            "bf16": plain.to(torch.bfloat16),
            "bool": plain > 3,
            "expanded": (plain[:1, :1] + scale).expand(4, 6),
            "empty": plain[:0].clone(),
            "scalar": (plain[1, 1] * 2).clone(),
            "complex32": torch.complex(plain, plain).to(torch.complex32),
            "host": (plain * 3).cpu(),
        }

    first, second = make(1.5), make(0.0)
    save_and_restore(store_url, first, second)
    assert [one.device for one in first.values()] == [one.device for one in second.values()]


class Average:
    """Keeps what it is given, as averages of weights that people write do."""

    def __init__(self, scale: float) -> None:
        weight = torch.full((4, 4), scale, device="cuda")
        self.kept: dict[str, Any] = {"shadow": {"w": weight, "tied": weight}, "host": torch.ones(2)}

    def state_dict(self) -> dict[str, Any]:
        return self.kept

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept = state


class Extra(torch.nn.Module):
    """A module with state of its own kind."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scales = [torch.full((3,), scale, device="cuda"), 7]

    def get_extra_state(self) -> list[Any]:
        return self.scales

    def set_extra_state(self, state: list[Any]) -> None:
        self.scales = state


def test_what_objects_are_given_is_where_they_had_it(runtime: Path, store_url: str) -> None:
    def make(scale: float) -> dict[str, Any]:
        sparse = (torch.eye(3, device="cuda") * scale).to_sparse()
        return {"average": Average(scale), "extra": Extra(scale), "sparse": sparse}

    first, second = make(1.5), make(0.0)
    save_and_restore(store_url, first, second)
    average = second["average"].kept
    assert average["shadow"]["w"].is_cuda
    assert average["shadow"]["w"] is average["shadow"]["tied"]
    assert average["host"].is_cpu
    assert second["extra"].scales[0].is_cuda
    assert second["sparse"].is_cuda


# -- kills and ranks ----------------------------------------------------------------------------


def lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def test_killed_training_ends_as_if_it_had_not_been_killed(runtime: Path, store_url: str) -> None:
    truth = Loop()
    for _ in range(STEPS):
        truth.step()
    expected = truth.digest()
    chance, sources = random.Random(7), []
    for kill in range(KILLS + 1):
        last = kill == KILLS
        after = chance.randrange(5, 25)
        with program("training_process.py", store_url, str(STEPS)) as process:
            for number, said in enumerate(lines(process)):
                if "source" in said:
                    sources.append(said["source"])
                if number > after and not last:
                    process.send_signal(signal.SIGKILL)
                    break
        if kill == 1:
            wipe(runtime)
    assert process.returncode == 0
    assert said["digest"] == expected
    assert sources[0] == ""
    assert {"memory", "store"} <= set(sources[1:]), sources


@pytest.mark.parametrize("layout", ["nccl-fsdp2", "gloo-ddp"])
def test_ranks_on_a_gpu(runtime: Path, store_url: str, tmp_path: Path, layout: str) -> None:
    """NCCL takes one rank for each GPU; two over gloo may share one."""
    world = 2 if layout == "gloo-ddp" else 1
    for phase in ("save", "restore"):
        meeting = tmp_path / f"meeting-{phase}"
        started = [
            program(
                *("ranks_on_gpu.py", layout, phase, store_url),
                RANK=str(rank),
                WORLD_SIZE=str(world),
                MEETING=f"file://{meeting}",
            )
            for rank in range(world)
        ]
        said = [process.communicate(timeout=120)[0].split() for process in started]
        assert [process.returncode for process in started] == [0] * world
        digests = {words[0] for words in said}
        assert len(digests) == 1, said
        if phase == "save":
            expected = digests
    assert digests == expected
