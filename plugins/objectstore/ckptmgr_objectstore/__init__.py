"""Object stores for ckptmgr."""

from __future__ import annotations
