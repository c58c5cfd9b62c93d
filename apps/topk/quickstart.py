"""The main job on one machine: real text in, a TopK model and its vanilla twin out.

Prepares the documentation of the Python that runs, trains both models from
configs/quickstart.yaml, both at the same time, evaluates them on the documents that
were held out (perplexity, and tasks in the manner of WikiText, LAMBADA and HellaSwag that are
made of them), compares the two, reads the neurons of both, turns some of them while the model
writes, and makes a report of it all. What is there from an earlier run is used.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from rich.console import Console

from apps.topk import cli, side_by_side
from apps.topk.analyze import FOLDER as NEURONS
from apps.topk.analyze import analyze
from apps.topk.comparison import compare
from apps.topk.corpus.python_docs import PythonDocs
from apps.topk.prepare import prepare
from apps.topk.provenance import write_text
from apps.topk.report import report
from apps.topk.steer_eval import steer_eval
from apps.topk.tasks import make_tasks
from lingua_topk.errors import ConfigError, DataError

if TYPE_CHECKING:
    from apps.topk.model import TopKTrainArgs

PROGRAM = "apps.topk.quickstart"
CONFIG = "configs/quickstart.yaml"
SOURCE = PythonDocs.label
VOCAB_SIZE = 2_000
DUMP_DIR = "dumps/quickstart"
TASKS_FOLDER = "tasks"  # below data.root_dir
MAX_ITEMS = 100  # a task
TABLE = "table.md"
REPORT = "report.html"
# Fewer deltas, prompts and candidates than by default: it takes less than two minutes.
STEERING = {"deltas": "1,2,4", "num_prompts": 16, "candidates": 64}
# The twin differs from the TopK model in this and in nothing else.
RUNS = {"topk": [], "vanilla": ["model.topk=null"]}

HELP = f"""\
usage: python -m {PROGRAM} [key=value ...]

{__doc__}
The keys are those of apps.topk.train and go to both runs, for example steps=100.
dump_dir (default {DUMP_DIR}) holds one folder a run: {", ".join(RUNS)}; and {TABLE}.
Text is prepared where data.root_dir does not exist yet; data.tokenizer.path goes with it."""

NEXT = """\
What to try next, from {root}:
  another k:         {python} -m apps.topk.train config={config} model.topk.k=16 dump_dir=dumps/k16
  your own text:     {python} -m apps.topk.prepare --source FOLDER --out data/mine --vocab_size 2000
  let it write:      {python} -m apps.topk.generate --ckpt {dump_dir}/topk --prompt "The list"
  turn a neuron:     {python} -m apps.topk.steer --ckpt {dump_dir}/topk --prompt "The list"
  what a run wrote:  {dump_dir}/topk: config.yaml, train.log, metrics.jsonl, checkpoints, evals
  the table below:   {dump_dir}/table.md, with a legend; and table.csv
  what there is:     README.md, and --help of every program
"""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; mistakes raise a UserError, for `cli.run` to report."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "--help" in argv or "-h" in argv:
        print(HELP)
        return
    from apps.topk.checkpoint import newest_checkpoint, open_checkpoint  # with torch: seconds

    overrides, dump_dir = _without_dump_dir(argv)
    args = _checked(overrides, dump_dir)
    root_dir = Path(args.data.root_dir or "")
    _prepare(root_dir)
    overrides += _harness(args, root_dir)
    print(f"\ntraining {' and '.join(RUNS)} at the same time", flush=True)
    side_by_side.run({name: _training(name, overrides, dump_dir) for name in RUNS})
    for name in RUNS:
        if open_checkpoint(newest_checkpoint(dump_dir / name)).step < args.steps:
            print(f"{name} was ended before its last step: run the quickstart again to go on")
            raise SystemExit(130)
    comparison = compare({name: dump_dir / name for name in RUNS})
    write_text(dump_dir / TABLE, comparison.markdown())
    write_text((dump_dir / TABLE).with_suffix(".csv"), comparison.csv())
    python = _shown(sys.executable)
    print(NEXT.format(root=Path.cwd(), python=python, config=CONFIG, dump_dir=dump_dir))
    for table in comparison.tables():
        Console().print(table)
    _read_neurons(dump_dir)
    _steer(dump_dir)


def _read_neurons(dump_dir: Path) -> None:
    """What the neurons of both fire on, and the page that shows it."""
    from apps.topk.neurons import folder as neuron_files
    from apps.topk.neurons.listing import describe

    print("\nreading the neurons of both, and of controls", flush=True)
    topk, twin = (str(dump_dir / name) for name in RUNS)
    analyze(ckpt=topk, twin=twin, quiet=True)
    layers = neuron_files.read_layers(dump_dir / "topk" / NEURONS / neuron_files.MODEL)
    print(f"\n{describe(layers)}\n")


def _steer(dump_dir: Path) -> None:
    """What turning neurons does to the model's text, and the page of it all."""
    print("steering: neurons are raised while the model writes", flush=True)
    topk, twin = (str(dump_dir / name) for name in RUNS)
    try:
        content = steer_eval(ckpt=topk, twin=twin, quiet=True, **STEERING)
    except DataError as error:  # a model that is hardly trained has no neuron told by its words
        print(f"nothing to steer: {error}")
    else:
        from apps.topk.steering.shown_example import show_example

        print()
        show_example(Console(highlight=False), content)
    print()
    report(run=topk, out=str(dump_dir / REPORT))


