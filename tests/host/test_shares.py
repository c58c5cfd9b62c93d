"""lingua._shares: every line of a source has one reader, for any number of files and processes."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from lingua._jsonl import read_share
from lingua._shares import (
    distribute_data_to_rank,
    find_and_sanitize_chunks,
    parts_of_rank,
    source_folder,
)
from lingua.errors import ConfigError, DataError

GRID = [(files, ranks) for files in range(1, 8) for ranks in range(1, 8)]


def write_source(folder: Path, lines_of_files: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for number, n_lines in enumerate(lines_of_files):
        lines = [json.dumps({"text": f"{number}:{i}"}) + "\n" for i in range(n_lines)]
        (folder / f"s.chunk.{number:02d}.jsonl").write_text("".join(lines))
    return folder


def epoch(state) -> list[str]:
    """The texts of one pass over a share."""
    texts = []
    for document, after in read_share(state):
        if after["current_iter"] > state["current_iter"]:
            return texts
        texts.append(document["text"])


@pytest.mark.parametrize(("files", "ranks"), GRID)
def test_every_line_is_read_by_one_process_once_an_epoch(files, ranks, tmp_path):
    lengths = [ranks + 2 * number for number in range(files)]
    write_source(tmp_path, lengths)
    shares = [epoch(distribute_data_to_rank(tmp_path, r, ranks)) for r in range(ranks)]
    written = [f"{number}:{i}" for number, n in enumerate(lengths) for i in range(n)]
    assert Counter(text for share in shares for text in share) == Counter(written)


@pytest.mark.parametrize(("files", "ranks"), GRID)
def test_shares_are_equal_and_of_few_parts(files, ranks):
    names = [f"{number}" for number in range(files)]
    for rank in range(ranks):
        parts = parts_of_rank(names, rank, ranks)
        share = sum(part["n_offsets"] / part["block_size"] for part in parts)
        assert share == pytest.approx(files / ranks)
        assert sum(part["block_size"] > 1 for part in parts) <= 2
        assert [part["file_path"] for part in parts] == sorted({p["file_path"] for p in parts})


@pytest.mark.parametrize(("files", "ranks"), [(f, r) for f, r in GRID if r % f == 0])
def test_where_the_files_divide_the_processes_it_is_the_rule_of_lingua(files, ranks, tmp_path):
    write_source(tmp_path, [1] * files)
    readers = ranks // files
    for rank in range(ranks):
        state = distribute_data_to_rank(tmp_path, rank, ranks)
        assert state.pop("line") == 0
        assert state == {
            "file_path": str(tmp_path / f"s.chunk.{rank // readers:02d}.jsonl"),
            "position": 0,
            "block_size": readers,
            "offset": rank % readers,
            "current_iter": 0,
        }


def test_a_state_is_plain_json(tmp_path):
    write_source(tmp_path, [4, 4, 4])
    state = distribute_data_to_rank(tmp_path, 1, 2)
    assert json.loads(json.dumps(state)) == state


def test_files_are_sorted_whatever_the_file_system_says(tmp_path, monkeypatch):
    write_source(tmp_path, [1] * 12)
    expected = [str(tmp_path / f"s.chunk.{number:02d}.jsonl") for number in range(12)]
    assert find_and_sanitize_chunks(tmp_path, 1) == expected
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda *args: sorted(glob(*args), reverse=True))
    assert find_and_sanitize_chunks(tmp_path, 5) == expected


def test_other_files_hidden_ones_and_folders_are_no_chunks(tmp_path):
    write_source(tmp_path, [1])
    for name in ("s.val.jsonl", ".s.chunk.01.jsonl", "s.chunk.02.jsonl.gz", "notes.txt"):
        (tmp_path / name).write_text('{"text": "x"}\n')
    (tmp_path / "s.chunk.03.jsonl").mkdir()
    assert find_and_sanitize_chunks(tmp_path, 4) == [str(tmp_path / "s.chunk.00.jsonl")]
    validation = find_and_sanitize_chunks(tmp_path, 4, "*.val.jsonl")
    assert validation == [str(tmp_path / "s.val.jsonl")]


def test_a_link_to_a_file_is_a_chunk_and_one_to_a_folder_is_not(tmp_path):
    write_source(tmp_path / "elsewhere", [3])
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "s.chunk.0.jsonl").symlink_to("../elsewhere/s.chunk.00.jsonl")
    (tmp_path / "s" / "s.chunk.1.jsonl").symlink_to("../elsewhere")
    assert epoch(distribute_data_to_rank(tmp_path / "s", 0, 1)) == ["0:0", "0:1", "0:2"]


@pytest.mark.parametrize("kind", ["link to nothing", "link to itself", "pipe", "device"])
def test_what_is_called_a_chunk_and_cannot_be_read_is_not_left_out_silently(tmp_path, kind):
    write_source(tmp_path, [1])
    path = tmp_path / "s.chunk.01.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        target = {"link to nothing": "gone", "link to itself": path.name, "device": "/dev/zero"}
        path.symlink_to(target[kind])
    reason = {
        "link to nothing": "No such file or directory",
        "link to itself": "Too many levels of symbolic links",
    }.get(kind, "it is no regular file")
    with pytest.raises(DataError, match=rf"{path} cannot be read \({reason}\): put a file there"):
        distribute_data_to_rank(tmp_path, 0, 1)


def test_a_folder_that_cannot_be_listed_says_why(tmp_path):
    write_source(tmp_path / "s", [1])
    (tmp_path / "s").chmod(0)
    try:
        if os.access(tmp_path / "s", os.R_OK):
            pytest.skip("this user may list every folder")
        with pytest.raises(DataError, match=r"that can be seen \(Permission denied\)"):
            distribute_data_to_rank(tmp_path / "s", 0, 1)
    finally:
        (tmp_path / "s").chmod(0o700)


def test_a_folder_that_is_gone_says_so(tmp_path):
    with pytest.raises(DataError, match=r"that can be seen \(No such file or directory\)"):
        find_and_sanitize_chunks(tmp_path / "gone", 1)


def test_a_folder_without_chunks_says_what_was_looked_for(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=rf"{tmp_path} holds no file called \*\.chunk\.\*\.jsonl"):
        distribute_data_to_rank(tmp_path, 0, 1)


def test_a_source_is_a_folder_below_the_root_or_an_absolute_path(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "file").touch()
    assert source_folder(str(tmp_path), "s") == tmp_path / "s"
    for root in (None, "", "/elsewhere"):
        assert source_folder(root, str(tmp_path / "s")) == tmp_path / "s"
    for name in ("t", "file"):
        with pytest.raises(ConfigError, match=rf"sources: {name} is not a folder .*{tmp_path}"):
            source_folder(str(tmp_path), name)
