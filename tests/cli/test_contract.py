"""What every command has: help with exit statuses, JSON that is documented, one-line errors with a
hint, completion. A command that is new fails here until it has them all.
"""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from called import call, check_error
from ckptmgr.cli import app
from ckptmgr.commands.app import STATUS
from ckptmgr.types import Outcome
from cli.test_json import documented
from driven import PATIENCE_SECONDS, PYTHON_PATH, Daemon, Rank

COMMANDS = get_command(app).commands  # type: ignore[attr-defined]
ESCAPE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

WITHOUT_JSON = {"daemon", "install-units"}
"""Commands that print no result, or only what they do and what to do next."""

WRONG: dict[str, tuple[list[str], int, str]] = {
    "advise": (["/nothing", "--slots=7"], 2, "is not allowed"),
    "bench": (["--codec=pickle"], 2, "'pickle' is not a codec"),
    "daemon": (["--max-store-gbps=-1"], 2, "is not a limit"),
    "demo": (["--seed=many"], 2, "--seed"),
    "doctor": (["--every=often"], 2, "is not a time"),
    "drain": ([], 1, "no daemon answers"),
    "gc": (["/nothing", "--keep=0"], 2, "0 is not allowed"),
    "hold": (["/nothing", "first"], 4, "is not a ckptmgr store"),
    "install-units": (["--user", "--run-as=train"], 2, "are for the system's units"),
    "ls": (["s3://key:word@bucket"], 2, "carries credentials"),
    "prefetch": (["/nothing", "--ranks=0-x"], 2, "'0-x' names no ranks"),
    "release": (["/nothing", "1", "nonsense"], 4, "is not a ckptmgr store"),
    "report": (["/nothing"], 4, "is not a ckptmgr store"),
    "restore": (["/nothing", "--format=pickle"], 2, "'pickle' is not a format"),
    "show": (["nosuch://x"], 2, "no store is installed"),
    "status": (["--watch"], 2, "needs a terminal"),
    "verify": (["/nothing", "1", "--all"], 2, "a step or --all"),
    "watch": (["/nothing", "--to=/nowhere"], 2, "is not a directory"),
}
"""Command -> arguments that it must refuse, with which status, and a word of what it says."""


# ---- help, JSON, errors -----------------------------------------------------


@pytest.mark.parametrize("command", [[], *([name] for name in sorted(COMMANDS))])
def test_every_help_text_ends_with_the_exit_statuses(command: list[str]) -> None:
    found = CliRunner().invoke(app, [*command, "--help"])
    assert (found.exit_code, found.stderr) == (0, "")
    assert " ".join(found.stdout.split()).endswith(" ".join(STATUS.split()))
    assert not ESCAPE.search(found.stdout)


def test_the_help_of_the_program() -> None:
    found = call("--help")
    assert (found.status, found.err) == (0, "")
    assert found.out.startswith("Usage: ckptmgr [OPTIONS] COMMAND")
    assert not ESCAPE.search(found.out)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_and_argument_is_explained(name: str) -> None:
    assert COMMANDS[name].help
    told = [one for one in COMMANDS[name].params if not getattr(one, "hidden", False)]
    assert not [one.name for one in told if not getattr(one, "help", None)]


def test_every_command_prints_json_that_is_documented() -> None:
    having = {name for name, one in COMMANDS.items() if _has_json(one)}
    assert having == COMMANDS.keys() - WITHOUT_JSON, "give it --json, or a reason in WITHOUT_JSON"
    assert documented().keys() == having, "docs/cli-json.md has a section for each"


def _has_json(command: object) -> bool:
    return any("--json" in one.opts for one in command.params)  # type: ignore[attr-defined]


def test_every_command_has_a_wrong_input() -> None:
    assert WRONG.keys() == COMMANDS.keys(), "say in WRONG what the new command must refuse"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_wrong_input_is_one_line_and_a_hint(name: str) -> None:
    arguments, status, words = WRONG[name]
    found = call(name, *arguments)
    check_error(found, status, words, "\nhint: ")
    assert "word@" not in found.err


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() - {"bench"}))
def test_an_unknown_option_is_refused(name: str) -> None:
    """In which form is seen in test_cli.py: it is the parser's for all commands."""
    needed = ["x" for one in COMMANDS[name].params if one.required]
    found = CliRunner().invoke(app, [name, *needed, "--nonsense"])
    assert (found.exit_code, found.stdout) == (2, "")
    assert "No such option: --nonsense" in found.stderr


def test_no_arguments_at_all_ask_for_help() -> None:
    found = call()
    assert "Usage: ckptmgr" in found.out + found.err
    assert "Traceback" not in found.err


