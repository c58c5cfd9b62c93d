"""The words that tell a neuron apart: where its mass lies that the corpus does not put there."""

from dataclasses import dataclass

import numpy as np

from lingua_topk.analysis.recording import Block
from lingua_topk.analysis.words import Words

MOST_WORDS = 20


@dataclass(frozen=True)
class DistinctiveWord:
    """A word of a neuron.

    Attributes:
        word: lower-cased.
        bits: p log2(p / q), p the word's share of the neuron's mass, q its share of all places:
            what it contributes to the divergence of the two, above 0.
        mean: of the neuron's value where it fires on the word, with its sign.
    """

    word: str
    bits: float
    mean: float


def distinctive_words(block: Block, words: Words, most: int = MOST_WORDS) -> list[list]:
    """Of each neuron of a block the words with the most bits, at most `most`, falling.

    In contrast to the words with the largest value these are the ones it mostly fires on, so that
    a neuron that a rare word excites most is not called by it. A list of DistinctiveWord a neuron.

    words: of the places that the block's survivors lie at. The mass of a survivor is |value|; that
    of places in no word counts in the total.
    """
    n, n_words = len(block.counts), len(words.words)
    q = np.bincount(words.index[words.index >= 0], minlength=n_words) / max(len(words.index), 1)
    total = np.bincount(block.neurons, np.abs(block.values, dtype=np.float64), n)  # [n]
    here = words.index[block.places]  # [M]
    inside = np.flatnonzero(here >= 0)
    keys = block.neurons[inside] * n_words + here[inside]
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], block.values[inside][order].astype(np.float64)
    starts = np.flatnonzero(np.diff(keys, prepend=-1))  # [P], a neuron and a word each
    if not len(starts):
        return [[] for _ in range(n)]
    neurons, ids = np.divmod(keys[starts], n_words)
    p = np.add.reduceat(np.abs(values), starts) / total[neurons]
    mean = np.add.reduceat(values, starts) / np.diff(starts, append=len(keys))
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(p > 0, p * np.log2(p / q[ids]), 0.0)
    order = np.lexsort((ids, -bits, neurons))
    order = order[bits[order] > 0]
    found: list[list] = [[] for _ in range(n)]
    for i in order.tolist():
        mine = found[neurons[i]]
        if len(mine) < most:
            mine.append(DistinctiveWord(words.words[ids[i]], float(bits[i]), float(mean[i])))
    return found
