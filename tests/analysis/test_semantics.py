"""Semantic entropy, against histograms worked out on paper and the plain definition."""

import math

import numpy as np
import pytest

from lingua_topk.analysis.recording import Block
from lingua_topk.analysis.semantics import (
    TOP_WORDS,
    semantic_entropy,
    semantic_measures,
    told_by_words,
)
from lingua_topk.analysis.vectors import Vectors
from lingua_topk.analysis.words import Words
from lingua_topk.errors import ConfigError

X, Y, Z = np.eye(3)


def block_of(neurons: list[list[tuple[int, float]]]) -> Block:
    """Of (place, value) pairs a neuron."""
    pairs = [pair for one in neurons for pair in one]
    return Block(
        first=0,
        counts=np.array([len(one) for one in neurons], dtype=np.int64),
        places=np.array([place for place, _ in pairs], dtype=np.int64),
        values=np.array([value for _, value in pairs], dtype=np.float32),
    )


def text_of(words: str, vectors: dict[str, np.ndarray]) -> tuple[Words, Vectors]:
    """One word a place, "." for none; a word that `vectors` lacks has none."""
    places = words.split()
    distinct = list(dict.fromkeys(word for word in places if word != "."))
    index = np.array([-1 if w == "." else distinct.index(w) for w in places], dtype=np.int32)
    rows = np.array([vectors.get(word, np.zeros(3)) for word in distinct], dtype=np.float32)
    found = np.array([word in vectors for word in distinct], dtype=bool)
    return Words(distinct, index), Vectors(rows, found, "by hand")


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        # Cosines 0, 0, 0: one bin.
        ([X, Y, Z], 0.0),
        # 1, 1, 1: one bin, the last.
        ([X, X, X], 0.0),
        # The one pair has -1, in the first bin.
        ([X, -X], 0.0),
        # 1 (X, X), -1 and -1 (X, -X): shares 1/3 and 2/3.
        ([X, X, -X], math.log2(3) - 2 / 3),
        # -1 (X, -X), 0 and 0: the same shares in other bins.
        ([X, -X, Y], math.log2(3) - 2 / 3),
        # Two clusters of two, at right angles: 1 twice, 0 four times.
        ([X, X, Y, Y], math.log2(3) - 2 / 3),
        # Cosines 0 (X, Y), 0.6 and 0.8: three bins, a third each.
        ([X, Y, 0.6 * X + 0.8 * Y], math.log2(3)),
        # 0.25 and 0.28 (and their product 0.07 plus what is orthogonal): see below.
        ([X, 0.25 * X + math.sqrt(1 - 0.25**2) * Y, 0.28 * X + 0.96 * Z], math.log2(3) - 2 / 3),
    ],
)  # fmt: skip
def test_by_hand(vectors, expected):
    # The last case: (1, 2) 0.25 and (1, 3) 0.28 fall in [0.2, 0.3), (2, 3) has 0.07.
    assert semantic_entropy(np.array(vectors)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [0, 1])
def test_without_a_pair_there_is_none(n):
    assert math.isnan(semantic_entropy(np.ones((n, 1))))


@pytest.mark.parametrize("scale", [1 + 1e-6, 1 - 1e-6])
def test_rounding_beyond_one_stays_in_the_bins_at_the_ends(scale):
    vectors = (np.array([X, X, -X, -X]) * scale).astype(np.float32)
    # (X, X) and (-X, -X): 2 pairs; (X, -X): 4.
    expected = math.log2(3) - 2 / 3
    assert semantic_entropy(vectors) == pytest.approx(expected, abs=1e-12)
    words, _ = text_of("a b c d", {})
    block = block_of([[(i, 1.0) for i in range(4)]])
    found = semantic_measures(block, words, Vectors(vectors, np.ones(4, bool), ""), min_words=2)
    assert found.entropy == pytest.approx([expected], abs=1e-12)


def test_what_a_neuron_fires_on():
    words, vectors = text_of("cat dog . cat the sun", {"cat": X, "dog": Y, "sun": X})
    block = block_of(
        [
            # Its largest is 4, above 2 are: dog 3, . 4, cat 2.5, the 2.5. cat 1.0 and sun 2.0
            # are not. Mass above: 12, with a vector 5.5.
            [(0, 1.0), (1, 3.0), (2, 4.0), (3, 2.5), (4, 2.5), (5, 2.0)],
            [],
            # By magnitude, the sign is kept: cat -5, dog 4, and sun 3 as the third.
            [(0, 2.0), (1, 4.0), (3, -5.0), (5, 3.0)],
        ]
    )
    found = semantic_measures(block, words, vectors, threshold=0.5, min_words=3)
    assert found.n_words.tolist() == [3, 0, 3]
    assert found.n_with_vector.tolist() == [2, 0, 3]
    assert found.too_few.tolist() == [True, True, False]
    np.testing.assert_allclose(found.coverage, [5.5 / 12, np.nan, 1.0])
    # cat and sun are alike, dog is not: cosines 1, 0, 0.
    np.testing.assert_allclose(found.entropy, [np.nan, np.nan, math.log2(3) - 2 / 3])
    assert found.top_words == [
        [("dog", 3.0), ("cat", 2.5), ("the", 2.5)],
        [],
        [("cat", -5.0), ("dog", 4.0), ("sun", 3.0)],
    ]


