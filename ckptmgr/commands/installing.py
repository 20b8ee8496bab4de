"""The command that installs the units of systemd/ (docs/systemd.md)."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from ckptmgr.commands.app import command
from ckptmgr.errors import CkptmgrError, UsageError

SHIPPED_COMMAND = "/usr/bin/ckptmgr"
SITE = "20-site.conf"
_PACKAGE = Path(__file__).parents[1]
_HIDDEN = ("/home/", "/root/", "/run/user/")
"""What ProtectHome= hides from the system's units: an interpreter there could not be started."""

_WORD = re.compile(r"[\w@%+=:,./-]+")
_NEXT_SYSTEM = """next: systemctl daemon-reload
      systemctl enable --now ckptmgr@UID.socket        for each uid that trains on this host
      systemctl enable --now ckptmgr-verify@JOB.timer  for each job in /etc/ckptmgr/jobs/JOB.env"""
_NEXT_USER = """next: systemctl --user daemon-reload
      systemctl --user enable --now ckptmgr.socket
      systemctl --user enable --now ckptmgr-verify@JOB.timer  for ~/.config/ckptmgr/jobs/JOB.env"""


@dataclass(frozen=True, slots=True)
class UnitFile:
    """A file to be installed: its name below the directory of units, and its text."""

    name: str
    text: str


@command
def install_units(
    user: Annotated[
        bool, typer.Option("--user", help="Those of this user, not those of the system.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell.")] = False,
    root: Annotated[
        Path, typer.Option(help="Install below this directory, as in an image.")
    ] = Path("/"),
    write_path: Annotated[
        list[Path] | None, typer.Option(help="Directory of file:// stores; may be repeated.")
    ] = None,
    run_as: Annotated[
        str, typer.Option(help="Owner of those stores, to run gc, verify and doctor as.")
    ] = "",
) -> None:
    """Install the systemd units, for this installation's interpreter; starts nothing.

    Files of that name are replaced, and drop-ins of other names are left alone.
    """
    if user and (write_path or run_as):
        raise UsageError(
            "--write-path and --run-as are for the system's units",
            hint="Leave out --user; a user's units see what the user sees.",
        )
    interpreter = sys.executable
    # That of a virtual environment may be a link to one elsewhere.
    if not user and any(
        p.startswith(_HIDDEN) for p in (interpreter, os.path.realpath(interpreter))
    ):
        raise UsageError(
            "is in a home directory, which the system's units can not see",
            subject=interpreter,
            hint="Install ckptmgr elsewhere, for example in /opt/ckptmgr, or use --user.",
        )
    files = [*shipped(interpreter, user=user), *site(write_path or [], run_as)]
    directory = root / units_directory(user=user)
    for file in files:
        typer.echo(f"{_install(directory / file.name, file.text, dry_run=dry_run)}")
    typer.echo(_NEXT_USER if user else _NEXT_SYSTEM)


def units_directory(*, user: bool) -> Path:
    """Where an administrator's units are, relative to the root of the system."""
    if not user:
        return Path("etc/systemd/system")
    home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(home, "systemd/user").relative_to("/")


def shipped(interpreter: str, *, user: bool) -> list[UnitFile]:
    """The units of this package, with the command that starts this installation."""
    start = f"{_word(interpreter)} -m ckptmgr.cli"
    here = [path for path in (_PACKAGE / "systemd", _PACKAGE.parent / "systemd") if path.is_dir()]
    if not here:
        raise CkptmgrError("the units are not part of this installation", subject=str(_PACKAGE))
    tops = [here[0] / ("user" if user else "system"), here[0] / "timers"]
    return [
        UnitFile(str(path.relative_to(top)), path.read_text().replace(SHIPPED_COMMAND, start))
        for top in tops
        for path in sorted(top.rglob("*"))
        if path.is_file()
    ]


def site(write_paths: list[Path], run_as: str) -> list[UnitFile]:
    """What only this site knows: where stores of files are, and whose they are."""
    for path in write_paths:
        if not path.is_absolute():
            raise UsageError("is not an absolute path", subject=str(path))
    # With a dash: a mount that is missing must not keep the daemon from starting.
    paths = "".join(f"ReadWritePaths=-{_word(str(path))}\n" for path in write_paths)
    owner = f"DynamicUser=no\nUser={_word(run_as)}\n" if run_as else ""
    head = "# Written by `ckptmgr install-units`; it is replaced by the next one.\n\n[Service]\n"
    found = {f"ckptmgr@.service.d/{SITE}": paths, f"ckptmgr-.service.d/{SITE}": owner + paths}
    return [UnitFile(name, head + text) for name, text in found.items() if text]


def _word(text: str) -> str:
    """`text` as one word of a unit file.

    Raises:
        UsageError: it would have to be quoted.
    """
    if not _WORD.fullmatch(text):
        raise UsageError("can not be written into a unit", subject=text)
    return text.replace("%", "%%")


def _install(path: Path, text: str, *, dry_run: bool) -> str:
    """Write a file unless it is as it should be; returns what was done, or would be."""
    try:
        old = path.read_text() if path.exists() else None
        if old == text:
            return f"unchanged  {path}"
        if not dry_run:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    except OSError as error:
        raise CkptmgrError(
            f"can not be written: {error.strerror}",
            subject=str(path),
            hint="Run it as root, or use --user for the units of this user.",
        ) from error
    return f"{'new' if old is None else 'replaced':<10} {path}"
