"""ruff, with the rules of pyproject.toml, finds nothing in the repository."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command", ["check --output-format=concise", "format --check"])
def test_ruff_is_content(command):
    ruff = [sys.executable, "-m", "ruff", *command.split(), "--no-cache", "."]
    found = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
