"""The working folder: one process at a time, and state that is whole."""

import errno
import fcntl
import multiprocessing
import os
import signal

import pytest

from apps.topk.corpus.work import Pace, Work, working_folder
from lingua_topk._host.lingua._lock import NAME, ConfigError


@pytest.fixture
def out(tmp_path):
    return tmp_path / "deep" / "out"


def _work_until_killed(out, started):
    with working_folder(out) as work:
        work.save("reading", {"documents": 3})
        started.set()
        signal.pause()


@pytest.fixture
def worker(out):
    """Another process that works for `out`."""
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=_work_until_killed, args=(out, started))
    process.start()
    assert started.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_second_process_is_turned_away(out, worker):
    said = f"out={out} is being written by another program .process {worker.pid} "
    with pytest.raises(ConfigError, match=said), working_folder(out):
        pass
    assert worker.is_alive()


def test_it_is_held_until_the_end(out):
    """Also where all that is in the folder has been removed."""
    for empty in (Work.clear, Work.remove):
        with working_folder(out) as work:
            work.save("reading", {"documents": 3})
            empty(work)
            assert work.load("reading") is None
            with pytest.raises(ConfigError, match="is being written"), working_folder(out):
                pass
        assert not any(out.parent.iterdir())


def test_where_nothing_can_be_locked_that_is_said(out, monkeypatch, capsys):
    def no_locks(descriptor, flags):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with working_folder(out):
        assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_what_a_killed_process_left_is_there(out, worker):
    worker.kill()
    worker.join()
    with working_folder(out) as work:
        assert work.load("reading") == {"documents": 3}
        assert work.load("dealing") is None
        work.remove()
    assert os.listdir(out.parent) == []


def test_an_empty_folder_does_not_stay(out):
    with pytest.raises(KeyboardInterrupt), working_folder(out):
        raise KeyboardInterrupt
    assert os.listdir(out.parent) == []


def test_state_that_cannot_be_read_is_none(out):
    with working_folder(out) as work:
        for content in ("", "{", "[]", "\x00"):
            (work.folder / "reading.json").write_text(content)
            assert work.load("reading") is None


def test_what_is_made_of_the_documents_can_be_cleared_alone(out):
    with working_folder(out) as work:
        work.save("reading", {})
        work.documents.write_text("text")
        work.save("dealing", {})
        work.held_out.write_text("text")
        (work.new / "name").mkdir(parents=True)
        work.clear_dealing()
        assert sorted(os.listdir(work.folder)) == [NAME, "documents", "reading.json"]


def test_saving_takes_a_twentieth_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Pace()
    assert pace.is_due()
    with pace.saving():
        now[0] += 2
    now[0] += 37
    assert not pace.is_due()
    assert not pace.is_overdue()
    now[0] += 1
    assert pace.is_due()
    now[0] += 22
    assert pace.is_overdue()
