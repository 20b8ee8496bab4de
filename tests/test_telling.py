"""What does not stop training is told, whatever becomes of warnings."""

from __future__ import annotations

import sys
import warnings

import pytest

from ckptmgr.telling import tell


def test_a_warning_names_who_is_warned_of() -> None:
    with pytest.warns(RuntimeWarning, match="^ckptmgr: step 3 was lost$") as caught:
        tell("step 3 was lost")
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_is_written_instead(capsys: pytest.CaptureFixture[str]) -> None:
    tell("step 3 was lost")
    assert capsys.readouterr().err == "ckptmgr: step 3 was lost\n"


@pytest.mark.parametrize("stderr", [None, open])
def test_nothing_is_raised_where_nobody_can_be_told(
    stderr: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("the log is full")

    monkeypatch.setattr(warnings, "warn", refuse)
    monkeypatch.setattr(sys, "stderr", stderr)
    tell("step 3 was lost")
