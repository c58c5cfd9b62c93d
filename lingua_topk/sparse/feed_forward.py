"""A feed-forward whose gate is TopK (`site: mlp`)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from lingua_topk.nn import TopK
from lingua_topk.ops.gathered import GATE, gathered_gate, pays_off
from lingua_topk.sparse.copies import FeatureMajor
from lingua_topk.sparse.modules import (
    StandIn,
    check_linear,
    could_gather,
    holds,
    is_hooked,
    is_own,
    is_plain,
)

_NAMES = ("w2", "w3")


class SparseFeedForward:
    """w2(TopK(w1 x) * w3 x) with the rows of w3 and the columns of w2 that the survivors meet.

    ConfigError for a feed-forward without w2 and w3. topk: the one in it.
    """

    def __init__(self, feed_forward: nn.Module, topk: TopK, where: str):
        self._linears = {name: getattr(feed_forward, name, None) for name in _NAMES}
        for name, linear in self._linears.items():
            check_linear(linear, f"{where}.feed_forward.{name}")
        self._feed_forward, self._topk = feed_forward, topk
        self.copy = FeatureMajor([feed_forward.w2])  # [F, D]

    @contextmanager
    def active(self) -> Iterator[None]:
        part = self._feed_forward
        if not self._can_stand_in():
            yield  # what another has replaced or compiled is left to it
            return
        self.copy.forget_if_changed()
        part.forward = StandIn(part, self._forward)
        try:
            yield
        finally:
            del part.forward

    def _can_stand_in(self) -> bool:
        part = self._feed_forward
        return (
            holds(part, {"topk": self._topk, **self._linears})
            and all(map(is_plain, self._linears.values()))
            and is_own(part)
        )

    def _forward(self, x: Tensor) -> Tensor:
        """x and the result: [..., D]."""
        part = self._feed_forward
        gate = part.topk(part.w1(x))  # [..., F]
        if not self._gathers(gate):
            return part.w2(gate * part.w3(x))
        return gathered_gate(gate, x, part.w3.weight, self.copy.get())

    def _gathers(self, gate: Tensor) -> bool:
        w2, w3 = self._linears.values()
        return (
            could_gather(gate, w2.weight)
            and self._topk.alpha == 0
            # They are not called: what waits for their inputs or outputs would not be either.
            and not (is_hooked(w2) or is_hooked(w3))
            and pays_off(gate, w2.out_features + w3.in_features, self._topk.k, GATE)
        )
