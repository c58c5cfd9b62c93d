"""What steering did, as files and in words: JSON, CSV, a table, a figure, sentences."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from apps.topk.provenance import provenance, write_json, write_text
from apps.topk.steering import methods
from apps.topk.steering.experiment import Experiment, Row
from apps.topk.steering.handles import Handle
from apps.topk.steering.methods import Concept
from apps.topk.terminal import shown

VERSION = 1
NAME = "steering.json"
TABLE, CSV, FIGURE = "steering.md", "steering.csv", "lift.svg"
AIM_LIFT, AIM_RATIO = 5, 2
RESAMPLES, LEVEL = 2000, 0.95
SHOWN_WORDS = 6
# Medians are shown of these.
SUMMARISED = ("concept_rate", "unsteered_rate", "lift", "perplexity_ratio", "distinct_1",
              "distinct_2", "score")  # fmt: skip
WITH_INTERVAL = ("lift", "perplexity_ratio", "score")


def content_of(experiment: Experiment) -> dict[str, Any]:
    """What steering.json holds."""
    rows = experiment.rows
    summary = summarised(rows, experiment.settings.seed)
    twin = experiment.twin_checkpoint
    return {
        "version": VERSION,
        "inputs": experiment.inputs(),
        "settings": asdict(experiment.settings),
        "checkpoint": experiment.checkpoint.describe(),
        "step": experiment.checkpoint.step,
        "twin": twin and twin.describe(),
        "judge": "twin" if twin else "the model itself, unsteered",
        "conclusion": conclusion(rows, summary, bool(twin)),
        "methods": list(dict.fromkeys(row.method.name for row in rows)),
        "summary": summary,
        "rows": [_row(one) for one in rows],
        "concepts": [_concept(one) for one in experiment.concepts],
        "twin_concepts": [_concept(one) for one in experiment.twin_concepts],
        "examples": [
            {
                "concept": one.row.concept.name, "method": one.row.method.name,
                "delta": one.row.delta, "absolute": one.row.delta * one.row.method.unit,
                "prompt": one.prompt, "unsteered": one.unsteered, "steered": one.steered,
            }
            for one in experiment.examples
        ],
        "provenance": provenance(),
    }  # fmt: skip


def _row(one: Row) -> dict[str, Any]:
    layer, _, neuron = one.method.neuron.partition(":")
    return {
        "method": one.method.name,
        "concept": one.concept.name,
        "layer": int(layer) if layer else one.concept.handle.layer,
        "neuron": int(neuron) if neuron else None,
        "delta": one.delta,
        "absolute": one.delta * one.method.unit,
        "chosen": one.chosen,
        "reported": one.reported.json(),
        "all_words": one.all_words.json(),
        "choosing": one.choosing.json(),
    }


def _concept(one: Concept) -> dict[str, Any]:
    handle: Handle = one.handle
    return {
        "name": one.name, "layer": handle.layer, "neuron": handle.neuron,
        "words": list(handle.words), "held_out_words": list(one.held_out),
        "semantic_entropy": _finite(handle.semantic_entropy), "output_score": handle.output_score,
        "strength": handle.strength, "firing_rate": handle.firing_rate, "mean": handle.mean,
        "maximum": handle.maximum, "sign": handle.sign,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# Over concepts -----------------------------------------------------------------------------


def summarised(rows: Sequence[Row], seed: int) -> list[dict[str, Any]]:
    """By method the medians over concepts at the deltas that were chosen, with intervals.

    An interval is where the middle 95% of the medians lie when concepts are drawn again; it says
    what other concepts of the same model would have given.
    """
    found = []
    for name in dict.fromkeys(row.method.name for row in rows):
        chosen = [row.reported for row in rows if row.chosen and row.method.name == name]
        record: dict[str, Any] = {"method": name, "n": len(chosen)}
        draws = np.random.default_rng(seed).integers(len(chosen), size=(RESAMPLES, len(chosen)))
        for measure in SUMMARISED:
            values = np.array([getattr(one, measure) for one in chosen])
            record[measure] = float(np.median(values))
            if measure in WITH_INTERVAL:
                record[f"{measure}_ci95"] = _interval(values, draws)
        record["lift_all_words"] = float(
            np.median([
                row.all_words.lift for row in rows if row.chosen and row.method.name == name
            ])
        )  # fmt: skip
        reached = [
            one for one in chosen if one.lift >= AIM_LIFT and one.perplexity_ratio <= AIM_RATIO
        ]
        record["n_reached"] = len(reached)
        found.append(record)
    return found


def _interval(values: np.ndarray, draws: np.ndarray) -> list[float] | None:
    """None for fewer than two concepts, which tell nothing of others."""
    if len(values) < 2:
        return None
    medians = np.median(values[draws], axis=1)
    ends = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(end) for end in ends]


def conclusion(rows: Sequence[Row], summary: Sequence[dict[str, Any]], has_twin: bool) -> list[str]:
    """What the numbers come to, in sentences."""
    judge = "the vanilla twin" if has_twin else "the model itself, unsteered (no twin was given)"
    by_name = {one["method"]: one for one in summary}
    first = by_name[methods.NEURON]
    sentences = [
        f"Steering {_count(first['n'])}, each at the delta chosen for it on other prompts by other"
        f" words, changes the rate of its held-out words by a factor of {_with(first, 'lift')}"
        f" (median), at {_with(first, 'perplexity_ratio')} times the perplexity of unsteered text"
        f" under {judge}.",
        f"{first['n_reached']} of {first['n']} reach a lift of {AIM_LIFT} at no more than"
        f" {AIM_RATIO} times the perplexity.",
    ]
    ends = first["lift_ci95"]
    if ends is not None and ends[0] <= 1:
        sentences.append("So raising these neurons has not been found to bring their words.")
    others = [one for name, one in by_name.items() if name != methods.NEURON]
    if others:
        parts = [
            f"{one['method']} {_with(one, 'lift')} at {_with(one, 'perplexity_ratio')} times the"
            " perplexity"
            for one in others
        ]
        sentences.append(f"Beside it, lift by {'; '.join(parts)}.")
    for name in (methods.RANDOM, methods.DIRECTION, methods.TWIN_DIRECTION):
        difference = paired(rows, name)
        if difference is not None:
            better, n = difference
            sentences.append(
                f"By the score the neuron is better than the {name} for {better} of {n} concepts."
            )
    return sentences


def paired(rows: Sequence[Row], name: str) -> tuple[int, int] | None:
    """For how many concepts the neuron's score is above another method's, and of how many."""
    scores = {(row.method.name, row.concept.name): row.reported.score for row in rows if row.chosen}
    pairs = [
        (value, scores[name, concept])
        for (method, concept), value in scores.items()
        if method == methods.NEURON and (name, concept) in scores
    ]
    return (sum(own > other for own, other in pairs), len(pairs)) if pairs else None


def _count(n: int) -> str:
    return "one neuron" if n == 1 else f"{n} neurons"


def _with(record: dict[str, Any], name: str) -> str:
    """1.9 [1.4, 2.6]."""
    ends = record.get(f"{name}_ci95")
    text = f"{record[name]:.3g}"
    return text if ends is None else f"{text} [{ends[0]:.3g}, {ends[1]:.3g}]"


# Files -------------------------------------------------------------------------------------


def write(out: Path, content: dict[str, Any]) -> None:
    """All files; steering.json, which says that they are there, is the last."""
    from lingua_topk.report import figures

    points = {
        name: [_median_point(content["rows"], name, delta) for delta in _deltas(content, name)]
        for name in content["methods"]
    }
    chosen = {
        name: [_point(row) for row in content["rows"] if row["method"] == name and row["chosen"]]
        for name in content["methods"]
    }
    drawing = figures.lift_against_fluency(points, chosen, controls=[methods.RANDOM])
    write_text(out / FIGURE, figures.svg(drawing, "Lift of the concept rate against fluency"))
    write_text(out / CSV, as_csv(content))
    write_text(out / TABLE, as_markdown(content))
    write_json(out / NAME, content)


def _deltas(content: dict[str, Any], name: str) -> list[float]:
    return sorted({row["delta"] for row in content["rows"] if row["method"] == name})


def _point(row: dict[str, Any]) -> tuple[float, float]:
    return row["reported"]["perplexity_ratio"], row["reported"]["lift"]


def _median_point(rows: Sequence[dict[str, Any]], name: str, delta: float) -> tuple[float, float]:
    points = [_point(row) for row in rows if row["method"] == name and row["delta"] == delta]
    ratio, gain = np.median(np.array(points), axis=0).tolist()
    return ratio, gain


def as_csv(content: dict[str, Any]) -> str:
    """A line a method, concept and delta: the reported numbers, and the score it was chosen by."""
    file = io.StringIO()
    names = ["method", "concept", "layer", "neuron", "delta", "absolute", "chosen"]
    measures = list(content["rows"][0]["reported"])
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, *measures, "lift_all_words", "choosing_score"])
    for row in content["rows"]:
        numbers = [row["reported"][measure] for measure in measures]
        more = (row["all_words"]["lift"], row["choosing"]["score"])
        writer.writerow([*(row[name] for name in names), *numbers, *more])
    return file.getvalue()


COLUMNS = ("method", "concepts", "lift", "lift, all words", "perplexity ratio", "distinct-2",
           "score", f"lift >= {AIM_LIFT} at ratio <= {AIM_RATIO}")  # fmt: skip
LEGEND = """\
- Medians over concepts, with 95% bootstrap intervals over concepts, at the delta chosen for each \
on other prompts and by other words than those of the numbers.
- **lift**: how many times more often the held-out words of a concept are generated than without \
steering, (hits + 1/2) / (expected hits + 1/2); **all words**: with those that delta was chosen \
by. **perplexity ratio**: of steered over unsteered text, under the judge. **distinct-2**: share \
of different pairs of neighbouring tokens. **score**: harmonic mean of 1 - 1 / lift, 1 / \
perplexity ratio and the ratio of distinct-2, each at most 1; 0 if one is 0.
- **random neuron**: of the same layer, of about the same firing rate, with the same words. \
**direction**: mean of the layer's values where the words stand less the mean elsewhere. **twin \
neuron**: of the vanilla twin, chosen alike, with its own words. **twin direction**: as direction, \
in the twin."""


