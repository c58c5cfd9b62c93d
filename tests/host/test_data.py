"""lingua.data: from files to batches, exactly repeatable from any state."""

import contextlib
import dataclasses
import json
import math
import multiprocessing as mp
import os
from collections import Counter
from itertools import islice

import numpy as np
import pytest

import lingua.data
from lingua.data import (
    DataArgs,
    build_dataloader_from_args,
    choose_source,
    init_choice_state,
    init_dataloader_state_from_args,
    setup_sources,
    tokenize,
)
from lingua.errors import ConfigError, DataError

BOS, EOS = 256, 257


def write_source(root, name: str, files: list[list[str]]) -> None:
    (root / name).mkdir(parents=True)
    for number, texts in enumerate(files):
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        (root / name / f"{name}.chunk.{number:02d}.jsonl").write_text("".join(lines))


def made_texts(name: str, n_files: int, n_lines: int) -> list[list[str]]:
    """Texts of 3 to 60 bytes, no two alike."""
    return [
        [f"{name}{number}.{i}" + "é" * (7 * i % 29) for i in range(n_lines)]
        for number in range(n_files)
    ]


@pytest.fixture
def two_sources(tmp_path):
    write_source(tmp_path, "sea", made_texts("s", 3, 11))
    write_source(tmp_path, "land", made_texts("l", 2, 7))
    return DataArgs(
        root_dir=str(tmp_path),
        sources={"sea": 0.7, "land": 0.3},
        batch_size=3,
        seq_len=16,
        prefetch_size=4,
        load_async=False,
    )


def taken(args: DataArgs, n: int, state=None, rank: int = 0, world_size: int = 1) -> list:
    state = state or init_dataloader_state_from_args(args, rank, world_size)
    with build_dataloader_from_args(args, state) as batches:
        return list(islice(batches, n))


