"""What recording costs beside the plain forward pass, and how much memory it takes."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from apps.bench.rows import RESULTS, append, machine
from apps.topk import cli
from apps.topk.corpus import flags
from apps.topk.model import TopKTransformer, TopKTransformerArgs
from apps.topk.provenance import ROOT, provenance
from lingua_topk import TopKArgs
from lingua_topk.analysis.record import Point, points_of, record
from lingua_topk.errors import ConfigError, DataError

PROGRAM = "apps.bench.recording"
EXAMPLE = "--save"
MB = 1_000_000
K, WIDTH, VOCAB_SIZE, ROW_LENGTH = 64, 1024, 32_000, 500
FAKE_ROWS = 8  # a batch of the memory's measurement


def main(argv: Sequence[str] | None = None) -> None:
    flags.call(measure, PROGRAM, sys.argv[1:] if argv is None else argv, EXAMPLE)


def measure(
    *,
    repeats: int = 5,
    rows: int = 4,
    batch_rows: int = 2,
    few_tokens: int = 100_000,
    many_tokens: int = 1_000_000,
    save: bool = False,
) -> dict[str, Any]:
    """Measure recording beside the plain forward pass, and its memory with few and many tokens.

    Time: a model with D=1024, 8 layers, k=64 and random weights, all layers recorded (of the two
    without TopK the 64 largest values), in turns with the plain pass in one process; the median
    of the ratios of neighbours, after one turn that is not counted, on the wall's clock and in
    the CPUs' seconds. Sorting at the end is named apart. Memory: one point with 64 survivors a
    token, without a model, in a process of its own; the largest resident set that the system
    noted.

    Args:
        repeats: how often time is measured.
        rows: of 500 tokens each, a repeat.
        batch_rows: rows that are run at once.
        few_tokens: tokens of the first measurement of memory.
        many_tokens: tokens of the second.
        save: append a row to apps/bench/results/recording.csv.

    Returns: the row.
    """
    smallest = FAKE_ROWS * ROW_LENGTH
    if min(repeats, rows, batch_rows) < 1 or min(few_tokens, many_tokens) < smallest:
        raise ConfigError(
            f"repeats, rows and batch_rows are at least 1, and tokens {smallest}: give such numbers"
        )
    made_by = provenance()
    row = {
        "date": made_by["created_at"], "machine": machine(), "threads": torch.get_num_threads(),
        "commit": made_by["commit"], "torch": made_by["torch"],
        # First: a process counts as its own what the one that starts it has in memory then.
        **{f"few_{name}": value for name, value in _memory(few_tokens).items()},
        **{f"many_{name}": value for name, value in _memory(many_tokens).items()},
        **_times(repeats, rows, batch_rows),
    }  # fmt: skip
    _show(row)
    if save:
        append(RESULTS / "recording.csv", row)
    return row


def _times(repeats: int, n_rows: int, batch_rows: int) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _model().to(device)
    tokens = torch.randint(0, VOCAB_SIZE, (n_rows, ROW_LENGTH))
    turns = []
    for _ in range(repeats + 1):
        plain = _plain(model, tokens, batch_rows)
        turns.append([plain, *_recorded(model, tokens, batch_rows)])
    seconds = np.array(turns[1:])  # [repeats, (plain, recording, finishing), (wall, CPU)]
    plain, recording, finishing = np.median(seconds, axis=0)
    ratios = seconds[:, 1] / seconds[:, 0]  # [repeats, (wall, CPU)]
    return {
        "device": device,
        "repeats": repeats,
        "tokens": tokens.numel(),
        "batch_rows": batch_rows,
        "plain_tokens_a_second": round(tokens.numel() / plain[0]),
        "recording_tokens_a_second": round(tokens.numel() / recording[0]),
        "ratio": round(np.median(ratios[:, 0]), 3),
        "smallest_ratio": round(ratios[:, 0].min(), 3),
        "largest_ratio": round(ratios[:, 0].max(), 3),
        "cpu_ratio": round(np.median(ratios[:, 1]), 3),
        "smallest_cpu_ratio": round(ratios[:, 1].min(), 3),
        "largest_cpu_ratio": round(ratios[:, 1].max(), 3),
        "finishing_share": round(finishing[0] / plain[0], 3),
    }


def _clocks() -> np.ndarray:
    """Seconds on the wall, and of the CPUs for this process, which others disturb less."""
    return np.array([time.perf_counter(), time.process_time()])


def _model() -> TopKTransformer:
    torch.manual_seed(0)
    args = TopKTransformerArgs(
        dim=WIDTH, n_layers=8, n_heads=8, vocab_size=VOCAB_SIZE, max_seqlen=ROW_LENGTH,
        topk=TopKArgs(k=K, n_last_nontopk=2),
    )  # fmt: skip
    model = TopKTransformer(args)
    model.init_weights()
    return model.eval().requires_grad_(False)


def _plain(model: nn.Module, tokens: Tensor, batch_rows: int) -> np.ndarray:
    """Seconds of the forward pass: [2], wall and CPU."""
    device = next(model.parameters()).device
    start = _clocks()
    with torch.no_grad():
        for batch in tokens.split(batch_rows):
            model(batch.to(device))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return _clocks() - start


def _recorded(model: nn.Module, tokens: Tensor, batch_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of the pass that records, and those of the sorting at the end: [2], [2]."""
    device = next(model.parameters()).device
    passed = []  # the clocks after each batch
    with tempfile.TemporaryDirectory() as folder:
        start = _clocks()
        record(
            lambda batch: model(batch.to(device)), points_of(model, k=K), tokens,
            row_length=ROW_LENGTH, n_rows=len(tokens), out=Path(folder, "out"),
            batch_rows=batch_rows, inputs={}, model_name="", vocab_size=VOCAB_SIZE,
            on_progress=lambda rows: passed.append(_clocks()),
        )  # fmt: skip
        return passed[-1] - start, _clocks() - passed[-1]


