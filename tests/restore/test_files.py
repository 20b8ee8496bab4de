"""Files for other programs: what the safetensors library reads is what was saved, or a refusal."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy

from ckptmgr.errors import CkptmgrError, UnsupportedLeafError, UsageError
from ckptmgr.repository.budget import BufferPool
from ckptmgr.repository.catalog import Catalog
from ckptmgr.repository.manifest import Manifest
from ckptmgr.restore.files import (
    SAFETENSORS_DTYPES,
    new_directory,
    safetensors_header,
    write_hostbuffer,
    write_safetensors,
)
from ckptmgr.restore.joined import Tensor
from ckptmgr.staging.hostbuffer import HostBuffer
from ckptmgr.staging.layout import encode_layout
from ckptmgr.store.base import Store
from ckptmgr.types import PAGE_BYTES, Group, Layout, Leaf
from processes import needs_root
from small_step import (
    Encoded,
    commit_encoded,
    made_in_memory,
    memory_store,
    read_safetensors,
    same_bits,
    save_steps,
    small_state,
)

SAVED, OBJECTS = made_in_memory(save_steps)
NEWEST = SAVED[-1]


def manifest_in(store: Store) -> Manifest:
    return asyncio.run(Catalog(store).manifest(NEWEST.decision, 0)).manifest


def write(store: Store, manifest: Manifest, directory: Path) -> list[Path]:
    return asyncio.run(
        write_safetensors(store, [manifest], directory, BufferPool(1), lambda _: None)
    )


def written(state: dict[Any, Any], directory: Path) -> Any:
    """The values of a state, as a JSON parser without extensions reads them."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    saved, objects = made_in_memory(partial(save_steps, steps=(1,), state=lambda _: state))
    store = memory_store(objects)
    manifest = asyncio.run(Catalog(store).manifest(saved[-1].decision, 0)).manifest
    _, values = write(store, manifest, directory)
    return json.loads(values.read_text(), parse_constant=refuse)


def test_numbers_that_json_has_not_are_text(tmp_path: Path) -> None:
    lr = [float("nan"), float("-inf"), 0.5]
    assert written({"lr": lr}, tmp_path)["lr"] == ["nan", "-inf", 0.5]


def test_keys_that_are_one_as_text_are_refused_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLeafError, match="can not tell apart") as caught:
        written({"of": {"each": {1: "number", "1": "text"}}}, tmp_path)
    assert caught.value.subject == "state/of/each"
    assert caught.value.hint == "Use --format torch."


def test_the_library_reads_what_was_saved(tmp_path: Path) -> None:
    store = memory_store(OBJECTS)
    state, values = write(store, manifest_in(store), tmp_path)
    assert same_bits(tmp_path, NEWEST)
    loaded = safetensors.numpy.load_file(state)
    assert set(loaded) == set(NEWEST.arrays)
    for path, array in NEWEST.arrays.items():
        assert loaded[path].dtype == array.dtype
        assert loaded[path].shape == array.shape
        assert loaded[path].tobytes() == array.tobytes()
    plain = json.loads(values.read_text())
    assert plain["step"] == 20
    assert plain["note"] == small_state(20)["note"]
    assert plain["net"]["weight"] == {"tensor": "net/weight"}


def of_every_dtype() -> tuple[Encoded, dict[str, bytes]]:
    """A leaf of each dtype that safetensors has, with random bits, odd shapes and none."""
    rng, data, leaves, raw = np.random.default_rng(1), bytearray(), [], {}
    for name, code in SAFETENSORS_DTYPES.items():
        digits = re.search("[0-9]+", code)
        itemsize = int(digits[0]) // 8 if digits else 1
        for shape in ((3, 5), (), (0, 4), (1,)):
            data += bytes(-len(data) % 16)
            count = int(np.prod(shape))
            bits = rng.integers(0, 2 if name == "bool" else 256, count * itemsize, np.uint8)
            path = f"{name}/{'x'.join(map(str, shape)) or 'scalar'}"
            leaves.append(Leaf(path, name, shape, len(data), bits.nbytes))
            raw[path] = bits.tobytes()
            data += raw[path]
    data += bytes(-len(data) % PAGE_BYTES)
    layout = Layout(tuple(leaves), (Group(0, len(data), 1, False),), len(data), b"\xc0")
    return Encoded(layout, encode_layout(layout), b"\x90", bytes(data)), raw


