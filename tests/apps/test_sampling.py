"""Draws and their sets against plain definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apps.topk.sampling import (
    MAX_SEED,
    NO_NUMBERS,
    Sampling,
    likeliest,
    next_tokens,
    nucleus,
    row_generator,
)
from lingua_topk.errors import ConfigError

ALL = torch.ones(12, dtype=torch.bool)


def rows(n=200, width=12, values=None):
    """Logits with many ties where they are of a few `values`, float64 [n, width]."""
    generator = torch.Generator().manual_seed(0)
    if values:
        return torch.randint(values, (n, width), generator=generator).double()
    return 2 * torch.randn(n, width, generator=generator, dtype=torch.float64)


def plain_likeliest(row, k):
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    return set(order[:k] if k else order)


def plain_nucleus(row, p):
    total = sum(math.exp(x) for x in row)
    kept, reached = set(), 0.0
    for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
        if reached >= p:
            break
        kept.add(i)
        reached += math.exp(row[i]) / total
    return kept


def kept_of(logits):
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in logits]


@pytest.mark.parametrize("k", [0, 1, 2, 5, 11, 12, 99])
@pytest.mark.parametrize("values", [None, 2, 4])
def test_top_k(k, values):
    logits = rows(values=values)
    expected = [plain_likeliest(row, k) for row in logits.tolist()]
    assert kept_of(likeliest(logits, k)) == expected
    assert k in (0, 99) or all(len(one) == k for one in expected)


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.333, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("values", [None, 3])
def test_top_p(p, values):
    logits = rows(values=values)
    assert kept_of(nucleus(logits, p)) == [plain_nucleus(row, p) for row in logits.tolist()]


@pytest.mark.parametrize(("p", "size"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (0.76, 4)])
def test_a_probability_that_is_reached_exactly_is_enough(p, size):
    assert kept_of(nucleus(torch.zeros(1, 4, dtype=torch.float64), p)) == [set(range(size))]


def test_the_first_of_many_ties_count():
    logits = rows(3, 3000, values=3)
    for p in (0.3, 0.9):
        assert kept_of(nucleus(logits, p)) == [plain_nucleus(row, p) for row in logits.tolist()]
    assert kept_of(likeliest(logits, 7)) == [plain_likeliest(row, 7) for row in logits.tolist()]


@given(st.lists(st.floats(-30, 30), min_size=12, max_size=12), st.floats(1e-6, 1))
def test_a_nucleus_is_large_enough_and_no_larger(row, p):
    logits = torch.tensor([row], dtype=torch.float64)
    probabilities = logits.softmax(-1)[0]
    kept = nucleus(logits, p)[0].isfinite()
    mass = probabilities[kept].sum()
    assert mass >= p - 1e-12
    assert mass - probabilities[kept].min() < p + 1e-12
    assert kept.all() or probabilities[kept].min() >= probabilities[~kept].max()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (3.0, 0, 1.0), (1.0, 5, 1.0), (1.0, 0, 0.7), (0.8, 6, 0.8)],
)
def test_frequencies(temperature, top_k, top_p):
    logits, n = rows(1)[0], 5000
    scaled = logits / temperature
    kept = sorted(plain_likeliest(scaled.tolist(), top_k))
    inner = plain_nucleus(scaled[kept].tolist(), top_p)
    kept = [token for place, token in enumerate(kept) if place in inner]
    expected = scaled[kept].softmax(-1) * n
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    draws = [row_generator(0, index) for index in range(n)]
    counts = torch.tensor(next_tokens(logits.expand(n, 12), ALL, sampling, draws)).bincount(
        minlength=12
    )
    assert counts.sum() == counts[kept].sum() == n
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
    degrees = len(kept) - 1
    assert degrees > 0 and chi_square < degrees + 4 * (2 * degrees) ** 0.5


def test_one_generator_gives_the_distribution_too():
    logits, n = rows(1), 5000
    draws = [row_generator(0, 0)]
    sampling = Sampling(temperature=1.0)
    tokens = [next_tokens(logits, ALL, sampling, draws)[0] for _ in range(n)]
    expected = logits[0].softmax(-1) * n
    chi_square = ((torch.tensor(tokens).bincount(minlength=12) - expected) ** 2 / expected).sum()
    assert chi_square < 11 + 4 * 22**0.5


def test_generators_of_neighbours_have_nothing_in_common():
    n = 4000
    for seed in (0, 1):
        first = torch.stack([torch.rand(3, generator=row_generator(seed, i)) for i in range(n)])
        deviations = (first.T @ first.T.T / n).sub(1 / 4)  # of independent numbers 0 off diagonal
        assert deviations.fill_diagonal_(0).abs().max() < 0.02
        neighbours = torch.corrcoef(torch.stack((first[:-1, 0], first[1:, 0])))[0, 1]
        assert neighbours.abs() < 0.06
        assert len(first[:, 0].unique()) > n - 5
    one, other = (torch.stack([torch.rand(1, generator=row_generator(s, i)) for i in range(n)])
                  for s in (0, 1))  # fmt: skip
    assert torch.corrcoef(torch.cat((one, other), 1).T)[0, 1].abs() < 0.06


def test_one_number_a_row_and_token_decides():
    logits = rows(6)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    together = next_tokens(logits, ALL, sampling, [row_generator(5, i) for i in range(6)])
    alone = [
        next_tokens(logits[i : i + 1], ALL, sampling, [row_generator(5, i)])[0] for i in range(6)
    ]
    assert together == alone
    generator = row_generator(5, 0)
    next_tokens(logits[:1], ALL, sampling, [generator])
    expected = row_generator(5, 0)
    torch.rand((), dtype=torch.float64, generator=expected)
    assert torch.equal(generator.get_state(), expected.get_state())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_the_likeliest(dtype):
    logits = rows(values=3).to(dtype)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert next_tokens(logits, ALL, Sampling(), []) == expected
    draws = [row_generator(0, i) for i in range(200)]
    assert next_tokens(logits, ALL, Sampling(temperature=5.0, top_k=1), draws) == expected
    assert next_tokens(logits, ALL, Sampling(temperature=5.0, top_p=1e-9), draws) == expected


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-9])
def test_a_temperature_near_nothing_is_greedy(temperature):
    logits = rows()
    draws = [row_generator(0, i) for i in range(200)]
    found = next_tokens(logits, ALL, Sampling(temperature=temperature), draws)
    assert found == logits.argmax(-1).tolist()


def test_a_very_high_temperature_draws_from_all_that_is_allowed():
    allowed = ALL.clone()
    allowed[[0, 7, 11]] = False
    draws = [row_generator(0, i) for i in range(500)]
    found = next_tokens(rows(500), allowed, Sampling(temperature=1e300), draws)
    assert set(found) == {1, 2, 3, 4, 5, 6, 8, 9, 10}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=3, top_p=0.5)])
def test_rows_without_numbers_are_told(bad, sampling):
    logits = rows(4)
    logits[1, 5] = bad
    logits[2] = -math.inf
    found = next_tokens(logits, ALL, sampling, [row_generator(0, i) for i in range(4)])
    assert [token == NO_NUMBERS for token in found] == [False, True, True, False]


def test_what_is_not_allowed_may_be_anything():
    logits = rows(4)
    logits[:, 5] = math.nan
    allowed = ALL.clone()
    allowed[5] = False
    assert NO_NUMBERS not in next_tokens(logits, allowed, Sampling(), [])
    draws = [row_generator(0, i) for i in range(4)]
    assert NO_NUMBERS not in next_tokens(logits, allowed, Sampling(temperature=1.0), draws)


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 2.0},
        {"top_p": math.nan},
        {"top_k": -1},
        {"seed": -1},
        {"seed": MAX_SEED + 1},
        {"stop": ("a", "")},
        {"stop": "abc"},
    ],
)
def test_values_that_are_not_allowed(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"^{name}=.* is not allowed: give"):
        Sampling(**wrong)
    assert row_generator(MAX_SEED, 10**9) is not None