def _harness(args: "TopKTrainArgs", root_dir: Path) -> list[str]:
    """The keys that evaluate on tasks made of the held-out text of the first source."""
    source = next(iter(args.data.sources))
    made = make_tasks(
        out=str(root_dir / TASKS_FOLDER), text=str(root_dir / source), max_items=MAX_ITEMS
    )
    keys = {
        "include_path": root_dir / TASKS_FOLDER,
        "tasks": f"[{','.join(made['tasks'])}]",
        "bootstrap_iters": 0,  # the comparison has standard errors from the items themselves
    }
    return [f"eval.harness.{key}={value}" for key, value in keys.items()]


def _without_dump_dir(argv: Sequence[str]) -> tuple[list[str], Path]:
    """The arguments for both runs, and the folder that their own ones lie in."""
    given = [a.partition("=")[2] for a in argv if a.startswith("dump_dir=")]
    return [a for a in argv if not a.startswith("dump_dir=")], Path((given or [DUMP_DIR])[-1])


def _checked(overrides: list[str], dump_dir: Path) -> "TopKTrainArgs":
    """The config of the TopK run. What is wrong with it is found before the first work.

    Also where a run is there already, with another config: nothing of it would take effect.
    """
    from apps.topk import train
    from apps.topk.model import TopKTrainArgs
    from lingua.optim import build_lr_fn

    args = cli.read_config(TopKTrainArgs, PROGRAM, "", argv=[f"config={CONFIG}", *overrides])
    if args.model.topk is None or args.eval is None:
        raise ConfigError("model.topk and eval cannot be null here: the quickstart compares both")
    args.model.topk.validate(args.model.n_layers)
    if args.steps < 1:
        raise ConfigError(f"steps={args.steps} is too small: give at least 1")
    build_lr_fn(args.optim, args.steps)  # the embedded host's refuses what cannot be
    if Path(args.data.root_dir or "").exists():
        train.validate(args)
    for name in RUNS:
        _check_same_run(dump_dir / name, args)
    return args


def _check_same_run(folder: Path, args: "TopKTrainArgs") -> None:
    path = folder / "config.yaml"
    if not path.is_file():
        return
    there = OmegaConf.to_container(cli.read_yaml(str(path)))
    wanted = asdict(args)
    sections = ("steps", "seed", "data", "optim", "model")
    if not all(name in there for name in sections) or not isinstance(there["model"], dict):
        raise ConfigError(
            f"{path} is not the config of a training run: move {folder} away, or give"
            " dump_dir=OTHER for a new pair of runs"
        )
    if there["model"].get("topk") is None:
        wanted["model"]["topk"] = None
    for section in sections:
        different = _difference(wanted[section], there[section], section)
        if different:
            raise ConfigError(
                f"{different} in the run that is in {folder}: give dump_dir=OTHER for a new pair of"
                " runs, or the same keys as before to see this one"
            )


def _difference(wanted: Any, there: Any, key: str) -> str | None:
    """What to say of the first key that differs, or None."""
    if isinstance(wanted, dict) and isinstance(there, dict):
        for name in wanted:
            found = _difference(wanted[name], there.get(name), f"{key}.{name}")
            if found:
                return found
        return None
    # Training fills these in.
    if wanted == there or key in ("model.vocab_size", "model.max_seqlen"):
        return None
    return f"{key}={wanted}, but it is {there}"


def _prepare(root_dir: Path) -> None:
    if root_dir.exists():
        print(f"text: {root_dir} is there and is used")
        return
    print(f"text: the documentation of Python {sys.version.split()[0]}")
    prepare(source=SOURCE, out=str(root_dir), vocab_size=VOCAB_SIZE)


def _training(name: str, overrides: list[str], dump_dir: Path) -> list[str]:
    """The words that train one of the runs."""
    from apps.topk.train import PROGRAM as TRAIN

    here = [f"name={name}", f"dump_dir={dump_dir / name}"]
    return [TRAIN, f"config={CONFIG}", *overrides, *RUNS[name], *here]


def _shown(path: str) -> str:
    """A path as a user would type it here."""
    here = f"{Path.cwd()}/"
    return path.removeprefix(here)


if __name__ == "__main__":
    cli.run(main)
