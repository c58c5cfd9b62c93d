"""The schedules of alpha, value by value and at their ends; and k where it is annealed."""

import math

import pytest

from lingua_topk.anneal import SCHEDULES, alpha_at, kept_at
from lingua_topk.errors import ConfigError

FALLING = ("linear", "cosine", "exponential")
# A quarter, half and three quarters of the way, from the formulas.
VALUES = {
    "linear": [0.75, 0.5, 0.25],
    "cosine": [(2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4],
    "exponential": [
        (math.exp(-5 * p) - math.exp(-5)) / (1 - math.exp(-5)) for p in (0.25, 0.5, 0.75)
    ],
    "step": [1.0, 1.0, 1.0],
}


def test_all_schedules_are_tested():
    assert SCHEDULES.keys() == VALUES.keys()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_values(schedule):
    # 0.2 of 100 steps: the annealing ends with step 20.
    assert alpha_at(0, 100, 0.2, schedule) == 1.0
    assert [alpha_at(step, 100, 0.2, schedule) for step in (5, 10, 15)] == pytest.approx(
        VALUES[schedule], abs=1e-12
    )
    assert alpha_at(19, 100, 0.2, schedule) > 0
    assert {alpha_at(step, 100, 0.2, schedule) for step in (20, 21, 99, 100, 10**6)} == {0.0}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ratio", [0.03, 0.2, 1 / 3, 1.0])
def test_it_falls_and_stays_within_its_range(ratio, schedule):
    alphas = [alpha_at(step, 50, ratio, schedule) for step in range(60)]
    assert all(0.0 <= alpha <= 1.0 for alpha in alphas)
    assert alphas == sorted(alphas, reverse=True)
    if schedule in FALLING:
        annealed = [alpha for alpha in alphas if alpha > 0]
        assert len(set(annealed)) == len(annealed) == math.ceil(50 * ratio)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ratio_zero_never_anneals_and_ratio_one_always(schedule):
    assert {alpha_at(step, 10, 0.0, schedule) for step in range(12)} == {0.0}
    assert all(alpha_at(step, 10, 1.0, schedule) > 0 for step in range(10))
    assert alpha_at(10, 10, 1.0, schedule) == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_short_runs(schedule):
    assert [alpha_at(step, 1, 0.2, schedule) for step in (0, 1)] == [1.0, 0.0]
    assert [alpha_at(step, 1, 1.0, schedule) for step in (0, 1)] == [1.0, 0.0]
    assert alpha_at(0, 1, 0.0, schedule) == alpha_at(0, 0, 0.2, schedule) == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_end_is_not_moved_by_rounding(schedule):
    # Here ratio * steps is a little more, or less, than the whole number it stands for.
    for ratio, n_steps, end in ((0.07, 100, 7), (0.14, 50, 7), (0.29, 100, 29), (0.57, 100, 57)):
        assert ratio * n_steps != end
        assert alpha_at(end - 1, n_steps, ratio, schedule) > 0
        assert alpha_at(end, n_steps, ratio, schedule) == 0.0


def test_the_default_is_linear():
    assert alpha_at(5, 100, 0.2) == 0.75


def test_unknown_schedule():
    with pytest.raises(
        ConfigError, match="anneal_schedule='cubic' is not known: choose one of lin"
    ):
        alpha_at(0, 10, 0.2, "cubic")


def test_k_falls_geometrically_from_the_width():
    assert [kept_at(alpha, 16, 256) for alpha in (1.0, 0.75, 0.5, 0.25, 0.0)] == [
        256, 128, 64, 32, 16,
    ]  # fmt: skip
    kept = [kept_at(alpha / 100, 3, 50) for alpha in range(101)]
    assert kept == sorted(kept) and (kept[0], kept[-1]) == (3, 50)


def test_k_stays_where_it_is_not_below_the_width():
    assert {kept_at(alpha, 8, 4) for alpha in (0.0, 0.5, 1.0)} == {8}
