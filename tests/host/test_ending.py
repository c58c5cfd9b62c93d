"""How a program ends by an error: what is said, by whom, and without waiting for others."""

import errno
import os
import socket
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

import apps.main.train as host
from lingua import _ending
from lingua.errors import ConfigError


@pytest.fixture
def left(monkeypatch):
    """A group of two processes on GPUs, as far as this one can tell; its ways out are noted."""
    ways = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(_ending.sys.modules["torch"].cuda, "is_available", lambda: True)
    monkeypatch.setattr(os, "_exit", lambda status: ways.append(status))
    with monkeypatch.context() as patch:
        patch.setattr(dist, "destroy_process_group", lambda: ways.append("together"))
        yield ways
    dist.destroy_process_group()


def ended(error):
    def program():
        with _ending.group_left_together():
            if error is not None:
                raise error

    try:
        _ending.run(program)
    except (SystemExit, ZeroDivisionError) as end:
        return getattr(end, "code", "raised")
    return "well"


@pytest.mark.parametrize("error, way", [
    (None, ["together"]), (SystemExit(0), ["together"]), (ConfigError("x=1"), [2]),
    (ZeroDivisionError(), [1]),
])  # fmt: skip
def test_an_error_on_a_gpu_is_told_and_the_others_not_waited_for(left, capsys, error, way):
    ended(error)
    assert left == way
    said = capsys.readouterr().err
    assert said == "" if way == ["together"] else ("error: x=1" in said or "ZeroDivision" in said)


def test_a_process_alone_leaves_its_group(left, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 1)
    assert ended(ConfigError("x=1")) == 2 and ended(ZeroDivisionError()) == "raised"
    assert left == ["together", "together"]


def test_of_one_start_each_machine_says_it_once(monkeypatch):
    """The machines count their starts each for itself: one may be at 0 when another is at 1."""
    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "True"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", str(store.port))):  # fmt: skip
        monkeypatch.setenv(name, value)
    said = []
    for machine, start in (("a", "0"), ("a", "0"), ("b", "0"), ("b", "1")):
        monkeypatch.setattr(socket, "gethostname", lambda machine=machine: machine)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", start)
        said.append(_ending._is_first_to_fail("errors"))
    assert said == [True, False, True, True]


@pytest.mark.parametrize("error, line", [
    (ConfigError("steps=0 is\ntoo small"), "error: steps=0 is too small\n"),
    (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"),
     "error: a/b cannot be written: No space left on device: make room there, or give another"
     " place, then run it again\n"),
])  # fmt: skip
def test_the_hosts_program_tells_an_error_of_any_rank(monkeypatch, capsys, error, line):
    def fails(args):
        raise error

    monkeypatch.setattr(host, "_read_args", lambda: host.TrainArgs())
    monkeypatch.setattr(host, "get_is_master", lambda: False)
    monkeypatch.setattr(host, "train", fails)
    with pytest.raises(SystemExit) as end:
        host.main()
    assert end.value.code == 2 and capsys.readouterr().err == line


def test_every_rank_goes_the_way_of_the_first(tmp_path, monkeypatch):
    """That finds the run done where this one's file system still shows an older folder."""
    shown = []
    monkeypatch.setattr(host, "from_first", lambda value: shown.append(value) or True)
    monkeypatch.setattr(host, "evaluate", lambda *_: pytest.fail("it is there"))
    args = host.TrainArgs(dump_dir=str(tmp_path), eval={})
    host._evaluate_if_missing(args, Path("checkpoints/0000000004"))
    assert shown == [False]
