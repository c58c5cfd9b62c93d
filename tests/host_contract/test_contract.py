"""The embedded host offers what Meta Lingua offers, under the same names, with the same defaults.

Each host is described in a process of its own. What differs on purpose is listed here with the
reason; a difference that is not listed, or that has gone, fails.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lingua_topk.host import EMBEDDED_ROOT

HOME = os.environ.get("LINGUA_HOME", "")
pytestmark = pytest.mark.skipif(not HOME, reason="LINGUA_HOME names no checkout of Meta Lingua")

MODULES = """
lingua.args lingua.tokenizer lingua.data lingua.optim lingua.distributed lingua.checkpoint
lingua.metrics lingua.logger lingua.profiling lingua.transformer lingua.stool
apps.main.transformer apps.main.train apps.main.eval
""".split()

EVALUATOR = "the evaluator is apps.topk.eval, on both hosts"
PROFILER = "torch's own profiler writes the traces; nothing is uploaded"
ABSENT = {
    "lingua.metrics.upload_train_to_wandb": "a run is logged while it runs",
    "lingua.profiling.perfetto_to_html": PROFILER,
    "lingua.profiling.PyTorchProfilerWandb": PROFILER,
    "lingua.profiling.MemSnapshotsProfilerWandb": PROFILER,
    "apps.main.eval.all_dicts_same": EVALUATOR,
    "apps.main.eval.MockAccelerator": EVALUATOR,
    "apps.main.eval.EvalHarnessLM": EVALUATOR,
    "apps.main.eval.eval_on_val": EVALUATOR,
    "apps.main.eval.main": EVALUATOR,
}
TEXT = "the text is called text, and not s"
DIFFERENT = {
    "lingua.tokenizer.MockTokenizer": "can be instantiated, which Lingua's cannot",
    "lingua.tokenizer.ByteTokenizer": TEXT,
    "lingua.tokenizer.SentencePieceTokenizer": TEXT,
    "lingua.tokenizer.TikTokenTokenizer": TEXT,
    "lingua.data.distribute_data_to_rank": "the file pattern has a default",
    "lingua.data.DataArgs": "max_malformed: the share of malformed lines that stops a run",
    "apps.main.train.TrainArgs": "holds DataArgs",
    "lingua.stool.StoolArgs": "dry_run: what would be submitted",
    "lingua.logger.LogFormatter": "one method where Lingua has four",
    "lingua.logger.init_logger": "level INFO: records of other libraries stay out",
    "apps.main.transformer.create_causal_mask": "takes a device as well",
    "apps.main.transformer.LMTransformer": "reset_parameters has no init_std, which is never given",
    "apps.main.eval.EvalArgs": "sections that are absent are off",
}


def describe(root):
    program = Path(__file__).with_name("describe_host.py")
    done = subprocess.run(
        [sys.executable, program, str(root), *MODULES], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def hosts():
    return describe(Path(HOME).resolve()), describe(EMBEDDED_ROOT)


def own_names(hosts):
    """(name, theirs, ours or None) of what Lingua defines in each module."""
    lingua, embedded = hosts
    for module in MODULES:
        for name, theirs in lingua[module].items():
            if theirs["own"]:
                yield f"{module}.{name}", theirs, embedded[module].get(name)


def extends(ours, theirs):
    """Whether whoever calls theirs can call ours: the same, or with more methods."""
    if "methods" in theirs and "methods" in ours:
        return all(ours["methods"].get(k) == v for k, v in theirs["methods"].items())
    return {**ours, "own": True} == theirs


def test_the_embedded_host_offers_every_name_of_lingua(hosts):
    assert len(list(own_names(hosts))) > 120, "next to nothing was compared"
    assert {name for name, _, ours in own_names(hosts) if ours is None} == ABSENT.keys()


def test_signatures_fields_and_defaults_are_those_of_lingua(hosts):
    present = [(name, theirs, ours) for name, theirs, ours in own_names(hosts) if ours is not None]
    assert {n for n, theirs, ours in present if not extends(ours, theirs)} == DIFFERENT.keys()
