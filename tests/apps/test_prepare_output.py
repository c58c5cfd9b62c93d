"""Output appears whole or not at all, whatever interrupts it."""

import json
import os

import pytest

from apps.topk.corpus.output import chunk_name, find_finished, publish, put_back
from lingua_topk.errors import ConfigError


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def new(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "new").write_text("new")
    return folder


def nothing(line: str) -> None:
    raise AssertionError(f"unexpected warning: {line}")


@pytest.mark.parametrize("replace", [False, True])
def test_a_new_folder(out, new, replace):
    publish(new, out, replace)
    assert os.listdir(out.parent) == ["out"]
    assert os.listdir(out) == ["new"]


def test_replacing(out, new):
    out.mkdir()
    (out / "old").write_text("old")
    publish(new, out, replace=True)
    assert os.listdir(out) == ["new"]
    assert os.listdir(out.parent) == ["out"]


def test_what_appears_meanwhile_is_not_replaced(out, new):
    out.mkdir()
    (out / "a").write_text("theirs")
    with pytest.raises(OSError):
        publish(new, out, replace=False)
    assert (out / "a").read_text() == "theirs"


def test_a_failed_rename_puts_the_old_folder_back(out, new, monkeypatch):
    out.mkdir()
    (out / "a").write_text("old")
    rename = os.rename

    def failing(source, target):
        if str(target) == str(out) and source == new:
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk gone"):
        publish(new, out, replace=True)
    assert (out / "a").read_text() == "old"
    assert sorted(os.listdir(out.parent)) == ["new", "out"]


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_killed_while_replacing(out, finished):
    (out.parent / ".out.prepare-replaced").mkdir()
    (out.parent / ".out.prepare-replaced" / "a").write_text("old")
    if finished:
        out.mkdir()
        (out / "a").write_text("new")
    warnings = []
    put_back(out, warnings.append)
    assert (out / "a").read_text() == ("new" if finished else "old")
    assert os.listdir(out.parent) == ["out"]
    assert len(warnings) == 1


def test_nothing_to_put_back(out):
    put_back(out, nothing)
    assert find_finished(out, {}, overwrite=False) is None


@pytest.mark.parametrize(
    ("chunk", "chunks", "expected"),
    [
        (0, 1, "x.chunk.00.jsonl"),
        (7, 100, "x.chunk.07.jsonl"),
        (7, 101, "x.chunk.007.jsonl"),
    ],
)
def test_chunk_names_sort_in_order(chunk, chunks, expected):
    assert chunk_name("x", chunk, chunks) == expected


def test_a_manifest_that_is_not_ours(out):
    out.mkdir()
    for content in (
        "",
        "[]",
        "3",
        '{"files": {}}',
        '{"inputs": {}, "counts": {}, "files": 3}',
        "\x00",
    ):
        (out / "manifest.json").write_text(content)
        with pytest.raises(ConfigError, match=r"no readable manifest\.json"):
            find_finished(out, {}, overwrite=True)


@pytest.mark.parametrize(
    ("wanted", "there", "message"),
    [
        (
            [{"python": "3.12.1"}],
            [{"python": "3.11.7"}],
            r"python-docs of Python 3\.12\.1 \(there: python-docs of Python 3\.11\.7\)",
        ),
        ([{"path": "/b"}], [{"path": "/a"}], r"source /b \(there: /a\)"),
        ([{"path": "/a"}, {"path": "/b"}], [{"path": "/a"}], r"2 sources \(there: 1\)"),
        (
            [{"hf": "a/b", "config": "x", "revision": "main", "split": "train"}],
            [{"hf": "a/b", "config": None, "revision": None, "split": "test"}],
            r"source hf:a/b@main:x:train \(there: hf:a/b::test\)",
        ),
        (
            [{"path": "/a", "files": [1]}],
            [{"path": "/a", "files": [2]}],
            "the files of /a, which changed since",
        ),
    ],
)
def test_other_sources_are_named(out, wanted, there, message):
    out.mkdir()
    manifest = '{"format": 1, "files": {}, "counts": {}, "inputs": {"sources": %s}}'
    (out / "manifest.json").write_text(manifest % json.dumps(there))
    with pytest.raises(ConfigError, match=message):
        find_finished(out, {"sources": wanted}, overwrite=False)
