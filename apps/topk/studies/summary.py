"""What the runs of a study come to: their perplexities beside that of the twin, over the seeds."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from apps.topk.evaluation.results import PROVENANCE, VALIDATION_NAME
from apps.topk.studies.arguments import Run
from lingua_topk.errors import DataError

COLUMNS = (
    "run", "seed", "source", "perplexity", "nll_per_token", "twin_nll_per_token", "percent",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """The held-out text of one source under one run.

    Attributes:
        nll: nats a token.
        twin_nll: of the twin with the same seed.
    """

    kind: str
    seed: int | None
    source: str
    nll: float
    twin_nll: float

    @property
    def percent(self) -> float:
        """By how much its perplexity is above the twin's."""
        return 100 * math.expm1(self.nll - self.twin_nll)


def rows_of(runs: Sequence[Run], twin: str) -> list[Row]:
    """A row a run and source, from the evaluations. DataError where one cannot be read."""
    measured = {(run.kind, run.seed): _nll_by_source(run) for run in runs}
    rows = []
    for (kind, seed), by_source in measured.items():
        of_twin = measured[twin, seed]
        rows += [
            Row(kind, seed, source, nll, of_twin[source])
            for source, nll in by_source.items()
            if source in of_twin
        ]
    return rows


def _nll_by_source(run: Run) -> dict[str, float]:
    path = run.evaluation / VALIDATION_NAME
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {
            source: float(measured["nll_per_token"])
            for source, measured in content.items()
            if source != PROVENANCE
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no evaluation of validation text ({type(error).__name__}): remove"
            f" {run.evaluation} and run the study again"
        ) from None


def as_csv(rows: Sequence[Row]) -> str:
    """Every number, a line a run, seed and source."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        seed = "" if row.seed is None else row.seed
        numbers = (math.exp(row.nll), row.nll, row.twin_nll, row.percent)
        writer.writerow([row.kind, seed, row.source, *(f"{number:.6g}" for number in numbers)])
    return out.getvalue()


def as_markdown(rows: Sequence[Row], twin: str) -> str:
    """A table a source: mean perplexity (geometric, over seeds), and how far above the twin's."""
    sources = list(dict.fromkeys(row.source for row in rows))
    kinds = list(dict.fromkeys(row.kind for row in rows))
    tables = [_table([row for row in rows if row.source == one], one, kinds) for one in sources]
    legend = (
        f"Perplexity on held-out text; geometric mean over the seeds. Above {twin}: against the"
        " twin of the same seed, and in brackets the least and the most of the seeds, where there"
        " are several."
    )
    return "\n".join([legend, *tables])


def _table(rows: Sequence[Row], source: str, kinds: Sequence[str]) -> str:
    lines = [
        "", f"| {_cell(source)} | seeds | perplexity | above the twin's, % |",
        "|---|---:|---:|---:|",
    ]  # fmt: skip
    for kind in kinds:
        own = [row for row in rows if row.kind == kind]
        if not own:
            continue
        perplexity = math.exp(mean(row.nll for row in own))
        above = 100 * math.expm1(mean(row.nll - row.twin_nll for row in own))
        percents = sorted(row.percent for row in own)
        spread = f" ({percents[0]:+.1f} to {percents[-1]:+.1f})" if len(own) > 1 else ""
        is_twin = all(row.nll == row.twin_nll for row in own)
        shown = "-" if is_twin else f"{above:+.1f}{spread}"
        lines.append(f"| {_cell(kind)} | {len(own)} | {perplexity:,.2f} | {shown} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
