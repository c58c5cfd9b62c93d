"""What neurons fire on: cases worked out by hand, and against the plain dense computation."""

import math

import numpy as np
import pytest
import torch

from lingua_topk.analysis import neurons
from lingua_topk.analysis.neurons import TokenMass, entropy, token_entropy, token_mass
from lingua_topk.analysis.recording import Block


def block_of(dense: np.ndarray, first: int = 0) -> Block:
    """The block of all values that are not 0; dense: float [places, neurons]."""
    found, places = np.nonzero(dense.T)
    values = dense.T[found, places].astype(np.float32)
    return Block(first, np.bincount(found, minlength=dense.shape[1]), places, values)


def random_dense(seed: int, places: int = 200, width: int = 7, negative: bool = False):
    chance = np.random.default_rng(seed)
    values = chance.exponential(size=(places, width)) * (chance.random((places, width)) < 0.2)
    if negative:
        values *= chance.choice([-1, 1], size=values.shape)
    values[:, 3] = 0  # dead
    return values.astype(np.float32)


def test_one_token_has_entropy_0():
    """Fires three times, each time on token 5."""
    dense = np.array([[2.0], [0.0], [0.5], [7.0]])
    found = token_mass(block_of(dense), np.array([5, 1, 5, 5]))
    assert token_entropy(found).tolist() == [0.0]
    assert found.tokens.tolist() == [5]
    assert found.mass.tolist() == [9.5]
    assert found.counts.tolist() == [3]


@pytest.mark.parametrize("n", [2, 3, 64])
def test_n_tokens_evenly_have_entropy_log2_n(n):
    dense = np.ones((4 * n, 1))
    found = token_mass(block_of(dense), np.tile(np.arange(n), 4))
    assert token_entropy(found)[0] == pytest.approx(math.log2(n), abs=1e-12)


def test_mass_and_count_are_told_apart():
    """Token 0 once with 3, token 1 three times with 1 in all: (3/4, 1/4) and (1/4, 3/4)."""
    dense = np.array([[3.0], [0.25], [0.25], [0.5]])
    found = token_mass(block_of(dense), np.array([0, 1, 1, 1]))
    expected = -0.75 * math.log2(0.75) - 0.25 * math.log2(0.25)
    assert token_entropy(found)[0] == pytest.approx(expected)
    assert token_entropy(found, by_count=True)[0] == pytest.approx(expected)
    ids, shares = neurons.top_tokens(found, 3)
    assert ids.tolist() == [[0, 1, -1]]
    assert shares.tolist() == [[0.75, 0.25, 0.0]]


def test_a_dead_neuron_has_no_entropy_and_a_rare_one_has():
    dense = np.zeros((5, 2))
    dense[3, 1] = 1e-3
    found = token_mass(block_of(dense), np.arange(5))
    assert np.isnan(token_entropy(found)[0])
    assert token_entropy(found)[1] == 0.0
    assert neurons.top_tokens(found, 2)[0].tolist() == [[-1, -1], [3, -1]]


def test_the_sign_of_a_value_does_not_matter_to_its_mass():
    dense = random_dense(1, negative=True)
    tokens = np.random.default_rng(2).integers(0, 11, len(dense))
    signed, plain = (token_mass(block_of(one), tokens) for one in (dense, np.abs(dense)))
    np.testing.assert_array_equal(signed.mass, plain.mass)


@pytest.mark.parametrize("seed", range(3))
def test_against_the_dense_definition(seed):
    dense = random_dense(seed)
    tokens = np.random.default_rng(seed).integers(0, 13, len(dense))
    found = token_mass(block_of(dense), tokens)
    one_hot = np.eye(13)[tokens]  # [places, V]
    mass = dense.T.astype(np.float64) @ one_hot  # [neurons, V]
    count = (dense.T != 0).astype(np.int64) @ one_hot.astype(np.int64)
    expected = [entropy(row) for row in mass]
    np.testing.assert_allclose(token_entropy(found), expected, atol=1e-12)
    by_count = [entropy(row) for row in count]
    np.testing.assert_allclose(token_entropy(found, by_count=True), by_count, atol=1e-12)
    ids, shares = neurons.top_tokens(found, 4)
    for i, row in enumerate(mass):
        order = [t for t in np.argsort(-row, kind="stable") if row[t] > 0][:4]
        assert [t for t in ids[i] if t >= 0] == order
        np.testing.assert_allclose(shares[i, : len(order)], row[order] / row.sum(), rtol=1e-6)


