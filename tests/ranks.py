"""Real processes with a process group on this host: `run_ranks("rank.worlds", "ddp", 2, tmp_path)`.

Each process joins a gloo group and calls the function of the module with the directory; what the
function returns travels back as JSON. Everything else goes through files in the directory. torch is
imported once, and each rank is a fork of that process. `run_forked` does the same for many process
groups, one after the other.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from nursery import Forked, torch_nursery

TESTS = Path(__file__).parent
SECONDS_MAX = 150.0
"""For importing torch on a busy machine, and a few small steps."""


def run_ranks(
    module: str, function: str, world: int, directory: Path, *, seconds_max: float = SECONDS_MAX
) -> list[Any]:
    """What `function(directory)` of `module` returned on each rank; an AssertionError if it raised.

    No process is left when it returns.
    """
    return run_forked(module, [(function, world)], directory, seconds_max=seconds_max)[0]


def run_forked(
    module: str, groups: list[tuple[str, int]], directory: Path, *, seconds_max: float
) -> list[list[Any]]:
    """`run_ranks` of each (function, world) in turn; a group begins when the one before has ended.

    No process is left when it returns.
    """
    places = [directory / f"{function}-{world}" for function, world in groups]
    for place in places:
        place.mkdir()
    log = directory / "forks.log"
    # A session of its own: all its processes can be ended together.
    arguments = (module, json.dumps(groups), str(directory))
    process = start_warm(log, {}, Path(__file__), *arguments, session=True)
    try:
        process.wait(seconds_max)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        logs = sorted(path for place in places for path in place.glob("*.log"))
        raise AssertionError("\n".join(f"-- {p}:\n{p.read_text()[-4000:]}" for p in [log, *logs]))
    return [
        [json.loads((place / f"{rank}.json").read_text()) for rank in range(world)]
        for place, (_, world) in zip(places, groups, strict=True)
    ]


def start_warm(
    log: Path, environment: Mapping[str, str], program: Path, *arguments: str, session: bool = False
) -> Forked:
    """Run a file in a process that has imported torch, in our environment and this, and add what it
    prints to `log`.
    """
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    ours = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with log.open("ab") as told:
        return torch_nursery().start(
            [str(program), *arguments],
            env=ours | environment,
            stdout=told,
            stderr=told,
            start_new_session=session,
        )


def _main(module: str, function: str, rank: int, world: int, place: Path) -> None:
    import torch.distributed as dist

    store = dist.FileStore(str(place / "store"), world)
    limit = timedelta(seconds=SECONDS_MAX)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    result = getattr(importlib.import_module(module), function)(place)
    (place / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()  # nobody leaves while another still needs an answer
    sys.stdout.flush()
    os._exit(0)  # gloo's threads do not always end by themselves


def _fork(module: str, groups: list[tuple[str, int]], directory: Path) -> None:
    import torch

    torch.set_num_threads(1)
    importlib.import_module(module)
    for function, world in groups:
        assert len(os.listdir("/proc/self/task")) == 1, "a fork takes only this thread along"
        place = directory / f"{function}-{world}"
        left = {_forked(module, function, rank, world, place) for rank in range(world)}
        while left:
            pid, status = os.wait()
            left.remove(pid)
            if status:
                sys.exit(f"a rank of {place.name} ended with status {status}")


def _forked(module: str, function: str, rank: int, world: int, place: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        with (place / f"{rank}.log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        _main(module, function, rank, world, place)
    except BaseException:  # a fork must never go on as its parent would
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    _fork(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
