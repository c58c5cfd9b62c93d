"""The public operators: they check their arguments, then run the backend."""

import operator

from torch import Tensor

from lingua_topk.errors import ConfigError
from lingua_topk.ops.backends import backend_of
from lingua_topk.ops.definition import ACTIVATIONS


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
    k, alpha = _checked(k, alpha, activation)
    _check_floating("x", x)
    return backend_of(x).topk(x, k, alpha, activation)


def topk_sum(
    h: Tensor, update: Tensor, k: int, alpha: float | Tensor = 0.0, activation: str = "relu"
) -> Tensor:
    """TopK(h + update), in one go where the backend can: the end of a residual block.

    Args:
        h, update: [..., D], of one shape, on one device; floating dtypes, which may differ.
        k, alpha, activation: as for `topk`.

    Returns:
        [..., D], dtype of h + update. Of half precision the sum is taken in float32 and
        selected on as it is, and the result is rounded once: rounded before, sums would
        tie, and ties at the threshold are all kept.

    Raises:
        ConfigError (a ValueError): as for `topk`, and where the shapes differ.

    The gradient is that of `topk`, the same for both.
    """
    k, alpha = _checked(k, alpha, activation)
    _check_floating("h", h)
    _check_floating("update", update)
    if h.shape != update.shape:
        raise ConfigError(
            f"update has shape {tuple(update.shape)}: give one of h's, {tuple(h.shape)}"
        )
    return backend_of(h).topk_sum(h, update, k, alpha, activation)


def _checked(k: int, alpha: float | Tensor, activation: str) -> tuple[int, float | Tensor]:
    check_activation(activation)
    if not isinstance(alpha, Tensor):
        alpha = check_alpha(alpha)
    elif alpha.dim() != 0:
        raise ConfigError(f"alpha has shape {tuple(alpha.shape)}: give a float or a 0-d tensor")
    return check_k(k), alpha


def _check_floating(name: str, x: Tensor) -> None:
    if not x.is_floating_point() or x.dim() == 0:
        raise ConfigError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}: topk takes a floating tensor [..., D]"
        )


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


__all__ = ["check_activation", "check_alpha", "check_k", "topk", "topk_sum"]