def test_the_bench_takes_its_options_as_they_are(tmp_path: Path) -> None:
    """Those that it does not know go to the measuring process, without `--` before them."""
    pytest.importorskip("torch")
    found = call("bench", "--mib=1", f"--directory={tmp_path}", "--nonsense=3")
    assert (found.status, found.out) == (2, "")
    assert "unrecognized arguments: --nonsense=3" in found.err


# ---- completion -------------------------------------------------------------


@pytest.fixture
def shell_path(tmp_path: Path) -> str:
    """A PATH with `ckptmgr` on it."""
    program = tmp_path / "ckptmgr"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ckptmgr.cli "$@"\n')
    program.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def in_shell(shell: str, script: str, path: str) -> str:
    done = subprocess.run(
        [shell, "-c", script],
        env={**os.environ, "PATH": path, "PYTHONPATH": PYTHON_PATH},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize(
    ("shell", "words"),
    [("bash", "complete -o default"), ("zsh", "#compdef ckptmgr"), ("fish", "complete --command")],
)
def test_completion_is_printed_for_each_shell(shell: str, words: str) -> None:
    found = call(_CKPTMGR_COMPLETE=f"source_{shell}")
    assert (found.status, found.err) == (0, "")
    assert words in found.out
    assert "_CKPTMGR_COMPLETE=complete_" in found.out
    assert "python" not in found.out


def test_a_shell_completes_the_names_of_commands_and_options(shell_path: str) -> None:
    script = """
        eval "$(ckptmgr --show-completion; true)"
        ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
                _ckptmgr_completion ckptmgr; echo "${COMPREPLY[@]}"; }
        ask ckptmgr re
        ask ckptmgr ''
        ask ckptmgr restore --f
    """
    some, every, option = in_shell("bash", script, shell_path).splitlines()
    assert some.split() == ["release", "report", "restore"]
    assert sorted(every.split()) == sorted(COMMANDS)
    assert option.split() == ["--format"]


def test_completion_is_installed(shell_path: str, tmp_path: Path) -> None:
    in_shell("bash", f"HOME={tmp_path} ckptmgr --install-completion; true", shell_path)
    assert "_ckptmgr_completion" in (tmp_path / ".bash_completions" / "ckptmgr.sh").read_text()
    assert "ckptmgr.sh" in (tmp_path / ".bashrc").read_text()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_the_script(shell: str, shell_path: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"NEEDS {shell}: what it makes of the script is not checked in this run")
    script = call(_CKPTMGR_COMPLETE=f"source_{shell}").out
    ready = "autoload -U compinit; compinit -u\n" if shell == "zsh" else ""
    in_shell(shell, ready + script, shell_path)


# ---- status --watch ---------------------------------------------------------


class Terminal:
    """`ckptmgr status --watch` on a terminal of its own."""

    def __init__(self, runtime: Path, columns: int, lines: int = 24) -> None:
        self._fd, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        given = {"CKPTMGR_RUNTIME_DIR": str(runtime), "PYTHONPATH": PYTHON_PATH}
        unset = {"COLUMNS", "LINES", "NO_COLOR"}
        kept = {name: value for name, value in os.environ.items() if name not in unset}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ckptmgr.cli", "status", "--watch"],
            env={**kept, **given, "TERM": "xterm-256color"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.seen = ""

    def await_text(self, words: str, since: int = 0) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while words not in self.seen[since:]:
            assert time.monotonic() < deadline, self.seen[since:]
            if select.select([self._fd], [], [], 1.0)[0]:
                self.seen += os.read(self._fd, 1 << 16).decode(errors="replace")

    def frames(self) -> list[list[str]]:
        """What was drawn so far, frame by frame, without what moves the cursor or colours."""
        drawn = re.split(r"\x1b\[H", self.seen)[1:]
        plain = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame) for frame in drawn]
        return [frame.replace("\r", "").split("\n") for frame in plain]

    def end(self) -> int:
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(PATIENCE_SECONDS)
        os.close(self._fd)
        return status


def test_watching_shows_what_changes_until_ctrl_c(
    runtime: Path, store_url: str, tmp_path: Path
) -> None:
    with Daemon(runtime) as daemon:
        terminal = Terminal(runtime, columns=50)
        terminal.await_text(f"daemon {daemon.process.pid}")
        with Rank(runtime, store_url) as rank:
            rank.save(1)
            assert rank.wait(1).outcome == Outcome.COMMITTED
            terminal.await_text("1.1 committed")
        daemon.end()
        terminal.await_text("no daemon answers")
    before = len(terminal.seen)
    with Daemon(runtime) as daemon:
        terminal.await_text(f"daemon {daemon.process.pid}", since=before)
        assert terminal.end() == 130
    assert all(len(line) <= 50 for frame in terminal.frames() for line in frame)
    assert terminal.seen.count("\x1b[?1049h") == 1
