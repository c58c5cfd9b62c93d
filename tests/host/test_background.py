"""lingua._background: another process's items arrive in order, its end is noticed, none is left."""

import contextlib
import gc
import logging
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from itertools import count, islice
from pathlib import Path

import pytest

import lingua
from lingua import _background
from lingua._background import async_iterator
from lingua.errors import ConfigError, DataError

HOST = Path(lingua.__file__).parents[1]


@pytest.fixture(autouse=True)
def forked():
    """The builders here are local functions, which only a fork takes along."""
    before = mp.get_start_method(allow_none=True)
    mp.set_start_method("fork", force=True)
    yield
    mp.set_start_method(before, force=True)
    assert not mp.active_children()


def builder(function):
    """An iterator builder of a generator function without arguments."""

    @contextlib.contextmanager
    def build():
        yield function()

    return build


def wait_until(condition) -> None:
    end = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("buffer_size", [1, 3, 100])
def test_items_arrive_in_order_and_end(buffer_size):
    def items():
        yield from ((i, b"x" * (i * 997)) for i in range(50))

    with async_iterator(buffer_size, builder(items)) as found:
        assert list(found) == list(items())


def test_the_iterator_runs_in_another_process_whose_context_is_left_there(tmp_path):
    marker = tmp_path / "marker"

    @contextlib.contextmanager
    def build():
        yield iter([os.getpid(), os.getppid()])
        marker.write_text("left")

    with async_iterator(2, build) as found:
        other, parent = found
    assert parent == os.getpid() != other
    assert marker.read_text() == "left"


def test_the_producer_is_not_far_ahead():
    n_made = mp.Value("i", 0)

    def items():
        for _ in count():
            n_made.value += 1
            yield b"x" * 1_000_000  # more than a pipe holds

    with async_iterator(3, builder(items)) as found:
        wait_until(lambda: n_made.value >= 4)
        time.sleep(0.2)
        assert n_made.value == 4
        next(found)
        wait_until(lambda: n_made.value == 5)


def test_a_bug_in_the_producer_is_raised_with_its_traceback_after_the_items():
    def items():
        yield 1
        raise KeyError("no such thing")

    with async_iterator(8, builder(items)) as found:
        assert next(found) == 1
        with pytest.raises(RuntimeError, match="no such thing") as caught:
            next(found)
    assert 'raise KeyError("no such thing")' in str(caught.value)


@pytest.mark.parametrize("n_items", [0, 2])
def test_a_users_error_stays_what_it_is(n_items):
    def items():
        yield from range(n_items)
        raise DataError("d.jsonl: mend it")

    with async_iterator(8, builder(items)) as found:
        assert list(islice(found, n_items)) == list(range(n_items))
        with pytest.raises(DataError) as caught:
            next(found)
    assert str(caught.value) == "d.jsonl: mend it"
    assert caught.value.exit_status == 2


def test_an_error_before_the_first_item_is_raised_too():
    def build():
        raise ConfigError("no tokenizer")

    with async_iterator(8, build) as found, pytest.raises(ConfigError, match="no tokenizer"):
        next(found)


def test_an_item_that_cannot_be_sent_is_an_error():
    with (
        async_iterator(8, builder(lambda: iter([lambda: 0]))) as found,
        pytest.raises(RuntimeError, match="pickle"),
    ):
        next(found)


@pytest.mark.parametrize(
    ("end", "code"), [(lambda: os.kill(os.getpid(), 9), -9), (lambda: os._exit(7), 7)]
)
def test_a_producer_that_dies_is_an_error_with_its_exit_code(end, code):
    arrived = mp.Event()

    def items():
        yield from (0, 1)
        arrived.wait()
        end()

    with async_iterator(8, builder(items)) as found:
        assert list(islice(found, 2)) == [0, 1]
        arrived.set()
        with pytest.raises(RuntimeError, match=f"ended with exit code {code}; .*load_async=false"):
            next(found)


def test_a_producer_killed_in_the_middle_of_an_item_is_an_error():
    with async_iterator(2, builder(lambda: (b"x" * 10_000_000 for _ in count()))) as found:
        next(found)
        (producer,) = mp.active_children()
        time.sleep(0.1)  # now it fills the pipe
        producer.kill()
        with pytest.raises(RuntimeError, match="exit code -9"):
            list(found)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_signals_to_the_whole_group_leave_the_producer_at_work(number):
    with async_iterator(1, builder(lambda: ((i, b"x" * 100_000) for i in count()))) as found:
        next(found)
        (producer,) = mp.active_children()
        os.kill(producer.pid, number)
        assert [i for i, _ in islice(found, 20)] == list(range(1, 21))


def test_warnings_of_the_producer_reach_the_handlers_of_the_consumer(caplog):
    def items():
        logging.getLogger("lingua._jsonl").warning("skipped line %d", 3)
        yield 1

    with async_iterator(8, builder(items)) as found:
        assert next(found) == 1
    assert [(r.name, r.getMessage()) for r in caplog.records] == [
        ("lingua._jsonl", "skipped line 3")
    ]
    assert caplog.records[0].process != os.getpid()


@pytest.mark.parametrize("n_taken", [0, 5])
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_leaving_early_ends_the_producer_at_once(n_taken, size):
    with async_iterator(4, builder(lambda: (b"x" * size for _ in count()))) as found:
        list(islice(found, n_taken))
        (producer,) = mp.active_children()
    assert producer.exitcode == 0, "it did not listen and was killed"


def test_an_error_of_the_consumer_ends_the_producer_and_is_kept():
    with pytest.raises(ZeroDivisionError), async_iterator(4, builder(count)) as found:
        next(found)
        raise ZeroDivisionError
    assert not mp.active_children()


def test_a_producer_that_does_not_listen_is_killed(monkeypatch):
    monkeypatch.setattr(_background, "SECONDS_TO_END", 0.1)

    def items():
        yield 1
        time.sleep(60)

    with async_iterator(4, builder(items)) as found:
        next(found)
        (producer,) = mp.active_children()
    assert producer.exitcode == -9


def test_two_at_once_do_not_hold_each_other_up():
    with async_iterator(2, builder(count)) as first:
        with async_iterator(2, builder(count)) as second:
            assert list(islice(second, 3)) == list(islice(first, 3)) == [0, 1, 2]
        assert list(islice(first, 3)) == [3, 4, 5]


def test_nothing_stays_open():
    def use():
        with async_iterator(2, builder(count)) as found:
            list(islice(found, 3))
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    assert use() == use() == use()


def test_a_buffer_without_room_is_not_allowed():
    with pytest.raises(ConfigError, match=r"data\.prefetch_size=0 is too small"):
        async_iterator(0, builder(count)).__enter__()


PROGRAM = """
import contextlib, itertools, multiprocessing, os, signal, sys, threading, time
from lingua._background import async_iterator

@contextlib.contextmanager
def numbers():
    yield itertools.count()

multiprocessing.set_start_method("fork")
found = async_iterator(4, numbers)
next(found.__enter__())
print(multiprocessing.active_children()[0].pid, flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ("", 0),  # the context is never left
        ("sys.exit(3)", 3),
        ("raise ZeroDivisionError", 1),
        ("os._exit(4)", 4),
        ("os.kill(os.getpid(), signal.SIGTERM)", -15),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
    ],
)
def test_nothing_is_left_running_however_the_consumer_ends(then, status):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(then=then)],
        env={**os.environ, "PYTHONPATH": str(HOST)},  # without `apps`: it imports torch
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == status, done.stderr
    producer = int(done.stdout)
    wait_until(lambda: not runs(producer))
