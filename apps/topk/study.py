"""Several runs from one config: trained, evaluated, compared, one of them read and steered."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from apps.topk import cli, side_by_side
from apps.topk.evaluation.results import DONE_NAME
from apps.topk.provenance import write_text
from apps.topk.studies import summary
from apps.topk.studies.arguments import (
    Run,
    StudyArgs,
    evaluation_config,
    read_arguments,
    runs_of,
)
from apps.topk.studies.made_with import take

if TYPE_CHECKING:
    from collections.abc import Iterator

DESCRIPTION = """\
Train several runs that differ in a few keys, with several seeds if wanted, evaluate the last
checkpoint of each, and write how far each lies above the vanilla twin; and of one of them read the
neurons, steer them and make a page. A run that is there is used: stopped at any moment, by a time
limit too, the same command goes on from there. A run that fails does not keep the others from it;
it is tried again by the same command."""
SUMMARY = "summary.md"
TABLE = "table.md"
REPORT = "report.html"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; mistakes raise a UserError, for `cli.run` to report."""
    study(read_arguments(sys.argv[1:] if argv is None else list(argv), DESCRIPTION))


def study(args: StudyArgs) -> None:
    """All of it, in the order of its pieces; what is done is passed over."""
    runs, evaluation = runs_of(args), evaluation_config(args)
    for run in runs:
        take(run, evaluation)
    failed = _train(runs, args.parallel)
    failed |= _evaluate([run for run in runs if run.name not in failed], args)
    whole = _with_their_twins(runs, failed, args.twin)
    if whole:
        _sum_up(whole, args)
        if args.read in {run.kind for run in _first_seed(whole)}:
            _read(args, whole)
        print(f"\n{(Path(args.dump_dir) / SUMMARY).read_text(encoding='utf-8')}")
        print(f"written: {Path(args.dump_dir) / SUMMARY}, {TABLE}, both also as .csv")
    if failed:
        print(f"failed, as said above: {', '.join(failed)}; the same command tries again")
        raise SystemExit(next(iter(failed.values())))


def _with_their_twins(runs: Sequence[Run], failed: Mapping[str, int], twin: str) -> list[Run]:
    """Those that can be compared: without a failure, and their twin too."""
    whole = [run for run in runs if run.name not in failed]
    seeds = {run.seed for run in whole if run.kind == twin}
    return [run for run in whole if run.seed in seeds]


def _sum_up(runs: Sequence[Run], args: StudyArgs) -> None:
    folder, rows = Path(args.dump_dir), summary.rows_of(runs, args.twin)
    write_text((folder / SUMMARY).with_suffix(".csv"), summary.as_csv(rows))
    write_text(folder / SUMMARY, summary.as_markdown(rows, args.twin))
    _compare(runs, args.twin, folder)


def _train(runs: Sequence[Run], parallel: int) -> dict[str, int]:
    """By name the statuses of the runs that failed."""
    todo, failed = [run for run in runs if not run.checkpoint.is_dir()], {}
    print(f"training: {len(runs)} runs, {len(runs) - len(todo)} of them are done", flush=True)
    for some in _batches(todo, parallel):
        failed |= side_by_side.statuses({run.name: ["apps.topk.train", *run.words] for run in some})
        for run in some:
            if run.name not in failed and not run.checkpoint.is_dir():
                print(f"{run.name} was ended before its last step: the same command goes on")
                raise SystemExit(130)
    return failed


def _evaluate(runs: Sequence[Run], args: StudyArgs) -> dict[str, int]:
    """By name the statuses of the evaluations that failed."""
    todo, failed = [run for run in runs if not (run.evaluation / DONE_NAME).is_file()], {}
    print(f"evaluating: {len(runs)} runs, {len(runs) - len(todo)} of them are done", flush=True)
    for some in _batches(todo, args.parallel):
        failed |= side_by_side.statuses({run.name: _evaluation(run, args) for run in some})
    return failed


def _evaluation(run: Run, args: StudyArgs) -> list[str]:
    return [
        "apps.topk.eval", f"config={args.eval}", f"ckpt_dir={run.checkpoint}",
        f"dump_dir={run.evaluation}", *args.eval_set,
    ]  # fmt: skip


def _batches(runs: Sequence[Run], size: int) -> "Iterator[Sequence[Run]]":
    return (runs[start : start + size] for start in range(0, len(runs), size))


def _compare(runs: Sequence[Run], twin: str, folder: Path) -> None:
    """The table of the first seed, in which a difference has its standard error over items."""
    from apps.topk.comparison import compare

    comparison = compare({run.kind: run.evaluation for run in _first_seed(runs)}, twin)
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
    except side_by_side.Stopped:
        raise
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
