"""MonoScore: how alike the words are that a neuron fires on, weighted by how much it does.

Pach et al., arXiv 2504.02821: the mean cosine similarity of all pairs of items, weighted by the
product of their activations, which are scaled to [0, 1]. 1 for a neuron whose words all have the
same vector, about 0 for one that fires on anything.
"""

import numpy as np

from lingua_topk.analysis.recording import Block
from lingua_topk.analysis.vectors import Vectors
from lingua_topk.analysis.words import Words

# Activations of some neurons on all words that are in memory at once.
MOST_ACTIVATIONS = 2**22


def mono_score(block: Block, words: Words, vectors: Vectors, word_counts: np.ndarray) -> np.ndarray:
    """sum_{n<m} a_n a_m cos(e_n, e_m) / sum_{n<m} a_n a_m of each neuron, float64 [n].

    Items are the distinct words with a vector e. a is the mean |value| over all places of a word,
    0 where the neuron does not fire, scaled so that the neuron's least a is 0 and its largest 1.
    NaN where fewer than two words have an a above 0. Computed in time linear in the words
    (arXiv 2602.12403): (||sum a e||^2 - sum a^2) / ((sum a)^2 - sum a^2).

    word_counts: int64 [W], how many places each word has in the corpus.
    """
    n, items = len(block.counts), np.flatnonzero(vectors.found & (word_counts > 0))  # [I]
    if not len(items):
        return np.full(n, np.nan)
    columns = np.full(len(word_counts) + 1, -1)  # the last one is that of -1, in no word
    columns[items] = np.arange(len(items))
    columns = columns[words.index[block.places]]  # [M]
    unit, counts = vectors.vectors[items], word_counts[items]
    step = max(1, MOST_ACTIVATIONS // len(items))
    scores = [
        _scores(_means(block, columns, counts, first, min(first + step, n)), unit)
        for first in range(0, n, step)
    ]
    return np.concatenate(scores)


def _means(
    block: Block, columns: np.ndarray, counts: np.ndarray, first: int, end: int
) -> np.ndarray:
    """The mean |value| of the neurons `first` to `end` of the block on each item, [c, I]."""
    here = slice(block.offsets[first], block.offsets[end])
    columns, neurons = columns[here], block.neurons[here] - first
    inside = columns >= 0
    keys = neurons[inside] * len(counts) + columns[inside]
    size = np.abs(block.values[here][inside], dtype=np.float64)
    sums = np.bincount(keys, size, (end - first) * len(counts))
    return sums.reshape(-1, len(counts)) / counts


def _scores(a: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """a: float64 [c, I], overwritten. unit: float32 [I, E], of unit length."""
    a -= a.min(axis=1, keepdims=True)
    largest = a.max(axis=1, keepdims=True)
    a /= np.where(largest > 0, largest, 1.0)
    sums = (a.astype(np.float32) @ unit).astype(np.float64)  # [c, E]
    squares = (a * a).sum(axis=1)
    enough = np.count_nonzero(a, axis=1) >= 2
    scores = np.full(len(a), np.nan)
    pairs = (sums * sums).sum(axis=1) - squares
    np.divide(pairs, a.sum(axis=1) ** 2 - squares, out=scores, where=enough)
    return scores
