"""`restore` and `verify` of a step that two ranks wrote, through a real daemon."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from called import call
from ckptmgr.config import open_private_dir
from ckptmgr.types import Outcome
from crash.content import content
from driven import Daemon, Rank
from small_step import read_safetensors

NBYTES = 1 << 20


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A store with step 1 of two ranks."""
    runtime = Path(f"/dev/shm/ckptmgr-test-{secrets.token_hex(6)}")
    open_private_dir(runtime)
    store = tmp_path_factory.mktemp("made") / "store"
    url = f"file://{store}"
    with (
        Daemon(runtime),
        Rank(runtime, url, world=2) as first,
        Rank(runtime, url, rank=1, world=2, first=first) as second,
    ):
        for rank in (first, second):
            rank.save(1)
        for rank in (first, second):
            assert rank.wait(1).outcome == Outcome.COMMITTED
    yield store
    shutil.rmtree(runtime)


def test_safetensors_hold_what_each_rank_had(made: Path, tmp_path: Path) -> None:
    found = call("restore", made, "--to", tmp_path / "out", "--json")
    assert found.status == 0, found
    assert found.document["files"] == ["state.safetensors", "values-1.json", "values.json"]
    tensors = read_safetensors(tmp_path / "out" / "state.safetensors")
    raw = content(1, 1, NBYTES).tobytes()
    for prefix in ("", "ranks/1/"):
        assert tensors[f"{prefix}words"][2] + tensors[f"{prefix}floats"][2] == raw
    assert len(tensors) == 4


def test_torch_files_hold_what_each_rank_had(made: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    found = call("restore", made, "--to", tmp_path / "out", "--format", "torch", "--json")
    assert found.status == 0, found
    assert found.document["files"] == ["ranks/1/state.pt", "state.pt"]
    for name in found.document["files"]:
        state = torch.load(tmp_path / "out" / name, weights_only=False)
        words = state["words"].numpy().tobytes() + state["floats"].numpy().tobytes()
        assert words == content(1, 1, NBYTES).tobytes()


def test_verify_names_the_part_of_any_rank(made: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made, store)
    assert call("verify", store).status == 0
    (pack,) = (store / "data/00000001/000000000001/000001").iterdir()
    blob = bytearray(pack.read_bytes())
    blob[5000] ^= 1
    pack.write_bytes(blob)
    found = call("verify", store, "--json")
    assert found.status == 3
    (damage,) = found.document[0]["damage"]
    assert damage["key"] == str(pack.relative_to(store))
