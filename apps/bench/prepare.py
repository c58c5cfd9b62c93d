"""How fast `apps.topk.prepare` is, and how much memory it takes at most."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apps.bench.rows import append, machine
from apps.topk import cli
from apps.topk.corpus import flags
from apps.topk.provenance import ROOT, provenance
from lingua_topk.errors import DataError

PROGRAM = "apps.bench.prepare"
EXAMPLE = "--source python-docs --vocab_size 0"
RESULTS = Path(__file__).parent / "results" / "prepare.csv"
MB = 1_000_000


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    flags.call(measure, PROGRAM, argv, EXAMPLE, repeatable=["source"])


def measure(
    *,
    source: str,
    vocab_size: int = 32_000,
    tokenizer_mb: int = 100,
    memory_mb: int = 512,
    chunks: int = 1,
    save: bool = False,
) -> dict[str, Any]:
    """Measure documents a second and peak memory of `python -m apps.topk.prepare`.

    The command runs in a process of its own, and writes to a temporary folder. Its memory is
    the largest resident set that the system noted; what the program takes before it has read
    anything is measured by its --help and shown beside.

    Args:
        source: as for prepare.
        vocab_size: as for prepare; 0 leaves out the tokenizer.
        tokenizer_mb: as for prepare.
        memory_mb: as for prepare.
        chunks: as for prepare.
        save: append a row to apps/bench/results/prepare.csv.

    Returns: the row.
    """
    start_seconds, start_mb = _run(["--help"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        arguments = {
            "source": source,
            "vocab_size": vocab_size,
            "tokenizer_mb": tokenizer_mb,
            "memory_mb": memory_mb,
            "chunks": chunks,
        }
        argv = [f"--{name}={value}" for name, value in {**arguments, "out": out}.items()]
        seconds, peak_mb = _run(argv)
        counts = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["counts"]
    parts = (counts["train"], counts["validation"])
    documents = sum(part["documents"] for part in parts) + counts["duplicates_dropped"]
    text_mb = sum(part["bytes"] for part in parts) / MB
    seconds_of_work = max(seconds - start_seconds, 1e-9)
    made_by = provenance()
    row = {
        "date": made_by["created_at"],
        "machine": machine(),
        "commit": made_by["commit"],
        "python": made_by["python"],
        "lingua_topk": made_by["lingua_topk"],
        **arguments,
        "documents": documents,
        "text_mb": round(text_mb, 1),
        "seconds": round(seconds, 1),
        "start_seconds": round(start_seconds, 1),
        "documents_a_second": round(documents / seconds_of_work),
        "mb_a_second": round(text_mb / seconds_of_work, 1),
        "peak_mb": round(peak_mb),
        "start_mb": round(start_mb),
    }
    _show(row)
    if save:
        append(RESULTS, row)
    return row


def _run(argv: list[str]) -> tuple[float, float]:
    """Run prepare; its seconds and its largest resident set in MB. DataError where it fails."""
    command = [sys.executable, "-m", "apps.topk.prepare", *argv]
    with tempfile.TemporaryFile("w+") as said:
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said)
        # Of this child alone, where getrusage would give the largest of all so far.
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise DataError(f"prepare failed: {said.read().strip()}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return seconds, usage.ru_maxrss * unit / MB


def _show(row: dict[str, Any]) -> None:
    table = Table("what", "value", title=f"prepare --source {row['source']}")
    for name in list(row)[list(row).index("vocab_size") :]:
        value = row[name]
        table.add_row(name, f"{value:,}" if isinstance(value, (int, float)) else str(value))
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
