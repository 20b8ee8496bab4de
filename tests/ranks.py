"""Real processes with a process group on this host: `run_ranks("rank.worlds", "ddp", 2, tmp_path)`.

Each process imports the module, joins a gloo group and calls the function with the directory; what
the function returns travels back as JSON. Everything else goes through files in the directory.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
SECONDS_MAX = 150.0
"""For importing torch several times at once on a busy machine, and a few small steps."""


def run_ranks(
    module: str, function: str, world: int, directory: Path, *, seconds_max: float = SECONDS_MAX
) -> list[Any]:
    """What `function(directory)` of `module` returned on each rank; an AssertionError if it raised.

    No process is left when it returns.
    """
    place = directory / f"{function}-{world}"
    place.mkdir()
    processes = [_start(module, function, rank, world, place) for rank in range(world)]
    end = time.monotonic() + seconds_max
    try:
        for process in processes:
            process.wait(max(end - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        raise AssertionError("\n".join(_told(place, rank) for rank in range(world)))
    return [json.loads((place / f"{rank}.json").read_text()) for rank in range(world)]


def _start(
    module: str, function: str, rank: int, world: int, place: Path
) -> subprocess.Popen[bytes]:
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with (place / f"{rank}.log").open("wb") as log:
        arguments = [module, function, str(rank), str(world), str(place)]
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *arguments],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _told(place: Path, rank: int) -> str:
    return f"-- rank {rank}:\n{(place / f'{rank}.log').read_text()[-4000:]}"


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


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
