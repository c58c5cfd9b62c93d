"""Semantic entropy: how alike the words are that a neuron fires on.

After arXiv 2506.21468: the cosine similarities of all pairs of words go into a histogram over
[-1, 1], and the entropy of the histogram is low where the pairs are all alike (or all unlike) to
the same degree. It says nothing of where the histogram lies: MonoScore does.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from lingua_topk.analysis.neurons import entropy
from lingua_topk.analysis.recording import Block
from lingua_topk.analysis.vectors import Vectors
from lingua_topk.analysis.words import Words
from lingua_topk.errors import ConfigError

# Bins of width 0.1 over [-1, 1]. Each holds its lower edge, the last also its upper one.
BINS = 20
TOP_WORDS = 20
# A neuron that is strong on fewer words, or mostly elsewhere, is not told by its words.
TOLD_WORDS, TOLD_COVERAGE = 5, 0.2


@dataclass(frozen=True)
class SemanticMeasures:
    """The words of a block's neurons, n of them.

    Attributes:
        entropy: float64 [n], in bits, 0 to log2 BINS; NaN where `too_few`.
        n_words: int64 [n], distinct words above the threshold.
        n_with_vector: int64 [n], those of them that have a vector.
        coverage: float64 [n], which share of the mass above the threshold (also that on no word)
            is on words with a vector; NaN for a neuron that never fires.
        too_few: bool [n], fewer words with a vector than are asked for.
        top_words: [n], the words above the threshold, at most TOP_WORDS, each with the value of
            largest magnitude that the neuron has there (with its sign), by falling magnitude.
    """

    entropy: np.ndarray
    n_words: np.ndarray
    n_with_vector: np.ndarray
    coverage: np.ndarray
    too_few: np.ndarray
    top_words: list[list[tuple[str, float]]]


@dataclass(frozen=True)
class _Pairs:
    """A neuron and a word each, P of them, sorted by neuron, then by falling |value|, then by word.

    neurons, words: int64 [P]. values: float32 [P], of largest magnitude.
    """

    neurons: np.ndarray
    words: np.ndarray
    values: np.ndarray


def semantic_entropy(vectors: np.ndarray) -> float:
    """H = -sum_i p_i log2 p_i in bits, p_i the share of pairs whose cosine falls in bin i.

    vectors: float [n, E], of unit length. NaN for fewer than two. This is the definition that
    `semantic_measures` computes faster.
    """
    counts = np.zeros(BINS)
    for i in range(len(vectors)):
        for j in range(i + 1, len(vectors)):
            cosine = float(np.dot(vectors[i].astype(np.float64), vectors[j].astype(np.float64)))
            # What rounding takes beyond -1 or 1 belongs into the bins at the ends.
            cosine = min(max(cosine, -1.0), 1.0)
            counts += np.histogram([cosine], BINS, (-1.0, 1.0))[0]
    return entropy(counts)


def semantic_measures(
    block: Block,
    words: Words,
    vectors: Vectors,
    *,
    threshold: float = 0.5,
    min_words: int = 10,
    max_words: int = 100,
) -> SemanticMeasures:
    """Semantic entropy of each neuron of a block, and the words that it comes from.

    Args:
        block: the survivors of the neurons.
        words: of the places that the block's survivors lie at.
        vectors: of those words.
        threshold: only what is above this share of the neuron's largest |value| counts, at least
            0 and below 1.
        min_words: with fewer distinct words with a vector a neuron is not scored; at least 2.
        max_words: of more words with a vector those with the largest |value| are taken.

    Raises: ConfigError for an argument out of range.
    """
    _check(threshold, min_words, max_words)
    n = len(block.counts)
    above = _above(block, threshold)
    neurons, values = block.neurons[above], block.values[above]
    found_words = words.index[block.places[above]]  # -1: in no word
    mass = np.abs(values, dtype=np.float64)
    has_vector = np.append(vectors.found, False)[found_words]  # the last one is that of -1
    total = np.bincount(neurons, mass, n)
    covered = np.bincount(neurons[has_vector], mass[has_vector], n)
    pairs = _strongest(neurons, found_words, values, len(words.words))
    with_vector = vectors.found[pairs.words]
    n_with_vector = np.bincount(pairs.neurons[with_vector], minlength=n)
    too_few = n_with_vector < min_words
    chosen = _split(pairs.neurons[with_vector], pairs.words[with_vector], n)
    entropies = [
        np.nan if few else _fast_entropy(vectors.vectors[one[:max_words]])
        for one, few in zip(chosen, too_few, strict=True)
    ]
    with np.errstate(invalid="ignore"):
        coverage = covered / total
    return SemanticMeasures(
        entropy=np.array(entropies, dtype=np.float64),
        n_words=np.bincount(pairs.neurons, minlength=n),
        n_with_vector=n_with_vector,
        coverage=coverage,
        too_few=too_few,
        top_words=_top_words(pairs, words.words, n),
    )


def told_by_words(n_with_vector: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    """Whether its words say what a neuron fires on, bool [n]; other neurons fire on spaces, signs
    or pieces, and what is measured of their few words says little of them.

    n_with_vector, coverage: as in `SemanticMeasures`.
    """
    return (n_with_vector >= TOLD_WORDS) & (coverage >= TOLD_COVERAGE)  # NaN: not


def _check(threshold: float, min_words: int, max_words: int) -> None:
    if not 0 <= threshold < 1:
        raise ConfigError(f"threshold={threshold} is not allowed: give at least 0 and less than 1")
    if min_words < 2:
        raise ConfigError(f"min_words={min_words} is not allowed: give at least 2, for one pair")
    if max_words < min_words:
        raise ConfigError(
            f"max_words={max_words} is less than min_words={min_words}: give at least as many"
        )


def _above(block: Block, threshold: float) -> np.ndarray:
    """Which survivors are above that share of their neuron's largest |value|, int64 [m]."""
    size, neurons = np.abs(block.values), block.neurons  # [M]
    largest = np.zeros(len(block.counts), dtype=np.float32)
    np.maximum.at(largest, neurons, size)
    limit = largest.astype(np.float64) * threshold
    return np.flatnonzero(size > limit[neurons])


