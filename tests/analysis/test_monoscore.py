"""MonoScore in linear time, against the sum over pairs and cases worked out on paper."""

import math

import numpy as np
import pytest

from lingua_topk.analysis import monoscore
from lingua_topk.analysis.monoscore import mono_score
from lingua_topk.analysis.recording import Block
from lingua_topk.analysis.vectors import Vectors
from lingua_topk.analysis.words import Words


def block_of(neurons: list[dict[int, float]]) -> Block:
    """Of place: value a neuron."""
    return Block(
        first=0,
        counts=np.array([len(one) for one in neurons], dtype=np.int64),
        places=np.array([place for one in neurons for place in one], dtype=np.int64),
        values=np.array([v for one in neurons for v in one.values()], dtype=np.float32),
    )


def score(neurons, index: list[int], vectors: list, found: list[bool] | None = None) -> list[float]:
    rows = np.array(vectors, dtype=np.float32)
    found = np.ones(len(rows), bool) if found is None else np.array(found)
    words = Words([str(i) for i in range(len(rows))], np.array(index, dtype=np.int32))
    counts = np.bincount(words.index[words.index >= 0], minlength=len(rows))
    return mono_score(block_of(neurons), words, Vectors(rows, found, ""), counts).tolist()


def pairwise(a: np.ndarray, vectors: np.ndarray) -> float:
    """The definition, of activations [I] on items with unit vectors [I, E]."""
    a = (a - a.min()) / (a.max() - a.min()) if a.max() > a.min() else np.zeros(len(a))
    if np.count_nonzero(a) < 2:
        return math.nan
    above = below = 0.0
    for n in range(len(a)):
        for m in range(n + 1, len(a)):
            above += a[n] * a[m] * float(vectors[n] @ vectors[m])
            below += a[n] * a[m]
    return above / below


X, Y = np.eye(2)


def test_by_hand():
    # Words 0, 1, 2 (X, X, Y) and 3 (-X) stand once each; each neuron is silent on one at least.
    fired_on = [
        {0: 2.0, 1: 2.0},  # X and X: 1
        {0: 3.0, 2: 1.0},  # X and Y: 0
        {1: 1.0, 3: -1.0},  # X and -X, by magnitude: -1
        # a = 1, 1/2, 1/2 on X, X, Y. Above: 1 * 1/2. Below: 1/2 + 1/2 + 1/4. 0.4
        {0: 4.0, 1: 2.0, 2: 2.0},
    ]
    found = score(fired_on, [0, 1, 2, 3], [X, X, Y, -X])
    assert found == pytest.approx([1.0, 0.0, -1.0, 0.4], abs=1e-6)


def test_means_include_the_places_where_it_does_not_fire():
    # Word 0 stands at 4 places and has 4 once: mean 1. Word 1 stands once, with 2. Word 2: 0.
    # a = 1/2, 1, 0: one pair. Word 3, with 1: a = 1/2 too. Vectors X, X, Y, Y.
    # Above: 1/2 * 1. Below: 1/2 * 1 + 1/2 * 1/2 + 1 * 1/2. 0.4
    found = score([{0: 4.0, 4: 2.0, 6: 1.0}], [0, 0, 0, 0, 1, 2, 3], [X, X, Y, Y])
    assert found == pytest.approx([0.4], abs=1e-6)


def test_the_least_activation_becomes_zero():
    # 5, 3, 1 become 1, 1/2, 0: the pair of X and Y alone.
    assert score([{0: 5.0, 1: 3.0, 2: 1.0}], [0, 1, 2], [X, Y, X]) == pytest.approx([0.0], abs=1e-6)


def test_where_there_is_no_pair():
    neurons = [
        {},  # dead
        {0: 1.0},  # one word
        {0: 1.0, 1: 1.0, 2: 1.0},  # the same on all: nothing is left of it
        {0: 1.0, 3: 5.0},  # the second fires on no word
    ]
    assert all(map(math.isnan, score(neurons, [0, 1, 2, -1], [X, X, Y])))


def test_words_without_a_vector_are_no_items():
    # The silent word 2 has no vector, so word 1 is the least active: one word is left.
    assert math.isnan(score([{0: 2.0, 1: 1.0}], [0, 1, 2], [X, X, X], [True, True, False])[0])
    assert math.isnan(score([{0: 2.0}], [0], [X], [False])[0])


@pytest.mark.parametrize("most", [1, 100, 2**22])
def test_as_the_sum_over_pairs_has_it(most, monkeypatch):
    monkeypatch.setattr(monoscore, "MOST_ACTIVATIONS", most)
    rng = np.random.default_rng(0)
    n_places, n_words = 300, 20
    index = rng.integers(-1, n_words, n_places).astype(np.int32)
    unit = rng.standard_normal((n_words, 6)) + 0.5
    unit = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).astype(np.float32)
    found = rng.random(n_words) < 0.8
    counts = np.bincount(index[index >= 0], minlength=n_words)
    neurons = [
        {int(p): float(rng.standard_normal()) for p in np.sort(rng.choice(n_places, m, False))}
        for m in (0, 1, 3, 30, 300, 0, 120)
    ]
    vectors = Vectors(unit * found[:, None], found, "")
    result = mono_score(block_of(neurons), Words([""] * n_words, index), vectors, counts)
    expected = []
    for fired in neurons:
        a = np.zeros(n_words)
        for place, value in fired.items():
            if index[place] >= 0:
                a[index[place]] += abs(value)
        expected.append(pairwise((a / counts)[found], unit[found]))
    assert np.isfinite(expected).sum() >= 3
    np.testing.assert_allclose(result, expected, atol=1e-6)
