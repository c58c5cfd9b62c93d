"""A run of four steps, saved at the second and the last, and all that such runs have in common."""

import json
import logging

import pytest

from apps.topk import cli
from apps.topk.train import train
from lingua.checkpoint import read_model
from tests.apps.tiny import read_metrics, train_args

STEPS = 4
SETTINGS = (f"steps={STEPS}", "checkpoint.dump.every=2", "model.topk.dead_window=300")


def long(*values):
    """Parameters of a test that are left to its long version."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


def start(corpus, folder, *overrides):
    """The exit status of a start of the run."""
    return status_of(lambda: train(train_args(corpus, folder, *SETTINGS, *overrides)))


def status_of(program):
    """The exit status of a program, started as its command line starts it."""
    try:
        cli.run(program)
    except SystemExit as end:
        return end.code
    finally:  # what comes after it in this process is not of its log
        for handler in list(logging.getLogger().handlers):
            if isinstance(handler, logging.FileHandler):
                logging.getLogger().removeHandler(handler)
                handler.close()
    return 0


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error:")]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def result(folder, step=STEPS):
    """What does not depend on when and where a run was: weights and moments as bytes, records."""
    last = folder / "checkpoints" / f"{step:010d}"
    tensors = {**read_model(last), **read_model(last, "optim")}
    return {
        "tensors": {name: x.numpy().tobytes() for name, x in tensors.items()},
        "state": json.loads((last / "train_state_00000.json").read_text(encoding="utf-8")),
        "metrics": [
            {k: v for k, v in line.items() if k.startswith(("loss/", "optim/", "topk/", "global"))}
            for line in read_metrics(folder)
        ],
    }