def assert_same(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for (batch, state), (other, after) in zip(found, expected, strict=True):
        assert (batch == other).all()
        assert state == after


def texts_in(batches: list) -> list[str]:
    """The documents in the inputs of unshuffled batches, but for a last one that is cut off."""
    stream = np.concatenate([batch[..., 0].ravel() for batch, _ in batches])
    pieces = np.split(stream, np.flatnonzero(stream == BOS))
    return [bytes(p[1:-1].tolist()).decode() for p in pieces if p.size and p[-1] == EOS]


def open_files(folder) -> list[str]:
    """The files in a folder that this process holds open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in found if path.startswith(str(folder))]


def test_defaults_and_names_are_those_of_lingua():
    assert dataclasses.asdict(DataArgs()) == {
        "root_dir": None,
        "sources": {},
        "batch_size": 2,
        "seq_len": 2048,
        "n_views": 2,
        "seed": 42,
        "add_bos": True,
        "add_eos": True,
        "load_async": True,
        "prefetch_size": 64,
        "tokenizer": {"name": "bytes", "path": None},
    }
    assert all(hasattr(lingua.data, name) for name in lingua.data.__all__)


def test_a_batch_is_int64_and_its_target_is_its_input_shifted_by_one(two_sources):
    for batch, _ in taken(two_sources, 9):
        assert batch.shape == (3, 16, 2)
        assert batch.dtype == np.int64
        assert (batch[:, 1:, 0] == batch[:, :-1, 1]).all()


@pytest.mark.parametrize(("files", "ranks"), [(1, 1), (1, 3), (3, 1), (2, 3), (5, 2), (4, 6)])
def test_every_document_is_an_input_once_an_epoch(files, ranks, tmp_path):
    texts = made_texts("d", files, 9)
    write_source(tmp_path, "d", texts)
    args = DataArgs(
        root_dir=str(tmp_path),
        sources={"d": 1.0},
        batch_size=1,
        seq_len=7,
        prefetch_size=1,
        load_async=False,
    )
    read = []
    for rank in range(ranks):
        found = texts_in(taken(args, 300, rank=rank, world_size=ranks))
        read += found[: found.index(found[0], 1)]  # until the first comes again
    assert Counter(read) == Counter(text for lines in texts for text in lines)


@pytest.mark.parametrize("n_views", [1, 2, 3, 4])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 3)])
def test_loading_goes_on_exactly_from_every_state(two_sources, n_views, rank, world_size):
    args = dataclasses.replace(two_sources, n_views=n_views)
    everything = taken(args, 40, rank=rank, world_size=world_size)
    for index, (_, state) in enumerate(everything[:30]):
        resumed = taken(args, 10, json.loads(json.dumps(state)))
        assert_same(resumed, everything[index + 1 : index + 11])


@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_another_process_loads_the_same_batches(two_sources, start_method):
    expected = taken(two_sources, 12)
    before = mp.get_start_method(allow_none=True)
    mp.set_start_method(start_method, force=True)
    try:
        args = dataclasses.replace(two_sources, load_async=True)
        found = taken(args, 6)
        assert_same(found, expected[:6])
        assert_same(taken(args, 6, found[-1][1]), expected[6:])
    finally:
        mp.set_start_method(before, force=True)


def test_the_seed_decides_the_order_and_processes_differ(two_sources):
    def batches(seed=0, rank=0):
        args = dataclasses.replace(two_sources, seed=seed)
        return [batch.tolist() for batch, _ in taken(args, 6, rank=rank, world_size=2)]

    assert batches() == batches()
    assert batches() != batches(seed=1)
    assert batches() != batches(rank=1)


@pytest.mark.parametrize(("seed", "rank"), [(0, 0), (0, 1), (5, 1)])
def test_generators_are_seeded_as_in_lingua(two_sources, seed, rank):
    state = init_dataloader_state_from_args(dataclasses.replace(two_sources, seed=seed), rank, 2)
    draws = state["it_state"]["it_state"]["it_state"]["rng_state"]
    assert draws == np.random.default_rng((seed, rank, 2)).bit_generator.state
    assert state["rng_state"] == np.random.default_rng((seed + 1, rank, 2)).bit_generator.state


def test_sources_are_drawn_by_their_weights(two_sources):
    weights = {"sea": 3.0, "land": 1.0}
    state = init_choice_state(two_sources.root_dir, weights, 0, 0, 1, "*.chunk.*.jsonl")
    documents = choose_source(
        setup_sources(state), state["source_to_state"], "", weights, state["rng_state"]
    )
    n_drawn = Counter(document["text"][0] for document, _ in islice(documents, 4000))
    assert n_drawn["s"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_a_state_holds_every_level_and_is_plain_json(two_sources):
    state = init_dataloader_state_from_args(two_sources, 1, 2)
    assert json.loads(json.dumps(state)) == state
    levels = []
    while "it_state" in state:
        levels.append(set(state) - {"it_state"})
        state = state["it_state"]
    assert levels == [
        {"seq_idx", "rng_state", "batch_size", "prefetch_size"},
        {"start_token", "output_seq_len", "n_views", "seq_len"},
        {"add_bos", "add_eos", "name", "path"},
    ]
    assert set(state) == {"root_dir", "sources", "source_to_state", "rng_state"}


def test_a_state_counts_more_than_the_arguments_and_that_is_reported(two_sources, caplog):
    *_, (_, state) = taken(two_sources, 3)
    assert caplog.text == ""
    expected = taken(two_sources, 2, state)
    other = dataclasses.replace(
        two_sources, batch_size=1, seq_len=8, n_views=3, sources={"land": 1.0}, add_bos=False
    )
    assert_same(taken(other, 2, state), expected)
    reported = {record.getMessage().partition("=")[0] for record in caplog.records}
    names = ("batch_size", "seq_len", "n_views", "sources", "add_bos")
    assert reported == {f"data.{name}" for name in names}


def test_without_a_state_loading_begins_as_a_single_process(two_sources):
    with build_dataloader_from_args(two_sources) as batches:
        assert_same(list(islice(batches, 2)), taken(two_sources, 2))


def test_one_bad_line_costs_that_line_only(two_sources, tmp_path, caplog):
    path = tmp_path / "sea" / "sea.chunk.01.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    expected = taken(two_sources, 60)
    path.write_bytes(b"".join([*lines[:4], b'{"text": "cut o\n', b"\n", *lines[4:]]))
    found = taken(two_sources, 60)
    assert all((a == b).all() for (a, _), (b, _) in zip(found, expected, strict=True))
    assert f"skipped {path} line 5: not JSON" in caplog.text
    assert f"skipped {path} line 6: empty" in caplog.text
    assert f"{path}: skipped 2 of the 13 lines read" in caplog.text


def test_an_empty_text_is_skipped_where_no_token_frames_it(tmp_path, caplog):
    write_source(tmp_path, "d", [["abc", "", "de"]])
    args = DataArgs(
        root_dir=str(tmp_path),
        sources={"d": 1.0},
        batch_size=1,
        seq_len=5,
        prefetch_size=1,
        add_bos=False,
        add_eos=False,
        load_async=False,
    )
    everything = taken(args, 7)
    assert all(bytes(batch[0, :, 0].tolist()) == b"abcde" for batch, _ in everything)
    for index, (_, state) in enumerate(everything[:4]):
        assert_same(taken(args, 3, state), everything[index + 1 : index + 4])
    assert "line 2: no token" in caplog.text
    write_source(tmp_path, "e", [["", ""]])
    with pytest.raises(DataError, match=r"no usable document .*no token"):
        taken(dataclasses.replace(args, sources={"e": 1.0}), 1)


def test_tokenize_passes_over_what_gives_no_token():
    documents = [({"text": ""}, 1), ({"text": "a"}, 2)]
    found = list(tokenize(documents, False, False, "bytes"))
    assert [(tokens, state["it_state"]) for tokens, state in found] == [([97], 2)]


def test_tokenize_frames_documents_and_keeps_their_states():
    documents = [({"text": "ab"}, 1), ({"content": "é"}, 2), ({"text": ""}, 3)]
    found = list(tokenize(documents, True, False, "bytes"))
    assert [tokens for tokens, _ in found] == [[BOS, 97, 98], [BOS, 0xC3, 0xA9], [BOS]]
    assert [state["it_state"] for _, state in found] == [1, 2, 3]
    assert found[0][1] == {
        "it_state": 1,
        "add_bos": True,
        "add_eos": False,
        "name": "bytes",
        "path": None,
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, r"data\.batch_size=0 is too small"),
        ({"prefetch_size": 0}, r"data\.prefetch_size=0 is too small"),
        ({"seq_len": -1}, r"data\.seq_len=-1 is too small"),
        ({"n_views": 0}, r"data\.n_views=0 is too small"),
        ({"seed": -1}, r"data\.seed=-1 is not allowed"),
        ({"sources": {}}, r"data\.sources is empty"),
        ({"sources": {"sea": 0.0}}, r"weight 0\.0 of sea is not allowed"),
        ({"sources": {"sea": -1.0}}, r"weight -1\.0 of sea"),
        ({"sources": {"sea": math.nan}}, r"weight nan of sea"),
        ({"sources": {"sea": math.inf}}, r"weight inf of sea"),
        ({"sources": {"lake": 1.0}}, r"sources: lake is not a folder"),
        ({"root_dir": None}, r"sea is not a folder in data\.root_dir=None"),
    ],
)
def test_what_is_not_allowed_names_its_field(two_sources, changes, message):
    args = dataclasses.replace(two_sources, **changes)
    with pytest.raises(ConfigError, match=message):
        init_dataloader_state_from_args(args, 0, 1)


def test_a_source_without_files_and_a_share_without_lines_are_errors(two_sources, tmp_path):
    (tmp_path / "lake").mkdir()
    args = dataclasses.replace(two_sources, sources={"lake": 1.0})
    with pytest.raises(DataError, match="lake holds no file called"):
        init_dataloader_state_from_args(args, 0, 1)
    (tmp_path / "lake" / "lake.chunk.00.jsonl").write_text('{"text": "only one"}\n')
    taken(args, 3, rank=0, world_size=2)
    with pytest.raises(DataError, match="no line for this process"):
        taken(args, 3, rank=1, world_size=2)


@pytest.mark.parametrize("load_async", [False, True])
def test_a_file_changed_since_the_state_was_saved_is_an_error(two_sources, tmp_path, load_async):
    *_, (_, state) = taken(two_sources, 9)
    for path in tmp_path.rglob("*.jsonl"):
        path.write_text('{"text": "anew"}')
    args = dataclasses.replace(two_sources, load_async=load_async)
    with pytest.raises(DataError, match=r"was changed since; restore it") as caught:
        taken(args, 1, state)
    assert caught.value.exit_status == 2


def test_a_tokenizer_changed_since_is_an_error_where_it_can_be_seen(tmp_path):
    write_source(tmp_path, "d", [["x" * 50]])
    args = DataArgs(
        str(tmp_path), {"d": 1.0}, batch_size=1, seq_len=30, prefetch_size=1, load_async=False
    )
    ((_, state),) = taken(args, 1)
    (tmp_path / "d" / "d.chunk.00.jsonl").write_text('{"text": "short"}\n')
    with pytest.raises(DataError, match="the data or the tokenizer changed"):
        taken(args, 1, state)


def test_leaving_the_loader_closes_its_files(two_sources, tmp_path):
    with build_dataloader_from_args(two_sources) as batches:
        next(batches)
        assert len(open_files(tmp_path)) == 2
    assert open_files(tmp_path) == []
