"""The measures of steered text, by hand."""

import math

import pytest

from lingua_topk.errors import ConfigError
from lingua_topk.steering.measures import distinct, lift, steering_score


@pytest.mark.parametrize(
    ("steered", "unsteered", "expected"),
    [
        ((50, 1000), (10, 1000), 50.5 / 10.5),
        ((50, 1000), (40, 4000), 50.5 / 10.5),  # four times as many tokens change nothing
        ((0, 1000), (0, 4000), 1.0),
        ((0, 1000), (0, 10), 1.0),
        ((1, 1000), (0, 4000), 3.0),
        ((0, 1000), (8, 4000), 0.2),
        ((0, 0), (0, 0), 1.0),
    ],
)
def test_lift(steered, unsteered, expected):
    assert lift(steered, unsteered) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ("abcd", 1, 1.0),
        ("aaaa", 1, 0.25),
        ("abab", 2, 2 / 3),
        ("aaaaa", 2, 0.25),
        ("ab", 2, 1.0),
        ("a", 2, 1.0),
        ("", 1, 1.0),
    ],
)
def test_distinct(tokens, n, expected):
    assert distinct(list(tokens), n) == pytest.approx(expected)


def test_distinct_of_nothing():
    with pytest.raises(ConfigError, match="n=0"):
        distinct([1, 2], 0)


def test_the_score_is_the_harmonic_mean():
    assert steering_score(5.0, 2.0, 0.9) == pytest.approx(3 / (1 / 0.8 + 2 + 1 / 0.9))
    assert steering_score(5.0, 0.5, 3.0) == pytest.approx(3 / (1 / 0.8 + 1 + 1))  # at most 1 each
    assert steering_score(1e9, 1.0, 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "parts",
    [(1.0, 1.0, 1.0), (0.4, 1.0, 1.0), (5.0, math.inf, 1.0), (5.0, math.nan, 1.0), (5.0, 1.0, 0.0),
     (math.nan, 1.0, 1.0), (5.0, 1.0, math.nan)],
)  # fmt: skip
def test_the_score_is_0_where_a_part_is(parts):
    assert steering_score(*parts) == 0.0
