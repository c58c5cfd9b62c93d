"""What a neuron fires on: token entropy, how often, how strongly, on which tokens and where.

All functions take a `Block`, the survivors of consecutive neurons, and give arrays with a row a
neuron; so memory does not grow with the corpus. The mass of a survivor is its absolute value.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lingua_topk.analysis.recording import Block

HISTOGRAM_BINS = 20


def entropy(weights: np.ndarray) -> float:
    """H = -sum_d p_d log2 p_d in bits, p the weights over their sum; NaN where that is 0.

    weights: float or integer [V], none negative. This is the definition that `token_entropy`
    computes for many neurons at once.
    """
    total = weights.sum()
    if not total > 0:
        return float("nan")
    p = weights[weights > 0] / total
    return float(-(p * np.log2(p)).sum()) + 0.0  # no -0.0


@dataclass(frozen=True)
class TokenMass:
    """How the mass and the firings of neurons spread over tokens; a pair each where there is any.

    Attributes:
        neurons: int64 [P], rising; of the block's first.
        tokens: int64 [P], rising within a neuron.
        mass: float64 [P], the sum of |value|.
        counts: int64 [P], how often.
        n_neurons: in the block, with those that have no pair.
    """

    neurons: np.ndarray
    tokens: np.ndarray
    mass: np.ndarray
    counts: np.ndarray
    n_neurons: int


def token_mass(block: Block, tokens: np.ndarray) -> TokenMass:
    """tokens: int [N * S], which token stands at a place."""
    here = tokens[block.places].astype(np.int64)  # [M]
    most = int(tokens.max(initial=0)) + 1
    keys = block.neurons * most + here
    order = np.argsort(keys, kind="stable")
    keys, mass = keys[order], np.abs(block.values[order], dtype=np.float64)
    starts = np.flatnonzero(np.diff(keys, prepend=-1))  # [P]
    pairs = keys[starts]
    return TokenMass(
        neurons=pairs // most,
        tokens=pairs % most,
        mass=np.add.reduceat(mass, starts) if len(starts) else np.empty(0),
        counts=np.diff(starts, append=len(keys)),
        n_neurons=len(block.counts),
    )


def token_entropy(found: TokenMass, by_count: bool = False) -> np.ndarray:
    """Shannon entropy of each neuron's mass (or count) over the vocabulary, in bits, float64 [n].

    H = -sum_d p_d log2 p_d, p_d the share of token d (arXiv 2506.21468); NaN for a neuron that
    never fires. 0 for one that fires on one token, log2 n for one that fires evenly on n.
    """
    weights = found.counts.astype(np.float64) if by_count else found.mass
    totals = np.bincount(found.neurons, weights, found.n_neurons)  # [n]
    with np.errstate(divide="ignore", invalid="ignore"):
        p = weights / totals[found.neurons]  # [P]
        terms = np.where(p > 0, -p * np.log2(p), 0.0)
        return np.where(totals > 0, np.bincount(found.neurons, terms, found.n_neurons), np.nan)


def top_tokens(found: TokenMass, n_top: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens with the largest share of each neuron's mass, and that share.

    int32 and float32 [n, n_top], falling; -1 and 0 where there are fewer.
    """
    order = np.lexsort((found.tokens, -found.mass, found.neurons))  # within a neuron by mass
    firsts = np.searchsorted(found.neurons, np.arange(found.n_neurons))  # [n]
    rank = np.arange(len(order)) - firsts[found.neurons]  # neurons are in their order already
    taken = rank < n_top
    where = found.neurons[taken], rank[taken]
    totals = np.bincount(found.neurons, found.mass, found.n_neurons)
    ids = np.full((found.n_neurons, n_top), -1, dtype=np.int32)
    shares = np.zeros((found.n_neurons, n_top), dtype=np.float32)
    ids[where] = found.tokens[order][taken]
    with np.errstate(invalid="ignore"):
        shares[where] = np.nan_to_num(found.mass[order][taken] / totals[where[0]])
    return ids, shares


