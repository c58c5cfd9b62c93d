"""The q, k and v of a block behind a TopK block."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from lingua_topk.nn import TopK
from lingua_topk.ops.gathered import gathered, pays_off
from lingua_topk.sparse.copies import FeatureMajor
from lingua_topk.sparse.modules import (
    StandIn,
    check_linear,
    could_gather,
    holds,
    is_hooked,
    is_plain,
)

_NAMES = ("wq", "wk", "wv")


@dataclass
class _Pending:
    """What of a fused product has not been asked for yet."""

    x: Tensor  # held, so that no other tensor gets its memory meanwhile
    results: dict[str, Tensor]

    def take(self, name: str, x: Tensor) -> Tensor | None:
        """The result of that projection of x, once; None where it is not of this x."""
        # Not `is`: Lingua's own attention gives each of them a view of its own.
        return self.results.pop(name, None) if x.is_set_to(self.x) else None


class SparseProjections:
    """When q is asked for, all three are taken of one fused weight, and the others wait.

    ConfigError for an attention without the three of them. topk: the one in the block before.
    """

    def __init__(self, block: nn.Module, before: nn.Module, topk: TopK, where: str):
        self._attention = getattr(block, "attention", None)
        self._linears = {name: getattr(self._attention, name, None) for name in _NAMES}
        for name, linear in self._linears.items():
            check_linear(linear, f"{where}.attention.{name}")
        self._before, self._topk = before, topk
        self.copy = FeatureMajor(list(self._linears.values()))  # [D, Oq + Ok + Ov]
        self._pending: _Pending | None = None

    @contextmanager
    def active(self) -> Iterator[None]:
        if not self._can_stand_in():
            yield  # what another has replaced or compiled is left to it
            return
        self.copy.forget_if_changed()
        forwards = (self._queries, self._keys, self._values)
        for linear, forward in zip(self._linears.values(), forwards, strict=True):
            linear.forward = StandIn(linear, forward)
        try:
            yield
        finally:
            self._pending = None
            for linear in self._linears.values():
                del linear.forward

    def _can_stand_in(self) -> bool:
        return (
            holds(self._before, {"topk": self._topk})
            and holds(self._attention, self._linears)
            and all(map(is_plain, self._linears.values()))
        )

    def _queries(self, x: Tensor) -> Tensor:
        """x: [..., D], as all three take it."""
        self._pending = None
        if self._gathers(x):
            sizes = [linear.out_features for linear in self._linears.values()]
            found = gathered(x, self.copy.get()).split(sizes, dim=-1)
            self._pending = _Pending(x, dict(zip(_NAMES, found, strict=True)))
        return self._taken("wq", x)

    def _keys(self, x: Tensor) -> Tensor:
        return self._taken("wk", x)

    def _values(self, x: Tensor) -> Tensor:
        return self._taken("wv", x)

    def _taken(self, name: str, x: Tensor) -> Tensor:
        found = None if self._pending is None else self._pending.take(name, x)
        return F.linear(x, self._linears[name].weight) if found is None else found

    def _gathers(self, x: Tensor) -> bool:
        linears = self._linears.values()
        return (
            could_gather(x, self._linears["wq"].weight)
            and self._topk.alpha == 0
            # A hook of one of them may change x, in place too, behind the product of all three.
            and not any(map(is_hooked, linears))
            and pays_off(x, sum(linear.out_features for linear in linears), self._topk.k)
        )