def test_half_of_the_mass_lacks_a_vector():
    words, vectors = text_of("cat the", {"cat": X})
    found = semantic_measures(block_of([[(0, 2.0), (1, -2.0)]]), words, vectors)
    assert found.coverage.tolist() == [0.5] and found.too_few.tolist() == [True]


def test_the_strongest_words_are_taken():
    words, vectors = text_of("a b c d", {"a": X, "b": Y, "d": X})
    # By strength: d, c (no vector), b, a. The first two with a vector are d and b: one pair.
    block = block_of([[(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)]])
    two = semantic_measures(block, words, vectors, threshold=0, min_words=2, max_words=2)
    three = semantic_measures(block, words, vectors, threshold=0, min_words=2, max_words=3)
    assert two.entropy.tolist() == [0.0] and two.n_with_vector.tolist() == [3]
    assert three.entropy == pytest.approx([math.log2(3) - 2 / 3])


def test_top_words_end():
    names = [f"w{chr(97 + i)}" for i in range(26)]
    words, vectors = text_of(" ".join(names), {})
    found = semantic_measures(block_of([[(i, 1.0) for i in range(26)]]), words, vectors)
    # All tie: in the order of the words.
    assert found.top_words == [[(name, 1.0) for name in names[:TOP_WORDS]]]
    assert found.n_words.tolist() == [26]


def test_a_block_without_neurons_or_words():
    words, vectors = text_of(". .", {})
    vectors = Vectors(np.zeros((0, 3), np.float32), np.zeros(0, bool), "")
    found = semantic_measures(block_of([[(0, 1.0), (1, 2.0)], []]), words, vectors)
    assert found.n_words.tolist() == [0, 0] and found.top_words == [[], []]
    np.testing.assert_array_equal(found.coverage, [0.0, np.nan])


def plainly(block: Block, words: Words, vectors: Vectors, threshold, min_words, max_words):
    """Entropy, words, words with a vector and coverage of each neuron, a survivor at a time."""
    rows = []
    for start, stop in zip(block.offsets, block.offsets[1:], strict=False):
        survivors = list(zip(block.places[start:stop], block.values[start:stop], strict=True))
        limit = threshold * max((float(abs(value)) for _, value in survivors), default=0.0)
        best, total, covered = {}, 0.0, 0.0
        for place, value in survivors:
            size, word = float(abs(value)), int(words.index[place])
            if not size > limit:
                continue
            total += size
            if word >= 0:
                covered += size * vectors.found[word]
                best[word] = max(best.get(word, 0.0), size)
        ordered = sorted(best, key=lambda word: (-best[word], word))
        with_vector = [word for word in ordered if vectors.found[word]]
        few = len(with_vector) < min_words
        h = math.nan if few else semantic_entropy(vectors.vectors[with_vector[:max_words]])
        rows.append((h, len(best), len(with_vector), covered / total if total else math.nan))
    return np.array(rows, dtype=np.float64).T


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5])
def test_as_the_plain_definition_has_it(threshold):
    rng = np.random.default_rng(0)
    n_places, n_words = 400, 60
    index = rng.integers(-1, n_words, n_places).astype(np.int32)
    unit = rng.standard_normal((n_words, 5))
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    found = rng.random(n_words) < 0.7
    vectors = Vectors((unit * found[:, None]).astype(np.float32), found, "")
    words = Words([str(i) for i in range(n_words)], index)
    block = block_of(
        [
            [
                (int(p), float(rng.standard_normal()))
                for p in np.sort(rng.choice(n_places, m, False))
            ]
            for m in (0, 1, 300, 5, 90, 400, 0)
        ]
    )
    measured = semantic_measures(
        block, words, vectors, threshold=threshold, min_words=4, max_words=12
    )
    entropy, n_distinct, n_with_vector, coverage = plainly(block, words, vectors, threshold, 4, 12)
    assert np.isfinite(entropy).sum() >= 3 and np.isnan(entropy).any()
    np.testing.assert_allclose(measured.entropy, entropy, atol=1e-12)
    np.testing.assert_array_equal(measured.n_words, n_distinct)
    np.testing.assert_array_equal(measured.n_with_vector, n_with_vector)
    np.testing.assert_allclose(measured.coverage, coverage)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threshold": 1.0}, "threshold=1.0 is not allowed"),
        ({"threshold": -0.1}, "threshold=-0.1 is not allowed"),
        ({"threshold": math.nan}, "threshold=nan is not allowed"),
        ({"min_words": 1}, "min_words=1 is not allowed: give at least 2"),
        ({"max_words": 9}, "max_words=9 is less than min_words=10"),
    ],
)
def test_settings_out_of_range(settings, says):
    words, vectors = text_of("a", {"a": X})
    with pytest.raises(ConfigError, match=says):
        semantic_measures(block_of([[(0, 1.0)]]), words, vectors, **settings)


def test_a_neuron_is_told_by_its_words_where_they_are_enough_and_most_of_it():
    n_with_vector, coverage = np.array([5, 4, 50, 5, 0]), np.array([0.2, 0.9, 0.19, 1.0, np.nan])
    assert told_by_words(n_with_vector, coverage).tolist() == [True, False, False, True, False]