def strength(block: Block) -> dict[str, np.ndarray]:
    """`mass`, `mean` and `maximum` of |value| over the firings, float64 [n]; 0 where there is none.

    And `histogram`, int32 [n, HISTOGRAM_BINS]: |value| in equal bins from 0 to the maximum.
    """
    n, size = len(block.counts), np.abs(block.values, dtype=np.float64)  # [M]
    mass = np.bincount(block.neurons, size, n)
    maximum = np.zeros(n)
    np.maximum.at(maximum, block.neurons, size)
    scale = maximum[block.neurons]  # [M]
    share = np.divide(size, scale, out=np.zeros_like(size), where=scale > 0)
    bins = np.minimum((share * HISTOGRAM_BINS).astype(np.int64), HISTOGRAM_BINS - 1)
    histogram = np.bincount(block.neurons * HISTOGRAM_BINS + bins, minlength=n * HISTOGRAM_BINS)
    return {
        "mass": mass,
        "mean": mass / np.maximum(block.counts, 1),
        "maximum": maximum,
        "histogram": histogram.reshape(n, HISTOGRAM_BINS).astype(np.int32),
    }


def top_contexts(
    block: Block, row_length: int, n_contexts: int, width: int
) -> dict[str, np.ndarray]:
    """Where each neuron fires most strongly, at most one place a row, and its values around there.

    `context_rows`, `context_positions` and `context_starts` (of the window within its row): int32
    [n, C], -1 where there are fewer. `context_values`: float32 [n, C, W], the neuron's value at
    the W = min(width, row_length) places of the window, 0 where it does not fire. The window
    has the place in its middle, but for the ends of the row.
    """
    n, width = len(block.counts), min(width, row_length)
    found = {
        name: np.full((n, n_contexts), -1, dtype=np.int32)
        for name in ("context_rows", "context_positions", "context_starts")
    }
    values = np.zeros((n, n_contexts, width), dtype=np.float32)
    for i, (start, stop) in enumerate(zip(block.offsets, block.offsets[1:], strict=False)):
        places, fired = block.places[start:stop], block.values[start:stop]
        peaks = _peaks(places, fired, row_length, n_contexts)  # [c]
        rows, positions = np.divmod(peaks, row_length)
        firsts = np.clip(positions - width // 2, 0, row_length - width)
        c = len(peaks)
        found["context_rows"][i, :c] = rows
        found["context_positions"][i, :c] = positions
        found["context_starts"][i, :c] = firsts
        for j, first in enumerate(rows * row_length + firsts):
            a, b = np.searchsorted(places, [first, first + width])
            values[i, j, places[a:b] - first] = fired[a:b]
    return {**found, "context_values": values}


def _peaks(places: np.ndarray, values: np.ndarray, row_length: int, most: int) -> np.ndarray:
    """The places of the largest |values|, strongest first, one a row; int64 [at most `most`]."""
    rows = places // row_length
    starts = np.flatnonzero(np.diff(rows, prepend=-1))  # places rise, so rows are together
    if not len(starts):
        return np.empty(0, dtype=np.int64)
    size = np.abs(values)
    best = np.maximum.reduceat(size, starts)  # [rows with a firing]
    # Of rows that tie, and of places that tie in a row, the first.
    strongest = np.argsort(-best, kind="stable")[:most]
    ends = np.append(starts[1:], len(places))
    return np.array(
        [places[starts[r] + np.argmax(size[starts[r] : ends[r]])] for r in strongest],
        dtype=np.int64,
    )


def direct_effects(
    directions: Tensor, norm: Tensor, output: Tensor, n_top: int
) -> dict[str, Tensor]:
    """The next tokens that neurons promote and suppress most, straight through the last norm.

    Args:
        directions: [n, D], what +1 of a neuron adds to the residual stream.
        norm: [D], the weight of the final norm. Its division is left out: it scales all
            logits of a place alike.
        output: [V, D], the output matrix.
        n_top: tokens each way.

    Returns: `promoted`, `suppressed` int64 [n, n_top] and their changes of the logit,
    `promoted_logits` (falling), `suppressed_logits` (rising), dtype of the weights.
    """
    logits = (directions * norm) @ output.T  # [n, V]
    n_top = min(n_top, logits.shape[1])
    up, promoted = torch.topk(logits, n_top)
    down, suppressed = torch.topk(logits, n_top, largest=False)
    return {
        "promoted": promoted, "promoted_logits": up,
        "suppressed": suppressed, "suppressed_logits": down,
    }  # fmt: skip
