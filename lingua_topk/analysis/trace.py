"""The same neuron over the checkpoints of a run, and the same index over layers.

All recordings that are compared hold the same rows of tokens. Neurons are read one after
another, so memory holds single neurons and never a [D, V] or a [D, N * S] matrix.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, islice

import numpy as np

from lingua_topk.analysis.recording import LayerRecording

NEVER = -1
# A variance below this share of the mean square is what rounding leaves of a constant.
LEAST_VARIANCE = 1e-12
BLOCK_SURVIVORS = 2**22
PIECE_PLACES = 2**16  # of a corpus, that several neurons are laid side by side at

# The survivors of a neuron: places int64 [m], rising, and values float32 [m].
Survivors = tuple[np.ndarray, np.ndarray]


def neurons_of(
    layer: LayerRecording, first: int = 0, max_survivors: int = BLOCK_SURVIVORS
) -> Iterator[Survivors]:
    """The survivors of each neuron of a layer, from `first` on and then from 0 up to it."""
    if first:
        behind = islice(neurons_of(layer, 0, max_survivors), first, None)
        before = islice(neurons_of(layer, 0, max_survivors), first)
        yield from chain(behind, before)
        return
    for block in layer.blocks(max_survivors):
        for start, stop in zip(block.offsets, block.offsets[1:], strict=False):
            yield block.places[start:stop], block.values[start:stop]


class TokenShares:
    """How the mass of a neuron, the sum of |value|, spreads over the tokens of a corpus."""

    def __init__(self, tokens: np.ndarray):
        """tokens: int [N, S] or [N * S], which token stands at a place."""
        # Only tokens that occur get a column: V may be much larger.
        distinct, index = np.unique(tokens, return_inverse=True)
        self.n_tokens = len(distinct)
        self._index = index.reshape(-1)

    def of(self, places: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The share of each token, float64 [n_tokens]: sums to 1, or all 0 without any mass."""
        size = np.abs(values, dtype=np.float64)
        mass = np.bincount(self._index[places], size, self.n_tokens)
        total = mass.sum()
        return mass / total if total > 0 else mass


def overlap(p: np.ndarray, q: np.ndarray) -> float:
    """sum_d min(p_d, q_d) of shares of tokens: 1 minus their total variation distance.

    1 where the two are the same, 0 where they have no token in common or one of them has no mass.
    """
    return float(np.minimum(p, q).sum())


def overlaps(
    layer: LayerRecording, other: LayerRecording, shares: TokenShares, shift: int = 0
) -> np.ndarray:
    """The overlap of each neuron i of `layer` with neuron i + shift (modulo D) of `other`.

    float64 [D]. With a shift it is a baseline: what neurons have in common whatever their index.
    """
    pairs = zip(neurons_of(layer), neurons_of(other, shift), strict=True)
    return np.array([overlap(shares.of(*a), shares.of(*b)) for a, b in pairs], dtype=np.float64)


def settled_at(overlap_with_final: np.ndarray, threshold: float) -> np.ndarray:
    """The first checkpoint from which on, the later ones all included, a neuron is its final self.

    overlap_with_final: [C, D], the last row that of the final checkpoint with itself.
    threshold: the overlap that counts as the same.

    Returns: int64 [D], an index in [0, C), or NEVER for a neuron that is dead in the end.
    """
    n_checkpoints = len(overlap_with_final)
    is_same = overlap_with_final >= threshold  # [C, D]
    since = np.cumprod(is_same[::-1], axis=0).sum(axis=0)  # [D], how many at the end
    return np.where(since > 0, n_checkpoints - since, NEVER).astype(np.int64)


@dataclass(frozen=True)
class OverLayers:
    """What the same index means in two layers, for every pair of layers.

    Attributes:
        pairs: (lower, higher) indices of layers, P of them.
        overlap: float64 [P, D], of the token shares of neuron i in both.
        correlation: float64 [P, D], Pearson's, of the values at all places, 0 where a neuron did
            not survive; NaN where one of the two is constant.
        shift: the baseline compares neuron i of the lower layer with i + shift (modulo D) of
            the higher one, so what neurons have in common whatever their index.
        shifted_overlap, shifted_correlation: float64 [P, D], that baseline; NaN for D = 1.
    """

    pairs: list[tuple[int, int]]
    overlap: np.ndarray
    correlation: np.ndarray
    shift: int
    shifted_overlap: np.ndarray
    shifted_correlation: np.ndarray


