"""A run that is killed at any moment and started again is the run that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.apps.tiny import write_corpus

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("kills", [8, pytest.param(50, marks=pytest.mark.long)])
def test_killed_runs_end_as_the_one_that_was_not(tmp_path, kills):
    """Losses, learning rate, alpha, counts, evaluations, weights, optimizer: to the last bit."""
    corpus = write_corpus(tmp_path / "corpus")
    done = subprocess.run(
        [sys.executable, "-m", "tests.apps.killed_runs", corpus, tmp_path / "runs",
         str(kills), str(kills)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["kills"]) >= kills and result["touches"] > 50
    assert result["differing"] == {}
