"""The tree keeps the house rules, and the rules see what they are for."""

from __future__ import annotations

import inspect
import re
from functools import cache
from pathlib import Path

import pytest

from ckptmgr import errors
from ckptmgr.errors import CkptmgrError
from tidy import IMPORTS, Fault, Source, faults_of, lines_of_code, read_tree

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    *("pyproject.toml", "ckptmgr", "plugins", "systemd", "tests", "docs"),
    *("README.md", "LICENSE", "Makefile"),
}
PROMISE = re.compile(r"^\W*G\d+\b", re.MULTILINE)
NAMED_TEST = re.compile(r"\btests/([\w/]+\.py)(?:::(\w+))?")


@cache
def sources() -> list[Source]:
    return read_tree(ROOT, "ckptmgr", "plugins", "tests")


def show(faults: list[Fault]) -> str:
    return "\n" + "\n".join(map(str, faults))


def test_the_tree_keeps_the_house_rules() -> None:
    faults = [fault for source in sources() for fault in faults_of(source)]
    assert not faults, show(faults)


def test_every_module_has_a_row_in_the_import_table_and_every_row_a_module() -> None:
    units = {source.module.split(".")[0] for source in sources() if source.in_package}
    modules = {source.module for source in sources() if source.in_package}
    assert units <= set(IMPORTS), "add the new unit to IMPORTS in tests/tidy.py"
    stale = {row for row in IMPORTS if row not in units | modules}
    assert not stale, f"IMPORTS in tests/tidy.py has rows without a module: {sorted(stale)}"


def test_the_top_level_holds_nothing_else() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    built = {"build", "dist", "shared"}  # what .gitignore names
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    extra = found - TOP_LEVEL - built
    assert not extra, f"move below one of {sorted(TOP_LEVEL)}: {sorted(extra)}"


# ---- errors -----------------------------------------------------------------


def drawn_errors(text: str) -> dict[str, tuple[str, int | None]]:
    """Read the tree at the top of errors.py: name -> (parent, exit status if it is written)."""
    tree: dict[str, tuple[str, int | None]] = {}
    above: list[str] = []
    for line in text.splitlines():
        match = re.match(r"^\s*((?:[| ] {2})*(?:\+- )?)(\w+Error)\b(?:\s+exit (\d+))?", line)
        if match is None:
            continue
        depth = len(match[1]) // 3
        above[depth:] = [match[2]]
        parent = above[depth - 1] if depth else "Exception"
        tree[match[2]] = (parent, int(match[3]) if match[3] else None)
    return tree


def error_faults(text: str, classes: dict[str, type[CkptmgrError]]) -> list[str]:
    drawn = drawn_errors(text)
    faults = [f"{name} is drawn but does not exist" for name in drawn if name not in classes]
    for name, kind in classes.items():
        if name not in drawn:
            faults.append(f"{name} is not in the tree at the top of errors.py")
            continue
        parent, status = drawn[name]
        if kind.__bases__[0].__name__ != parent:
            faults.append(f"{name} is drawn below {parent}, but derives from {kind.__bases__[0]}")
        if status not in {None, kind.exit_status}:
            faults.append(f"{name} is drawn with exit {status}, but has {kind.exit_status}")
    return faults


def error_classes() -> dict[str, type[CkptmgrError]]:
    return {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, CkptmgrError)
    }


def test_the_drawn_error_tree_is_the_real_one() -> None:
    faults = error_faults(errors.__doc__ or "", error_classes())
    assert not faults, "\n".join(faults)


def test_every_error_occurs_in_some_test() -> None:
    tests = "\n".join(
        source.text
        for source in sources()
        if source.path.startswith("tests/") and not source.path.endswith("test_tidy.py")
    )
    missing = [name for name in error_classes() if not re.search(rf"\b{name}\b", tests)]
    assert not missing, f"no test names {missing}: provoke each and check its type"


# ---- promises ---------------------------------------------------------------


def promise_faults(text: str, tests: dict[str, str]) -> list[str]:
    """Check that each promise names tests, and that every test named anywhere exists."""
    faults = []
    for path, name in NAMED_TEST.findall(text):
        if path not in tests:
            faults.append(f"tests/{path} does not exist")
        elif name and f"def {name}(" not in tests[path] and f"class {name}" not in tests[path]:
            faults.append(f"tests/{path} has no {name}")
    starts = [match.start() for match in PROMISE.finditer(text)]
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        block = text[start:end]
        if not any(name for _, name in NAMED_TEST.findall(block)):
            faults.append(f"promise without a test: {block.splitlines()[0].strip()}")
    return faults