def test_strength_against_the_dense_definition():
    dense = random_dense(5, negative=True)
    found = neurons.strength(block_of(dense))
    size = np.abs(dense.astype(np.float64))
    fired = dense != 0
    np.testing.assert_allclose(found["mass"], size.sum(0))
    np.testing.assert_allclose(found["maximum"], size.max(0))
    means = [size[fired[:, i], i].mean() if fired[:, i].any() else 0 for i in range(7)]
    np.testing.assert_allclose(found["mean"], means)
    for i in range(7):
        edges = (0.0, size[:, i].max() or 1.0)
        expected = np.histogram(size[fired[:, i], i], neurons.HISTOGRAM_BINS, edges)[0]
        assert found["histogram"][i].tolist() == expected.tolist()


def test_contexts_are_the_strongest_places_one_a_row():
    """Rows of 4. Row 0 peaks at place 2, row 1 at 4, row 2 is silent; place 1 is in row 0 too."""
    dense = np.array([[0], [5], [9], [0], [-7], [0], [0], [1], [0], [0], [0], [0]], dtype=float)
    found = neurons.top_contexts(block_of(dense), 4, n_contexts=3, width=3)
    assert found["context_rows"].tolist() == [[0, 1, -1]]
    assert found["context_positions"].tolist() == [[2, 0, -1]]
    assert found["context_starts"].tolist() == [[1, 0, -1]]
    assert found["context_values"].tolist() == [[[5, 9, 0], [-7, 0, 0], [0, 0, 0]]]


@pytest.mark.parametrize("width", [1, 4, 10, 99])
def test_contexts_against_the_dense_definition(width):
    length = 10
    dense = random_dense(7, negative=True)
    found = neurons.top_contexts(block_of(dense), length, 5, width)
    width = min(width, length)
    by_row = dense.reshape(-1, length, dense.shape[1])  # [rows, length, neurons]
    for i in range(dense.shape[1]):
        peaks = np.abs(by_row[:, :, i]).max(axis=1)
        rows = [r for r in np.argsort(-peaks, kind="stable") if peaks[r] > 0][:5]
        assert [r for r in found["context_rows"][i] if r >= 0] == rows
        for j, row in enumerate(rows):
            start = found["context_starts"][i, j]
            assert 0 <= start <= found["context_positions"][i, j] < start + width <= length
            expected = by_row[row, start : start + width, i]
            np.testing.assert_array_equal(found["context_values"][i, j], expected)


def test_direct_effects_are_those_of_the_model_without_the_norms_division():
    """The change of the logits that +1 makes, with the norm's scale held fixed."""
    torch.manual_seed(0)
    norm, output = torch.rand(6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64)
    h = torch.randn(6, dtype=torch.float64)
    found = neurons.direct_effects(torch.eye(6, dtype=torch.float64), norm, output, 4)
    for i in range(6):
        moved = h.clone()
        moved[i] += 1
        change = output @ (norm * moved) - output @ (norm * h)
        order = change.argsort(descending=True)
        assert found["promoted"][i].tolist() == order[:4].tolist()
        assert found["suppressed"][i].tolist() == order.flip(0)[:4].tolist()
        torch.testing.assert_close(found["promoted_logits"][i], change[order[:4]])


def test_no_neuron_fires():
    empty = block_of(np.zeros((4, 3)))
    found = token_mass(empty, np.arange(4))
    assert isinstance(found, TokenMass)
    assert np.isnan(token_entropy(found)).all()
    assert neurons.strength(empty)["maximum"].tolist() == [0, 0, 0]
    assert (neurons.top_contexts(empty, 4, 2, 3)["context_rows"] == -1).all()
    assert (neurons.top_tokens(found, 2)[0] == -1).all()
