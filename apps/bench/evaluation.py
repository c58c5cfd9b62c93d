"""How fast our evaluation of a checkpoint is beside lm-eval's own HFLM on its export."""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from apps.bench.rows import RESULTS, append, machine
from apps.topk import cli, export
from apps.topk.checkpoint import DTYPES, Checkpoint, open_checkpoint
from apps.topk.corpus import flags
from apps.topk.provenance import provenance
from lingua_topk.errors import ConfigError

if TYPE_CHECKING:
    from apps.topk.evaluation.adapter import HarnessModel  # with lm-eval, which takes seconds

PROGRAM = "apps.bench.evaluation"
EXAMPLE = "--ckpt DIR --tasks FOLDER"


def main(argv: Sequence[str] | None = None) -> None:
    flags.call(measure, PROGRAM, sys.argv[1:] if argv is None else argv, EXAMPLE)


def measure(
    *,
    ckpt: str,
    tasks: str,
    batch: int = 16,
    repeats: int = 3,
    limit: int = 200,
    dtype: str = "fp32",
    save: bool = False,
) -> list[dict[str, Any]]:
    """Measure tokens a second of our evaluation and of HFLM, in one process, in turns.

    Both are given the requests that lm-eval builds for every task of a folder; a token counts
    as often as it is in one, however often it is read. The median of `repeats`, after one run
    that is not counted.

    Args:
        ckpt: the folder of a checkpoint, which is exported to a temporary folder for HFLM.
        tasks: a folder of tasks that apps.topk.tasks made; those that generate are left out.
        batch: sequences a batch of HFLM, and as many windows of tokens a batch of ours.
        repeats: how often each is measured.
        limit: documents a task.
        dtype: fp64, fp32, bf16 or fp16.
        save: append rows to apps/bench/results/evaluation.csv.

    Returns: a row a task.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: choose one of {', '.join(DTYPES)}")
    if min(batch, repeats, limit) < 1:
        raise ConfigError("batch, repeats and limit are at least 1: give such numbers")
    checkpoint = open_checkpoint(ckpt)
    with tempfile.TemporaryDirectory() as folder:
        export.main(["--ckpt", ckpt, "--out", f"{folder}/hf"])
        theirs = _hflm(Path(folder, "hf"), checkpoint, DTYPES[dtype], batch)
        ours = _ours(checkpoint, DTYPES[dtype], batch)
        rows = [
            {**_origin(), "checkpoint": ckpt, "dtype": dtype, "batch": batch, **row}
            for row in _measured(ours, theirs, tasks, limit, repeats)
        ]
    _show(rows)
    for row in rows if save else []:
        append(RESULTS / "evaluation.csv", row)
    return rows


def _origin() -> dict[str, Any]:
    made_by = provenance()
    return {
        "date": made_by["created_at"], "machine": machine(), "threads": torch.get_num_threads(),
        "commit": made_by["commit"], "torch": made_by["torch"],
    }  # fmt: skip


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _ours(checkpoint: Checkpoint, dtype: torch.dtype, batch: int) -> "HarnessModel":
    from apps.topk.evaluation.adapter import HarnessModel

    window = checkpoint.model_args.max_seqlen
    model = checkpoint.model(_device(), dtype)
    return HarnessModel(model, checkpoint.tokenizer(), window, batch * window)


def _hflm(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype, batch: int):
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ConfigError(
            f"HFLM cannot be imported ({error}): install the extra dev, which has what it needs"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lingua_topk.hf import register

    register()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(_device())
    return HFLM(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=batch,
        max_length=checkpoint.model_args.max_seqlen,
    )  # fmt: skip


def _measured(ours, theirs, folder: str, limit: int, repeats: int):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    for name in manager.all_subtasks:
        task = manager.load([name])["tasks"][name]
        if task.OUTPUT_TYPE == "generate_until":
            continue
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        method = task.instances[0].request_type
        here, there = (
            [_seconds(getattr(model, method), task.instances) for _ in range(repeats + 1)][1:]
            for model in (ours, theirs)
        )
        tokens = sum(_tokens(ours, one.args) for one in task.instances)
        yield {
            "task": name, "requests": len(task.instances), "tokens": tokens,
            "ours_tokens_a_second": round(tokens / median(here)),
            "hflm_tokens_a_second": round(tokens / median(there)),
            "ratio": round(median(there) / median(here), 2),
        }  # fmt: skip


def _seconds(run: Callable[..., Any], instances: list[Any]) -> float:
    start = time.perf_counter()
    run(instances, disable_tqdm=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _tokens(model: "HarnessModel", texts: tuple[str, ...]) -> int:
    return len(model.tok_encode("".join(texts)))


def _show(rows: list[dict[str, Any]]) -> None:
    table = Table("task", "requests", "tokens", "ours, tokens/s", "HFLM, tokens/s", "ratio")
    for row in rows:
        table.add_row(row["task"], *(f"{value:,}" for value in list(row.values())[-5:]))
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
