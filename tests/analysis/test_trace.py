"""Overlaps, settling and correlations: cases by hand, and against the plain dense definitions."""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest

from lingua_topk.analysis import trace
from lingua_topk.analysis.recording import Block
from lingua_topk.analysis.trace import (
    NEVER,
    TokenShares,
    correlations,
    neurons_of,
    over_layers,
    overlap,
    overlaps,
    settled_at,
)

VOCAB = 23


@dataclass
class DenseLayer:
    """What a LayerRecording offers, of a dense float32 [places, D]."""

    dense: np.ndarray
    index: int = 0

    @property
    def width(self):
        return self.dense.shape[1]

    @property
    def n_tokens(self):
        return len(self.dense)

    def blocks(self, max_survivors=2**22):
        """Blocks of 1, 2, 3, 1, ... neurons, so that they end where those of others do not."""
        first, size = 0, 1 + self.index % 3
        while first < self.width:
            some = self.dense[:, first : first + size]
            found, places = np.nonzero(some.T)
            counts = np.bincount(found, minlength=some.shape[1])
            yield Block(first, counts, places, some.T[found, places])
            first, size = first + size, 1 + size % 3


def random_layer(seed, places=300, width=7, index=0):
    """Some neurons often, some rarely, one of them dead and one at every place."""
    draw = np.random.default_rng(seed)
    dense = draw.normal(size=(places, width)) * (draw.random((places, width)) < 0.2)
    dense[:, 2] = 0
    dense[:, 4] = draw.normal(3, 1, size=places)
    return DenseLayer(dense.astype(np.float32), index)


