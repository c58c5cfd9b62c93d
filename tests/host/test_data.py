"""lingua.data: from files to batches, exactly repeatable from any state."""

import base64
import contextlib
import dataclasses
import json
import logging
import math
import multiprocessing as mp
import os
import re
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lingua.data
from apps.topk.corpus.tokenizer import train_tokenizer
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
from lingua.tokenizer import TokenizerArgs, build_tokenizer

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


def test_defaults_and_names_are_those_of_lingua_and_one_more():
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
        "max_malformed": 0.1,
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
def test_another_process_loads_the_same_batches_and_says_the_same(
    two_sources, start_method, caplog
):
    caplog.set_level(logging.INFO)
    expected = taken(two_sources, 60)
    said = "sea.chunk.00.jsonl and 2 more: pass 1 has read 33 lines and skipped 0"
    assert said in caplog.text
    caplog.clear()
    before = mp.get_start_method(allow_none=True)
    mp.set_start_method(start_method, force=True)
    try:
        args = dataclasses.replace(two_sources, load_async=True)
        found = taken(args, 54)
        assert_same(found, expected[:54])
        assert said in caplog.text
        assert_same(taken(args, 6, found[-1][1]), expected[54:])
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


@pytest.mark.parametrize("weight", [1.0, 1e-320, 1e308, 1.7e308])
def test_weights_of_every_size_count_in_proportion(two_sources, weight):
    weights = {"sea": weight, "land": weight}
    state = init_choice_state(two_sources.root_dir, weights, 0, 0, 1, "*.chunk.*.jsonl")
    documents = choose_source(
        setup_sources(state), state["source_to_state"], "", weights, state["rng_state"]
    )
    n_drawn = Counter(document["text"][0] for document, _ in islice(documents, 1000))
    assert n_drawn["s"] / 1000 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("small", [1e-300, 1e-12])
def test_a_source_of_next_to_no_weight_is_not_drawn(two_sources, small):
    args = dataclasses.replace(two_sources, sources={"sea": small, "land": 1e300})
    stream = np.concatenate([batch[..., 0].ravel() for batch, _ in taken(args, 20)])
    assert b"s" not in bytes(t for t in stream.tolist() if t < 256)


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
        ({"max_malformed": -0.1}, r"data\.max_malformed=-0\.1 is not allowed"),
        ({"max_malformed": 1.01}, r"data\.max_malformed=1\.01 is not allowed"),
        ({"max_malformed": math.nan}, r"data\.max_malformed=nan is not allowed"),
        ({"max_malformed": math.inf}, r"data\.max_malformed=inf is not allowed"),
        ({"sources": {}}, r"data\.sources is empty"),
        ({"sources": {"sea": 0.0}}, r"weight 0\.0 of sea is not allowed"),
        ({"sources": {"sea": -1.0}}, r"weight -1\.0 of sea"),
        ({"sources": {"sea": math.nan}}, r"weight nan of sea"),
        ({"sources": {"sea": math.inf}}, r"weight inf of sea"),
        ({"sources": {"sea": 10**400}}, r"weight 10+ of sea"),
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


def test_what_is_not_allowed_is_refused_when_resuming_too(two_sources):
    ((_, state),) = taken(two_sources, 1)
    args = dataclasses.replace(two_sources, max_malformed=2.0)
    with pytest.raises(ConfigError, match=r"data\.max_malformed=2\.0 is not allowed: give .* 0 "):
        build_dataloader_from_args(args, state)


# Lines that are no documents.


@pytest.fixture
def one_bad_line(two_sources, tmp_path):
    """Two sources, and in a file of one a line that is cut off."""
    path = tmp_path / "sea" / "sea.chunk.01.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:8], b'{"text": "cut o\n', *lines[8:]]))
    return two_sources


@pytest.mark.parametrize("load_async", [False, True])
def test_the_config_says_how_many_malformed_lines_stop_the_run(one_bad_line, load_async, caplog):
    args = dataclasses.replace(one_bad_line, load_async=load_async)
    allowed = taken(dataclasses.replace(args, max_malformed=0.01), 40)
    assert "skipped" in caplog.text
    message = r"sea.chunk.01.jsonl: 1 of the first 9 .*max_malformed=0 allows .* line 9: not JSON"
    with pytest.raises(DataError, match=message):
        taken(dataclasses.replace(args, max_malformed=0), 40)
    # What counts is the present config, not the one that the state was saved with.
    state = allowed[1][1]
    with pytest.raises(DataError, match=message):
        taken(dataclasses.replace(args, max_malformed=0), 40, state)
    assert_same(taken(dataclasses.replace(args, max_malformed=1), 38, state), allowed[2:])


