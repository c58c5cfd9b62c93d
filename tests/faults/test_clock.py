"""A clock that is put back an hour, and on by a day: nothing goes by the order of its times."""

import datetime
import itertools
import json
import os
import re
import signal
import time

import pytest

import apps.main.train as host
from apps.topk import provenance as provenance_module
from apps.topk.checkpoint import checkpoint_folder
from apps.topk.evaluation import results as evaluation_results
from lingua import metrics
from lingua.checkpoint import consolidate_checkpoints
from tests.apps.tiny import read_metrics
from tests.faults.runs import checkpoints, result, start

JUMPS = (0, -3600, 86_400, -90_000)  # seconds
WITH_EVALUATION = ("eval.validation.context=8", "eval.validation.max_documents=2")


@pytest.fixture
def jumping_clock(monkeypatch):
    """Every look at the clock finds it elsewhere."""
    now, jumps = time.time, itertools.cycle(JUMPS)

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.fromtimestamp(time.time(), tz)

    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    for module in (metrics, provenance_module, evaluation_results):
        monkeypatch.setattr(module, "datetime", Jumping)


def shuffle_times(folder):
    """The older a checkpoint is, the newer its files say they are."""
    for age, name in enumerate(reversed(checkpoints(folder))):
        for path in (folder / "checkpoints" / name).rglob("*"):
            os.utime(path, (2e9 + age, 2e9 + age))
        os.utime(folder / "checkpoints" / name, (2e9 + age, 2e9 + age))


def ended_after(patch, step):
    """The run is told to end in that step; it saves then."""
    original = host._optimizer_step

    def and_end(run):
        norm = original(run)
        if run.state.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return norm

    patch.setattr(host, "_optimizer_step", and_end)


def test_a_run_is_the_same_whatever_the_clock_says(corpus, tmp_path, monkeypatch, request):
    assert start(corpus, tmp_path / "whole", *WITH_EVALUATION) == 0
    request.getfixturevalue("jumping_clock")
    folder = tmp_path / "run"
    for step in (1, 3):
        with monkeypatch.context() as patch:
            ended_after(patch, step)
            assert start(corpus, folder, *WITH_EVALUATION) == 0
        shuffle_times(folder)
    assert checkpoints(folder) == ["0000000001", "0000000002", "0000000003"]
    assert start(corpus, folder, *WITH_EVALUATION) == 0
    assert result(folder) == result(tmp_path / "whole")
    for line in read_metrics(folder):
        assert line["speed/wps"] > 0 and 0 < line["speed/curr_iter_time"] < 600
    log = (folder / "train.log").read_text(encoding="utf-8")
    elapsed = re.findall(r" - (.+?) - (?:step:|saved)", log)
    assert len(elapsed) > 6 and all(re.fullmatch(r"0:\d\d:\d\d", one) for one in elapsed)
    assert [int(step) for step in re.findall(r"resuming from \S+/(\d+)", log)] == [1, 3]
    starts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert len(starts) == 3  # in the order in which they were, whatever they say


def test_the_newest_checkpoint_is_that_of_the_last_step(corpus, tmp_path):
    folder = tmp_path / "run"
    assert start(corpus, folder) == 0
    first, last = (folder / "checkpoints" / f"{step:010d}" for step in (2, 4))
    shuffle_times(folder)
    assert checkpoint_folder(str(folder)) == last
    consolidated = consolidate_checkpoints(first)
    os.utime(consolidated / "consolidated.pth", (0, 0))  # older than what it is made of
    inode = (consolidated / "consolidated.pth").stat().st_ino
    assert consolidate_checkpoints(first) == consolidated
    assert (consolidated / "consolidated.pth").stat().st_ino == inode
