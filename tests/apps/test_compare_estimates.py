"""The formulas of a comparison against numbers worked out otherwise."""

import math

import numpy as np
import pytest

from apps.topk.comparison import estimates
from apps.topk.comparison.estimates import Estimate, Items


def items(amounts, weights=None) -> Items:
    amounts = np.asarray(amounts, float)
    weights = np.ones(len(amounts)) if weights is None else np.asarray(weights, float)
    return Items(tuple((i, i) for i in range(len(amounts))), amounts, weights)


def test_a_ratio_by_hand():
    # r = 12 / 6 = 2; residuals 5 - 4 = 1 and 7 - 8 = -1; sqrt(2 / 1 * 2) / 6 = 1/3.
    assert estimates.ratio(np.array([5.0, 7.0]), np.array([2.0, 4.0])) == pytest.approx((2, 1 / 3))


def test_with_equal_weights_it_is_the_standard_error_of_a_mean():
    x = np.random.default_rng(0).random(50)
    value, stderr = estimates.ratio(x, np.ones(50))
    assert value == pytest.approx(x.mean())
    assert stderr == pytest.approx(x.std(ddof=1) / math.sqrt(50))


def test_a_paired_difference_by_hand():
    # Answers 1 1 0 1 against 0 1 0 0: differences 1 0 0 1, mean 1/2,
    # variance 4 * 1/4 / 3 = 1/3, standard error sqrt(1/3) / 2.
    found = estimates.paired_difference(items([1, 1, 0, 1]), items([0, 1, 0, 0]))
    assert found == pytest.approx((0.5, math.sqrt(1 / 3) / 2))


def test_relative_differences_by_hand():
    value, stderr = estimates.relative(Estimate(math.log(1.1), 0.02))
    assert (value, stderr) == pytest.approx((0.1, 0.022))
    assert estimates.logarithm(Estimate(20.0, 3.0)) == pytest.approx((math.log(20), 0.15))
    assert estimates.exponential(Estimate(math.log(20), 0.15)) == pytest.approx((20.0, 3.0))


def test_errors_of_independent_estimates_add_in_squares():
    found = estimates.unpaired_difference(Estimate(5.0, 0.3), Estimate(3.0, 0.4))
    assert found == pytest.approx((2.0, 0.5))
    assert estimates.unpaired_difference(Estimate(5.0, None), Estimate(3.0, 0.4)).stderr is None


@pytest.mark.parametrize("value", [None, "N/A", math.nan, math.inf, 0, 0.0, -1.0, True, 10**400])
def test_what_is_no_standard_error_is_unknown(value):
    assert estimates.usable_stderr(value) is None


@pytest.mark.parametrize("amounts", [[3.0], [1.0, 1.0, 1.0], [0.1] * 7, [0.0, 0.0]])
def test_without_a_spread_there_is_no_standard_error(amounts):
    assert estimates.ratio(np.array(amounts), np.ones(len(amounts))).stderr is None


def test_a_difference_is_beyond_chance_from_1_96_standard_errors_on():
    assert estimates.is_beyond_chance(Estimate(-1.97, 1.0))
    assert not estimates.is_beyond_chance(Estimate(1.95, 1.0))
    assert not estimates.is_beyond_chance(Estimate(5.0, None))


def _bootstrapped(statistic, n: int, rng) -> float:
    """The spread of a statistic over resampled items."""
    return float(np.std([statistic(rng.integers(0, n, n)) for _ in range(4000)], ddof=1))


def test_a_paired_perplexity_difference_spreads_as_the_bootstrap_says():
    rng = np.random.default_rng(1)
    n = 300
    tokens = rng.integers(50, 2000, n).astype(float)
    hard = rng.normal(4.0, 0.4, n)  # shared by both models, and gone from the difference
    a = (hard + 0.05 + rng.normal(0, 0.08, n)) * tokens
    b = (hard + rng.normal(0, 0.08, n)) * tokens

    def grown(rows):
        return math.exp((a[rows] - b[rows]).sum() / tokens[rows].sum()) - 1

    found = estimates.relative(estimates.paired_difference(items(a, tokens), items(b, tokens)))
    assert found.value == pytest.approx(grown(np.arange(n)))
    assert found.stderr == pytest.approx(_bootstrapped(grown, n, rng), rel=0.06)
    alone = estimates.ratio(a, tokens).stderr
    assert found.stderr < alone / 2.5


def test_a_paired_accuracy_difference_spreads_as_the_bootstrap_says():
    rng = np.random.default_rng(2)
    n = 400
    hard = rng.random(n)
    a, b = (hard + rng.normal(0, 0.1, n) < 0.5), (hard + rng.normal(0, 0.1, n) < 0.45)

    def gained(rows):
        return a[rows].mean() - b[rows].mean()

    found = estimates.paired_difference(items(a), items(b))
    assert found.stderr == pytest.approx(_bootstrapped(gained, n, rng), rel=0.06)
