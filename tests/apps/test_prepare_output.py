"""Output appears whole or not at all, whatever interrupts it."""

import multiprocessing
import os
import signal

import pytest

from apps.topk.corpus.output import chunk_name, clear_leftovers, find_finished, whole_folder
from lingua_topk.errors import ConfigError


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def nothing(line: str) -> None:
    raise AssertionError(f"unexpected warning: {line}")


def test_nothing_is_seen_before_the_end(out):
    with whole_folder(out, replace=False) as new:
        (new / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("replace", [False, True])
def test_an_error_leaves_what_was_there(out, replace):
    out.mkdir()
    (out / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(out, replace) as new:
        (new / "a").write_text("new")
        raise KeyboardInterrupt
    assert (out / "a").read_text() == "old"
    assert os.listdir(out.parent) == ["out"]


def test_replacing(out):
    out.mkdir()
    (out / "old").write_text("old")
    with whole_folder(out, replace=True) as new:
        (new / "new").write_text("new")
    assert os.listdir(out) == ["new"]
    assert os.listdir(out.parent) == ["out"]


def test_what_appears_meanwhile_is_not_replaced(out):
    with pytest.raises(OSError), whole_folder(out, replace=False) as new:
        (new / "a").write_text("ours")
        out.mkdir()
        (out / "a").write_text("theirs")
    assert (out / "a").read_text() == "theirs"
    assert os.listdir(out.parent) == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(out, monkeypatch):
    out.mkdir()
    (out / "a").write_text("old")
    rename = os.rename

    def failing(source, target):
        if str(target) == str(out) and "partial" in str(source):
            raise OSError("disk gone")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk gone"), whole_folder(out, replace=True) as new:
        (new / "a").write_text("new")
    assert (out / "a").read_text() == "old"
    assert os.listdir(out.parent) == ["out"]


def _write_until_killed(out, started):
    with whole_folder(out, replace=False) as new:
        (new / "half").write_text("half")
        started.set()
        signal.pause()


@pytest.fixture
def writer(out):
    """Another process that is writing `out`."""
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_write_until_killed, args=(out, started))
    process.start()
    assert started.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_second_writer_is_turned_away(out, writer):
    with pytest.raises(ConfigError, match="is being written by another process"):
        clear_leftovers(out, nothing)
    with (
        pytest.raises(ConfigError, match="is being written by another process"),
        whole_folder(out, replace=False),
    ):
        pass
    assert writer.is_alive()
    assert (out.parent / ".out.prepare-partial" / "half").exists()


def test_what_a_killed_writer_left_is_removed_with_a_warning(out, writer):
    writer.kill()
    writer.join()
    assert os.listdir(out.parent) == [".out.prepare-partial"]
    warnings = []
    clear_leftovers(out, warnings.append)
    assert os.listdir(out.parent) == []
    (line,) = warnings
    assert ".out.prepare-partial, left by a run that was interrupted" in line


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_killed_while_replacing(out, finished):
    (out.parent / ".out.prepare-replaced").mkdir()
    (out.parent / ".out.prepare-replaced" / "a").write_text("old")
    if finished:
        out.mkdir()
        (out / "a").write_text("new")
    warnings = []
    clear_leftovers(out, warnings.append)
    assert (out / "a").read_text() == ("new" if finished else "old")
    assert os.listdir(out.parent) == ["out"]
    assert len(warnings) == 1


def test_nothing_to_clear(out):
    clear_leftovers(out, nothing)
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
            r"python-docs of Python 3\.12\.1 \(there: 3\.11\.7\)",
        ),
        ([{"path": "/b"}], [{"path": "/a"}], r"source /b \(there: /a\)"),
        ([{"path": "/a"}, {"path": "/b"}], [{"path": "/a"}], r"2 sources \(there: 1\)"),
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
    (out / "manifest.json").write_text(manifest % str(there).replace("'", '"'))
    with pytest.raises(ConfigError, match=message):
        find_finished(out, {"sources": wanted}, overwrite=False)
