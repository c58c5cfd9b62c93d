"""Several runs from one config: trained, evaluated, compared, one of them read and steered."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apps.topk import cli, side_by_side
from apps.topk.evaluation.results import DONE_NAME
from apps.topk.provenance import write_json, write_text
from apps.topk.studies import summary
from apps.topk.studies.arguments import Run, StudyArgs, read_arguments, runs_of
from lingua_topk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

DESCRIPTION = """\
Train several runs that differ in a few keys, with several seeds if wanted, evaluate the last
checkpoint of each, and write how far each lies above the vanilla twin; and of one of them read the
neurons, steer them and make a page. A run that is there is used: stopped at any moment, by a time
limit too, the same command goes on from there."""
MADE_WITH = "study.json"  # in the folder of a run
SUMMARY = "summary.md"
TABLE = "table.md"
REPORT = "report.html"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; mistakes raise a UserError, for `cli.run` to report."""
    study(read_arguments(sys.argv[1:] if argv is None else list(argv), DESCRIPTION))


def study(args: StudyArgs) -> None:
    """All of it, in the order of its pieces; what is done is passed over."""
    runs = runs_of(args)
    for run in runs:
        _take(run, args)
    _train(runs, args.parallel)
    _evaluate(runs, args)
    folder = Path(args.dump_dir)
    rows = summary.rows_of(runs, args.twin)
    write_text((folder / SUMMARY).with_suffix(".csv"), summary.as_csv(rows))
    write_text(folder / SUMMARY, summary.as_markdown(rows, args.twin))
    _compare(runs, folder)
    if args.read is not None:
        _read(args, runs)
    print(f"\n{(folder / SUMMARY).read_text(encoding='utf-8')}")
    print(f"written: {folder / SUMMARY}, {TABLE}, both also as .csv")


def _take(run: Run, args: StudyArgs) -> None:
    """Write down what a run is made with; ConfigError where one is there that was made otherwise.

    Else results of other keys would be taken for those that are asked for.
    """
    path, now = run.folder / MADE_WITH, {"train": list(run.words), "eval": _evaluation(run, args)}
    if run.folder.is_dir() and any(run.folder.iterdir()):
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = None
        if there != now:
            raise ConfigError(
                f"{run.folder} was made with other keys than this study has"
                f" ({_first_other(there, now)} by {MADE_WITH} in it): give dump_dir=OTHER, or move"
                " it away"
            )
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(path, now)


def _first_other(there: Any, now: dict[str, list[str]]) -> str:
    """A word that one of the two has and the other has not."""
    for part, words in now.items():
        earlier = there.get(part) if isinstance(there, dict) else None
        if not isinstance(earlier, list):
            return "unknown ones"
        for word in [*words, *earlier]:
            if (word in words) != (word in earlier):
                return f"{word} {'is new' if word in words else 'is not among them'},"
    return "in another order"


def _train(runs: Sequence[Run], parallel: int) -> None:
    todo = [run for run in runs if not run.checkpoint.is_dir()]
    print(f"training: {len(runs)} runs, {len(runs) - len(todo)} of them are done", flush=True)
    for some in _batches(todo, parallel):
        side_by_side.run({run.name: ["apps.topk.train", *run.words] for run in some})
        for run in some:
            if not run.checkpoint.is_dir():
                print(f"{run.name} was ended before its last step: the same command goes on")
                raise SystemExit(130)


def _evaluate(runs: Sequence[Run], args: StudyArgs) -> None:
    todo = [run for run in runs if not (run.evaluation / DONE_NAME).is_file()]
    print(f"evaluating: {len(runs)} runs, {len(runs) - len(todo)} of them are done", flush=True)
    for some in _batches(todo, args.parallel):
        side_by_side.run({run.name: _evaluation(run, args) for run in some})


def _evaluation(run: Run, args: StudyArgs) -> list[str]:
    return [
        "apps.topk.eval", f"config={args.eval}", f"ckpt_dir={run.checkpoint}",
        f"dump_dir={run.evaluation}", *args.eval_set,
    ]  # fmt: skip


def _batches(runs: Sequence[Run], size: int) -> "Iterator[Sequence[Run]]":
    return (runs[start : start + size] for start in range(0, len(runs), size))


def _compare(runs: Sequence[Run], folder: Path) -> None:
    """The table of the first seed, in which a difference has its standard error over items."""
    from apps.topk.comparison import compare

    comparison = compare({run.kind: run.evaluation for run in _first_seed(runs)})
    write_text(folder / TABLE, comparison.markdown())
    write_text((folder / TABLE).with_suffix(".csv"), comparison.csv())


def _read(args: StudyArgs, runs: Sequence[Run]) -> None:
    """The neurons of one run beside those of the twin, by the programs for it."""
    first = {run.kind: run for run in _first_seed(runs)}
    run, twin = first[args.read], first[args.twin]
    both = ["--ckpt", str(run.folder), "--twin", str(twin.folder), "--quiet"]
    out = str(Path(args.dump_dir) / REPORT)
    _run(["apps.topk.analyze", *both, *_flags(args.analyze)])
    status = 0
    try:
        _run(["apps.topk.steer_eval", *both, *_flags(args.steer)])
    except SystemExit as ended:  # it has said why; a page of the rest can be made
        status = ended.code
    _run(["apps.topk.report", "--run", str(run.folder), "--out", out])
    if status:
        raise SystemExit(status)


def _run(words: list[str]) -> None:
    print(f"\n{' '.join(words)}", flush=True)
    side_by_side.run({words[0].rpartition(".")[2]: words})


def _flags(values: dict) -> list[str]:
    return [f"--{name}={value}" for name, value in values.items()]


def _first_seed(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.seed == runs[0].seed]


if __name__ == "__main__":
    cli.run(main)
