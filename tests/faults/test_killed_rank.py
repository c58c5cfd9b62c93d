"""One of two processes is lost: the other ends, says so, and the same command goes on."""

import json
import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from lingua import _peers, _rendezvous
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


NCCL = "NCCL error in: /p/NCCLUtils.cpp:94, {}, NCCL version 2.29.3\n{}\nLast error:\n{}"
USAGE = "ncclInvalidUsage: This usually reflects invalid usage of NCCL library."
CUDA = "ncclUnhandledCudaError: Call to CUDA function failed."
REMOTE = (
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting"
    " prematurely."
)
DEVICE = "[enforce fail at ../third_party/gloo/gloo/transport/tcp/device.cc:84] "


@pytest.mark.parametrize("error", [
    dist.DistBackendError(NCCL.format("remote process exited or there was a network error", REMOTE,
                                      "socketProgress: Connection closed by remote peer n<5>")),
    dist.DistBackendError("store->get('0') got error: failed to recv, got 0 bytes"),
    dist.DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(...)"),
    dist.DistNetworkError("The client socket has timed out after 60000ms while trying to connect"),
    dist.DistStoreError("Timed out after 61 seconds waiting for clients. 1/2 clients joined."),
    RuntimeError("Gloo connectFullMesh failed with [../third_party/gloo/gloo/transport/tcp/pair.cc:"
                 "144] no error"),
])  # fmt: skip
def test_other_transports_tell_it_in_their_own_words(error):
    assert lost_peer(error).startswith(LINE.removeprefix("error: "))


@pytest.mark.parametrize("error", [
    RuntimeError("CUDA out of memory"), ValueError("gloo/"), CheckpointError("is damaged"),
    OSError(104, "Connection reset by peer"),
    RuntimeError("/data/gloo/transport/a.bin cannot be read: timed out"),
    dist.DistBackendError(NCCL.format("invalid usage", USAGE, "Duplicate GPU detected : rank 1")),
    dist.DistBackendError(NCCL.format("invalid usage", USAGE, "")),
    dist.DistBackendError(NCCL.format("unhandled cuda error", CUDA,
                                      "Cuda failure 2 'out of memory'")),
    dist.DistBackendError(NCCL.format("unhandled cuda error", CUDA,
                                      "Cuda failure 702 'the launch timed out'")),
    dist.DistNetworkError("The server socket has failed to listen on any local network address."
                          " port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message:"
                          " address already in use"),
    RuntimeError(DEVICE + "ifa != nullptr. Unable to find interface for: [0.0.0.1]"),
    RuntimeError(DEVICE + "ifa != nullptr. Unable to find address for: eth9"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/device.cc:9] Unable to find address for"
                 " interface eth9"),
])  # fmt: skip
def test_other_errors_are_not_taken_for_one(error):
    assert lost_peer(error) is None


def test_the_time_to_wait_is_named_where_it_is_read(monkeypatch):
    """Inside Lingua nothing reads it: its `lingua` has no such module."""
    error = dist.DistStoreError("timed out")
    assert "LINGUA_TOPK_TIMEOUT" in lost_peer(error)
    monkeypatch.delitem(sys.modules, "lingua._timeout")
    assert "LINGUA_TOPK_TIMEOUT" not in lost_peer(error)


def test_an_error_that_is_cut_is_whole_in_the_log(caplog):
    caplog.set_level(logging.DEBUG, _peers.logger.name)
    text = f"timed out {'x' * 300} the end"
    assert "the end" not in lost_peer(dist.DistStoreError(text))
    assert text in caplog.text


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf", "1e9"])
def test_a_time_to_wait_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("LINGUA_TOPK_TIMEOUT", value)
    with pytest.raises(ConfigError, match=f"LINGUA_TOPK_TIMEOUT='{value}' is not allowed: give"):
        get_timeout()
