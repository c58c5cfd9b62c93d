"""Another number of processes goes on reading: nothing is left out."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lingua._jsonl import read_share
from lingua._reshare import progress_of, reshare
from lingua._shares import distribute_data_to_rank
from lingua.data import DataArgs, build_dataloader, init_dataloader_state_from_args
from lingua.tokenizer import TokenizerArgs


def write_files(folder, lengths):
    """Files with so many documents each; every text is its own."""
    folder.mkdir(parents=True)
    for number, length in enumerate(lengths):
        lines = [json.dumps({"text": f"{number}:{line}"}) + "\n" for line in range(length)]
        path = folder / f"text.chunk.{number:02d}.jsonl"
        path.write_text("".join(lines), encoding="utf-8")


def share(folder, rank, size):
    return distribute_data_to_rank(folder, rank, size)


def read(state, n_documents):
    """The texts of so many documents from `state` on, and the state after them."""
    texts = []
    for (document, after), _ in zip(read_share(state), range(n_documents), strict=False):
        texts.append(document["text"])
        state = after
    return texts, state


def loader_state(shares, root=""):
    """What a checkpoint holds of one process, as far as it matters here."""
    choice = {"source_to_state": shares, "rng_state": RNG, "root_dir": str(root)}
    return {"it_state": {"it_state": {"it_state": choice}}, "rng_state": RNG}


RNG = {
    "bit_generator": "PCG64",
    "state": {"state": 3, "inc": 5},
    "has_uint32": 0,
    "uinteger": 0,
}


def shares_after(states, folder, size):
    """The shares of `size` processes that go on after `states`."""
    old = [json.loads(json.dumps(loader_state({"text": state}))) for state in states]
    for rank in range(size):
        new = loader_state({"text": share(folder, rank, size)}, folder.parent)
        choice = reshare(old, new, rank, size, step=7)["it_state"]["it_state"]["it_state"]
        yield choice["source_to_state"]["text"]


def rest_of_pass(state):
    """The texts from `state` to the end of the pass it is in."""
    texts, passes = [], state["current_iter"]
    for document, after in read_share(state):
        if after["current_iter"] > passes:
            break
        texts.append(document["text"])
    return texts


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nothing_of_the_pass_is_left_out(tmp_path_factory, data):
    """What all had read, and what is read from then on, is all there is."""
    folder = tmp_path_factory.mktemp("data") / "text"
    before = data.draw(st.integers(1, 4), label="processes before")
    after = data.draw(st.integers(1, 4), label="processes after")
    lengths = data.draw(st.lists(st.integers(8, 20), min_size=1, max_size=4), label="lengths")
    write_files(folder, lengths)
    n_all = sum(lengths)
    states, had = [], Counter()
    for rank in range(before):
        most = n_all // before
        texts, state = read(share(folder, rank, before), data.draw(st.integers(0, most)))
        had.update(texts)
        states.append(state)
    shares = list(shares_after(states, folder, after))
    passes = min(one["current_iter"] for one in shares)
    still = Counter()
    for one in shares:
        still.update(rest_of_pass(one) if one["current_iter"] == passes else [])
    assert len({**had, **still}) == n_all
    # A process reads nothing twice itself.
    for one in shares:
        assert max(Counter(rest_of_pass(one)).values(), default=1) == 1


@pytest.mark.parametrize(
    ("before", "after", "n_files"), [(4, 1, 4), (8, 4, 32), (8, 4, 8), (4, 8, 16), (2, 3, 6)]
)
def test_of_the_rest_of_a_pass_nearly_nothing_is_read_twice_and_all_have_as_much(
    tmp_path, before, after, n_files
):
    """Each process before has read half of its share; none shared a file with another."""
    write_files(tmp_path / "text", [24] * n_files)
    had, states = set(), []
    for rank in range(before):
        texts, state = read(share(tmp_path / "text", rank, before), 12 * n_files // before)
        had.update(texts)
        states.append(state)
    shares = list(shares_after(states, tmp_path / "text", after))
    still = [rest_of_pass(one) for one in shares]
    assert sorted(t for texts in still for t in texts) == sorted(
        {f"{n}:{line}" for n in range(n_files) for line in range(24)} - had
    )
    assert max(map(len, still)) - min(map(len, still)) <= 24


def test_the_next_pass_has_all_of_it_again_and_states_in_between_resume(tmp_path):
    write_files(tmp_path / "text", [10] * 4)
    states = [read(share(tmp_path / "text", rank, 4), 3 + rank)[1] for rank in range(4)]
    (one,) = shares_after(states, tmp_path / "text", 1)
    n_left = 40 - (3 + 4 + 5 + 6)
    texts, _ = read(one, n_left + 40)
    assert len(set(texts[:n_left])) == n_left
    assert sorted(texts[n_left:]) == sorted(f"{n}:{line}" for n in range(4) for line in range(10))
    for n in (0, 1, n_left - 1, n_left, n_left + 1):
        _, between = read(one, n)
        assert read(json.loads(json.dumps(between)), n_left + 40 - n)[0] == texts[n:]


def test_the_place_is_the_first_that_one_had_still_to_read(tmp_path):
    """Two read lines 0, 2, 4 ... and 1, 3, 5 ...; the second is behind."""
    write_files(tmp_path / "text", [20])
    _, first = read(share(tmp_path / "text", 0, 2), 6)
    _, second = read(share(tmp_path / "text", 1, 2), 2)
    (one,) = shares_after([first, second], tmp_path / "text", 1)
    assert one["line"] == 4  # lines 0 to 3 are read by both; then 1 of every 2
    assert rest_of_pass(one) == [f"0:{line}" for line in range(4, 20)]


def test_a_file_that_is_done_is_not_begun_again(tmp_path):
    write_files(tmp_path / "text", [8, 8])
    _, first = read(share(tmp_path / "text", 0, 2), 8)  # all of file 0
    _, second = read(share(tmp_path / "text", 1, 2), 3)
    (one,) = shares_after([first, second], tmp_path / "text", 1)
    assert rest_of_pass(one) == [f"1:{line}" for line in range(3, 8)]


def test_a_state_without_line_numbers_is_counted(tmp_path):
    write_files(tmp_path / "text", [20])
    _, state = read(share(tmp_path / "text", 0, 1), 5)
    state = {k: v for k, v in state.items() if k != "line"}
    path = str(tmp_path / "text" / "text.chunk.00.jsonl")
    assert progress_of([state])[path].first.line == 5


@pytest.mark.parametrize(("before", "after"), [(1, 3), (2, 1), (3, 2)])
def test_the_loader_goes_on_in_another_number_of_processes(tmp_path, before, after, caplog):
    for source in ("a", "b"):
        write_files(tmp_path / source, [30, 30])
    args = DataArgs(
        root_dir=str(tmp_path), sources={"a": 1.0, "b": 2.0}, batch_size=2, seq_len=8,
        prefetch_size=2, tokenizer=TokenizerArgs(name="bytes"),
    )  # fmt: skip

    def batches(state, number):
        with build_dataloader(state) as loader:
            return [next(loader) for _ in range(number)]

    old = [
        batches(init_dataloader_state_from_args(args, rank, before), 3 + rank)[-1][1]
        for rank in range(before)
    ]
    old = json.loads(json.dumps(old))
    firsts = []
    with caplog.at_level("INFO"):
        for rank in range(after):
            new = init_dataloader_state_from_args(args, rank, after)
            state = json.loads(json.dumps(reshare(old, new, rank, after, step=4)))
            first, second = batches(state, 2)
            again = batches(first[1], 1)[0]  # its own states resume as any other
            assert (again[0] == second[0]).all()
            firsts.append(first[0].tolist())
    assert len({str(first) for first in firsts}) == after
    assert "data of a: text.chunk.00.jsonl goes on at line" in caplog.text
