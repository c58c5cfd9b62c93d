"""Processes of torchrun, looked at and hurt from outside."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lingua.checkpoint import read_model
from tests.apps.tiny import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
LATEST = 300  # seconds after which whatever is waited for counts as never coming


class Torchrun:
    """One torchrun under way; what it prints lies in `folder`. Ends with the `with` block."""

    def __init__(
        self, folder: Path, words: Sequence[object], before: Sequence[str] = (), **environment: str
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "out", folder / "err"
        with open(self._out, "wb") as out, open(self._err, "wb") as err:
            self.process = subprocess.Popen(
                [*before, *TORCHRUN, *map(str, words)],
                cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            )  # fmt: skip

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8", errors="replace")

    @property
    def errors(self) -> list[str]:
        """The lines that are meant for the user."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def wait_for(self, words: str) -> None:
        """Until it has printed the words."""
        until = time.monotonic() + LATEST
        while words not in self.out:
            assert self.process.poll() is None, self.err[-4000:]
            assert time.monotonic() < until, f"{words!r} is not printed: {self.out[-2000:]}"
            time.sleep(0.05)

    def ranks(self) -> dict[int, int]:
        """The pids of its processes, by rank."""
        found = {}
        for pid in _children(self.process.pid):
            rank = _environment(pid).get("RANK")
            if rank is not None:
                found[int(rank)] = pid
        return found

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *raised: object) -> None:
        below = [self.process.pid]
        for pid in below:
            below += _children(pid)
        for pid in below if self.process.poll() is None else ():
            _kill(pid)
        self.process.wait()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    try:
        tasks = [path / "children" for path in Path(f"/proc/{pid}/task").iterdir()]
        return [int(one) for task in tasks for one in task.read_text().split()]
    except OSError:
        return []


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def outcome(run: Path, step: int) -> dict[str, object]:
    """What two runs that came to the same have in common, to the last bit."""
    last = run / "checkpoints" / f"{step:010d}"
    kept = ("loss/", "optim/", "topk/", "global_step")
    return {
        "metrics": [
            {key: value for key, value in line.items() if key.startswith(kept)}
            for line in read_metrics(run)
        ],
        "weights": {name: weight.tolist() for name, weight in read_model(last).items()},
        "states": [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(last.glob("train_state_*.json"))
        ],
        "left over": sorted(path.name for path in last.parent.glob(".*")),
    }
