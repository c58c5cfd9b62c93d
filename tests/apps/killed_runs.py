"""Trains a tiny run again and again, killing it at a given moment each time, and compares.

    python -m tests.apps.killed_runs CORPUS OUT TRIALS SEED

A moment is either the n-th time that the run touches a file of its dump_dir (an audit event:
every open, rename, removal, truncation, those of a save included) or a time. After each kill
the same command goes on, and may be killed again. Prints one JSON object: the number of
kills and where they were, and what differed from the run that nobody killed.

Runs are forked from this process, which has imported everything, also what is else imported by
work, and computed nothing.
"""

import gc
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.profiler

from apps.topk.train import train
from lingua.checkpoint import read_model
from tests.apps.tiny import read_metrics, train_args

STEPS = 9
OVERRIDES = [
    f"steps={STEPS}",
    "checkpoint.dump.every=3",
    "checkpoint.dump.keep=2",
    "checkpoint.eval.every=5",
    "save_at=[1,2]",
    "logging.freq=2",
    "grad_acc_steps=2",
    "data.batch_size=2",
    "model.topk.dead_window=300",
    "eval.validation.context=8",
    "eval.validation.max_documents=2",
]
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


class Killer:
    """An audit hook: ends this process, without warning, at the n-th touch of `folder`."""

    def __init__(self, folder, n, number=signal.SIGKILL):
        self.folder, self.n, self.number, self.seen = str(folder), n, number, 0

    def __call__(self, event, args):
        if event in EVENTS and args and self.folder in str(args[0]):
            self.seen += 1
            if self.seen == self.n:
                os.kill(os.getpid(), self.number)


def forked(work, errors):
    """The pid of a process that does `work` and ends; what it says of errors is in that file."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
        work()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def start(corpus, folder, kill_at=None, report=None):
    """The pid of a forked run. `report` gets the number of touches, at its end."""

    def run():
        hook = Killer(folder, kill_at)
        sys.addaudithook(hook)
        train(train_args(corpus, folder, *OVERRIDES))
        if report is not None:
            os.write(report, str(hook.seen).encode())

    return forked(run, folder.with_suffix(".err"))


def wait(pid, seconds=None):
    """The exit status of a run; killed after `seconds`, if they are given and it lasts so long."""
    until = None if seconds is None else time.monotonic() + seconds
    while until is not None and time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    if until is not None:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def records(folder):
    """All that two runs must have in common, to the last bit."""
    metrics = [
        {k: v for k, v in line.items() if k.startswith(("loss/", "optim/", "topk/", "global"))}
        for line in read_metrics(folder)
    ]
    text = (folder / "metrics.validation.jsonl").read_text(encoding="utf-8")
    validation = [json.loads(line) for line in text.splitlines()]
    for line in validation:
        del line["created_at"]
    last = folder / "checkpoints" / f"{STEPS:010d}"
    return {
        "metrics": metrics,
        "validation": validation,
        "weights": read_model(last),
        "state": json.loads((last / "train_state_00000.json").read_text(encoding="utf-8")),
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
    }


def differences(found, expected):
    weights, others = found.pop("weights"), dict(expected)
    expected_weights = others.pop("weights")
    names = [key for key in others if found[key] != others[key]]
    if not all(torch.equal(weights[name], x) for name, x in expected_weights.items()):
        names.append("weights")
    return names


def trial(corpus, folder, draw, touches, seconds):
    """Kill and start again until a start comes to its end; where it was killed."""
    places = []
    while True:
        at, after = None, None
        if len(places) < draw.choice((1, 1, 2, 3)):
            if draw.random() < 0.7:
                at = draw.randint(1, touches)
            else:
                after = draw.uniform(0, seconds)
        status = wait(start(corpus, folder, kill_at=at), after)
        if status == -signal.SIGKILL:
            places.append(f"touch {at}" if at else f"{after:.2f} s")
        elif status:
            raise RuntimeError(folder.with_suffix(".err").read_text(encoding="utf-8")[-3000:])
        else:
            return places


def main(corpus, out, trials, seed):
    out.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    gc.freeze()  # a collection of garbage in a run need not look at what is imported
    began = time.monotonic()
    if wait(start(corpus, out / "whole", report=writer)):
        raise RuntimeError((out / "whole.err").read_text(encoding="utf-8")[-3000:])
    seconds = time.monotonic() - began
    touches = int(os.read(reader, 20))
    draw = random.Random(seed)
    kills, differing = [], {}
    while len(kills) < trials:
        folder = out / str(len(kills))
        places = trial(corpus, folder, draw, touches, seconds)
        kills += places
        names = differences(records(folder), records(out / "whole"))
        if names:
            differing[folder.name] = {"killed": places, "differs": names}
    print(json.dumps({"touches": touches, "kills": kills, "differing": differing}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
