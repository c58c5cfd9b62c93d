"""Beginnings of texts: what output scores are measured on, and what steered texts go on from."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apps.topk.neurons.folder import MODEL, RECORDING
from lingua_topk.analysis.recording import open_recording
from lingua_topk.errors import DataError

PROBES, PROBE_TOKENS = 24, 16


def probes_of(analysis: Path) -> Tensor:
    """Beginnings of rows of the text that was analysed, evenly spread: int64 [P, S]."""
    tokens = open_recording(analysis / MODEL / RECORDING).tokens  # int32 [N, S]
    rows = np.unique(np.linspace(0, len(tokens) - 1, PROBES).round().astype(np.int64))
    return torch.from_numpy(tokens[rows, :PROBE_TOKENS]).long()


def prompts_of_rows(
    tokens: np.ndarray, pieces: Sequence[bytes], n: int, length: int, seed: int
) -> list[list[int]]:
    """`n` pieces of text of `length` tokens, of different rows as long as there are.

    They begin with a word, and end with one that is whole: the next token begins another. Without
    special tokens. Drawn by the seed; DataError where there are too few.

    tokens: int [N, S]; pieces: what each token spells, [V].
    """
    begins = np.array([piece.startswith(b" ") for piece in pieces])  # [V]
    special = np.array([not piece for piece in pieces])
    draws = np.random.default_rng(seed)
    found: list[list[int]] = []
    used: set[tuple[int, int]] = set()
    while len(found) < n:
        n_before = len(found)
        for row in draws.permutation(len(tokens)):
            if len(found) == n:
                break
            starts = _starts(tokens[row], begins, special, length)
            starts = [start for start in starts if (row, start) not in used]
            if starts:
                start = starts[draws.integers(len(starts))]
                used.add((row, start))
                found.append(tokens[row, start : start + length].tolist())
        if len(found) == n_before:
            raise DataError(
                f"the text has {len(found)} beginnings of {length} tokens that are whole words,"
                f" where {n} are wanted: give more text, or fewer prompts"
            )
    return found


def _starts(row: np.ndarray, begins: np.ndarray, special: np.ndarray, length: int) -> list[int]:
    """Where in a row, int [S], a prompt of that length can begin."""
    possible = np.arange(len(row) - length)
    clean = np.convolve(special[row], np.ones(length, dtype=int), "valid")[: len(possible)] == 0
    return possible[begins[row[possible]] & begins[row[possible + length]] & clean].tolist()