def random_tokens(seed=0, places=300):
    return np.random.default_rng(seed).integers(3, VOCAB, size=(places // 10, 10)).astype(np.int32)


def dense_shares(values, tokens):
    """The share of |value| on each token, [V]."""
    mass = np.zeros(VOCAB)
    for value, token in zip(values, tokens.reshape(-1), strict=True):
        mass[token] += abs(float(value))
    return mass / mass.sum() if mass.sum() > 0 else mass


def dense_overlap(a, b, tokens):
    """1 minus the total variation distance, where both have any mass."""
    p, q = dense_shares(a, tokens), dense_shares(b, tokens)
    return 1 - np.abs(p - q).sum() / 2 if p.any() and q.any() else 0.0


def fires(values, width=1):
    return DenseLayer(np.array(values, dtype=np.float32).reshape(-1, width))


def test_shares_by_hand():
    """3 on token 7 and -1 on token 5: by magnitude 3/4 and 1/4."""
    shares = TokenShares(np.array([[5, 7, 7, 9]]))
    assert shares.of(np.array([0, 1, 2]), np.array([-1, 1, 2], np.float32)).tolist() == [
        0.25, 0.75, 0,
    ]  # fmt: skip
    assert shares.of(np.array([], np.int64), np.array([], np.float32)).tolist() == [0, 0, 0]


def test_overlap_by_hand():
    """(1/2, 1/2, 0) and (1/4, 1/4, 1/2) have 1/4 + 1/4 in common."""
    assert overlap(np.array([0.5, 0.5, 0]), np.array([0.25, 0.25, 0.5])) == 0.5
    assert overlap(np.array([1.0, 0]), np.array([0, 1.0])) == 0
    assert overlap(np.zeros(2), np.zeros(2)) == 0


def test_overlap_does_not_see_how_strongly_a_neuron_fires():
    shares = TokenShares(np.array([[0, 1, 2, 1]]))
    one, twice = fires([2, 1, 0, 1]), fires([4, 2, 0, 2])
    assert overlaps(one, twice, shares) == pytest.approx([1])
    # The mass of token 1 may lie at another of its places.
    assert overlaps(one, fires([2, 0, 0, 2]), shares) == pytest.approx([1])
    assert overlaps(one, fires([0, 0, 3, 0]), shares).tolist() == [0]
    assert overlaps(one, fires([0, 0, 0, 0]), shares).tolist() == [0]


@pytest.mark.parametrize("seed", range(4))
def test_overlaps_are_those_of_the_dense_definition(seed):
    tokens = random_tokens(seed)
    a, b = random_layer(seed), random_layer(seed + 100, index=1)
    for shift in (3, 0):
        theirs = np.roll(b.dense, -shift, axis=1)
        expected = [dense_overlap(a.dense[:, i], theirs[:, i], tokens) for i in range(a.width)]
        found = overlaps(a, b, TokenShares(tokens), shift)
        assert found == pytest.approx(expected, abs=1e-12)
    assert found[2] == 0 and 0.5 < found[4] < 1


def test_neurons_are_read_in_order_and_from_any_one_on():
    layer = random_layer(3)
    for first in range(layer.width):
        found = list(neurons_of(layer, first))
        assert len(found) == layer.width
        for i, (places, values) in enumerate(found):
            column = layer.dense[:, (first + i) % layer.width]
            assert places.tolist() == np.flatnonzero(column).tolist()
            assert values.tolist() == column[column != 0].tolist()


SETTLING = [
    ([1.0, 1.0, 1.0], 0),  # never another one
    ([0.1, 0.2, 1.0], 2),  # changes at the last
    ([0.9, 0.2, 1.0], 2),  # had been there before, and left
    ([0.2, 0.5, 1.0], 1),  # the threshold itself counts
    ([0.7, 0.6, 0.0], NEVER),  # dead in the end
    ([0.0, 0.0, 0.0], NEVER),
]


def test_settling_by_hand():
    rows = np.array([row for row, _ in SETTLING]).T  # [C, D]
    assert settled_at(rows, 0.5).tolist() == [expected for _, expected in SETTLING]
    assert settled_at(rows, 1.0).tolist() == [0, 2, 2, 2, NEVER, NEVER]


def test_a_neuron_that_stays_settles_at_the_first_and_one_that_changes_last_at_the_last():
    """Two neurons over three checkpoints: the second turns from token 0 to token 1 at the end."""
    shares = TokenShares(np.array([[0, 1, 2, 0]]))
    before = fires([[1, 2], [0, 0], [3, 0], [2, 1]], width=2)
    after = fires([[1, 0], [0, 5], [3, 0], [2, 0]], width=2)
    found = np.stack([overlaps(one, after, shares) for one in (before, before, after)])
    assert found == pytest.approx(np.array([[1, 0], [1, 0], [1, 1]]))
    assert settled_at(found, 0.5).tolist() == [0, 2]


def survivors(dense):
    return list(neurons_of(DenseLayer(dense)))


@pytest.mark.parametrize("seed", range(4))
def test_correlations_are_numpys_over_all_places(seed):
    dense = random_layer(seed).dense
    dense = np.concatenate([dense, dense[:, :1] * -2, dense[:, :1] + dense[:, 1:2]], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.corrcoef(dense.astype(np.float64), rowvar=False)
    found = correlations(survivors(dense), dense.shape[1], len(dense))
    np.testing.assert_allclose(found, expected, atol=1e-12, equal_nan=True)
    assert found[0, 7] == pytest.approx(-1)
    assert np.isnan(found[2]).all()
    some = correlations(survivors(dense), 3, len(dense))
    np.testing.assert_allclose(some, found[:3], atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("piece", [1, 7, 100, 299, 300, 2**16])
def test_correlations_are_the_same_in_pieces_of_any_size(piece):
    """Also where pieces hold no survivor, and where a mean is far larger than the spread."""
    dense = random_layer(5).dense
    dense[100:250] = 0
    large = dense[:, :1] + np.float32(1000)
    for columns in (dense[:, [0, 1, 3, 4]], np.concatenate([dense[:, [0, 1, 3]], large], axis=1)):
        expected = np.corrcoef(columns.astype(np.float64), rowvar=False)[:2]
        found = correlations(survivors(columns), 2, len(columns), piece)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_constants_have_no_correlation():
    """A neuron at every place with one value; what rounding leaves is not taken for a variance."""
    dense = np.full((1000, 2), 0.1, dtype=np.float32)
    dense[::2, 1] = 0.7
    found = correlations(survivors(dense), 2, 1000)
    assert np.isnan(found[0]).all() and found[1, 1] == pytest.approx(1)


@pytest.mark.parametrize("n_layers", [1, 2, 4])
def test_over_layers_against_the_dense_definition(n_layers, monkeypatch):
    monkeypatch.setattr(trace, "BLOCK_SURVIVORS", 50)
    tokens = random_tokens(1)
    layers = [random_layer(seed, index=2 * seed) for seed in range(n_layers)]
    found = over_layers(layers, TokenShares(tokens))
    assert found.shift == 3
    pairs = list(combinations(range(n_layers), 2))
    assert found.pairs == [(2 * a, 2 * b) for a, b in pairs]
    for shift, overlap_found, correlation_found in (
        (0, found.overlap, found.correlation),
        (3, found.shifted_overlap, found.shifted_correlation),
    ):
        assert overlap_found.shape == correlation_found.shape == (len(pairs), 7)
        for row, (a, b) in enumerate(pairs):
            ours = layers[a].dense.astype(np.float64)
            theirs = np.roll(layers[b].dense.astype(np.float64), -shift, axis=1)
            for i in range(7):
                assert overlap_found[row, i] == pytest.approx(
                    dense_overlap(ours[:, i], theirs[:, i], tokens), abs=1e-12
                )
                with np.errstate(invalid="ignore", divide="ignore"):
                    expected = np.corrcoef(ours[:, i], theirs[:, i])[0, 1]
                assert correlation_found[row, i] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_the_same_meaning_at_the_same_index_shows_against_the_baseline():
    """Two layers that repeat each other, each neuron on tokens of its own."""
    tokens = np.arange(40).reshape(4, 10) % 8
    dense = (tokens.reshape(-1, 1) == np.arange(8)).astype(np.float32)  # [40, 8]
    found = over_layers([DenseLayer(dense, 0), DenseLayer(2 * dense, 1)], TokenShares(tokens))
    assert found.overlap[0] == pytest.approx(np.ones(8))
    assert found.correlation[0] == pytest.approx(np.ones(8))
    assert found.shifted_overlap[0].tolist() == [0] * 8
    assert (found.shifted_correlation[0] < 0).all()


def test_a_layer_of_one_neuron_has_no_other_to_compare_with():
    layers = [DenseLayer(random_layer(0, width=5).dense[:, :1], i) for i in range(2)]
    found = over_layers(layers, TokenShares(random_tokens()))
    assert found.overlap == pytest.approx(np.ones((1, 1)))
    assert np.isnan(found.shifted_overlap).all() and np.isnan(found.shifted_correlation).all()
