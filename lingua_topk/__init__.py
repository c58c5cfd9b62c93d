"""TopK language models: the operator, the patch, and what reads and steers them."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lingua_topk.config import TopKArgs
    from lingua_topk.ops import topk
    from lingua_topk.patch import TopKHandle, apply_topk, topk_handle

__version__ = "0.1.0"

__all__ = ["TopKArgs", "TopKHandle", "apply_topk", "topk", "topk_handle"]

_MODULES = {
    "TopKArgs": "config",
    "TopKHandle": "patch",
    "apply_topk": "patch",
    "topk": "ops",
    "topk_handle": "patch",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for.

    They bring torch, which takes seconds and 200 MB; what prepares data imports
    `lingua_topk.host` and `lingua_topk.errors`, and hence this file, and needs none of it.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
