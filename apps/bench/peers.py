"""Exact top-k kernels of others, for GPUs, where they are installed.

RTop-K (Xie et al., ICLR 2025) as the package `rtopk` builds it, and QuACK's (`quack-kernels`). Each
gives the values of a row and their places, as `torch.topk` does; neither takes part in anything
but the benchmark.
"""

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

# x [N, D], k -> values [N, k] and places [N, k]
TopKOfOthers = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def peers() -> dict[str, TopKOfOthers]:
    """Those that can be imported, by name."""
    found = {}
    for name, load in {"rtopk": _rtopk, "quack": _quack}.items():
        try:
            found[name] = load()
        except (ImportError, OSError):  # not installed, or built for another torch
            continue
    return found


def _rtopk() -> TopKOfOthers:
    rtopk = import_module("rtopk").rtopk
    # Its search ends at equality only: by default it ends earlier, and is approximate.
    return lambda x, k: rtopk(x, k, 10_000, 0.0)


def _quack() -> TopKOfOthers:
    return import_module("quack.topk").topk
