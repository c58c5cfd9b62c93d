"""One of two processes is lost: the other ends, says so, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from lingua import _rendezvous
from lingua._peers import lost_peer
from lingua._timeout import get_timeout
from lingua.errors import CheckpointError, ConfigError
from tests import processes
from tests.apps.tiny import write_config, write_corpus
from tests.faults.killed_ranks import LINE
from tests.faults.torchruns import LATEST, ROOT, Torchrun, outcome

STEPS = 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def words(folder, corpus, name):
    config = folder / "config.yaml"
    return [
        "apps.topk.train", f"config={config if config.exists() else write_config(config)}",
        f"data.root_dir={corpus}", f"dump_dir={folder / name}", f"steps={STEPS}",
        "checkpoint.dump.every=5", "checkpoint.dump.keep=2", "data.load_async=true",
    ]  # fmt: skip


def test_torchrun_goes_on_from_the_last_checkpoint_when_a_rank_is_killed(corpus, tmp_path):
    whole = processes.run(2, *words(tmp_path, corpus, "whole"))
    assert whole.returncode == 0, whole.stderr[-4000:]
    torchrun = ["--standalone", "--nproc-per-node", 2, "--max-restarts", 3, "-m"]
    with Torchrun(tmp_path, [*torchrun, *words(tmp_path, corpus, "killed")]) as run:
        run.wait_for("step: 12 ")
        os.kill(run.ranks()[1], signal.SIGKILL)
        assert run.process.wait(timeout=LATEST) == 0, run.err[-4000:]
    (said,) = run.errors
    assert said.startswith(LINE)
    assert "resuming from" in run.out
    assert outcome(tmp_path / "killed", STEPS) == outcome(tmp_path / "whole", STEPS)


@pytest.mark.long
@pytest.mark.parametrize("losses", [1, 50])
def test_runs_that_lose_a_process_end_as_the_one_that_lost_none(corpus, tmp_path, losses):
    """The first is stopped, and the other waits for it as long as it is told to."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killed_ranks", corpus, tmp_path / "runs",
         str(losses), str(losses)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    tally = json.loads(done.stdout.splitlines()[-1])
    assert len(tally["lost"]) >= losses and tally["left"] >= 1
    assert tally["wrong"] == [] and tally["differing"] == {}
    assert losses == 1 or tally["within_a_save"] > 3


def test_every_start_under_one_torchrun_has_a_name_of_its_own():
    """The store of torchrun outlives the processes, and what the dead ones wrote stays in it."""
    store, names = dist.HashStore(), []
    store.set("lingua/start/call/1", "of a process that is dead")
    for _ in range(3):
        with ThreadPoolExecutor(2) as others:
            heard = [others.submit(_rendezvous._follow, store, rank) for rank in (1, 2)]
            names.append(_rendezvous._lead(store, 3, timedelta(seconds=60)))
            assert {one.result(timeout=60) for one in heard} == {names[-1]}
    assert len(set(names)) == 3


def test_whoever_does_not_come_is_not_waited_for_without_end():
    with pytest.raises(dist.DistStoreError, match="timed out with 1 of 2 processes") as raised:
        _rendezvous._lead(dist.HashStore(), 2, timedelta(seconds=0))
    assert lost_peer(raised.value).startswith(LINE.removeprefix("error: "))


@pytest.mark.parametrize("text", [
    "[/a/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer",
    "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for"
    " recv operation to complete",
    "Connection closed by peer [10.0.0.1]:5",
])  # fmt: skip
def test_a_lost_process_is_told_wherever_it_was_missed(text):
    """By itself, behind an error of ours, and within what torch's checkpoints gather."""
    error = RuntimeError(text)
    behind = CheckpointError("cannot be written")
    behind.__cause__ = CheckpointException("save", {1: (error, None)})
    for one in (error, behind):
        said = lost_peer(one)
        assert said.startswith(LINE.removeprefix("error: ")) and ".cc:" not in said
        assert ("LINGUA_TOPK_TIMEOUT" in said) == ("Timed out" in text)


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA out of memory"), ValueError("gloo/"), CheckpointError("is damaged"),
    OSError(104, "Connection reset by peer"),
])  # fmt: skip
def test_other_errors_are_not_taken_for_one(error):
    assert lost_peer(error) is None


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_time_to_wait_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("LINGUA_TOPK_TIMEOUT", value)
    with pytest.raises(ConfigError, match=f"LINGUA_TOPK_TIMEOUT='{value}' is not allowed: give"):
        get_timeout()
