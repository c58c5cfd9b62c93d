"""The main job on one machine: real text in, a TopK model and its vanilla twin out.

Prepares the documentation of the Python that runs, trains both models from
configs/quickstart.yaml, each in a process of its own, and compares them on the documents
that were held out. What is there from an earlier run is used.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from apps.topk import cli
from apps.topk.checkpoint import Checkpoint, newest_checkpoint, open_checkpoint
from apps.topk.corpus.python_docs import PythonDocs
from apps.topk.prepare import prepare
from lingua_topk.errors import CheckpointError, ConfigError

PROGRAM = "apps.topk.quickstart"
CONFIG = "configs/quickstart.yaml"
SOURCE = PythonDocs.label
VOCAB_SIZE = 2_000
DUMP_DIR = "dumps/quickstart"
# The twin differs from the TopK model in this and in nothing else.
RUNS = {"topk": [], "vanilla": ["model.topk=null"]}

HELP = f"""\
usage: python -m {PROGRAM} [key=value ...]

{__doc__}
The keys are those of apps.topk.train and go to both runs, for example steps=100.
dump_dir (default {DUMP_DIR}) holds one folder a run: {", ".join(RUNS)}.
Text is prepared where data.root_dir does not exist yet."""

NEXT = """\
What to try next, from {root}:
  another k:         {python} -m apps.topk.train config={config} model.topk.k=16 dump_dir=dumps/k16
  your own text:     {python} -m apps.topk.prepare --source FOLDER --out data/mine
  what a run wrote:  {dump_dir}/topk: config.yaml, train.log, metrics.jsonl, checkpoints, evals
  what there is:     README.md, and --help of every program
"""


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return
    # The whole config is checked before the first minute of work.
    args = cli.read_config(_train_args_class(), PROGRAM, "", argv=[f"config={CONFIG}", *argv])
    if args.model.topk is None or args.eval is None:
        raise ConfigError("model.topk and eval cannot be null here: the quickstart compares both")
    overrides, dump_dir = _without_dump_dir(argv)
    _prepare(Path(args.data.root_dir or ""))
    for name, extra in RUNS.items():
        _train(name, [*overrides, *extra, f"name={name}", f"dump_dir={dump_dir / name}"])
    print(
        NEXT.format(
            root=Path.cwd(), python=_shown(sys.executable), config=CONFIG, dump_dir=dump_dir
        )
    )
    Console().print(comparison({name: dump_dir / name for name in RUNS}))


def _train_args_class() -> type:
    from apps.topk.model import TopKTrainArgs

    return TopKTrainArgs


def _without_dump_dir(argv: Sequence[str]) -> tuple[list[str], Path]:
    """The arguments for both runs, and the folder that their own ones lie in."""
    given = OmegaConf.from_dotlist([a for a in argv if a.startswith("dump_dir=")])
    return [a for a in argv if not a.startswith("dump_dir=")], Path(given.get("dump_dir", DUMP_DIR))


def _prepare(root_dir: Path) -> None:
    if root_dir.exists():
        print(f"text: {root_dir} is there and is used")
        return
    print(f"text: the documentation of Python {sys.version.split()[0]}")
    prepare(source=SOURCE, out=str(root_dir), vocab_size=VOCAB_SIZE)


def _train(name: str, overrides: list[str]) -> None:
    """Train in a process of its own; where that fails it has said why, and so ends this one."""
    print(f"\ntraining: {name}", flush=True)
    command = [sys.executable, "-m", "apps.topk.train", f"config={CONFIG}", *overrides]
    status = subprocess.run(command).returncode
    if status != 0:
        raise SystemExit(status if status > 0 else 1)


def comparison(dump_dirs: dict[str, Path]) -> Table:
    """The newest checkpoints of the runs side by side; the last run is the vanilla twin."""
    checkpoints = {name: open_checkpoint(newest_checkpoint(d)) for name, d in dump_dirs.items()}
    results = {name: _validation(dump_dirs[name], one) for name, one in checkpoints.items()}
    source = next(iter(results["vanilla"].keys() - {"provenance"}))
    twin = results["vanilla"][source]
    table = Table(
        title=f"held-out {source}: {twin['documents']:,} documents, {twin['tokens']:,} tokens"
    )
    for column in ("model", "k", "measured L0", "perplexity", "to the twin", "bits a byte"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, checkpoint in checkpoints.items():
        table.add_row(name, *_cells(checkpoint, results[name][source], twin))
    return table


def _cells(checkpoint: Checkpoint, result: dict[str, Any], twin: dict[str, Any]) -> list[str]:
    topk, dim = checkpoint.model_args.topk, checkpoint.model_args.dim
    l0 = list(result["l0"].values())
    return [
        f"{topk.k} of {dim}" if topk else "all",
        f"{sum(l0) / len(l0):.1f}" if l0 else "",
        f"{result['perplexity']:.2f}",
        f"{result['perplexity'] / twin['perplexity'] - 1:+.1%}" if topk else "",
        f"{result['bits_per_byte']:.3f}",
    ]


def _validation(dump_dir: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the evaluation of a checkpoint wrote."""
    path = dump_dir / "evals" / checkpoint.folder.name / "validation.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): delete {dump_dir}, and the quickstart trains anew"
        ) from None


def _shown(path: str) -> str:
    """A path as a user would type it here."""
    here = f"{Path.cwd()}/"
    return path.removeprefix(here)


if __name__ == "__main__":
    cli.run(main)
