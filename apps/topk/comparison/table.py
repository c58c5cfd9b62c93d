"""The table itself: runs, measures, differences and notes, before any way of showing it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from apps.topk.comparison import markdown, spreadsheet, terminal
from apps.topk.comparison.differences import Difference, difference, unlike_settings
from apps.topk.comparison.measures import HARNESS, L0, VALIDATION, Measure, Result
from apps.topk.comparison.runs import Run, read_run
from apps.topk.comparison.twins import find_twin, forced_twin, unlike

# The order of the paper's tables; other tasks follow in lm-eval's.
TASKS = (
    "wikitext", "lambada_openai", "lambada_standard", "winogrande", "hellaswag", "piqa",
    "arc_easy", "arc_challenge",
)  # fmt: skip


@dataclass
class Comparison:
    """Runs side by side.

    Attributes:
        runs: in the order they were given in.
        twins: of each run the one it is compared with, or None.
        measures: in the order of the columns.
        differences: by the index of the run.
        notes: what a reader must know, a line each.
    """

    runs: list[Run]
    twins: list[Run | None]
    measures: list[Measure]
    differences: dict[tuple[int, Measure], Difference] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def shown(self) -> list[Measure]:
        """The measures without the parts of groups."""
        members = set().union(*(run.members for run in self.runs))
        return [one for one in self.measures if one.suite != HARNESS or one.task not in members]

    def better(self, measure: Measure) -> int:
        """1 where higher is better, -1 where lower is, 0 where it is not known."""
        told = [run.results[measure].better for run in self.runs if measure in run.results]
        return next((one for one in told if one), 0)

    def best(self, measure: Measure) -> set[int]:
        """The runs with the best value, where there are several to compare and all were alike."""
        results = ((i, run.results.get(measure)) for i, run in enumerate(self.runs))
        have = {i: one for i, one in results if one is not None}
        better = self.better(measure)
        first = next(iter(have.values()), None)
        if len(have) < 2 or not better or not all(_alike(one, first) for one in have.values()):
            return set()
        scores = {i: better * one.estimate.value for i, one in have.items()}
        best, worst = max(scores.values()), min(scores.values())
        # Where all are the same, none is the best.
        return {i for i in scores if scores[i] == best and best > worst}

    def markdown(self) -> str:
        """A document: the table, notes and a legend."""
        return markdown.document(self)

    def csv(self) -> str:
        """A line a run and measure, every number as it was computed."""
        return spreadsheet.document(self)

    def tables(self, width: int = 80) -> list[Table]:
        """For a terminal of `width` columns: measures down, as many runs across as fit."""
        return terminal.tables(self, width)


def _alike(one: Result, first: Result) -> bool:
    return one.units == first.units and not unlike_settings(one, first)


def compare(folders: Mapping[str, Path], twin: str | None = None) -> Comparison:
    """The evaluations in `folders`, each a run's or an evaluation's own, by their names.

    twin: the name of the run that all others are compared with; by default each TopK run is
    with the vanilla run that is like it otherwise. ConfigError, DataError.
    """
    runs = []
    for name, folder in folders.items():
        run = read_run(Path(folder))
        run.name = name
        runs.append(run)
    return comparison_of(runs, twin)


def comparison_of(runs: list[Run], twin: str | None = None) -> Comparison:
    """The same of runs that were read, each with a name of its own."""
    twins, notes = _twins(runs, twin)
    comparison = Comparison(runs, twins, _ordered_measures(runs))
    comparison.notes += [f"{run.name}: {note}" for run in runs for note in run.notes] + notes
    for i, (run, its_twin) in enumerate(zip(runs, twins, strict=True)):
        if its_twin is not None:
            comparison.notes += _compare_run(comparison, i, run, its_twin)
    if len(comparison.shown) < len(comparison.measures):
        hidden = len(comparison.measures) - len(comparison.shown)
        comparison.notes.append(
            f"{hidden} measures of tasks that are part of a group are in the CSV only"
        )
    return comparison


def _twins(runs: list[Run], forced: str | None) -> tuple[list[Run | None], list[str]]:
    """The twin of each run, and notes on those without and on those that are unlike."""
    if forced:
        twin = forced_twin(forced, runs)
        others = [run for run in runs if run is not twin]
        notes = [
            f"{run.name}: not a twin of {twin.name} in all but TopK: it has {unlike(run, twin)}"
            for run in others
            if unlike(run, twin)
        ]
        if twin.model.topk is not None and any(not run.steered for run in others):
            notes.append(f"{twin.name}, which the others are compared with, has TopK itself")
        return [None if run is twin else twin for run in runs], notes
    found = [find_twin(run, runs) for run in runs]
    notes = [
        f"{run.name}: no differences, since {reason}"
        for run, (_, reason) in zip(runs, found, strict=True)
        if reason
    ]
    return [twin for twin, _ in found], notes


def _compare_run(comparison: Comparison, index: int, run: Run, twin: Run) -> list[str]:
    """Fill in the differences of a run, and say what the table cannot."""
    said: dict[str, list[str]] = {}
    for measure in comparison.measures:
        if measure == L0 or measure not in run.results:
            continue
        if measure not in twin.results:
            said.setdefault(f"not measured for {twin.name}", []).append(measure.label)
            continue
        found = difference(run.results[measure], twin.results[measure])
        if isinstance(found, str):
            said.setdefault(f"no difference, since {found}", []).append(measure.label)
            continue
        comparison.differences[index, measure] = found
        if found.settings:
            said.setdefault(f"\u2021 {found.settings}", []).append(measure.label)
    return [f"{run.name}: {_listed(labels)}: {text}" for text, labels in said.items()]


def _listed(labels: Sequence[str]) -> str:
    shown = list(dict.fromkeys(labels))
    more = f" and {len(shown) - 6} more" if len(shown) > 6 else ""
    return ", ".join(shown[:6]) + more


def _ordered_measures(runs: Sequence[Run]) -> list[Measure]:
    """Validation sources, L0, lm-eval's tasks: those of the paper first."""
    found = list(dict.fromkeys(measure for run in runs for measure in run.results))
    tasks = list(dict.fromkeys(one.task for one in found))

    def place(measure: Measure) -> tuple[int, int, int]:
        suite = {VALIDATION: 0, L0.suite: 1, HARNESS: 2}[measure.suite]
        known = suite == 2 and measure.task in TASKS
        rank = TASKS.index(measure.task) if known else len(TASKS)
        return suite, rank, tasks.index(measure.task)

    return sorted(found, key=place)
