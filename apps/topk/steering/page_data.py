"""What the page of a report shows of steering, read from what apps.topk.steer_eval wrote."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.topk.cli import one_line
from apps.topk.neurons.page_data import read_json, read_svg
from lingua_topk.errors import DataError
from lingua_topk.report.data import (
    Figure,
    Layer,
    SteeredConcept,
    SteeredExample,
    SteeredNumbers,
    Steering,
    Table,
)

FOLDER = "steering"  # beside the analysis
VERSION = 1
NEURON = "neuron"  # the method that steers the concept's own neuron
# That do not change when a run is moved.
SAME = ("name", "dim", "n_layers", "vocab_size", "steps", "seed", "topk")
CAPTION = (
    "Each point is the median over neurons at one delta; hollow markers are single neurons at the"
    " delta that was chosen for them. Dashed: twice the unsteered perplexity, five times the"
    " unsteered concept rate."
)


def read_steering(
    folder: Path, analysed: Mapping[str, Any], layers: Sequence[Layer]
) -> Steering | None:
    """What steering did to a run's text; None where it was not measured.

    Args:
        folder: RUN/steering.
        analysed: analysis.json of the report that it becomes a part of.
        layers: of that report.

    Raises: DataError where a file is damaged, or is of another checkpoint than the report.
    """
    path = folder / "steering.json"
    content = read_json(path)
    if content is None:
        return None
    try:
        _check(content, analysed)
        return _steering(content, read_svg(folder / "lift.svg"), layers)
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{path} is not the steering of what was analysed ({one_line(str(error))}): steer"
            " again (python -m apps.topk.steer_eval), or move that folder away"
        ) from None


def _check(content: Mapping[str, Any], analysed: Mapping[str, Any]) -> None:
    if content.get("version") != VERSION:
        raise ValueError(f"its version is {content.get('version')!r}, not {VERSION}")
    checkpoint, known = _get(content, "checkpoint", dict), analysed["checkpoint"]
    for name in SAME:
        if name in checkpoint and name in known and checkpoint[name] != known[name]:
            raise ValueError(
                f"it is of another model, whose {name} is {checkpoint[name]!r}, not {known[name]!r}"
            )
    if content.get("step") != analysed["step"]:
        raise ValueError(
            f"it is of step {content.get('step')!r}, and the analysis of {analysed['step']!r}"
        )


def _steering(content: Mapping[str, Any], drawing: str, layers: Sequence[Layer]) -> Steering:
    methods = _texts(content, "methods")
    rows = {
        (_get(row, "concept", str), _get(row, "method", str), _number(row, "delta")): row
        for row in _records(content, "rows")
    }
    concepts = [_concept(one, rows, layers) for one in _records(content, "concepts")]
    places = {f"{one.layer}:{one.neuron}": i for i, one in enumerate(concepts)}
    examples = [_example(one, rows, places) for one in _records(content, "examples")]
    ranks = {method: i for i, method in enumerate([NEURON, *methods])}
    examples.sort(key=lambda one: (one.concept, ranks.get(one.method, len(ranks))))
    return Steering(
        sentences=_texts(content, "conclusion"),
        figure=Figure("Lift against fluency", CAPTION, drawing) if drawing else None,
        methods=_method_table(_records(content, "summary")),
        concepts=concepts,
        examples=examples,
    )


def _concept(
    given: Mapping[str, Any], rows: Mapping[Any, Any], layers: Sequence[Layer]
) -> SteeredConcept:
    layer, neuron = _get(given, "layer", int), _get(given, "neuron", int)
    width = {one.index: one.width for one in layers}.get(layer, 0)
    if not 0 <= neuron < width:
        raise ValueError(f"neuron {layer}:{neuron} is not in the analysis")
    name = f"{layer}:{neuron}"
    chosen = [
        row for (concept, method, _), row in rows.items()
        if (concept, method) == (name, NEURON) and row.get("chosen") is True
    ]  # fmt: skip
    row = chosen[0] if chosen else {}
    return SteeredConcept(
        layer=layer,
        neuron=neuron,
        words=_texts(given, "words"),
        held_out_words=_texts(given, "held_out_words"),
        delta=_number(row, "delta"),
        absolute=_number(row, "absolute"),
        numbers=_numbers(row),
    )


def _example(
    given: Mapping[str, Any], rows: Mapping[Any, Any], places: Mapping[str, int]
) -> SteeredExample:
    concept, method = _get(given, "concept", str), _get(given, "method", str)
    if concept not in places:
        raise ValueError(f"an example is of {concept!r}, which is none of its concepts")
    delta = _number(given, "delta")
    row = rows.get((concept, method, delta), {})
    return SteeredExample(
        concept=places[concept],
        method=method,
        delta=delta,
        absolute=_number(given, "absolute"),
        is_chosen=row.get("chosen") is True,
        prompt=_get(given, "prompt", str),
        unsteered=_get(given, "unsteered", str),
        steered=_get(given, "steered", str),
        numbers=_numbers(row),
    )


def _numbers(row: Mapping[str, Any]) -> SteeredNumbers | None:
    """Those of the prompts that delta was not chosen on."""
    if row.get("reported") is None:
        return None
    reported = _get(row, "reported", dict)
    names = ("concept_rate", "unsteered_rate", "lift", "perplexity_ratio", "score")
    return SteeredNumbers(*(_number(reported, name) for name in names))


# The table of methods ----------------------------------------------------------------------


def _method_table(summary: Sequence[Mapping[str, Any]]) -> Table:
    columns = ["Method", "Neurons", "Lift (95%)", "Perplexity ratio (95%)", "Distinct-2",
               "Score (95%)"]  # fmt: skip
    rows = [
        [
            _get(one, "method", str),
            str(_get(one, "n", int)),
            *(_with_interval(one, name) for name in ("lift", "perplexity_ratio")),
            _written(_number(one, "distinct_2")),
            _with_interval(one, "score"),
        ]
        for one in summary
    ]
    return Table("Methods", columns, rows, "medians over neurons at the delta chosen for each")


def _with_interval(record: Mapping[str, Any], name: str) -> str:
    """6.1 (4 to 9)."""
    ends = record.get(f"{name}_ci95")
    written = _written(_number(record, name))
    if ends is None:
        return written
    if not isinstance(ends, list) or len(ends) != 2:
        raise ValueError(f"{name}_ci95 is {ends!r}, not two numbers")
    low, high = (_written(_number({"end": end}, "end")) for end in ends)
    return f"{written} ({low} to {high})"


def _written(value: float) -> str:
    if not math.isfinite(value):
        return "\u2013"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# Fields ------------------------------------------------------------------------------------


def _get(record: Mapping[str, Any], name: str, kind: type) -> Any:
    """The field, which must be there and of that type; a truth value is no number."""
    value = record.get(name)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        shown = repr(value)[:60] if name in record else "missing"
        raise ValueError(f"{name} is {shown}")
    return value


def _number(record: Mapping[str, Any], name: str) -> float:
    """NaN where it is absent or null."""
    value = record.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}"[:60])
    try:
        return float(value)
    except OverflowError:
        return math.nan


def _texts(record: Mapping[str, Any], name: str) -> list[str]:
    found = _get(record, name, list)
    if not all(isinstance(one, str) for one in found):
        raise ValueError(f"{name} holds more than text")
    return found


def _records(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    found = _get(record, name, list)
    if not all(isinstance(one, dict) for one in found):
        raise ValueError(f"{name} holds more than objects")
    return found
