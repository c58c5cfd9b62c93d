"""Data that is not as it was when the run began: a later start says so, or is refused."""

import json
import os
import shutil
from types import SimpleNamespace

import pytest

from apps.topk import data_files
from tests.apps.tiny import write_corpus
from tests.faults.runs import checkpoints, errors, long, result, start

CHUNK = "text/text.chunk.00.jsonl"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A place with a corpus and a run on it that has done two of its steps."""
    root = tmp_path_factory.mktemp("begun")
    write_corpus(root / "corpus")
    place = root / "corpus/text/text.chunk.01.jsonl"
    shutil.copy(root / "corpus" / CHUNK, place)
    return root


@pytest.fixture
def place(begun, tmp_path, monkeypatch):
    """A copy of it, in which the run is begun; paths are relative, so that they are the same."""
    shutil.copytree(begun / "corpus", tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    if not (begun / "run").exists():
        assert begin(tmp_path) == 0
        shutil.copytree(tmp_path / "run", begun / "run")
    else:
        shutil.copytree(begun / "run", tmp_path / "run")
    # Copied, the files have new times: the next start reads them, and finds them the same.
    return tmp_path


def begin(place, *overrides):
    from pathlib import Path

    return start(Path("corpus"), Path("run"), "save_at=[2]", "steps=2", *overrides)


def go_on(*overrides):
    from pathlib import Path

    return start(Path("corpus"), Path("run"), "save_at=[2]", *overrides)


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def replaced(path):
    """By a text of the same size, with line ends at the same bytes."""
    path.write_text("".join(line.replace("fox", "dog") for line in lines_of(path)), "utf-8")


def shortened(path):
    path.write_text("".join(lines_of(path)[:-5]), "utf-8")


def shorter_at_the_start(path):
    path.write_text("".join(lines_of(path)[5:]), "utf-8")


def grown(path):
    path.write_text("".join([*lines_of(path), '{"text": "More of it."}\n' * 3]), "utf-8")


def replaced_and_grown(path):
    replaced(path)
    grown(path)


def removed(path):
    path.unlink()


def renamed(path):
    path.rename(path.with_name("other.chunk.00.jsonl"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replaced, "holds another text"),
        (replaced_and_grown, "holds another text"),
        (shortened, "bytes, and had"),
        (shorter_at_the_start, "bytes, and had"),
        (removed, "is gone"),
        (renamed, "is gone"),
    ],
)
@pytest.mark.parametrize("number", [0, 1])
def test_another_text_is_refused(place, capfd, change, said, number):
    """Also in a file that the run has not come to yet."""
    path = place / "corpus/text" / f"text.chunk.{number:02d}.jsonl"
    change(path)
    before = {one: one.read_bytes() for one in (place / "run").rglob("*") if one.is_file()}
    assert go_on() == 2
    (line,) = errors(capfd.readouterr().err)
    assert f"data.sources: text/{path.name} " in line and said in line
    assert "unlike when the run in dump_dir=run began" in line and "put it back" in line
    assert "changed_data=accept" in line
    assert {one: one.read_bytes() for one in (place / "run").rglob("*") if one.is_file()} == before


def test_it_goes_on_where_the_user_accepts_that(place):
    replaced(place / "corpus" / CHUNK)
    assert go_on("changed_data=accept") == 0
    log = (place / "run/train.log").read_text(encoding="utf-8")
    assert f"changed since the checkpoint: data: {CHUNK} holds another text" in log
    assert checkpoints(place / "run")[-1] == "0000000004"
    record = json.loads((place / "run/data.json").read_text(encoding="utf-8"))
    assert record[CHUNK]["bytes"] == (place / "corpus" / CHUNK).stat().st_size
    assert go_on("steps=5") == 0  # what was accepted is what it has now


def test_added_lines_and_files_are_allowed_and_said(place, begun):
    path = place / "corpus" / CHUNK
    shutil.copytree(place / "run", place / "other")
    grown(path)
    shutil.copy(path, path.with_name("text.chunk.02.jsonl"))
    assert go_on() == 0
    log = (place / "run/train.log").read_text(encoding="utf-8")
    assert f"data: {CHUNK} has 72 bytes more at its end" in log
    assert "data: text/text.chunk.02.jsonl is new, and as many processes as before do not" in log


def test_the_same_text_at_another_time_is_the_same(place, capfd):
    path = place / "corpus" / CHUNK
    os.utime(path, (0, 0))
    assert go_on() == 0
    assert "changed since the checkpoint: data" not in (place / "run/train.log").read_text(
        encoding="utf-8"
    )
    assert json.loads((place / "run/data.json").read_text("utf-8"))[CHUNK]["mtime_ns"] == 0


def test_a_line_that_is_replaced_in_a_larger_file_is_found(tmp_path):
    path = tmp_path / "large"
    line = b'{"text": "The quick brown fox jumps over the lazy dog."}\n'  # 57 bytes
    path.write_bytes(line * 18_000)  # less than a megabyte
    then, size = data_files._described(path), path.stat().st_size
    for at in (0, 9_000, 12_345, 17_999):
        content = bytearray(line * 18_000)
        content[57 * at + 27] = ord("b")
        path.write_bytes(content)
        os.utime(path, (0, 0))
        assert data_files._difference(path, then) == "holds another text"
    path.write_bytes(line * 20_000)
    assert data_files._difference(path, then) is None  # grown to more than that
    assert data_files._digest(path, size) == then["pieces"]


def test_of_a_file_that_is_larger_still_a_megabyte_is_read(tmp_path, monkeypatch):
    path = tmp_path / "larger"
    with open(path, "wb") as file:
        file.truncate(1 << 28)  # no place on the disk is taken
    then = data_files._described(path)
    assert data_files._difference(path, then) is None
    for at in (0, (1 << 28) - 1, ((1 << 28) - 4096) * 100 // 255):
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(b"x")
        os.utime(path, (0, 0))
        assert data_files._difference(path, then) == "holds another text"
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(bytes(1))
        os.utime(path, (1, 1))
        assert data_files._difference(path, then) is None


WHOLE = {"bytes": 1, "mtime_ns": 2, "pieces": f"{data_files.PIECES}:{64 * 'a'}"}


@pytest.mark.parametrize("entry", [
    {"bytes": "1"}, {"bytes": True}, {"bytes": 1.5}, {"bytes": -1}, {"bytes": None},
    {"mtime_ns": "2"}, {"mtime_ns": [2]}, {"pieces": 3}, {"pieces": None}, {"pieces": 64 * "a"},
    {"pieces": f"8:{64 * 'a'}"}, {"pieces": "256:"},
])  # fmt: skip
def test_a_record_of_another_form_is_none(tmp_path, caplog, entry):
    """Of other numbers of pieces, too, which would be taken for another text."""
    args = SimpleNamespace(dump_dir=str(tmp_path))
    path = tmp_path / data_files.NAME
    path.write_text(json.dumps({"a": WHOLE}), "utf-8")
    assert data_files._recorded(args) == {"a": WHOLE}
    path.write_text(json.dumps({"a": WHOLE, "b": {**WHOLE, **entry}}), "utf-8")
    assert data_files._recorded(args) is None
    assert "b is described in another form" in caplog.text
    assert "changes of the data are not seen" in caplog.text


@pytest.mark.parametrize("content", ['{"a": 1}', *long("", "[]", '{"a": {"bytes": "x"}}')])
def test_a_damaged_record_is_said_and_made_anew(place, content):
    (place / "run/data.json").write_text(content, encoding="utf-8")
    assert go_on() == 0
    assert CHUNK in json.loads((place / "run/data.json").read_text(encoding="utf-8"))


def test_only_known_choices_are_taken(place, capfd):
    assert go_on("changed_data=perhaps") == 2
    (line,) = errors(capfd.readouterr().err)
    assert "changed_data='perhaps' is not known: choose refuse" in line


def test_a_run_of_before_this_record_goes_on(place):
    (place / "run/data.json").unlink()
    assert go_on() == 0
    assert (place / "run/data.json").is_file()
    assert result(place / "run")["metrics"]
