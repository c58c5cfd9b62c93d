"""Schedules of alpha, from 1 to 0 over the first part of training and 0 from then on; and what
alpha does when it is k that is annealed."""

import math
from collections.abc import Callable

from lingua_topk.errors import ConfigError

# Of its fall the exponential schedule has 0.076 left after half of its time.
_EXPONENTIAL_RATE = 5.0


def _linear(p: float) -> float:
    return 1.0 - p


def _cosine(p: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * p))


def _exponential(p: float) -> float:
    end = math.exp(-_EXPONENTIAL_RATE)
    return (math.exp(-_EXPONENTIAL_RATE * p) - end) / (1.0 - end)


def _step(p: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "exponential": _exponential,
    "step": _step,
}


# What alpha softens: what TopK cuts away, or how many components it keeps.
ANNEALED = ("alpha", "k")


def kept_at(alpha: float, k: int, width: int) -> int:
    """How many of `width` components are kept at `alpha` where k is annealed.

    All of them at 1, k at 0, and between the two geometrically, round(k^(1 - alpha) width^alpha):
    what is cut away a step is a share of what is left. k where it is not below `width`.
    """
    if alpha == 0 or k >= width:
        return k
    return min(max(round(k ** (1.0 - alpha) * width**alpha), k), width)


def alpha_at(step: int, n_steps: int, anneal_ratio: float, schedule: str = "linear") -> float:
    """alpha during optimizer step `step` (the first is 0) of a run of `n_steps`.

    1 at step 0 and 0 from step `anneal_ratio * n_steps` on; 0 throughout when the
    ratio is 0. With p the share of the annealing that has passed: "linear" is 1 - p,
    "cosine" (1 + cos(pi p)) / 2, "exponential" e^(-5 p) shifted and scaled to run from
    1 to 0, and "step" 1 until the end of the annealing.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(
            f"anneal_schedule={schedule!r} is not known: choose one of {', '.join(SCHEDULES)}"
        )
    length = anneal_ratio * n_steps
    # 0.07 * 100 is 7.000000000000001 in binary, but step 7 is past the end.
    if step >= length - 1e-6:
        return 0.0
    return SCHEDULES[schedule](step / length)
