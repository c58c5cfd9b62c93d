"""Texts and neurons as lines of JSON."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from apps.topk.steering.bench import Written
from apps.topk.steering.concept_words import count
from apps.topk.steering.handles import Handle
from apps.topk.steering.showing import concept_of


def text_lines(
    written: Sequence[Written], neurons: Sequence[Handle], unit: str, num: int
) -> Iterator[dict[str, Any]]:
    """A line a text: those of a prompt and completion together, the unsteered one first.

    unit: of the deltas. num: how many times the prompts are repeated.
    """
    total = len(written[0].texts)
    n_prompts = total // num
    words = concept_of(neurons)
    for index in range(n_prompts):
        for completion, i in enumerate(range(index, total, n_prompts)):
            for one in written:
                yield {
                    "index": index,
                    "completion": completion,
                    "neurons": [neuron.name for neuron in neurons],
                    **_turned(one, unit),
                    **asdict(one.texts[i]),
                    **_counted(one, i, words),
                    "twin_perplexity": _number(one.perplexities[i]) if one.perplexities else None,
                }


def _turned(one: Written, unit: str) -> dict[str, Any]:
    how = one.variant
    return {
        "mode": how and how.mode,
        "delta": how and how.delta,
        "unit": unit if how and how.absolute else None,
        "absolute": list(how.absolute) if how and how.absolute else None,
    }


def _counted(one: Written, i: int, words: frozenset[str]) -> dict[str, int | None]:
    text = one.texts[i]
    n, total = count(words, text.prompt, text.text)
    return {"concept_words": n if words else None, "words": total}


def handle_line(one: Handle) -> dict[str, Any]:
    """A neuron as JSON; null for a number that is not known."""
    fields = asdict(one) | {"words": list(one.words)}
    numbers = {name: _number(value) for name, value in fields.items() if isinstance(value, float)}
    return {"name": one.name, **fields, **numbers}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