def test_how_strict_to_be_is_not_in_the_state(one_bad_line):
    strict = dataclasses.replace(one_bad_line, max_malformed=0.0)
    states = [init_dataloader_state_from_args(args, 0, 1) for args in (one_bad_line, strict)]
    assert states[0] == states[1]


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    files=st.lists(
        st.lists(st.sampled_from(["", "{", "[1]", '{"text": 3}', "text", "content"]), max_size=9),
        min_size=1,
        max_size=4,
    ),
    ranks=st.integers(1, 4),
    seq_len=st.integers(1, 12),
)
def test_loading_goes_on_exactly_whatever_the_lines(folder, files, ranks, seq_len):
    """Every document once a pass over all processes, and the same stream from every state."""
    names = iter(range(1000))
    expected = []
    for old in folder.iterdir():
        old.unlink()
    for number, lines in enumerate(files):
        for i, line in enumerate(lines):
            if line in ("text", "content"):
                expected.append(f"<{next(names)}>")
                lines[i] = json.dumps({line: expected[-1]})
        (folder / f"s.chunk.{number}.jsonl").write_text("\n".join(lines))
    args = DataArgs(
        str(folder.parent), {folder.name: 1.0}, 1, seq_len, prefetch_size=1, max_malformed=1,
        load_async=False,
    )  # fmt: skip
    read = []
    for rank in range(ranks):
        try:
            everything = taken(args, 500 // seq_len, rank=rank, world_size=ranks)
        except DataError:
            continue  # no line for this process
        found = texts_in(everything)
        read += found[: found.index(found[0], 1)]
        for index in range(0, 30, 4):
            resumed = taken(args, 6, json.loads(json.dumps(everything[index][1])))
            assert_same(resumed, everything[index + 1 : index + 7])
    assert sorted(read) == sorted(expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root") / "source"
    folder.mkdir()
    return folder


def test_empty_files_and_files_shorter_than_the_processes_are_many(tmp_path):
    write_source(tmp_path, "d", [[], ["a"], ["b", "c"], []])
    args = DataArgs(str(tmp_path), {"d": 1.0}, 1, 3, prefetch_size=1, load_async=False)
    read = Counter()
    for rank in range(8):
        with contextlib.suppress(DataError):
            read.update(set(texts_in(taken(args, 9, rank=rank, world_size=8))))
    assert read == Counter("abc")


# Files that change while they are read.


def cut(path):
    os.truncate(path, path.stat().st_size - 10)


def replace(path):
    other = path.with_name("new")
    other.write_bytes(path.read_bytes().replace(b"s", b"t"))
    other.replace(path)


@pytest.mark.parametrize("change", [cut, replace, os.remove])
def test_a_file_changed_while_it_is_read_is_the_same_error_in_another_process(
    two_sources, tmp_path, change
):
    path = tmp_path / "sea" / "sea.chunk.00.jsonl"
    content, texts = path.read_bytes(), []
    for load_async in (False, True):
        path.write_bytes(content)
        args = dataclasses.replace(two_sources, sources={"sea": 1.0}, load_async=load_async)
        with build_dataloader_from_args(args) as batches:
            next(batches)
            change(path)
            with pytest.raises(
                DataError, match=rf"{path} .* at byte 0|{path} was .*byte \d+"
            ) as caught:
                for _ in range(10_000):
                    next(batches)
            texts.append(str(caught.value))
    without_position = [re.sub(r"byte \d+", "byte", text) for text in texts]
    assert without_position[0] == without_position[1]


# Documents that the tokenizer cannot encode.


class Panic(BaseException):
    """What tiktoken raises where its Rust code panics."""


Panic.__name__ = "PanicException"
KINDS = ("bytes", "mock", "sp", "tiktoken")


@pytest.fixture(scope="module")
def tokenizer_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "sp").write_bytes(train_tokenizer(["the quiet harbour day é s l"] * 3, 290))
    ranks = [b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256)]
    (folder / "tiktoken").write_bytes(b"".join(ranks))
    return {name: str(folder / name) if name in ("sp", "tiktoken") else None for name in KINDS}


