"""A feed-forward whose gate is TopK (`site: mlp`)."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lingua_topk.nn import TopK
from lingua_topk.ops.gathered import GATE, gathered_gate, pays_off
from lingua_topk.sparse.copies import FeatureMajor, check_linear, could_gather, is_plain

_NAMES = ("w2", "w3")


class SparseFeedForward:
    """w2(TopK(w1 x) * w3 x) with the rows of w3 and the columns of w2 that the survivors meet."""

    def __init__(self, feed_forward: nn.Module, topk: TopK, where: str):
        for name in _NAMES:
            check_linear(getattr(feed_forward, name, None), f"{where}.feed_forward.{name}")
        self._feed_forward, self._topk = feed_forward, topk
        self.copy = FeatureMajor([feed_forward.w2])  # [F, D]

    @contextmanager
    def active(self) -> Iterator[None]:
        part = self._feed_forward
        if "forward" in vars(part) or part._compiled_call_impl is not None:
            yield  # what another has replaced or compiled is left to it
            return
        self.copy.forget_if_changed()
        part.forward = self._forward
        try:
            yield
        finally:
            del part.forward

    def _forward(self, x: Tensor) -> Tensor:
        """x and the result: [..., D]."""
        part = self._feed_forward
        gate = part.topk(part.w1(x))  # [..., F]
        if not self._gathers(gate):
            return part.w2(gate * part.w3(x))
        return gathered_gate(gate, x, part.w3.weight, self.copy.get())

    def _gathers(self, gate: Tensor) -> bool:
        w2, w3 = self._feed_forward.w2, self._feed_forward.w3
        return (
            self._topk.alpha == 0
            and could_gather(gate, w2.weight)
            and all(is_plain(one) and not _is_hooked(one) for one in (w2, w3))
            and pays_off(gate, w2.out_features + w3.in_features, self._topk.k, GATE)
        )


def _is_hooked(module: nn.Module) -> bool:
    # They are not called: what waits for their inputs or outputs would not be either.
    return bool(module._forward_hooks or module._forward_pre_hooks) or _has_any_global_hook()