def _strongest(neurons: np.ndarray, words: np.ndarray, values: np.ndarray, n_words: int) -> _Pairs:
    """Each neuron and word once, of survivors that may lie on no word."""
    inside = np.flatnonzero(words >= 0)
    neurons, words, values = neurons[inside], words[inside].astype(np.int64), values[inside]
    keys = neurons * n_words + words
    order = np.lexsort((-np.abs(values), keys))
    firsts = order[np.flatnonzero(np.diff(keys[order], prepend=-1))]
    neurons, words, values = neurons[firsts], words[firsts], values[firsts]
    order = np.lexsort((words, -np.abs(values), neurons))
    return _Pairs(neurons[order], words[order], values[order])


def _split(neurons: np.ndarray, array: np.ndarray, n: int) -> list[np.ndarray]:
    """The part of `array` of each of the n neurons; `neurons` is sorted."""
    return np.split(array, np.searchsorted(neurons, np.arange(1, n)))


def _fast_entropy(vectors: np.ndarray) -> float:
    vectors = vectors.astype(np.float64)
    cosines = (vectors @ vectors.T)[_upper(len(vectors))]  # [n * (n - 1) / 2]
    return entropy(np.histogram(np.clip(cosines, -1.0, 1.0), BINS, (-1.0, 1.0))[0])


@cache
def _upper(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The pairs i < j below n."""
    return np.triu_indices(n, k=1)


def _top_words(pairs: _Pairs, words: list[str], n: int) -> list[list[tuple[str, float]]]:
    return [
        [(words[word], float(value)) for word, value in zip(some[:TOP_WORDS], values, strict=False)]
        for some, values in zip(
            _split(pairs.neurons, pairs.words, n),
            _split(pairs.neurons, pairs.values, n),
            strict=True,
        )
    ]
