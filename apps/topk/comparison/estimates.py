"""Ratios of sums over items, their differences between two models, and standard errors.

Every measure here that has items is a ratio r = sum(a) / sum(w) of an amount a and a weight
w of each of n items: nats by tokens, bits by bytes, correct answers by one each. Items are
the independent units; what lies within one (the tokens of a document) may depend on each
other. All standard errors are over items: they say what other items would have given, not
what other seeds of training would.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from apps.topk.comparison.fields import as_number
from apps.topk.evaluation.confidence import Z_95

# Residuals below this share of the amounts are rounding, and no spread.
NEGLIGIBLE = 1e-12


class Estimate(NamedTuple):
    """A value and its standard error, in the same unit; None where it is unknown, never 0."""

    value: float
    stderr: float | None


@dataclass(frozen=True, eq=False)
class Items:
    """What a measure was computed from, in the order of `ids`.

    Attributes:
        ids: which item, and what tells that it is the same one elsewhere.
        amounts: float64 [n].
        weights: float64 [n], their sum above 0.
    """

    ids: tuple[tuple[Hashable, Hashable], ...]
    amounts: np.ndarray
    weights: np.ndarray


def usable_stderr(value: Any) -> float | None:
    """`value` where it is a standard error, None for anything else.

    That is also None for 0: items without any spread (all answers right, say) do not tell
    how others would have spread.
    """
    number = None if isinstance(value, bool) else as_number(value)
    return number if number is not None and number > 0 else None


def ratio(amounts: np.ndarray, weights: np.ndarray) -> Estimate:
    """r = sum(a) / sum(w) and its standard error, in the unit of a by that of w.

    The ratio estimator (Cochran, Sampling Techniques, 3rd ed., section 6.4, without the
    correction for a finite population), with residuals e_i = a_i - r w_i, which sum to 0:

        se = sqrt(n / (n - 1) * sum(e_i^2)) / sum(w)

    With all weights 1 it is sd / sqrt(n) of a mean. Unknown for n = 1.
    """
    n, total = len(amounts), float(weights.sum())
    value = float(amounts.sum()) / total
    spread = float(np.linalg.norm(amounts - value * weights))
    if n < 2 or spread <= NEGLIGIBLE * float(np.linalg.norm(amounts)):
        return Estimate(value, None)
    return Estimate(value, usable_stderr(math.sqrt(n / (n - 1)) * spread / total))


def paired_difference(run: Items, twin: Items) -> Estimate:
    """r_run - r_twin over the same items with the same weights.

    Since the weights are shared, it is itself the ratio sum(a_run - a_twin) / sum(w), and
    `ratio` gives its standard error: how hard an item is for both models cancels within its
    difference (for means the paired analysis of Miller, arXiv 2411.00640).
    """
    return ratio(run.amounts - twin.amounts, twin.weights)


def unpaired_difference(run: Estimate, twin: Estimate) -> Estimate:
    """run - twin as if their items were independent: se = sqrt(se_run^2 + se_twin^2).

    Over the same items that is too wide wherever both find the same ones hard.
    """
    value = run.value - twin.value
    if run.stderr is None or twin.stderr is None:
        return Estimate(value, None)
    return Estimate(value, math.hypot(run.stderr, twin.stderr))


def exponential(log: Estimate) -> Estimate:
    """exp(x) of an estimate x, with se = exp(x) se(x): the delta method, d exp(x) = exp(x) dx."""
    value = math.exp(log.value)
    return Estimate(value, None if log.stderr is None else value * log.stderr)


def logarithm(estimate: Estimate) -> Estimate:
    """log(y) of an estimate y > 0, with se = se(y) / y: the delta method, d log(y) = dy / y."""
    error = None if estimate.stderr is None else estimate.stderr / estimate.value
    return Estimate(math.log(estimate.value), error)


def relative(log_difference: Estimate) -> Estimate:
    """y_run / y_twin - 1 of d = log(y_run) - log(y_twin), with se = exp(d) se(d), as above."""
    grown = exponential(log_difference)
    return Estimate(math.expm1(log_difference.value), grown.stderr)


def is_beyond_chance(difference: Estimate) -> bool:
    """Whether it is more than `Z_95` standard errors from 0; not where these are unknown."""
    return difference.stderr is not None and abs(difference.value) > Z_95 * difference.stderr
