"""A run of two tasks whose tasks are killed at random moments is the run that was not."""

import json
import os
import random
import signal
import time

import pytest

from tests.apps.killed_runs import OVERRIDES, differences, records
from tests.cluster.jobs import lay_out, submit

# Ends its own process, without warning, when that touches a file of the run for the n-th time.
PROGRAM = """
import json, os, runpy, sys
from pathlib import Path
from tests.apps.killed_runs import Killer

run = Path(os.environ["DUMP_DIR"])
plan, rank = json.loads((run / "plan.json").read_text()), os.environ["SLURM_PROCID"]
hook = Killer(run / "checkpoints", plan.get(rank))
sys.addaudithook(hook)
runpy.run_module("apps.topk.train", run_name="__main__", alter_sys=True)
(run / f"touches.{rank}").write_text(str(hook.seen))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    root = lay_out(tmp_path_factory.mktemp("kills") / "root", "tests")
    (root / "killed.py").write_text(PROGRAM, encoding="utf-8")
    return root


def start(cluster, project, name, plan):
    run = project / "runs" / name
    run.mkdir(parents=True)
    (run / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    words = ["ngpu=2", "time=600", "dirs_exists_ok=true"]
    return submit(cluster, project, name, *words, script="killed", overrides=OVERRIDES)


def planned(draw, touches):
    """Which task ends itself, and at which touch; none where one is killed from outside."""
    rank = draw.randrange(2)
    return {rank: draw.randint(1, touches[rank])} if draw.random() < 0.7 else {}


def goes_on(run, draw, plan):
    """The run's job again, or another: people do both."""
    (run.folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    if draw.random() < 0.5:
        assert run.cluster.run("scontrol", "requeue", run.job).returncode == 0
        run.again()
    else:
        run.job = run.cluster.submit(run.folder / "submit.slurm")


def kill_from_outside(run, draw, seconds):
    """One task, some time after it was started, if that is not too late."""
    rank = draw.randrange(2)
    run.cluster.wait_until(lambda: rank in run.cluster.tasks(run.job) or run.has_ended(), "a task")
    time.sleep(draw.uniform(0, seconds))
    task = run.cluster.tasks(run.job).get(rank)
    if task:
        os.kill(task, signal.SIGKILL)


def trial(cluster, project, name, draw, touches, seconds):
    """A run that is killed up to three times, and in the end is not; and how often it was."""
    wanted, killed = draw.choice((1, 1, 2, 3)), 0
    plan = planned(draw, touches)
    run = start(cluster, project, name, plan)
    while True:
        if killed < wanted and not plan:
            kill_from_outside(run, draw, seconds)
        state = run.ends()["JobState"]
        if state == "COMPLETED":
            return run, killed
        assert state == "FAILED", run.log(".stderr")
        killed += 1
        plan = planned(draw, touches) if killed < wanted else {}
        goes_on(run, draw, plan)


@pytest.mark.long
@pytest.mark.parametrize("kills", [int(os.environ.get("CLUSTER_KILLS", 50))])
def test_killed_tasks_leave_no_trace_in_a_run(cluster, project, kills):
    """By their own hand within a save, or from outside; then requeued, or submitted again."""
    began, whole = time.monotonic(), start(cluster, project, "whole", {})
    assert whole.ends()["JobState"] == "COMPLETED", whole.log("_0.err")
    seconds, expected = time.monotonic() - began, records(whole.folder)
    touches = [int((whole.folder / f"touches.{rank}").read_text("utf-8")) for rank in range(2)]
    draw, total, trials = random.Random(kills), 0, 0
    while total < kills:
        trials += 1
        run, killed = trial(cluster, project, f"killed-{trials}", draw, touches, seconds)
        total += killed
        print(f"{total} kills in {trials} runs", flush=True)  # of use with -s, for minutes pass
        assert differences(records(run.folder), expected) == []
    assert min(touches) > 5
