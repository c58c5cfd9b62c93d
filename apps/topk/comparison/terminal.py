"""The comparison for a terminal: measures down, runs across, so that it stays narrow."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from apps.topk.cli import one_line
from apps.topk.comparison import shown
from apps.topk.comparison.measures import Measure

if TYPE_CHECKING:
    from apps.topk.comparison.table import Comparison

# Longer labels and names are folded.
LABEL_WIDTH, NAME_WIDTH = 30, 24


def tables(comparison: "Comparison", width: int) -> list[Table]:
    """As many runs in a table as `width` columns hold, at least one; notes below the last."""
    rest = list(range(len(comparison.runs)))
    found = []
    while rest:
        n = _fitting(comparison, rest, width)
        found.append(_table(comparison, rest[:n]))
        rest = rest[n:]
    lines = [*shown.legend(comparison), *comparison.notes]
    # Text, never markup: names are data.
    found[-1].caption = Text("\n".join(one_line(line) for line in lines))
    return found


def _fitting(comparison: "Comparison", runs: list[int], width: int) -> int:
    console = Console(width=10_000)
    for n in range(len(runs), 1, -1):
        if console.measure(_table(comparison, runs[:n])).maximum <= width:
            return n
    return 1


def _table(comparison: "Comparison", runs: list[int]) -> Table:
    table = Table(caption_justify="left", title=_title(comparison))
    table.add_column("run", max_width=LABEL_WIDTH, overflow="fold")
    heads = [shown.head(comparison.runs[i].model) for i in runs]
    for i in runs:
        name = Text(one_line(comparison.runs[i].name))
        table.add_column(name, justify="right", max_width=NAME_WIDTH, overflow="fold")
    for label in heads[0]:
        is_last = label == list(heads[0])[-1]
        table.add_row(label, *(head[label] for head in heads), end_section=is_last)
    for measure in comparison.shown:
        label = Text(one_line(shown.label(comparison, measure)))
        table.add_row(label, *(_cell(comparison, i, measure) for i in runs))
    return table


def _title(comparison: "Comparison") -> Text | None:
    """Whom the differences are to, where that is one run for all."""
    twins = {twin.name for twin in comparison.twins if twin is not None}
    if len(twins) != 1:
        return None
    return Text(f"with differences to {one_line(twins.pop())}")


def _cell(comparison: "Comparison", index: int, measure: Measure) -> Text:
    """The value, and below it the difference."""
    value = shown.value(measure, comparison.runs[index].results.get(measure))
    below = shown.difference(measure, comparison.differences.get((index, measure)))
    style = "bold" if index in comparison.best(measure) else ""
    text = Text(value, style=style)
    return text.append(f"\n{below}", style="not bold") if below else text
