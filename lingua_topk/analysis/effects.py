"""What two populations of neurons differ by, and how sure that is.

Intervals are percentile bootstrap intervals (Efron and Tibshirani, An Introduction to the
Bootstrap, chapter 13): neurons, or pairs of neurons, are drawn again with replacement, and the
interval is where the middle 95% of the results lie. The same index is the same feature in
several layers, so where layers are put together an index is drawn with all that it has. They say
what other neurons of the same two models would have given, not what other seeds of training
would.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
# Below so many neurons or pairs no number is given.
MIN_ITEMS = 10
# Two neurons fire about as often where the rates differ by at most this factor.
CALIPER = 1.25
# Counts that are in memory at once while resampling: few enough to stay in a core's cache.
AT_ONCE = 2**16


class Estimate(NamedTuple):
    """A value with its bootstrap interval, all in the unit of the measure."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TwoSample:
    """How population a differs from population b.

    Attributes:
        n_a, n_b: neurons with a value.
        median_difference: median(a) - median(b); None where one has fewer than `MIN_ITEMS`.
        cliffs_delta: P(a > b) - P(a < b), in [-1, 1]; None likewise.
    """

    n_a: int
    n_b: int
    median_difference: Estimate | None
    cliffs_delta: Estimate | None


@dataclass(frozen=True)
class Paired:
    """How the first of each pair differs from the second.

    Attributes:
        n: pairs in which both have a value.
        median_difference: median of a_i - b_i; None where there are fewer than `MIN_ITEMS`.
        share_lower, share_higher: share of pairs with a_i < b_i, a_i > b_i; None likewise.
    """

    n: int
    median_difference: Estimate | None
    share_lower: float | None
    share_higher: float | None


def cliffs_delta(a: np.ndarray, b: np.ndarray) -> float:
    """P(a > b) - P(a < b) over all pairs of a value of a and a value of b; ties count as neither.

    Args:
        a, b: float [n], [m], neither empty, without NaN.

    Cliff, Dominance statistics, Psychological Bulletin 114 (1993). From ranks: n log m.
    """
    ordered = np.sort(b)
    below = np.searchsorted(ordered, a, side="left")  # [n], values of b below each of a
    above = len(b) - np.searchsorted(ordered, a, side="right")
    return float((below - above).sum() / (len(a) * len(b)))


