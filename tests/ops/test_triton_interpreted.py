"""The tests of the Triton kernel under Triton's interpreter, in a process of their own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lingua_topk.errors import ConfigError
from lingua_topk.ops import backends

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("triton"), reason="no package triton")
def test_the_kernel_under_the_interpreter():
    # Read when Triton is imported, so that it cannot be set within this process.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, str(HERE / "test_triton_topk.py")],
        env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def test_triton_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(backends, "_HAS_TRITON", False)
    message = "LINGUA_TOPK_BACKEND=triton cannot run: there is no package triton"
    with backends.use("triton"), pytest.raises(ConfigError, match=message):
        backends.backend_of(torch.ones(2, 4))


@pytest.mark.skipif(not find_spec("triton"), reason="no package triton")
def test_triton_is_refused_on_a_cpu():
    with backends.use("triton"), pytest.raises(ConfigError, match="x is on cpu, and Triton runs"):
        backends.backend_of(torch.ones(2, 4))
