"""Numbers as a reader wants them: as many digits as their standard errors allow."""

import math
from typing import TYPE_CHECKING

from apps.topk.comparison.differences import Difference
from apps.topk.comparison.measures import L0, Measure, Result
from apps.topk.comparison.models import Model

if TYPE_CHECKING:
    from apps.topk.comparison.table import Comparison

MISSING = "\u2013"
SIGNIFICANT, UNPAIRED, UNLIKE = "*", "\u2020", "\u2021"
ARROWS = {1: " \u2191", -1: " \u2193", 0: ""}
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"))


def value(measure: Measure, result: Result | None) -> str:
    """A value with its standard error; a dash where it was not measured."""
    if result is None:
        return MISSING
    scale = 100 if measure.is_share else 1
    return _with_error(*result.estimate, scale, _least_digits(measure, result), "")


def _least_digits(measure: Measure, result: Result) -> int:
    if measure == L0 or measure.is_share:
        return 1
    return 2 if result.is_log else 3


def difference(measure: Measure, found: Difference | None) -> str:
    """A signed difference with its standard error and marks; empty where there is none."""
    if found is None:
        return ""
    percent = found.is_relative or measure.is_share
    text = _with_error(*found.estimate, 100 if percent else 1, 1 if percent else 3, "+")
    text += " %" if found.is_relative else ""
    return f"{text} {marks(found)}".strip()


def marks(found: Difference) -> str:
    return (
        (SIGNIFICANT if found.is_significant else "")
        + ("" if found.is_paired else UNPAIRED)
        + (UNLIKE if found.settings else "")
    )


def _with_error(
    number: float, stderr: float | None, scale: int, least_digits: int, sign: str
) -> str:
    number *= scale
    stderr = None if stderr is None else stderr * scale
    if max(abs(number), stderr or 0.0) >= 1e7:
        return f"{number:{sign}.3g}" + ("" if stderr is None else f" \u00b1 {stderr:.2g}")
    if stderr is None:
        return f"{number:{sign},.{least_digits}f}"
    # Two digits of the error, and no more than six decimals.
    digits = min(6, max(least_digits, 1 - math.floor(math.log10(stderr))))
    return f"{number:{sign},.{digits}f} \u00b1 {stderr:.{digits}f}"


def count(number: int | None) -> str:
    if number is None:
        return MISSING
    for unit, name in UNITS:
        if number >= 0.9995 * unit:  # what three digits round up to it
            return f"{number / unit:.3g} {name}"
    return f"{number:,}"


def head(model: Model) -> dict[str, str]:
    """What a run is, by the name of the column."""
    return {
        "D": str(model.dim),
        "L": str(model.n_layers),
        "k": str(model.topk.k) if model.topk else "all",
        "non-TopK layers": _nontopk(model),
        "parameters": count(model.parameters),
        "tokens": _trained(model),
    }


def _nontopk(model: Model) -> str:
    if model.topk is None:
        return "all"
    n = model.n_nontopk_layers
    if model.topk.layers == tuple(range(len(model.topk.layers))):
        return str(n)
    # Not the last ones, as is usual: which?
    others = [str(i) for i in range(model.n_layers) if i not in model.topk.layers]
    return f"{n} ({', '.join(others[:6])}{', ...' if n > 6 else ''})"


def _trained(model: Model) -> str:
    if model.tokens is not None:
        return count(model.tokens)
    steps = model.steps if model.step is None else model.step
    return MISSING if steps is None else f"{steps:,} steps"


def label(comparison: "Comparison", measure: Measure) -> str:
    return measure.label + ARROWS[comparison.better(measure)]


def legend(comparison: "Comparison") -> list[str]:
    """What the signs in this table mean, a line each; of no sign that is not in it."""
    found = [comparison.differences.get((i, m)) for i in range(len(comparison.runs))
             for m in comparison.shown]  # fmt: skip
    there = [one for one in found if one is not None]
    lines = ["\u00b1 one standard error, over the items of a test (documents, questions): what"
             " other items would have given, not what another seed of training would"]  # fmt: skip
    if there:
        lines.append("with a sign: the difference to the twin; of perplexities in percent")
    if any(one.is_significant for one in there):
        lines.append(
            f"{SIGNIFICANT} more than 1.96 standard errors from 0 (by chance: one in twenty)"
        )
    if any(not one.is_paired for one in there):
        lines.append(
            f"{UNPAIRED} not paired, since the items of both runs are not at hand or not the"
            " same: the errors are added as independent, which is too wide for the same items"
        )
    if any(one.settings for one in there):
        lines.append(f"{UNLIKE} the evaluations differ in their settings: see the notes")
    return lines
