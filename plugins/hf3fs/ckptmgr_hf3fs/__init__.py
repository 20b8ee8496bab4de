"""A 3FS store for ckptmgr."""

from __future__ import annotations
