"""The public operator: checks its arguments, then runs the backend."""

import operator

from torch import Tensor

from lingua_topk.errors import ConfigError
from lingua_topk.ops.definition import ACTIVATIONS, topk_definition


def topk(x: Tensor, k: int, alpha: float | Tensor = 0.0, activation: str = "relu") -> Tensor:
    """Keep the k largest components of every row, the rest scaled by alpha.

    Args:
        x: [..., D], float64, float32, bfloat16 or float16; any strides.
        k: how many components a row keeps, at least 1. Components that tie with the
            k-th largest are kept as well, so a row can keep more. `k >= D` gives f(x).
        alpha: annealing coefficient in [0, 1]: 0 is the hard form, 1 is f(x) exactly.
            A float, or a 0-d tensor on the device of x (not range-checked: reading it
            would wait for the device).
        activation: f, applied element-wise: "relu", "identity", "gelu" or "silu", as
            torch computes them (silu and gelu of -inf are NaN there, not 0).
            Selection is by x, not by f(x).

    Returns:
        [..., D], dtype of x. A row that holds a NaN is NaN throughout (with alpha = 1
        or k >= D it is f(x), as for every other row).

    Raises:
        ConfigError (a ValueError): k, alpha or activation out of range, alpha a tensor
            with dimensions, or x without a last dimension or not of a floating dtype.

    The gradient takes the threshold as a constant:
    dy/dx = f'(x) (alpha + (1 - alpha) 1{x >= T}). Definition: arXiv 2506.21468.
    """
    k = check_k(k)
    check_activation(activation)
    if not isinstance(alpha, Tensor):
        alpha = check_alpha(alpha)
    elif alpha.dim() != 0:
        raise ConfigError(f"alpha has shape {tuple(alpha.shape)}: give a float or a 0-d tensor")
    if not x.is_floating_point() or x.dim() == 0:
        raise ConfigError(
            f"x is {x.dtype} of shape {tuple(x.shape)}: topk takes a floating tensor [..., D]"
        )
    return topk_definition(x, k, alpha, activation)


def check_k(k: int, field: str = "k") -> int:
    """k as an int of at least 1, or ConfigError naming `field`."""
    try:
        k = operator.index(k)
    except TypeError:
        raise ConfigError(f"{field}={k!r} is not a whole number: give an integer >= 1") from None
    if k < 1:
        raise ConfigError(f"{field}={k} is too small: TopK keeps at least 1 component, give k >= 1")
    return k


def check_alpha(alpha: float) -> float:
    """alpha as it is when it lies in [0, 1] (which NaN does not), else ConfigError."""
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha={alpha} is out of range: the annealing coefficient is in [0, 1]")
    return alpha


def check_activation(activation: str, field: str = "activation") -> str:
    """activation as it is when it is known, else ConfigError naming `field`."""
    if activation not in ACTIVATIONS:
        raise ConfigError(
            f"{field}={activation!r} is not known: choose one of {', '.join(ACTIVATIONS)}"
        )
    return activation


__all__ = ["check_activation", "check_alpha", "check_k", "topk"]
