"""--help of every program answers soon: what takes seconds to import is imported by the work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Each takes a third of a second or more; what is below torch (and sympy) is for compilation
# and for several processes only.
HEAVY = {
    "datasets", "lm_eval", "matplotlib", "pandas", "pyarrow", "scipy", "sentence_transformers",
    "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "transformers",
}  # fmt: skip
# The keys of train and eval are the host's own dataclasses, which come with torch.
WITH_TORCH = {"apps.topk.eval", "apps.topk.train"}

# All in one process, so that torch is imported once; it goes in at the end.
ASK = """
import contextlib, importlib, io, json, sys, traceback

told = {}
for name in sys.argv[1:]:
    before, text, sys.argv = set(sys.modules), io.StringIO(), [name, "--help"]
    try:
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            importlib.import_module(name).main()
    except Exception:
        text.write(traceback.format_exc())
    told[name] = [text.getvalue(), sorted(set(sys.modules) - before)]
print(json.dumps(told))
"""


def programs() -> list[str]:
    """Every module of `apps` that can be run, those that need torch last."""
    found = [
        f"apps.{path.parent.name}.{path.stem}"
        for path in sorted(ROOT.glob("apps/*/*.py"))
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    ]
    return sorted(found, key=needs_torch)


def needs_torch(program: str) -> bool:
    return program in WITH_TORCH or program.startswith("apps.bench.")


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[str, set[str]]]:
    """By program what --help prints, and the modules that were not there before it."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *programs()],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (text, set(new)) for name, (text, new) in json.loads(done.stdout).items()}


@pytest.mark.parametrize("program", programs())
def test_help_imports_nothing_that_takes_long(answers, program):
    text, imported = answers[program]
    assert text.startswith(f"usage: python -m {program} ")
    unwanted = HEAVY if needs_torch(program) else {*HEAVY, "torch"}
    assert not imported & unwanted
