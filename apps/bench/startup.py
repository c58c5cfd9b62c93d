"""How long `import lingua_topk` takes beyond `import torch`, and `--help` of every application."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from apps.bench.rows import RESULTS, append, origin
from apps.topk import cli
from apps.topk.corpus import flags
from apps.topk.provenance import ROOT
from lingua_topk.errors import ConfigError, DataError

PROGRAM = "apps.bench.startup"
EXAMPLE = "--repeats 5"
BASE = "import torch"
MAIN = 'if __name__ == "__main__"'


def main(argv: Sequence[str] | None = None) -> None:
    flags.call(measure, PROGRAM, sys.argv[1:] if argv is None else argv, EXAMPLE)


def measure(*, repeats: int = 5, apps: str = "", save: bool = False) -> list[dict[str, Any]]:
    """Measure how long fresh interpreters take until they have answered.

    In turns: `import torch`, `import lingua_topk`, and `python -m apps.topk.NAME --help` of
    every application. `over_torch` is what one takes longer than the first in the same turn,
    in seconds, and `time_ratio` its time over that one's: medians, and of the seconds the 10th
    and 90th percentile. Before them each runs once uncounted, which fills the disk's cache.

    Args:
        repeats: turns that count.
        apps: names of applications, with commas between them; by default all.
        save: append rows to apps/bench/results/startup.csv.

    Returns: a row for each.
    """
    if repeats < 1:
        raise ConfigError(f"repeats={repeats} is too small: give at least 1")
    commands = _commands(apps)
    seconds = np.array(
        [[_seconds(command) for command in commands.values()] for _ in range(1 + repeats)]
    )[1:]  # [repeats, commands]
    made_on = {**origin(), "repeats": repeats}
    rows = [{**made_on, **row} for row in _rows(seconds, list(commands))]
    _show(rows)
    for row in rows if save else []:
        append(RESULTS / "startup.csv", row)
    return rows


def applications() -> list[str]:
    """Names of the programs of apps/topk."""
    files = sorted(Path(ROOT, "apps", "topk").glob("*.py"))
    return [file.stem for file in files if MAIN in file.read_text(encoding="utf-8")]


def _commands(apps: str) -> dict[str, list[str]]:
    known = applications()
    chosen = apps.split(",") if apps else known
    for name in chosen:
        if name not in known:
            raise ConfigError(f"apps: {name!r} is not known: choose of {', '.join(known)}")
    return {
        BASE: ["-c", BASE],
        "import lingua_topk": ["-c", "import lingua_topk"],
        **{f"{name} --help": ["-m", f"apps.topk.{name}", "--help"] for name in chosen},
    }


def _seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise DataError(f"python {' '.join(arguments)} failed: {said[-1]}")
    return time.perf_counter() - start


def _rows(seconds: np.ndarray, names: list[str]) -> list[dict[str, Any]]:
    over = seconds - seconds[:, :1]  # [repeats, commands]
    tenth, median, ninetieth = np.percentile(over, (10, 50, 90), axis=0)
    ratios = np.median(seconds / seconds[:, :1], axis=0)
    return [
        {
            "what": name,
            "seconds": round(float(np.median(seconds[:, i])), 2),
            "over_torch": round(float(median[i]), 2),
            "over_torch_p10": round(float(tenth[i]), 2),
            "over_torch_p90": round(float(ninetieth[i]), 2),
            "time_ratio": round(float(ratios[i]), 2),
        }
        for i, name in enumerate(names)
    ]


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("what", "seconds", "over torch", "10%", "90%", "ratio", title="startup")
    for row in rows:
        values = list(row.values())[-5:]
        table.add_row(row["what"], *(f"{value:.2f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