def test_every_promise_names_tests_that_exist() -> None:
    page = ROOT / "docs" / "guarantees.md"
    if not page.exists():
        pytest.skip("docs/guarantees.md is not written yet")
    tests = {
        source.path.removeprefix("tests/"): source.text
        for source in sources()
        if source.path.startswith("tests/")
    }
    text = page.read_text()
    assert PROMISE.search(text), "docs/guarantees.md has no promise (a line that starts with G1)"
    faults = promise_faults(text, tests)
    assert not faults, "\n".join(faults)


# ---- the rules see what they are for ----------------------------------------

LONG_FUNCTION = "def f() -> None:\n" + "    f()\n" * 60
PLANTED = {
    "wrong direction": ("ckptmgr/store/a.py", "from ckptmgr.repository import pack", "imports"),
    "relative": ("ckptmgr/store/a.py", "from ..repository.pack import Pack", "imports"),
    "relative package": ("ckptmgr/store/a.py", "from .. import restore", "imports"),
    "in a function": (
        "ckptmgr/staging/a.py",
        "def f():\n    import ckptmgr.daemon.service",
        "imports",
    ),
    "type checking": (
        "ckptmgr/rank/a.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ckptmgr.store.base import S",
        "imports",
    ),
    "importlib": (
        "ckptmgr/cli.py",
        "import importlib\nimportlib.import_module('ckptmgr.rank.load')",
        "imports",
    ),
    "importlib, not constant": (
        "ckptmgr/cli.py",
        "import importlib\nN = {'x': 'ckptmgr.rank.load'}\nimportlib.import_module(N['x'])",
        "imports",
    ),
    "through the face": ("ckptmgr/daemon/a.py", "from ckptmgr import Checkpointer", "imports"),
    "the face in a layer": ("ckptmgr/store/a.py", "import ckptmgr", "imports"),
    "types import config": ("ckptmgr/types.py", "from ckptmgr.config import MIB", "imports"),
    "store imports staging": ("ckptmgr/store/a.py", "import ckptmgr.staging.values", "imports"),
    "unknown unit": ("ckptmgr/extra.py", "pass", "not in the import table"),
    "plugin above its seam": (
        "plugins/p/ckptmgr_p/a.py",
        "from ckptmgr.daemon.job import Job",
        "a plugin imports",
    ),
    "plugin with torch": ("plugins/p/ckptmgr_p/a.py", "import torch", "only ckptmgr/rank/"),
    "torch": ("ckptmgr/daemon/a.py", "import torch.nn as nn", "only ckptmgr/rank/"),
    "torch by importlib": (
        "ckptmgr/cli.py",
        "from importlib import import_module\nimport_module('torch')",
        "only ckptmgr/rank/",
    ),
    "pickle": ("ckptmgr/rank/a.py", "from pickle import loads", "runs code"),
    "marshal": ("ckptmgr/rank/a.py", "import marshal", "bad bytes"),
    "shelve": ("ckptmgr/rank/a.py", "import shelve", "pickles"),
    "eval": ("ckptmgr/rank/a.py", "eval('1')", "runs code"),
    "exec": ("ckptmgr/rank/a.py", "exec('1')", "runs code"),
    "torch.load": ("ckptmgr/rank/a.py", "import torch\ntorch.load('x')", "unpickles"),
    "allow_pickle": (
        "ckptmgr/rank/a.py",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "never unpickle",
    ),
    "fdatasync": ("ckptmgr/store/a.py", "import os\nos.fdatasync(3)", "use os.fsync"),
    "fsync of a file": ("ckptmgr/store/a.py", "import os\nos.fsync(f.fileno())", "buffered"),
    "rename": ("ckptmgr/store/a.py", "import os\nos.rename('a', 'b')", "os.link"),
    "replace": ("ckptmgr/store/a.py", "import os\nos.replace('a', 'b')", "os.link"),
    "Path.rename": ("ckptmgr/store/a.py", "path.rename(other)", "os.link"),
    "bare except": ("ckptmgr/cli.py", "try:\n    f()\nexcept:\n    raise", "bare except"),
    "broad except": (
        "ckptmgr/cli.py",
        "try:\n    f()\nexcept Exception:  # noqa: BLE001\n    g()",
        "does not raise again",
    ),
    "broad except in a tuple": (
        "ckptmgr/cli.py",
        "try:\n    f()\nexcept (ValueError, BaseException):\n    g()",
        "does not raise again",
    ),
    "sleep": ("ckptmgr/rank/a.py", "import time\ntime.sleep(1)", "wait for an event"),
    "sleep by name": ("ckptmgr/rank/a.py", "from time import sleep", "wait for an event"),
    "unfinished": ("ckptmgr/cli.py", "# TODO: later", "unfinished"),
    "unfinished test": ("tests/test_a.py", "x = 1  # FIXME", "unfinished"),
    "print": ("ckptmgr/rank/a.py", "print('x')", "calls print"),
    "vague class": ("ckptmgr/rank/a.py", "class StepManager:\n    pass", "says nothing"),
    "vague suffix": ("ckptmgr/rank/a.py", "class LeafMetadata:\n    pass", "says nothing"),
    "vague module": ("ckptmgr/rank/torch_utils.py", "pass", "says nothing"),
    "no docstring": ("ckptmgr/rank/a.py", "", "no module docstring"),
    "long file": ("tests/test_a.py", "x = 1\n" * 500, "501 lines"),
    "long line": ("tests/test_a.py", "x = '" + "a" * 100 + "'", "columns"),
    "long function": ("tests/test_a.py", LONG_FUNCTION, "61 lines of code"),
}
GOOD = {
    "own package": ("ckptmgr/store/a.py", "from ckptmgr.store.base import Store"),
    "relative": ("ckptmgr/store/a.py", "from .base import Store\nfrom ..errors import StoreError"),
    "plugin": ("plugins/p/ckptmgr_p/a.py", "from ckptmgr.store.base import Store"),
    "torch in rank": ("ckptmgr/rank/a.py", "import torch"),
    "version": ("ckptmgr/cli.py", "from ckptmgr import __version__, errors"),
    "prefix of a name": ("ckptmgr/daemon/a.py", "import torchlike, pickled"),
    "raises again": ("ckptmgr/cli.py", "try:\n    f()\nexcept Exception as e:\n    raise V from e"),
    "reasoned": (
        "ckptmgr/cli.py",
        "try:\n    f()\nexcept Exception:  # noqa: BLE001 - a bad plugin must not end us\n    g()",
    ),
    "str.replace": ("ckptmgr/store/a.py", "'a'.replace('a', 'b')"),
    "fsync of a descriptor": ("ckptmgr/store/a.py", "import os\nos.fsync(descriptor)"),
    "clear names": ("ckptmgr/rank/a.py", "class DataLoader:\n    pass\nclass HTTP:\n    pass"),
    "words in strings": ("ckptmgr/rank/a.py", "X = 'eval print TODO pickle'"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_caught(name: str) -> None:
    path, code, expected = PLANTED[name]
    text = code if name == "no docstring" else f'"""A module."""\n{code}\n'
    if path.startswith("tests/"):
        text = f"{code}\n"
    messages = [str(fault) for fault in faults_of(Source(path, text))]
    assert any(expected in message for message in messages), messages
    assert len(messages) == 1, f"one fault, several reports: {messages}"


@pytest.mark.parametrize("name", GOOD)
def test_good_code_is_left_alone(name: str) -> None:
    path, code = GOOD[name]
    assert faults_of(Source(path, f'"""A module."""\n{code}\n')) == []


def test_lines_of_code_leave_out_docstring_comments_and_blank_lines() -> None:
    text = (
        'def f():\n    """Doc.\n\n    More.\n    """\n\n    # why\n    return (\n        1\n    )\n'
    )
    source = Source("tests/test_a.py", text)
    assert lines_of_code(source, source.tree.body[0]) == 4  # type: ignore[arg-type]


def test_a_wrong_error_tree_is_caught() -> None:
    text = errors.__doc__ or ""
    classes = error_classes()
    assert error_faults(text.replace("TornSnapshotError ", "TornError "), classes)
    assert error_faults(text.replace("|  +- StepOrderError", "+- StepOrderError"), classes)
    assert error_faults(text.replace("exit 6", "exit 9"), classes)
    assert error_faults(text, {**classes, "NewError": CkptmgrError})


def test_a_promise_without_a_real_test_is_caught() -> None:
    tests = {"test_a.py": "def test_x() -> None: ..."}
    assert promise_faults("| G1 atomic | `tests/test_a.py::test_x` |", tests) == []
    assert promise_faults("| G1 atomic | tests |", tests)
    assert promise_faults("| G1 atomic | `tests/test_a.py` |", tests)
    assert promise_faults("| G1 atomic | `tests/test_a.py::test_y` |", tests)
    assert promise_faults("| G1 atomic | `tests/test_b.py::test_x` |", tests)
    assert promise_faults("## G1 a\n`tests/test_a.py::test_x`\n## G2 b\nno test", tests)
