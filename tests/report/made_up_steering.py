"""What apps.topk.steer_eval writes, made up: two neurons of the made-up analysis, bad text in all.

The first fires on "river" and was steered in two ways, by two deltas; the second on hostile text.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

from apps.topk.provenance import write_json, write_text
from tests.report import made_up

BAD = f"{made_up.HOSTILE[0]} {made_up.HOSTILE[1]} \u202eturned \x1b[31m \0 \ud800 {{{{script}}}}"
RIVER, HOSTILE = f"0:{made_up.ONE_TOKEN}", f"0:{made_up.ON_HOSTILE}"
ONCE = {"unsteered": " upon a time there was a house", "prompt": "Once"}
DRAWING = '<svg xmlns="http://www.w3.org/2000/svg"><script>alert(6)</script></svg>'


def numbers(lift: float, score: float | None = 0.5) -> dict[str, Any]:
    return {
        "concept_rate": 0.01 * lift, "unsteered_rate": 0.01, "lift": lift, "perplexity": 90.0,
        "unsteered_perplexity": 60.0, "perplexity_ratio": 1.5, "distinct_1": 0.5,
        "distinct_2": 0.9, "diversity": 0.9, "score": score, "tokens": 128,
    }  # fmt: skip


def row(concept: str, method: str, delta: float, chosen: bool, reported: Any) -> dict[str, Any]:
    layer, neuron = map(int, concept.split(":"))
    return {
        "method": method, "concept": concept, "layer": layer, "neuron": neuron, "delta": delta,
        "absolute": 3.5 * delta, "chosen": chosen, "reported": reported, "choosing": numbers(99.0),
    }  # fmt: skip


def concept(name: str, words: list[str], held_out_words: list[str]) -> dict[str, Any]:
    layer, neuron = map(int, name.split(":"))
    return {
        "name": name, "layer": layer, "neuron": neuron, "words": words,
        "held_out_words": held_out_words, "semantic_entropy": 1.5, "output_score": None,
        "firing_rate": 0.02, "maximum": 3.5,
    }  # fmt: skip


def example(concept: str, method: str, delta: float, **texts: str) -> dict[str, Any]:
    return {"concept": concept, "method": method, "delta": delta, "absolute": 3.5 * delta, **texts}


# The direction's example is the first: the page puts the neuron's own before it.
CONTENT: dict[str, Any] = {
    "version": 1, "settings": {}, "checkpoint": made_up.described()["checkpoint"], "step": 300,
    "twin": None, "corpus": {}, "conclusion": ["Steering lifts by 6.", BAD],
    "methods": ["neuron", "direction"],
    "summary": [
        {"method": "neuron", "n": 2, "lift": 6.125, "lift_ci95": [4, 9.5],
         "perplexity_ratio": 1.5, "perplexity_ratio_ci95": None, "distinct_2": 0.9, "score": 0.6,
         "score_ci95": [0.5, None]},
        {"method": f"direction {made_up.HOSTILE[3]}", "n": 1, "lift": None,
         "perplexity_ratio": 12345.6},
    ],
    "rows": [
        row(RIVER, "neuron", 1.0, False, numbers(3.0)),
        row(RIVER, "neuron", 2.0, True, numbers(7.0)),
        row(RIVER, "direction", 0.5, True, None),
        row(HOSTILE, "neuron", 4.0, True, numbers(5.0, score=None)),
    ],
    "concepts": [
        concept(RIVER, ["river", "bank"], ["don't", "stone"]),
        concept(HOSTILE, [*reversed(made_up.HOSTILE), "\ud800"], []),
    ],
    "examples": [
        example(RIVER, "direction", 0.5, **ONCE, steered=" a direction flows by"),
        example(RIVER, "neuron", 1.0, **ONCE, steered=" there was one river"),
        example(RIVER, "neuron", 2.0, **ONCE,
                steered=" the River,\na RIVER of rivers; Don\u2019t bank on stone"),
        example(RIVER, "neuron", 2.0, prompt="The ri", unsteered="ver.", steered="ch riverbed"),
        example(HOSTILE, "neuron", 4.0, prompt=BAD, unsteered=BAD, steered=f"{BAD} turned"),
    ],
    "provenance": {},
}  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    """steering.json with some of its fields changed, and the figure."""
    write_json(folder / "steering.json", {**deepcopy(CONTENT), **changes})
    write_text(folder / "lift.svg", DRAWING)
    return folder
