"""Feature-major copies of weights, made when they are first used, and anew when weights change."""

import weakref

import torch
from torch import Tensor, nn


class FeatureMajor:
    """The weights [O, D] of some linear layers as one [D, sum of O]: a feature is a row of it."""

    def __init__(self, linears: list[nn.Linear]):
        self._linears = linears
        self._copy: Tensor | None = None
        self._made_of: list[tuple[weakref.ref, tuple]] = []

    @property
    def nbytes(self) -> int:
        return 0 if self._copy is None else self._copy.nbytes

    def forget(self) -> None:
        self._copy, self._made_of = None, []

    def forget_if_changed(self) -> None:
        """Forget where a weight is another, or was changed in a way that leaves a trace."""
        weights = [linear.weight for linear in self._linears]
        # One that was replaced may have left its memory to the next, so the tensor itself counts.
        if any(
            made_of() is not weight or trace != _trace(weight)
            for (made_of, trace), weight in zip(self._made_of, weights, strict=False)
        ):
            self.forget()

    def get(self) -> Tensor:
        """The copy, contiguous: [D, sum of O]."""
        if self._copy is None:
            weights = [linear.weight for linear in self._linears]
            self._copy = torch.cat([weight.detach() for weight in weights]).t().contiguous()
            self._made_of = [(weakref.ref(weight), _trace(weight)) for weight in weights]
        return self._copy


def _trace(weight: Tensor) -> tuple:
    # Of what is made in inference mode torch counts no changes.
    return weight.data_ptr(), None if weight.is_inference() else weight._version
