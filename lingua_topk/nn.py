"""The TopK module: the operator with its settings, in the place where a model calls it."""

import torch
from torch import Tensor, nn

from lingua_topk.anneal import kept_at
from lingua_topk.ops import topk, topk_sum
from lingua_topk.ops.backends import chosen
from lingua_topk.ops.topk import check_activation, check_alpha, check_k
from lingua_topk.stats import FiringStats


class TopK(nn.Module):
    """y = TopK(x) or, for a residual stream, y = TopK(h + update). No parameters, no buffers.

    Attributes:
        alpha: annealing coefficient in [0, 1]; a float, so that it is a part of no state
            dict. It moves every step; compiled models take it as an input.
        anneals_k: alpha above 0 keeps more than k, see `kept_at`, in place of a part of what is
            cut. Not for compiled models, which would be compiled again for every k.
        stats: counts what fires, or None.
    """

    def __init__(
        self, k: int, activation: str = "relu", alpha: float = 0.0, anneals_k: bool = False
    ):
        super().__init__()
        chosen()  # a backend that is not known is told before anything runs
        self.k = check_k(k)
        self.activation = check_activation(activation)
        self.alpha = float(check_alpha(alpha))
        self.anneals_k = anneals_k
        self.stats: FiringStats | None = None

    def forward(
        self, h: Tensor, update: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """h, update and the result: [..., D], floating dtypes; the result's is `dtype` if given.

        The sum is taken here, beside the selection, so that both can become one kernel; of half
        precision it is selected on in float32. Whoever takes it outside, to change it, hands it
        over in float32 and names the dtype of the stream.
        """
        if self.anneals_k:
            arguments = (kept_at(self.alpha, self.k, h.shape[-1]), 0.0, self.activation)
        else:
            arguments = (self.k, self.alpha, self.activation)
        y = topk(h, *arguments) if update is None else topk_sum(h, update, *arguments)
        y = y if dtype is None else y.to(dtype)
        if self.stats is not None:
            self.stats.update(y)
        return y

    def extra_repr(self) -> str:
        return f"k={self.k}, activation={self.activation}, alpha={self.alpha}"
