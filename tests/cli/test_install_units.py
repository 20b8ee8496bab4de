"""`ckptmgr install-units`: which files, where, with which interpreter. On a real systemd:
tests/systemd.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest

from called import call
from ckptmgr.commands.installing import SHIPPED_COMMAND, shipped, site, units_directory
from ckptmgr.errors import UsageError
from driven import TREE

ELSEWHERE = "/opt/ckptmgr/bin/python3"


def test_every_unit_of_the_tree_is_installed_and_none_with_another_command() -> None:
    files = [*shipped(ELSEWHERE, user=False), *shipped(ELSEWHERE, user=True)]
    names = {Path(file.name).name for file in files}
    assert names == {path.name for path in (TREE / "systemd").rglob("*") if path.is_file()}
    assert not [file.name for file in files if SHIPPED_COMMAND in file.text]
    assert sum(f"ExecStart={ELSEWHERE} -m ckptmgr.cli " in file.text for file in files) == 8


def test_they_are_in_the_wheel_and_in_the_source_distribution() -> None:
    build = tomllib.loads((TREE / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
        "targets"
    ]
    assert build["wheel"]["force-include"] == {"systemd": "ckptmgr/systemd"}
    assert "systemd" in build["sdist"]["include"]


def test_a_site_s_paths_and_owner_are_drop_ins() -> None:
    files = {file.name: file.text for file in site([Path("/data/50%")], "train")}
    daemon, jobs = (
        files["ckptmgr@.service.d/20-site.conf"],
        files["ckptmgr-.service.d/20-site.conf"],
    )
    assert "ReadWritePaths=-/data/50%%\n" in daemon
    assert "User=" not in daemon, "each is the daemon of its own user"
    assert "DynamicUser=no\nUser=train\nReadWritePaths=-/data/50%%\n" in jobs
    assert site([], "") == [], "an upgrade leaves them alone"


def test_a_second_time_changes_nothing(tmp_path: Path) -> None:
    told = call("install-units", "--user", "--dry-run", "--root", tmp_path).out
    assert "new " in told
    assert not list(tmp_path.iterdir())
    first = call("install-units", "--user", "--root", tmp_path).out
    assert first == told
    directory = tmp_path / units_directory(user=True)
    text = (directory / "ckptmgr.service").read_text()
    assert f"ExecStart={sys.executable} -m ckptmgr.cli daemon" in text
    again = call("install-units", "--user", "--root", tmp_path).out
    assert again == first.replace("new      ", "unchanged")
    (directory / "ckptmgr.service").write_text("mine")
    assert (
        f"replaced   {directory}/ckptmgr.service"
        in call("install-units", "--user", "--root", tmp_path).out
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--user", "--run-as=train"], "are for the system's units"),
        (["--root={tmp}", "--write-path=data"], "is not an absolute path"),
        (["--root={tmp}", "--write-path=/my data"], "can not be written into a unit"),
        (["--user", "--root={tmp}/file"], "can not be written: Not a directory"),
    ],
)
def test_what_makes_no_sense_is_told(tmp_path: Path, arguments: list[str], told: str) -> None:
    (tmp_path / "file").touch()
    found = call("install-units", *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert found.status in (1, 2)
    assert told in found.err or "home directory" in found.err
    assert "Traceback" not in found.err


@pytest.mark.parametrize("place", ["/home/me/venv/bin/python", "/root/venv/bin/python"])
def test_an_interpreter_that_the_units_can_not_see_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    from ckptmgr.commands.installing import install_units

    monkeypatch.setattr(sys, "executable", place)
    with pytest.raises(UsageError, match="home directory"):
        install_units(root=tmp_path)
    assert not list(tmp_path.iterdir())
