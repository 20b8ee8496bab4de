"""Tell people of what does not stop training: a warning that raises nowhere."""

from __future__ import annotations

import contextlib
import sys
import warnings


def tell(why: str, stacklevel: int = 1) -> None:
    """Warn, as from `stacklevel` calls above the caller; 1 is the caller itself.

    Where warnings are errors (`python -W error`) it is written to stderr instead: a thread that
    died of its own warning could not do what it is there for, nor tell anybody.
    """
    text = f"ckptmgr: {why}"
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=stacklevel + 1)
    except Exception:  # noqa: BLE001 - a warning made an error, or whatever a hook of users raises
        with contextlib.suppress(Exception):  # None, or closed
            sys.stderr.write(f"{text}\n")
