"""Feature-major copies of weights, made when they are first used, and anew when weights change."""

import torch
from torch import Tensor, nn

from lingua_topk.errors import ConfigError


class FeatureMajor:
    """The weights [O, D] of some linear layers as one [D, sum of O]: a feature is a row of it."""

    def __init__(self, linears: list[nn.Linear]):
        self._linears = linears
        self._copy: Tensor | None = None
        self._made_of: list | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._copy is None else self._copy.nbytes

    def forget(self) -> None:
        self._copy = self._made_of = None

    def forget_if_changed(self) -> None:
        """Forget where a weight has been replaced, or changed in place under torch's eyes."""
        if self._copy is not None and self._made_of != self._sources():
            self.forget()

    def get(self) -> Tensor:
        """The copy, contiguous: [D, sum of O]."""
        if self._copy is None:
            weights = [linear.weight.detach() for linear in self._linears]
            self._copy = torch.cat(weights).t().contiguous()
            self._made_of = self._sources()
        return self._copy

    def _sources(self) -> list:
        weights = [linear.weight for linear in self._linears]
        if any(weight.is_inference() for weight in weights):
            return [object()]  # torch does not count their changes: never the same
        return [(w.data_ptr(), w._version, w.shape, w.stride(), w.dtype, w.device) for w in weights]


def check_linear(linear: nn.Module | None, where: str) -> None:
    """ConfigError for what is not an nn.Linear with a weight of its own and nothing else."""
    if type(linear) is nn.Linear and linear.bias is None and "weight" in linear._parameters:
        return
    kind = type(linear).__name__
    what = "an nn.Linear with more than a weight" if kind == "Linear" else f"a {kind}"
    raise ConfigError(
        f"{where} is {what}: decoding sparsely takes an nn.Linear without bias, of a model shaped"
        " like Lingua's; decode densely"
    )


def is_plain(linear: nn.Linear) -> bool:
    """Whether calling it is the product with its weight, here and now."""
    return (
        "forward" not in vars(linear)
        and linear._compiled_call_impl is None
        and type(linear.weight) is nn.Parameter  # not sharded
    )


def could_gather(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of x with weight may be one that has no gradient and casts nothing."""
    return (
        not torch.is_grad_enabled()
        and (x.dtype, x.device) == (weight.dtype, weight.device)
        and not torch.is_autocast_enabled(x.device.type)
    )