def test_every_dtype_of_the_format_keeps_its_bits(tmp_path: Path) -> None:
    encoded, raw = of_every_dtype()

    async def save() -> tuple[Store, Manifest]:
        store = memory_store({})
        (first,) = await save_steps(store, (1,))
        decision = await commit_encoded(store, 1, first.decision.nonce, 2, encoded)
        return store, (await Catalog(store).manifest(decision, 0)).manifest

    store, manifest = asyncio.run(save())
    path, _ = write(store, manifest, tmp_path)
    found = read_safetensors(path)
    assert {name: entry[2] for name, entry in found.items()} == raw
    for leaf in encoded.layout.leaves:
        assert found[leaf.path][:2] == (SAFETENSORS_DTYPES[leaf.dtype], leaf.shape)
    with safetensors.safe_open(path, framework="numpy") as opened:
        assert set(opened.keys()) == set(raw)
        assert opened.metadata()["step"] == "1.2"


def tensor(name: str, dtype: str) -> Tensor:
    return Tensor(name, dtype, (1,), 1)


REFUSED: list[tuple[Tensor, ...]] = [
    (tensor("x", "complex128"),),
    (tensor("x", "qint8"),),
    (tensor("x", ""),),
    (tensor("same", "int8"), tensor("same", "int8")),
    (tensor("__metadata__", "int8"),),
]


@pytest.mark.parametrize("tensors", REFUSED, ids=range(len(REFUSED)))
def test_what_the_format_can_not_hold_is_refused_with_its_name(tensors: tuple[Tensor, ...]) -> None:
    with pytest.raises(UnsupportedLeafError, match=tensors[0].name):
        safetensors_header(tensors, {})


def test_a_host_buffer_holds_the_step(tmp_path: Path) -> None:
    store = memory_store(OBJECTS)
    path = asyncio.run(
        write_hostbuffer(store, manifest_in(store), tmp_path, BufferPool(1), lambda _: None)
    )
    with HostBuffer.open(path) as buffer:
        (snapshot,) = buffer.snapshots()
        assert (snapshot.id, snapshot.rank, snapshot.world) == (NEWEST.id, 0, 1)
        table = buffer.table(snapshot)
        assert table.layout == NEWEST.encoded.layout_bytes
        assert table.values == NEWEST.encoded.values
        assert table.tags == NEWEST.decision.tags
        with buffer.data(0) as data:
            assert bytes(data[: snapshot.data_bytes]) == NEWEST.encoded.data


# -- the directory --------------------------------------------------------------------------------


def test_the_directory_appears_when_everything_is_in_it(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_directory(target) as directory:
        (directory / "file").write_text("x")
        assert not target.exists()
        assert directory.parent == target.parent, "a rename must not cross file systems"
    assert (target / "file").read_text() == "x"
    assert os.listdir(target.parent) == ["out"]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    with new_directory(tmp_path) as directory:
        (directory / "file").write_text("x")
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_to_an_empty_directory_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "disk/empty").mkdir(parents=True)
    link = tmp_path / "out"
    link.symlink_to("disk/empty")
    with new_directory(link) as directory:
        (directory / "file").write_text("x")
    assert link.is_symlink()
    assert os.listdir(tmp_path / "disk/empty") == ["file"]
    assert os.listdir(tmp_path / "disk") == ["empty"]


def test_what_can_not_be_replaced_at_the_end_is_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is the working directory"), new_directory(Path()):
        pytest.fail("entered")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    with pytest.raises(UsageError, match="mount point"), new_directory(tmp_path / "disk"):
        pytest.fail("entered")
    assert os.listdir(tmp_path) == ["disk"]


def test_after_an_error_there_is_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with suppress(ZeroDivisionError), new_directory(target) as directory:
        (directory / "file").write_text("x")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("what", ["a full directory", "a file", "a link to a full directory"])
def test_what_is_there_is_not_touched(tmp_path: Path, what: str) -> None:
    target, full = tmp_path / "out", tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("x")
    if what == "a file":
        target.write_text("precious")
    elif what == "a full directory":
        full.rename(target)
    else:
        target.symlink_to(full)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UsageError, match="not an empty directory"), new_directory(target):
        pytest.fail("entered")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_leaf_whose_shape_is_not_its_bytes_is_refused(tmp_path: Path) -> None:
    """No capture makes one; a forged manifest may hold it, and must not become a broken file."""
    store = memory_store(OBJECTS)
    manifest = manifest_in(store)
    layout = manifest.read_layout()
    leaves = tuple(msgspec.structs.replace(leaf, shape=(77,)) for leaf in layout.leaves)
    forged = encode_layout(msgspec.structs.replace(layout, leaves=leaves))
    with pytest.raises(CkptmgrError, match="safetensors does not read"):
        write(store, msgspec.structs.replace(manifest, layout=forged), tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system that is smaller than a step."""
    needs_root()
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.root
def test_a_full_disk_is_an_error_and_no_crash(small_disk: Path) -> None:
    """The file is written through a mapping: a page that can not be had would be SIGBUS."""
    store = memory_store(OBJECTS)
    manifest: Any = manifest_in(store)
    with (
        pytest.raises(CkptmgrError, match="can not be written"),
        new_directory(small_disk / "out") as directory,
    ):
        write(store, manifest, directory)
