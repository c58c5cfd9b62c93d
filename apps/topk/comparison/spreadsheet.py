"""The comparison as CSV: a line a run and measure, every number in full."""

import csv
import io
from typing import TYPE_CHECKING, Any

from apps.topk.cli import one_line
from apps.topk.comparison.measures import Measure
from apps.topk.comparison.models import Model

if TYPE_CHECKING:
    from apps.topk.comparison.table import Comparison

# A header that begins so is one of ours.
MARK = "run,suite,task,metric,filter,value,stderr,twin,difference"
COLUMNS = (
    *MARK.split(","),
    "difference_kind", "difference_stderr", "paired", "beyond_1.96_stderr", "settings_differ",
    "items", "higher_is_better", "D", "L", "k", "nontopk_layers", "vocab_size", "parameters",
    "tokens", "steps", "step", "commit", "checkpoint", "evaluation", "steered",
)  # fmt: skip
# What makes a spreadsheet take a text for a formula.
FORMULA = ("=", "+", "-", "@")


def document(comparison: "Comparison") -> str:
    """With a header; values as lm-eval and validation give them, accuracies as shares of 1."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for i, run in enumerate(comparison.runs):
        for measure in comparison.measures:
            if measure in run.results:
                row = _measured(comparison, i, measure) | _difference(comparison, i, measure)
                writer.writerow({name: _plain(one) for name, one in row.items()})
    return out.getvalue()


def _plain(value: Any) -> Any:
    """A cell that no spreadsheet computes: text is data, whatever it begins with."""
    if not isinstance(value, str):
        return value
    text = one_line(value)
    return f"'{text}" if text.startswith(FORMULA) else text


def _measured(comparison: "Comparison", index: int, measure: Measure) -> dict[str, Any]:
    run = comparison.runs[index]
    result = run.results[measure]
    better = comparison.better(measure)
    return {
        "run": run.name, "suite": measure.suite, "task": measure.task, "metric": measure.metric,
        "filter": measure.filter, "value": result.estimate.value, "stderr": result.estimate.stderr,
        "items": result.n, "higher_is_better": _truth(better > 0) if better else None,
        "commit": run.commit, "checkpoint": run.checkpoint, "evaluation": str(run.folder),
        "steered": run.steered or None,
        **_model(run.model),
    }  # fmt: skip


def _difference(comparison: "Comparison", index: int, measure: Measure) -> dict[str, Any]:
    found, twin = comparison.differences.get((index, measure)), comparison.twins[index]
    if found is None:
        return {}
    return {
        "twin": twin.name,
        "difference": found.estimate.value,
        "difference_kind": "relative" if found.is_relative else "absolute",
        "difference_stderr": found.estimate.stderr,
        "paired": _truth(found.is_paired),
        "beyond_1.96_stderr": _truth(found.is_significant),
        "settings_differ": found.settings,
    }


def _model(model: Model) -> dict[str, Any]:
    return {
        "D": model.dim,
        "L": model.n_layers,
        "k": model.topk.k if model.topk else None,
        "nontopk_layers": model.n_nontopk_layers,
        "vocab_size": model.vocab_size,
        "parameters": model.parameters,
        "tokens": model.tokens,
        "steps": model.steps,
        "step": model.step,
    }


def _truth(value: bool) -> str:
    return "yes" if value else "no"