def _memory(n_tokens: int) -> dict[str, Any]:
    """Tokens, seconds and peak memory of a process that records a fake layer."""
    program = f"from apps.bench.recording import record_fake; record_fake({n_tokens})"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DataError(f"recording {n_tokens} tokens failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


def record_fake(n_tokens: int) -> None:
    """Record a layer with 64 random survivors a token, read it once, and print what it took."""
    n_rows = n_tokens // ROW_LENGTH
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(FAKE_ROWS, ROW_LENGTH, WIDTH, generator=generator)
    y = torch.where(values >= values.topk(K).values[..., -1:], values, 0)  # [B, S, D]
    module = nn.Identity()
    rows = (torch.arange(i, i + ROW_LENGTH) % VOCAB_SIZE for i in range(n_rows))
    start_mb, start = _peak_mb(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        recording = record(
            lambda batch: module(y[: len(batch)]), {0: Point(module, is_topk=True)}, rows,
            row_length=ROW_LENGTH, n_rows=n_rows, out=Path(folder, "out"), batch_rows=FAKE_ROWS,
            inputs={}, model_name="", vocab_size=VOCAB_SIZE,
        )  # fmt: skip
        recorded_mb = _peak_mb()
        for _ in recording.layer(0).blocks():
            pass
    numbers = {
        "tokens": n_rows * ROW_LENGTH,
        "seconds": round(time.perf_counter() - start, 1),
        "start_mb": round(start_mb),
        "recorded_mb": round(recorded_mb),
        "read_mb": round(_peak_mb()),
    }
    print(json.dumps(numbers))


def _peak_mb() -> float:
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB


def _show(row: dict[str, Any]) -> None:
    table = Table("what", "value", title="recording beside the plain forward pass")
    for name in list(row)[list(row).index("few_tokens") :]:
        value = row[name]
        table.add_row(name, f"{value:,}" if isinstance(value, (int, float)) else str(value))
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
