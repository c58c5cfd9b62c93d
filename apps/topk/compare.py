"""Evaluations side by side: the paper's table, with differences to the vanilla twin."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from apps.topk import cli
from apps.topk.comparison import Comparison, markdown, spreadsheet
from apps.topk.comparison.runs import Run, read_run
from apps.topk.comparison.table import comparison_of
from apps.topk.corpus import flags
from apps.topk.provenance import write_text
from lingua_topk.errors import ConfigError

PROGRAM = "apps.topk.compare"
EXAMPLE = "RUN RUN ... --out table.md"
TAKES_VALUE = ("--out", "--twin")


@dataclass
class Options:
    """The flags."""

    out: str = ""
    twin: str = ""
    csv: bool = False


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; mistakes raise a UserError, for `cli.run` to report."""
    folders, given = _split(sys.argv[1:] if argv is None else argv)
    chosen = flags.call(options, PROGRAM, given, EXAMPLE) if given else Options()
    if chosen is None:  # --help
        return
    if not folders:
        raise ConfigError(
            f"no RUN is given: python -m {PROGRAM} {EXAMPLE} takes the dump_dirs of training runs,"
            " or folders of evaluations"
        )
    files = _output_files(chosen.out)
    comparison = comparison_of(_named([read_run(Path(one)) for one in folders]), chosen.twin)
    if chosen.csv:
        print(comparison.csv(), end="")
    else:
        console = Console()
        for table in comparison.tables(console.width):
            console.print(table)
    _write(comparison, files)


def options(*, out: str = "", twin: str = "", csv: bool = False) -> Options:
    """Print a table of evaluations, with differences to the vanilla twin and standard errors.

    RUN is the dump_dir of a training run, whose newest evaluation in evals/<step> is taken, or
    the folder of one evaluation: what holds validation.json (python -m apps.topk.eval),
    results.json (lm-eval), or both.

    A TopK run is compared with the vanilla run among the given ones that has the same width,
    depth, vocabulary, parameters, steps and tokens; an evaluation of a steered model, which is
    taken where its own folder is given only, with that of the same checkpoint as it is.
    Differences are paired by document or question where both evaluations kept them.

    Args:
        out: also write the table as Markdown into this file, which ends in .md, and every
            number in full into the .csv beside it. Files of this program are replaced.
        twin: compare all other runs with this one, by its name in the table.
        csv: print the CSV, in place of the table.
    """
    return Options(out, twin, csv)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The runs, and the flags with their values."""
    runs: list[str] = []
    given: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            runs.append(argument)
            continue
        given.append(argument)
        if argument in TAKES_VALUE and rest and not rest[0].startswith("--"):
            given.append(rest.pop(0))
    return runs, given


def _named(runs: list[Run]) -> list[Run]:
    """Runs of the same name get their folder added. ConfigError for one given twice."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.name} ({run.given})"
    labels = [run.name for run in runs]
    for run in runs:
        if labels.count(run.name) > 1:
            raise ConfigError(f"RUN={str(run.given)!r} is given twice: give it once")
    return runs


def _output_files(out: str) -> dict[Path, str]:
    """The files to write, each with the mark by which one of ours is known; before the work.

    ConfigError where one of them is there and not ours.
    """
    if not out:
        return {}
    path = Path(out).expanduser()
    if path.suffix != ".md":
        raise ConfigError(f"out={out!r} does not end in .md: give a file such as table.md")
    files = {path: markdown.MARK, path.with_suffix(".csv"): spreadsheet.MARK}
    for file, mark in files.items():
        if os.path.lexists(file) and not _begins_with(file, mark):
            raise ConfigError(
                f"out={out!r}: {file} is there and is no table of this program, which will not"
                " replace it: choose another --out"
            )
    return files


def _begins_with(path: Path, mark: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(mark)) == mark.encode()
    except OSError:
        return False


def _write(comparison: Comparison, files: dict[Path, str]) -> None:
    for path, content in zip(files, (comparison.markdown(), comparison.csv()), strict=False):
        try:
            write_text(path, content)
        except OSError as error:
            raise ConfigError(
                f"out: {path} cannot be written ({error}): choose another --out"
            ) from None
    if files:
        print(f"written: {' and '.join(map(str, files))}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