def _cells(record: dict[str, Any]) -> list[str]:
    return [
        record["method"], str(record["n"]), _with(record, "lift"),
        f"{record['lift_all_words']:.3g}", _with(record, "perplexity_ratio"),
        f"{record['distinct_2']:.3f}", _with(record, "score"),
        f"{record['n_reached']} of {record['n']}",
    ]  # fmt: skip


def as_markdown(content: dict[str, Any]) -> str:
    """The table of methods, the concepts, and what the columns mean."""
    lines = ["# Steering", "", *(f"- {one}" for one in content["conclusion"]), ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [f"| {' | '.join(_cells(one))} |" for one in content["summary"]]
    lines += ["", "| neuron | words | delta | rate | lift | perplexity ratio | score |"]
    lines += ["|---" * 7 + "|"]
    lines += [f"| {' | '.join(map(_escaped, cells))} |" for cells in _concept_cells(content)]
    return "\n".join([*lines, "", f"Perplexity under: {content['judge']}.", "", LEGEND, ""])


def _escaped(text: str) -> str:
    return shown(text).replace("|", "\\|")


def _concept_cells(content: dict[str, Any]) -> list[list[str]]:
    """Of each concept what steering its own neuron did."""
    words = {one["name"]: one["words"] for one in content["concepts"]}
    return [
        [
            row["concept"], ", ".join(words[row["concept"]][:SHOWN_WORDS]),
            f"{row['delta']:g} x",
            f"{100 * row['reported']['unsteered_rate']:.2f}% to"
            f" {100 * row['reported']['concept_rate']:.2f}%",
            f"{row['reported']['lift']:.3g}", f"{row['reported']['perplexity_ratio']:.3g}",
            f"{row['reported']['score']:.3f}",
        ]
        for row in content["rows"]
        if row["method"] == methods.NEURON and row["chosen"]
    ]  # fmt: skip


def tables(content: dict[str, Any]) -> list[Table]:
    """The same for a terminal."""
    by_method = Table(*COLUMNS, title="Steering, by method")
    for one in content["summary"]:
        by_method.add_row(*_cells(one))
    by_concept = Table("neuron", "words", "delta", "rate", "lift", "perplexity ratio", "score",
                       title="Steering the neuron, by concept")  # fmt: skip
    from rich.text import Text

    for cells in _concept_cells(content):
        by_concept.add_row(*(Text(shown(cell)) for cell in cells))
    return [by_method, by_concept]
