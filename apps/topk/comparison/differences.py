"""A measure of a run against that of its twin."""

from dataclasses import dataclass

from apps.topk.comparison.estimates import (
    Estimate,
    Items,
    is_beyond_chance,
    logarithm,
    paired_difference,
    relative,
    unpaired_difference,
)
from apps.topk.comparison.measures import LARGEST_LOG, Result


@dataclass(frozen=True)
class Difference:
    """Run minus twin.

    Attributes:
        estimate: in the measure's unit, or, `is_relative`, as a share of the twin's value.
        is_paired: both scored the same items, and the error is that of their differences.
        is_significant: more than 1.96 standard errors from 0.
        settings: where the two evaluations differ, as text; empty where they do not.
    """

    estimate: Estimate
    is_relative: bool
    is_paired: bool
    is_significant: bool
    settings: str


def difference(run: Result, twin: Result) -> Difference | str:
    """The difference, or why there is none.

    Of perplexities the logarithms are compared, ratios over items as all others, and shown
    as a relative difference. They need the same tokens: a model that cuts text into longer
    ones has a higher perplexity with the same likelihood.
    """
    a, b = run.items, twin.items
    is_paired = a is not None and b is not None and a.ids == b.ids
    if not (_same_weights(a, b) if is_paired else run.units == twin.units):
        return "the tokenizers differ, and perplexity is counted by tokens: see bits a byte"
    if run.is_log != twin.is_log:
        return "they were aggregated in different ways"
    if is_paired:
        found = paired_difference(a, b)
    elif run.is_log:
        found = unpaired_difference(logarithm(run.estimate), logarithm(twin.estimate))
    else:
        found = unpaired_difference(run.estimate, twin.estimate)
    if run.is_log and abs(found.value) > LARGEST_LOG:
        return "they are too far apart for a ratio"
    return Difference(
        estimate=relative(found) if run.is_log else found,
        is_relative=run.is_log,
        is_paired=is_paired,
        is_significant=is_beyond_chance(found),
        settings=unlike_settings(run, twin),
    )


def _same_weights(run: Items, twin: Items) -> bool:
    return bool((run.weights == twin.weights).all())


def unlike_settings(run: Result, twin: Result) -> str:
    """The settings that differ, each with both values; empty where none does."""
    names = dict.fromkeys([*run.settings, *twin.settings])
    pairs = {name: (run.settings.get(name), twin.settings.get(name)) for name in names}
    return ", ".join(
        f"{name} {_shown(a)}, in the twin {_shown(b)}" for name, (a, b) in pairs.items() if a != b
    )


def _shown(value: object) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
