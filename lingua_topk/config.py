"""The `model.topk` section of a config."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Optional

from lingua_topk.anneal import ANNEALED, SCHEDULES
from lingua_topk.errors import ConfigError
from lingua_topk.ops.topk import check_activation, check_k

SITES = ("residual", "mlp")


@dataclass
class TopKArgs:
    """Where TopK stands in a model, what it keeps, and how it is annealed.

    The defaults are the published ones (arXiv 2506.21468).
    """

    # Components of a row that survive.
    k: int = 64
    # The last blocks of the model that stay as they are; not used with `layers`.
    n_last_nontopk: int = 2
    # "residual": at the end of the block. "mlp": in place of the feed-forward's SiLU.
    site: str = "residual"
    # f: relu, identity, gelu or silu.
    activation: str = "relu"
    # Share of the training steps over which alpha falls from 1 to 0.
    anneal_ratio: float = 0.2
    # How it falls: linear, cosine, exponential or step.
    anneal_schedule: str = "linear"
    # What it softens. "alpha": of a row, what is not selected is scaled by alpha. "k": it is cut,
    # and k falls from the width of the row, geometrically.
    annealed: str = "alpha"
    # The blocks that get TopK, by index, in place of all but the last `n_last_nontopk`.
    layers: Optional[list[int]] = None  # noqa: UP045 (OmegaConf 2.3 reads this spelling only)
    # A neuron that did not fire for this many tokens, all processes counted, is dead.
    dead_window: int = 10_000_000

    def validate(self, n_layers: int | None = None) -> None:
        """Raise ConfigError for the first field that is out of range.

        `n_layers` is the number of blocks of the model, where it is known already.
        """
        check_k(self.k, "model.topk.k")
        _check_least("model.topk.n_last_nontopk", self.n_last_nontopk, 0)
        _check_choice("model.topk.site", self.site, SITES)
        check_activation(self.activation, "model.topk.activation")
        _check_share("model.topk.anneal_ratio", self.anneal_ratio)
        _check_choice("model.topk.anneal_schedule", self.anneal_schedule, tuple(SCHEDULES))
        _check_choice("model.topk.annealed", self.annealed, ANNEALED)
        _check_layers(self.layers)
        _check_least("model.topk.dead_window", self.dead_window, 1)
        if n_layers is not None:
            self.topk_layers(n_layers)

    def topk_layers(self, n_layers: int) -> tuple[int, ...]:
        """The indices of the blocks that get TopK, rising; ConfigError if there is none."""
        _check_layers(self.layers)
        if n_layers < 1:
            raise ConfigError(f"model.n_layers={n_layers} is too small: give at least 1")
        if self.layers is None:
            chosen = tuple(range(n_layers - self.n_last_nontopk))
            if not chosen:
                raise ConfigError(
                    f"model.topk.n_last_nontopk={self.n_last_nontopk} leaves no TopK block in a"
                    f" model of {n_layers}: give at most {n_layers - 1}"
                )
            return chosen
        if max(self.layers) >= n_layers:
            raise ConfigError(
                f"model.topk.layers={list(self.layers)} names a block that this model of"
                f" {n_layers} does not have: give indices in 0..{n_layers - 1}"
            )
        return tuple(sorted(self.layers))


def _check_choice(field: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{field}={value!r} is not known: choose one of {', '.join(allowed)}")


def _check_least(field: str, value: int, least: int) -> None:
    if not isinstance(value, Integral):
        raise ConfigError(f"{field}={value!r} is not a whole number: give at least {least}")
    if value < least:
        raise ConfigError(f"{field}={value} is too small: give at least {least}")


def _check_share(field: str, value: float) -> None:
    if not isinstance(value, Real) or not 0 <= value <= 1:
        raise ConfigError(
            f"{field}={value!r} is out of range: it is the share of the training steps in [0, 1]"
        )


def _check_layers(layers: Sequence[int] | None) -> None:
    """What can be said without the model: some indices from 0, none of them twice."""
    if layers is None:
        return
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise ConfigError(f"model.topk.layers={layers!r} is not a list: give one, as in [0, 3]")
    if not layers:
        raise ConfigError(
            "model.topk.layers=[] leaves no TopK block: list at least one, or set model.topk"
            " to null for a plain model"
        )
    are_indices = all(isinstance(i, Integral) and i >= 0 for i in layers)
    if not are_indices or len(set(layers)) != len(layers):
        raise ConfigError(
            f"model.topk.layers={list(layers)} is not a set of blocks: give different indices,"
            " counted from 0"
        )
