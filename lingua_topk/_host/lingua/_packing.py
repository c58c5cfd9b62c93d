"""Documents to batches: packing into sequences of one length, and a window of shuffling."""

from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lingua.errors import DataError


class _PackedFrom(TypedDict):
    start_token: int  # tokens of the next document that are used already
    it_state: Any  # the tokenizer's state before that document
    output_seq_len: int
    n_views: int


class PackTokensState(_PackedFrom, total=False):
    """Where the next sequence begins. `seq_len`, for a piece, is its number of tokens."""

    seq_len: int


class PrefetchState(TypedDict):
    """Where the window began, and how many of its batches are out."""

    it_state: PackTokensState
    seq_idx: int  # 0 .. prefetch_size - 1
    rng_state: dict[str, Any]  # before the window was shuffled
    batch_size: int
    prefetch_size: int


def get_empty_buffer_state(start_token: int, states: list[PackTokensState]) -> PackTokensState:
    """The state from which a packer with nothing in its buffer goes on.

    states: the pieces of documents in the buffer, in their order.
    start_token: where in the buffer the next sequence begins.
    """
    for piece in states[:-1]:
        if start_token < piece["seq_len"]:
            break
        start_token -= piece["seq_len"]
    else:
        piece = states[-1]
    return PackTokensState(
        start_token=piece["start_token"] + start_token,
        it_state=piece["it_state"],
        output_seq_len=piece["output_seq_len"],
        n_views=piece["n_views"],
    )


def pack_tokens(
    iterator: Iterable[tuple[list[int], Any]], empty_buffer_state: PackTokensState
) -> Iterator[tuple[np.ndarray, PackTokensState]]:
    """Concatenate documents and cut them into sequences of `output_seq_len` tokens.

    Yields int64 [S, V], element (t, v) being token t + v of the sequence, and the state
    after it. The next sequence begins S tokens on, so each token is an input once.
    """
    seq_len, n_views = empty_buffer_state["output_seq_len"], empty_buffer_state["n_views"]
    start_token, before = empty_buffer_state["start_token"], empty_buffer_state["it_state"]
    n_needed = seq_len + n_views - 1
    rest: list[np.ndarray] = []
    pieces: list[PackTokensState] = []
    n_tokens = 0
    for document, after in iterator:
        if start_token > len(document):
            raise DataError(
                f"the document at which the loader's state resumes has {len(document)} tokens, but"
                f" {start_token} of it are used: the data or the tokenizer changed since; restore"
                " them, or start a new run"
            )
        rest.append(np.asarray(document[start_token:], dtype=np.int64))
        pieces.append(_piece(empty_buffer_state, start_token, len(rest[-1]), before))
        n_tokens += len(rest[-1])
        start_token, before = 0, after
        if n_tokens < n_needed:
            continue
        tokens = np.concatenate(rest)  # [n_tokens]
        at = 0
        while n_tokens - at >= n_needed:
            views = sliding_window_view(tokens[at : at + n_needed], n_views)  # [S, V]
            at += seq_len
            yield views, get_empty_buffer_state(at, pieces)
        pieces = _from(at, pieces)
        rest, n_tokens = [tokens[at:]], n_tokens - at


def _piece(like: PackTokensState, start_token: int, seq_len: int, it_state: Any) -> PackTokensState:
    return PackTokensState(
        start_token=start_token,
        it_state=it_state,
        output_seq_len=like["output_seq_len"],
        n_views=like["n_views"],
        seq_len=seq_len,
    )


def _from(at: int, pieces: list[PackTokensState]) -> list[PackTokensState]:
    """The pieces without their first `at` tokens."""
    index = 0
    while index < len(pieces) and at >= pieces[index]["seq_len"]:
        at -= pieces[index]["seq_len"]
        index += 1
    left = pieces[index:]
    if left and at > 0:
        cut = left[0]
        left[0] = _piece(cut, cut["start_token"] + at, cut["seq_len"] - at, cut["it_state"])
    return left


def batch_and_shuffle_prefetched_sequences(
    data_loader: Iterator[tuple[np.ndarray, PackTokensState]],
    batch_size: int,
    prefetch_size: int,
    seq_len: int,
    n_views: int,
    state: PrefetchState,
) -> Iterator[tuple[np.ndarray, PrefetchState]]:
    """Shuffle within windows of `prefetch_size` batches of an endless stream of sequences.

    Yields int64 [B, S, V] and the state after it. After each batch its places are filled
    anew, so the stream is read evenly; a filled window is shuffled as a whole.
    """
    rng = np.random.default_rng()
    rng.bit_generator.state = state["rng_state"]
    sequences = np.empty((prefetch_size * batch_size, seq_len, n_views), dtype=np.int64)

    def fill(places) -> PackTokensState:
        """Read a sequence into each place; the packer's state after them."""
        for place in places:
            sequences[place], packed = next(data_loader)
        return packed

    # Shuffling the places instead of the sequences draws the same numbers.
    order = np.arange(len(sequences))
    start, n_out = state["it_state"], state["seq_idx"]
    end = fill(order)
    while True:
        rng_state = rng.bit_generator.state
        rng.shuffle(order)
        for index in range(prefetch_size):
            places = order[index * batch_size : (index + 1) * batch_size]
            if index >= n_out:
                is_last = index == prefetch_size - 1
                yield (
                    sequences[places],
                    PrefetchState(
                        it_state=end if is_last else start,
                        seq_idx=0 if is_last else index + 1,
                        rng_state=rng.bit_generator.state if is_last else rng_state,
                        batch_size=batch_size,
                        prefetch_size=prefetch_size,
                    ),
                )
            next_end = fill(places)
        start, end, n_out = end, next_end, 0