def two_sample(
    a: np.ndarray,
    b: np.ndarray,
    *,
    groups_a: np.ndarray | None = None,
    groups_b: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> TwoSample:
    """Difference of medians and Cliff's delta of two populations; both are drawn again.

    Args:
        a, b: float [n], [m]; NaN marks a neuron without a value, which is left out.
        groups_a, groups_b: int [n], [m]; those of one group depend on each other and are drawn
            together. None: each for itself.
    """
    (a, groups_a), (b, groups_b) = _with_value(a, groups_a), _with_value(b, groups_b)
    if min(len(a), len(b)) < MIN_ITEMS:
        return TwoSample(len(a), len(b), None, None)
    # Values are replaced by their places in one sorted list, resamples by how often each
    # place was drawn: then a cumulative sum is all that medians and ranks need.
    values, places = np.unique(np.concatenate([a, b]), return_inverse=True)
    draws = np.random.default_rng(seed)
    of_a = _resampled(places[: len(a)], groups_a, len(values), resamples, draws)
    of_b = _resampled(places[len(a) :], groups_b, len(values), resamples, draws)
    found = [
        (_medians(values, x) - _medians(values, y), _deltas(x, y))
        for x, y in zip(of_a, of_b, strict=True)
    ]
    medians, deltas = (np.concatenate(one) for one in zip(*found, strict=True))
    return TwoSample(
        len(a),
        len(b),
        _estimate(float(np.median(a) - np.median(b)), medians),
        _estimate(cliffs_delta(a, b), deltas),
    )


def paired(
    a: np.ndarray,
    b: np.ndarray,
    *,
    groups: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Paired:
    """Median of the differences a_i - b_i; pairs are drawn again.

    Args:
        a, b: float [p]; a pair in which one is NaN is left out.
        groups: int [p]; pairs of one group are drawn together. None: each for itself.
    """
    differences, groups = _with_value(a - b, groups)
    n = len(differences)
    if n < MIN_ITEMS:
        return Paired(n, None, None, None)
    values, places = np.unique(differences, return_inverse=True)
    draws = np.random.default_rng(seed)
    resampled = _resampled(places, groups, len(values), resamples, draws)
    return Paired(
        n,
        _estimate(
            float(np.median(differences)), np.concatenate([_medians(values, x) for x in resampled])
        ),
        float((differences < 0).mean()),
        float((differences > 0).mean()),
    )


def match_rates(
    a: np.ndarray, b: np.ndarray, caliper: float = CALIPER
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of a neuron of a and a neuron of b that fire about as often.

    The two that lie closest in log rate are paired first, and so on with what is left, until
    no two lie within the caliper. Without replacement, so that a few neurons of b do not stand
    for all of it, and closest first, which unlike a walk along the rates prefers no side: one
    from below would give each neuron the rarest that is allowed. Not the largest number of
    pairs that there could be.

    Args:
        a, b: float [n], [m], firing rates; a neuron whose rate is 0 or NaN has no partner.
        caliper: the largest ratio of two rates in a pair, at least 1.

    Returns:
        int64 [p], int64 [p]: indices into a and into b, in ascending order of those into a.
    """
    rates, sides, indices = _sorted_rates(a, b)
    pairs = sorted(
        (indices[x], indices[y]) if sides[x] == 0 else (indices[y], indices[x])
        for x, y in _closest_first(rates, sides, caliper)
    )
    found = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def _sorted_rates(a: np.ndarray, b: np.ndarray) -> tuple[list[float], list[int], list[int]]:
    """Rates above 0 of both, ascending; the side each is from, 0 or 1, and its index there."""
    rates = np.concatenate([a, b]).astype(np.float64)
    sides = np.repeat([0, 1], [len(a), len(b)])
    indices = np.concatenate([np.arange(len(a)), np.arange(len(b))])
    order = np.lexsort([indices, sides, rates])
    order = order[rates[order] > 0]
    return rates[order].tolist(), sides[order].tolist(), indices[order].tolist()


def _closest_first(
    rates: list[float], sides: list[int], caliper: float
) -> Iterator[tuple[int, int]]:
    """Pairs of places in ascending rates, of different sides.

    The closest two of different sides are always neighbours among those that are left. So
    only neighbours wait in the heap, and a pair that is taken makes new neighbours of those
    around it.
    """
    n = len(rates)
    left, right = list(range(-1, n - 1)), list(range(1, n + 1))
    free = [True] * n
    waiting: list[tuple[float, int, int]] = []

    def offer(x: int, y: int) -> None:
        if x >= 0 and y < n and sides[x] != sides[y]:
            ratio = rates[y] / rates[x]
            if ratio <= caliper:
                heapq.heappush(waiting, (ratio, x, y))

    for x in range(n - 1):
        offer(x, x + 1)
    while waiting:
        _, x, y = heapq.heappop(waiting)
        if not (free[x] and free[y]):
            continue
        free[x] = free[y] = False
        yield x, y
        before, after = left[x], right[y]
        if before >= 0:
            right[before] = after
        if after < n:
            left[after] = before
        offer(before, after)


def _with_value(values: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Those that are not NaN, and their groups, int64 [n]; without any each is its own."""
    values = np.asarray(values, dtype=np.float64)
    there = ~np.isnan(values)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    return values[there], groups[there]


def _resampled(
    places: np.ndarray,
    groups: np.ndarray,
    n_values: int,
    resamples: int,
    draws: np.random.Generator,
) -> Iterator[np.ndarray]:
    """How often each of the sorted values was drawn, int64 [r, n_values] for r resamples.

    As many groups are drawn as there are, with replacement, each with all that is in it.
    """
    _, group = np.unique(groups, return_inverse=True)  # [n]
    n_groups = int(group.max()) + 1
    at_once = max(AT_ONCE // n_values, 1)
    for start in range(0, resamples, at_once):
        r = min(at_once, resamples - start)
        rows = np.arange(r)[:, None]
        drawn = (draws.integers(n_groups, size=(r, n_groups)) + rows * n_groups).reshape(-1)
        times = np.bincount(drawn, minlength=r * n_groups).reshape(r, n_groups)[:, group]  # [r, n]
        keys = (places + rows * n_values).reshape(-1)
        found = np.bincount(keys, times.reshape(-1), r * n_values)
        yield found.reshape(r, n_values).astype(np.int64)


def _medians(values: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The median where values[i] (ascending) is there times[:, i] times, [r]."""
    until = np.cumsum(times, axis=1)
    n = until[:, -1:]  # [r, 1]
    lower, upper = (np.argmax(until > k, axis=1) for k in ((n - 1) // 2, n // 2))
    return (values[lower] + values[upper]) / 2


def _deltas(times_a: np.ndarray, times_b: np.ndarray) -> np.ndarray:
    """Cliff's delta from how often each of the same ascending values is in a and in b, [r]."""
    until = np.cumsum(times_b, axis=1)
    n_a, n_b = times_a.sum(axis=1), until[:, -1]  # [r]
    # Values of b below less values of b above, which is 2 until - times_b - n_b.
    ahead = np.einsum("ri,ri->r", times_a, 2 * until - times_b) - n_a * n_b
    return ahead / (n_a * n_b)


def _estimate(value: float, resampled: np.ndarray) -> Estimate:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Estimate(value, float(low), float(high))
