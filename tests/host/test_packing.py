"""lingua._packing: documents to sequences, sequences to shuffled batches, and back from a state."""

import json
from itertools import count, islice

import numpy as np
import pytest

from lingua._packing import batch_and_shuffle_prefetched_sequences, pack_tokens
from lingua.errors import DataError

# Documents of one token and of many sequences; every token of the stream is another number.
LENGTHS = [3, 1, 1, 40, 2, 7, 1, 12, 5, 1, 1, 1, 1, 9, 30, 6]
STARTS = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
N_TOKENS = sum(LENGTHS)
SETTINGS = [(s, v) for s in (1, 2, 5, 16, 50) for v in (1, 2, 3, 4)]


def documents(first: int = 0):
    """Documents from `first` on; the state after document i is i + 1."""
    for i, (start, length) in enumerate(zip(STARTS, LENGTHS, strict=True)):
        if i >= first:
            yield list(range(start, start + length)), i + 1


def beginning(seq_len: int, n_views: int) -> dict:
    return {
        "start_token": 0,
        "it_state": 0,
        "output_seq_len": seq_len,
        "n_views": n_views,
        "seq_len": 0,
    }


def packed(state: dict):
    return pack_tokens(documents(state["it_state"]), state)


@pytest.mark.parametrize(("seq_len", "n_views"), SETTINGS)
def test_every_token_is_an_input_once_and_views_are_shifted_by_one(seq_len, n_views):
    sequences = [sequence for sequence, _ in packed(beginning(seq_len, n_views))]
    assert len(sequences) == (N_TOKENS - n_views + 1) // seq_len
    for i, sequence in enumerate(sequences):
        assert sequence.dtype == np.int64
        first = np.arange(i * seq_len, (i + 1) * seq_len)
        assert (sequence == first[:, None] + np.arange(n_views)).all()
        assert sequence.shape == (seq_len, n_views)


@pytest.mark.parametrize(("seq_len", "n_views"), SETTINGS)
def test_packing_goes_on_exactly_from_every_state(seq_len, n_views):
    everything = list(packed(beginning(seq_len, n_views)))
    for i, (_, state) in enumerate(everything):
        resumed = list(packed(json.loads(json.dumps(state))))
        assert len(resumed) == len(everything) - i - 1
        for (ours, after), (theirs, expected) in zip(resumed, everything[i + 1 :], strict=True):
            assert (ours == theirs).all()
            assert after == expected


def test_a_state_has_the_keys_of_lingua():
    _, state = next(packed(beginning(4, 2)))
    assert state == {"start_token": 0, "it_state": 2, "output_seq_len": 4, "n_views": 2}
    _, state = next(packed(beginning(10, 2)))
    assert state == {"start_token": 5, "it_state": 3, "output_seq_len": 10, "n_views": 2}


def test_a_document_shorter_than_its_used_part_is_an_error():
    state = {**beginning(4, 2), "start_token": 4}
    with pytest.raises(DataError, match="resumes has 3 tokens, but 4 of it are used"):
        next(packed(state))


def sequences(first: int = 0, n_views: int = 2):
    """Sequence i is filled with i; the state after it is i + 1."""
    return ((np.full((3, n_views), i), i + 1) for i in count(first))


def shuffle_state(seed: int, batch_size: int, prefetch_size: int) -> dict:
    return {
        "it_state": 0,
        "seq_idx": 0,
        "rng_state": np.random.default_rng(seed).bit_generator.state,
        "batch_size": batch_size,
        "prefetch_size": prefetch_size,
    }


def shuffled(state: dict, n_views: int = 2):
    return batch_and_shuffle_prefetched_sequences(
        data_loader=sequences(state["it_state"], n_views),
        batch_size=state["batch_size"],
        prefetch_size=state["prefetch_size"],
        seq_len=3,
        n_views=n_views,
        state=state,
    )


def order(batches) -> list[int]:
    return [int(sequence[0, 0]) for batch, _ in batches for sequence in batch]


WINDOWS = [(1, 1), (4, 1), (1, 5), (3, 4), (8, 2)]


@pytest.mark.parametrize(("batch_size", "prefetch_size"), WINDOWS)
def test_a_window_holds_the_next_sequences_each_once(batch_size, prefetch_size):
    size = batch_size * prefetch_size
    found = order(islice(shuffled(shuffle_state(0, batch_size, prefetch_size)), 6 * prefetch_size))
    windows = [found[start : start + size] for start in range(0, 6 * size, size)]
    assert [sorted(window) for window in windows] == [
        list(range(start, start + size)) for start in range(0, 6 * size, size)
    ]
    if size > 4:
        relative = [tuple(n - size * i for n in window) for i, window in enumerate(windows)]
        assert len(set(relative)) > 1, "every window has the same order"
        assert all(window != sorted(window) for window in windows)


@pytest.mark.parametrize("n_views", [1, 2, 3])
def test_batches_are_whole_arrays_that_stay_as_they_are(n_views):
    taken = list(islice(shuffled(shuffle_state(0, 4, 2), n_views), 10))
    copies = [batch.copy() for batch, _ in taken]
    assert {batch.shape for batch, _ in taken} == {(4, 3, n_views)}
    assert {batch.dtype for batch, _ in taken} == {np.dtype(np.int64)}
    stream = shuffled(shuffle_state(0, 4, 2), n_views)
    held = [next(stream)[0] for _ in range(10)]
    assert all((a == b).all() for a, b in zip(held, copies, strict=True))
    assert sorted(order(taken)) == list(range(40))


def test_the_order_is_that_of_the_seed():
    first, same, other = (
        order(islice(shuffled(shuffle_state(seed, 4, 4)), 8)) for seed in (1, 1, 2)
    )
    assert first == same != other


@pytest.mark.parametrize(("batch_size", "prefetch_size"), WINDOWS)
def test_shuffling_goes_on_exactly_from_every_state(batch_size, prefetch_size):
    n_batches = 3 * prefetch_size + 1
    state = shuffle_state(3, batch_size, prefetch_size)
    everything = list(islice(shuffled(state), 2 * n_batches))
    for i, (_, state) in enumerate(everything[:n_batches]):
        assert state["seq_idx"] == (i + 1) % prefetch_size
        resumed = list(islice(shuffled(json.loads(json.dumps(state))), n_batches))
        expected = everything[i + 1 : i + 1 + n_batches]
        assert order(resumed) == order(expected)
        assert [after for _, after in resumed] == [after for _, after in expected]


def test_the_stream_is_read_evenly():
    """After the window is filled each batch costs the reading of one batch."""
    read = []
    stream = (read.append(i) or (sequence, i) for i, (sequence, _) in enumerate(sequences()))
    batches = batch_and_shuffle_prefetched_sequences(stream, 4, 3, 3, 2, shuffle_state(0, 4, 3))
    n_read = []
    for _ in islice(batches, 8):
        n_read.append(len(read))
    assert n_read == [12 + 4 * i for i in range(8)]
