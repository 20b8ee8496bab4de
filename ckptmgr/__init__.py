"""ckptmgr: a fault-tolerant checkpoint manager for PyTorch training.

Save: capture -> hostbuffer | intake -> chunk -> codec -> pack -> store -> manifest -> commit
Back: catalog -> resume -> plan -> fetch -> verify -> hostbuffer | place
      (| is the boundary between the training process and the daemon)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptmgr.errors import CkptmgrError
from ckptmgr.keep import Keep

if TYPE_CHECKING:
    from ckptmgr.rank.checkpointer import Checkpointer
    from ckptmgr.rank.handle import SaveHandle
    from ckptmgr.rank.load import load

__version__ = "0.1.0"
__all__ = ["Checkpointer", "CkptmgrError", "Keep", "SaveHandle", "__version__", "load"]

_RANK_FACES = {
    "Checkpointer": "ckptmgr.rank.checkpointer",
    "SaveHandle": "ckptmgr.rank.handle",
    "load": "ckptmgr.rank.load",
}


def __getattr__(name: str) -> Any:
    """Import the faces that need torch only when they are asked for (1.7 s and 235 MiB)."""
    if name not in _RANK_FACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_RANK_FACES[name]), name)
