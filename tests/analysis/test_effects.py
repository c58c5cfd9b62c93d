"""Effect sizes, matching by firing rate, and bootstrap intervals, against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingua_topk.analysis import effects
from lingua_topk.analysis.effects import CALIPER, cliffs_delta, match_rates, paired, two_sample

VALUES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12).map(np.array)
# Counts as of a recording: many are equal, and some are 0.
RATES = st.lists(st.integers(0, 40).map(float), max_size=14).map(np.array)


def plain_delta(a, b):
    signs = [np.sign(x - y) for x in a for y in b]
    return sum(signs) / len(signs)


@given(VALUES, VALUES)
def test_cliffs_delta_is_the_share_of_pairs_above_less_that_below(a, b):
    assert cliffs_delta(a, b) == pytest.approx(plain_delta(a, b), abs=1e-12)
    assert cliffs_delta(b, a) == pytest.approx(-plain_delta(a, b), abs=1e-12)


def test_cliffs_delta_of_cases_worked_out_by_hand():
    assert cliffs_delta(np.array([1.0, 2.0]), np.array([3.0])) == -1
    assert cliffs_delta(np.array([3.0]), np.array([1.0, 3.0])) == 0.5  # above one, level with one
    assert cliffs_delta(np.array([1.0, 1.0]), np.array([1.0])) == 0


@given(VALUES, VALUES, st.integers(0, 5))
def test_a_resample_has_the_median_and_delta_of_the_values_that_it_holds(a, b, seed):
    values, places = np.unique(np.concatenate([a, b]), return_inverse=True)
    draws = np.random.default_rng(seed)
    of_a, of_b = np.arange(len(a)), np.arange(len(b))
    (times_a,) = effects._resampled(places[: len(a)], of_a, len(values), 5, draws)
    (times_b,) = effects._resampled(places[len(a) :], of_b, len(values), 5, draws)
    medians, deltas = effects._medians(values, times_a), effects._deltas(times_a, times_b)
    for i in range(5):
        drawn_a, drawn_b = np.repeat(values, times_a[i]), np.repeat(values, times_b[i])
        assert len(drawn_a) == len(a) and set(drawn_a) <= set(a)
        assert medians[i] == np.median(drawn_a)
        assert deltas[i] == pytest.approx(plain_delta(drawn_a, drawn_b), abs=1e-12)


def test_resampling_in_parts_makes_every_resample(monkeypatch):
    monkeypatch.setattr(effects, "AT_ONCE", 7)
    places = np.array([0, 1, 2])
    parts = list(effects._resampled(places, places, 3, 9, np.random.default_rng(0)))
    assert [len(part) for part in parts] == [2, 2, 2, 2, 1]
    assert all((part.sum(axis=1) == 3).all() for part in parts)


def test_groups_are_drawn_together_by_the_plain_way():
    """Five copies of each value tell no more than one: the interval is that of the single ones."""
    draws = np.random.default_rng(4)
    single = draws.normal(0.3, 1, 50)
    copies, groups = np.tile(single, 5), np.tile(np.arange(50), 5)
    zeros = np.zeros(250)
    alone = effects.paired(single, np.zeros(50), resamples=4000).median_difference
    together = effects.paired(copies, zeros, groups=groups, resamples=4000).median_difference
    naive = effects.paired(copies, zeros, resamples=4000).median_difference
    assert together == pytest.approx(alone, abs=0.05)
    assert naive.high - naive.low < 0.7 * (alone.high - alone.low)
    plain = []
    for _ in range(2000):
        chosen = draws.integers(50, size=50)
        plain.append(np.median(np.concatenate([copies[groups == one] for one in chosen])))
    assert together[1:] == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.05)
    both = two_sample(copies, zeros[:50], groups_a=groups, resamples=4000).median_difference
    assert both == pytest.approx(alone, abs=0.05)


def test_an_interval_is_that_of_drawing_again_by_the_plain_way():
    draws = np.random.default_rng(3)
    a, b = draws.normal(0, 1, 60), draws.normal(0.5, 1, 80)
    found = two_sample(a, b, resamples=4000)
    plain = []
    for _ in range(4000):
        x, y = draws.choice(a, len(a)), draws.choice(b, len(b))
        plain.append((np.median(x) - np.median(y), cliffs_delta(x, y)))
    low, high = np.quantile(plain, [0.025, 0.975], axis=0)
    estimates = np.array([found.median_difference, found.cliffs_delta])  # value, low, high
    assert (np.abs(estimates[:, 1] - low) < 0.1 * (high - low)).all()
    assert (np.abs(estimates[:, 2] - high) < 0.1 * (high - low)).all()
    assert found.median_difference.value == pytest.approx(np.median(a) - np.median(b))
    assert found.cliffs_delta.value == pytest.approx(plain_delta(a, b))


def test_an_interval_holds_the_true_difference_about_as_often_as_it_says():
    draws = np.random.default_rng(5)
    held = 0
    for _ in range(200):
        found = two_sample(draws.normal(1, 1, 100), draws.normal(0, 1, 100), resamples=400)
        held += found.median_difference.low <= 1 <= found.median_difference.high
    assert 0.90 <= held / 200 <= 0.99


def test_intervals_are_the_same_for_the_same_seed_and_others_for_another():
    draws = np.random.default_rng(0)
    a, b = draws.normal(size=50), draws.normal(size=50)
    assert two_sample(a, b, seed=1) == two_sample(a, b, seed=1) != two_sample(a, b, seed=2)
    assert paired(a, b, seed=1) == paired(a, b, seed=1) != paired(a, b, seed=2)


def test_neurons_without_a_value_are_left_out():
    draws = np.random.default_rng(0)
    a, b = draws.normal(size=30), draws.normal(size=30)
    holes = np.concatenate([a, [np.nan] * 5])
    assert two_sample(holes, b) == two_sample(a, b)
    both = paired(np.concatenate([a, [np.nan, 1.0]]), np.concatenate([b, [1.0, np.nan]]))
    assert both == paired(a, b)


@pytest.mark.parametrize("n", [0, 1, effects.MIN_ITEMS - 1])
def test_too_few_neurons_or_pairs_give_no_number(n):
    few, many = np.arange(n, dtype=float), np.arange(50, dtype=float)
    assert two_sample(few, many) == effects.TwoSample(n, 50, None, None)
    assert two_sample(many, few).cliffs_delta is None
    assert paired(few, few) == effects.Paired(n, None, None, None)


def test_pairs_worked_out_by_hand():
    a = np.array([1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10])
    found = paired(a, a + np.array([1, 1, 1, 1, 1, 1, 3, 0, 0, -1]))
    assert found.n == 10
    assert found.median_difference.value == -1
    assert (found.share_lower, found.share_higher) == (0.7, 0.1)
    same = paired(a, a)
    assert same.median_difference == (0, 0, 0)
    assert (same.share_lower, same.share_higher) == (0, 0)


@pytest.mark.parametrize(
    "a, b, expected",
    [
        ([0.1], [0.1], [(0, 0)]),
        ([0.1], [0.2], []),  # further than the caliper
        ([0.0, 0.1], [0.0], []),  # dead neurons have no partner
        ([0.1, 0.1, 0.1], [0.1, 0.1], [(1, 0), (2, 1)]),  # none is used twice
        ([0.10], [0.121, 0.101, 0.09], [(0, 1)]),  # the nearest
        ([0.100, 0.109], [0.110], [(1, 0)]),  # the nearest of those that want it
        ([0.100, 0.120], [0.110, 0.105], [(0, 1), (1, 0)]),
        ([0.1, np.nan], [np.nan, 0.1], [(0, 1)]),
        ([], [0.1], []),
    ],
)
def test_matching_worked_out_by_hand(a, b, expected):
    i, j = match_rates(np.array(a), np.array(b))
    pairs = list(zip(i.tolist(), j.tolist(), strict=True))
    # Which of several equal ones is taken does not matter.
    assert [(a[x], b[y]) for x, y in pairs] == [(a[x], b[y]) for x, y in expected]
    assert i.dtype == j.dtype == np.int64


def plain_matching(a, b, caliper):
    """The rates of the closest two, again and again."""
    a, b = [x for x in a if x > 0], [y for y in b if y > 0]
    ratios = []
    while a and b:
        ratio, x, y = min((max(x / y, y / x), x, y) for x in a for y in b)
        if ratio > caliper:
            break
        a.remove(x)
        b.remove(y)
        ratios.append(ratio)
    return ratios, a, b


@settings(max_examples=150)
@given(RATES, RATES, st.sampled_from([1.0, 1.1, CALIPER, 3.0]))
def test_matching_pairs_within_the_caliper_nobody_twice_and_nobody_left_who_could(a, b, caliper):
    i, j = match_rates(a, b, caliper)
    assert len(set(i)) == len(i) and len(set(j)) == len(j)
    ratios = np.maximum(a[i] / b[j], b[j] / a[i])
    assert (ratios <= caliper).all()
    rest_a, rest_b = np.delete(a, i), np.delete(b, j)
    for x in rest_a[rest_a > 0]:
        for y in rest_b[rest_b > 0]:
            assert max(x / y, y / x) > caliper


@settings(max_examples=100)
@given(
    st.lists(st.floats(1, 2), max_size=10, unique=True).map(np.array),
    st.lists(st.floats(1, 2), max_size=10, unique=True).map(np.array),
)
def test_matching_takes_the_closest_first(a, b):
    ratios, rest_a, rest_b = plain_matching(a.tolist(), b.tolist(), CALIPER)
    i, j = match_rates(a, b)
    found = np.maximum(a[i] / b[j], b[j] / a[i]) if len(i) else np.empty(0)
    if len(np.unique(np.round(ratios, 9))) == len(ratios):  # otherwise ties leave a choice
        assert sorted(found) == pytest.approx(sorted(ratios), rel=1e-9)
        assert sorted(np.delete(a, i)) == sorted(rest_a)
        assert sorted(np.delete(b, j)) == sorted(rest_b)


def population(middle_rate, lower_by, draws, n=400):
    """Neurons whose entropy comes from how often they fire, less `lower_by` bits."""
    rates = middle_rate * np.exp(draws.normal(0, 0.8, n))
    return rates, 0.7 * np.log2(rates * 1e5) + draws.normal(0, 0.3, n) - lower_by


def test_an_entropy_that_is_lower_only_since_neurons_fire_rarely_is_none_at_matched_rate():
    """An interval misses 0 by chance one time in twenty, so ten models are made up."""
    values, includes_0 = [], 0
    for seed in range(10):
        draws = np.random.default_rng(seed)
        rates_a, a = population(0.01, 0.0, draws)
        rates_b, b = population(0.02, 0.0, draws)
        unmatched = two_sample(a, b)
        assert unmatched.median_difference.high < -0.3
        assert unmatched.cliffs_delta.high < -0.3
        i, j = match_rates(rates_a, rates_b)
        matched = paired(a[i], b[j])
        assert matched.n > 200
        values.append(matched.median_difference.value)
        includes_0 += matched.median_difference.low <= 0 <= matched.median_difference.high
    assert includes_0 >= 8
    assert abs(np.mean(values)) < 0.03


def test_an_entropy_that_is_lower_at_the_same_rate_too_is_found():
    draws = np.random.default_rng(0)
    rates_a, a = population(0.01, 0.5, draws)
    rates_b, b = population(0.02, 0.0, draws)
    i, j = match_rates(rates_a, rates_b)
    found = paired(a[i], b[j])
    assert found.median_difference.low < -0.5 + 0.1
    assert -0.7 < found.median_difference.value < -0.3
    assert found.median_difference.high < -0.3
    assert found.share_lower > 0.8
