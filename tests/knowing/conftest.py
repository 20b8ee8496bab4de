"""An emulated 3FS mount, as the tests of the plugin have it."""

from __future__ import annotations

from hf3fs.conftest import mount

__all__ = ["mount"]
