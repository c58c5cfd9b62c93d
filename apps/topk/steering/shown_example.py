"""The one example of a measurement that is shown on its own: unsteered and steered."""

from collections.abc import Mapping
from typing import Any

from rich.box import SQUARE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apps.topk.generation import Generation
from apps.topk.steering.methods import NEURON
from apps.topk.steering.showing import SHOWN_WORDS, has_colours, highlighted
from apps.topk.terminal import shown

TEXTS = ("unsteered", "steered")


def show_example(out: Console, content: Mapping[str, Any]) -> None:
    """The example of the concept with the highest score on the prompts to choose by.

    content: of steering.json.
    """
    row = best_row(content)
    found = [
        one for one in content["examples"]
        if (one["concept"], one["method"]) == (row["concept"], NEURON)
    ]  # fmt: skip
    (concept,) = (one for one in content["concepts"] if one["name"] == row["concept"])
    words = [*concept["words"], *concept["held_out_words"]]
    first = ", ".join(concept["words"][:SHOWN_WORDS])
    out.print(Text(shown(f"steering neuron {row['concept']} ({first}) by {row['delta']:g} times its"
                         f" maximum, {row['absolute']:+.3g} at every position:")))  # fmt: skip
    table = Table(box=SQUARE, expand=True)
    for name in TEXTS:
        table.add_column(name, ratio=1, overflow="fold")
    for one in found[:1]:
        texts = (Generation(one["prompt"], one[name], [], "length") for name in TEXTS)
        table.add_row(*(highlighted(text, words, has_colours(out)) for text in texts))
    out.print(table)
    reported = row["reported"]
    out.print(
        f"over {reported['tokens']} tokens: {100 * reported['concept_rate']:.2g}% of them in its"
        f" held-out words, unsteered {100 * reported['unsteered_rate']:.2g}%; perplexity"
        f" {reported['perplexity_ratio']:.2g} times that of unsteered text"
    )


def best_row(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the neurons' rows the one that is best where the delta was chosen."""
    rows = [row for row in content["rows"] if row["method"] == NEURON and row["chosen"]]
    return max(rows, key=lambda row: row["choosing"]["score"])