def with_tokenizer(args: DataArgs, name: str, paths) -> DataArgs:
    tokenizer = TokenizerArgs(name=name, path=paths[name])
    return dataclasses.replace(args, tokenizer=tokenizer)


def make_it_fail(monkeypatch, name: str, paths, error: BaseException) -> None:
    """The tokenizer raises `error` for the text that begins with "s1.3"."""
    cls = type(build_tokenizer(name, paths[name]))
    encode = cls.encode

    def failing(self, text, *args, **kwargs):
        if text.startswith("s1.3"):
            raise error
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(cls, "encode", failing)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("error", [ValueError("no\nsuch"), Panic("no\nsuch"), KeyError("no\nsuch")])
def test_a_document_that_cannot_be_encoded_costs_that_document_only(
    two_sources, tmp_path, tokenizer_paths, name, error, monkeypatch, caplog
):
    # With several sources the one to read instead is drawn anew.
    args = dataclasses.replace(two_sources, sources={"sea": 1.0})
    args = with_tokenizer(args, name, tokenizer_paths)
    path = tmp_path / "sea" / "sea.chunk.01.jsonl"
    content = path.read_bytes()
    path.write_bytes(re.sub(rb".*s1\.3.*\n", b"", content))
    expected = taken(args, 40)
    path.write_bytes(content)
    make_it_fail(monkeypatch, name, tokenizer_paths, error)
    caplog.clear()
    found = taken(args, 40)
    assert all((a == b).all() for (a, _), (b, _) in zip(found, expected, strict=True))
    for index in range(0, 30, 5):
        assert_same(taken(args, 5, found[index][1]), found[index + 1 : index + 6])
    kind = type(error).__name__
    assert f"skipped {path} line 4: the tokenizer failed: {kind}: " in caplog.text
    assert f"{path}: skipped 1 of the 11 lines read (1 the tokenizer failed)" in caplog.text
    with pytest.raises(DataError, match="line 4: the tokenizer failed"):
        taken(dataclasses.replace(args, max_malformed=0), 40)


@pytest.mark.parametrize("name", KINDS)
def test_a_tokenizer_that_encodes_nothing_is_noticed(
    two_sources, tokenizer_paths, name, monkeypatch
):
    args = with_tokenizer(two_sources, name, tokenizer_paths)
    cls = type(build_tokenizer(name, tokenizer_paths[name]))
    monkeypatch.setattr(cls, "encode", lambda *args, **kwargs: 1 / 0)
    for max_malformed in (0, 0.1, 1):
        with pytest.raises(DataError, match="line 1: the tokenizer failed: ZeroDivisionError"):
            taken(dataclasses.replace(args, max_malformed=max_malformed), 1)


@pytest.mark.parametrize("error", [ConfigError("no bos"), MemoryError(), KeyboardInterrupt()])
def test_what_is_not_the_fault_of_the_text_stops_the_run(two_sources, monkeypatch, error):
    make_it_fail(monkeypatch, "bytes", {"bytes": None}, error)
    with pytest.raises(type(error)):
        taken(two_sources, 40)


@pytest.mark.parametrize("name", KINDS)
def test_lone_surrogates_and_nul_are_read(tmp_path, tokenizer_paths, name, caplog):
    path = tmp_path / "d" / "d.chunk.0.jsonl"
    path.parent.mkdir()
    path.write_bytes(b'{"text": "a\\ud800b"}\n{"text": "c\\u0000d"}\n{"text": "\\udc00\\ud83d"}\n')
    args = DataArgs(str(tmp_path), {"d": 1.0}, 1, 40, prefetch_size=1, load_async=False)
    args = with_tokenizer(args, name, tokenizer_paths)
    ((batch, _),) = taken(args, 1)
    tokenizer = build_tokenizer(name, tokenizer_paths[name])
    text = tokenizer.decode(batch[0, :, 0].tolist())
    assert text.replace(" ", "").startswith("a\ufffdbc\0d\ufffd\ufffda")
    assert caplog.text == ""