def over_layers(layers: Sequence[LayerRecording], shares: TokenShares) -> OverLayers:
    """Compare neurons of the same index in all pairs of `layers`, which are in rising order.

    For L layers it holds 2 L neurons at a time.
    """
    n_layers, width = len(layers), layers[0].width
    shift = width // 2
    each = max(BLOCK_SURVIVORS // (2 * n_layers), 1)
    straight = [neurons_of(layer, 0, each) for layer in layers]
    shifted = [neurons_of(layer, shift, each) for layer in layers]
    lower, higher = _index_pairs(n_layers)
    found = []
    for neurons in zip(*straight, *shifted, strict=True):
        p = _overlaps_between(neurons, n_layers, shares)  # [L, 2 L]
        r = correlations(neurons, n_layers, layers[0].n_tokens)  # [L, 2 L]
        others = (higher, n_layers + higher)
        found.append([matrix[lower, other] for other in others for matrix in (p, r)])
    same_p, same_r, shifted_p, shifted_r = np.array(found).reshape(width, 4, -1).transpose(1, 2, 0)
    if shift == 0:  # one neuron alone has no other one to be compared with
        shifted_p = shifted_r = np.full_like(same_p, np.nan)
    return OverLayers(
        pairs=list(combinations((layer.index for layer in layers), 2)),
        overlap=same_p,
        correlation=same_r,
        shift=shift,
        shifted_overlap=shifted_p,
        shifted_correlation=shifted_r,
    )


def _index_pairs(n_layers: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.array(list(combinations(range(n_layers), 2)), dtype=np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _overlaps_between(
    neurons: Sequence[Survivors], n_first: int, shares: TokenShares
) -> np.ndarray:
    """The overlap of each of the first `n_first` neurons with each of all, [n_first, n]."""
    p = np.stack([shares.of(*one) for one in neurons])  # [n, n_tokens]
    p = p[:, p.any(axis=0)]
    return np.stack([np.minimum(one, p).sum(axis=1) for one in p[:n_first]])


def correlations(
    neurons: Sequence[Survivors], n_first: int, n_places: int, piece: int = PIECE_PLACES
) -> np.ndarray:
    """Pearson's r of each of the first `n_first` neurons with each of all, float64 [n_first, n].

    Over all `n_places` places, with 0 where a neuron did not survive. They are read in pieces of
    `piece` places, so memory does not grow with the corpus. NaN where the values of one neuron
    are constant.
    """
    means = np.array([values.sum(dtype=np.float64) for _, values in neurons]) / n_places  # [n]
    variances = np.zeros(len(neurons))
    covariances = np.zeros((n_first, len(neurons)))
    n_left = n_places  # where none of them survived: all are 0 there
    for start in range(0, n_places, piece):
        x = _side_by_side([_within(one, start, start + piece) for one in neurons])  # [n, m]
        x -= means[:, None]
        variances += np.square(x).sum(axis=1)
        covariances += x[:n_first] @ x.T
        n_left -= x.shape[1]
    variances = (variances + n_left * means**2) / n_places
    covariances = (covariances + n_left * np.outer(means[:n_first], means)) / n_places
    variances[variances <= LEAST_VARIANCE * (variances + means**2)] = np.nan
    spread = np.sqrt(variances)
    return np.clip(covariances / np.outer(spread[:n_first], spread), -1, 1)


def _within(neuron: Survivors, start: int, stop: int) -> Survivors:
    """The survivors at the places from `start` up to `stop`."""
    places, values = neuron
    some = slice(*np.searchsorted(places, (start, stop)))
    return places[some], values[some]


def _side_by_side(neurons: Sequence[Survivors]) -> np.ndarray:
    """The values of neurons at the places where any of them survived, float64 [n, m]."""
    places = np.concatenate([one[0] for one in neurons])
    distinct, columns = np.unique(places, return_inverse=True)
    rows = np.repeat(np.arange(len(neurons)), [len(one[0]) for one in neurons])
    x = np.zeros((len(neurons), len(distinct)))
    x[rows, columns.reshape(-1)] = np.concatenate([one[1] for one in neurons])
    return x
