"""A stand-in for the platform's package, which is not public."""

from __future__ import annotations
