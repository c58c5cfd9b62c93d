"""What is measured, and what one run got."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from apps.topk.comparison.estimates import Estimate, Items, exponential, ratio

VALIDATION, MODEL, HARNESS = "validation", "model", "lm-eval"
NO_FILTER = "none"
# Two sums of the same numbers in another order, or through a file, agree to this.
REPRODUCED = 1e-6
# exp of more overflows.
LARGEST_LOG = 700.0
# Named so by lm-eval, and shares of all items.
SHARES = ("acc", "exact_match")


@dataclass(frozen=True)
class Measure:
    """A column of the table.

    Attributes:
        suite: VALIDATION, MODEL or HARNESS.
        task: the validation source, or lm-eval's task or group.
        metric: by its name in the results.
        filter: lm-eval's, through which the answers went.
    """

    suite: str
    task: str
    metric: str
    filter: str = NO_FILTER

    @property
    def is_share(self) -> bool:
        """Whether it is shown in percent."""
        return self.suite == HARNESS and self.metric.startswith(SHARES)

    @property
    def label(self) -> str:
        by_filter = "" if self.filter == NO_FILTER else f" ({self.filter})"
        unit = " %" if self.is_share else ""
        return f"{self.task} {self.metric}{by_filter}{unit}".strip()


L0 = Measure(MODEL, "", "L0")


@dataclass(frozen=True, eq=False)
class Result:
    """A measure of one run.

    Attributes:
        estimate: in the measure's unit.
        better: 1 where higher is better, -1 where lower is, 0 where neither is known.
        is_log: the items give the logarithm of the value, and differences are relative.
        n: how many items were scored, None where it is not said.
        items: those items, where they were kept and give the value again.
        units: what the weights count, where it depends on the run (the tokenizer).
        settings: what two runs must share to be compared without a note.
    """

    estimate: Estimate
    better: int
    is_log: bool = False
    n: int | None = None
    items: Items | None = None
    units: Hashable = None
    settings: Mapping[str, Any] = field(default_factory=dict)


def reproduced(items: Items | None, value: float, is_log: bool) -> Estimate | None:
    """The measure computed from its items, None where that is not `value`.

    Whoever reads a file of items must know how they were put together: this shows that it
    was so, and that the file is of the same evaluation.
    """
    if items is None or not float(items.weights.sum()) > 0:
        return None
    computed = ratio(items.amounts, items.weights)
    if is_log:
        if computed.value > LARGEST_LOG:
            return None
        computed = exponential(computed)
    return computed if np.isclose(computed.value, value, rtol=REPRODUCED, atol=1e-9) else None
