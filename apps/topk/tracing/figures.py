"""The figures of a trace as SVG: over training steps by layer, and from layer to layer."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from apps.topk.tracing.summary import Trace
from lingua_topk.report import figures
from lingua_topk.report.figures import Band

SAME, ANOTHER = "same index", "another index"
OTHER_NEURON = "another neuron's"
# By the name of the measure: the label of its axis, what the figure shows.
OVER_STEPS = {
    "overlap": ("overlap with final self", "Overlap of tokens with those of the last checkpoint"),
    "token_entropy": ("token entropy (bits)", "Token entropy"),
    "semantic_entropy": ("semantic entropy (bits)", "Semantic entropy"),
}
OVER_LAYERS = {"overlap": "overlap of tokens", "correlation": "correlation of values"}


def drawings(trace: Trace, found: Mapping[str, Any], annealed_at: int | None) -> dict[str, str]:
    """SVG by name; `layers` only where there are two of them. found: what `summary` gives."""
    layers = found["layers"]
    names = [_layer_name(one) for one in layers]
    shares = [one["settled"]["share"] for one in layers]
    bands = [Band(*[_numbers(share)] * 3) for share in shares]
    figure = figures.lines_over_steps(
        trace.steps, dict(zip(names, bands, strict=True)),
        ylabel="share of neurons settled", annealed_at=annealed_at,
    )  # fmt: skip
    figure.axes[0].set_ylim(-0.03, 1.03)
    drawn = {"settling": _svg(figure, "Share of neurons that have settled, over training steps")}
    for measure, (label, description) in OVER_STEPS.items():
        series = {name: _band(one[measure]) for name, one in zip(names, layers, strict=True)}
        if measure == "overlap":
            series[OTHER_NEURON] = _baseline(trace)
        figure = figures.lines_over_steps(
            trace.steps, series, ylabel=label, annealed_at=annealed_at, controls=[OTHER_NEURON]
        )
        if measure == "overlap":
            figure.axes[0].set_ylim(-0.03, 1.03)
        drawn[measure] = _svg(
            figure, f"{description}, over training steps by layer: median and quartiles"
        )
    if len(layers) > 1:
        drawn["layers"] = _from_layer_to_layer(trace, found["over_layers"]["pairs"])
    return drawn


def _baseline(trace: Trace) -> Band:
    """The overlap with the final self of another neuron that fires in the end, all layers."""
    parts = []
    for layer in trace.layers:
        array = trace.of(layer, "shifted_overlap")  # [C, D]
        alive = trace.of(layer, "counts")[-1] > 0
        parts.append(array[:, np.roll(alive, -(len(alive) // 2))])
    return figures.quartiles(np.concatenate(parts, axis=1))


def _layer_name(layer: Mapping[str, Any]) -> str:
    return f"layer {layer['layer']}" + ("" if layer["is_topk"] else ", no TopK")


def _from_layer_to_layer(trace: Trace, pairs: Sequence[Mapping[str, Any]]) -> str:
    """Each layer against the recorded one before it, beside the baseline."""
    by_layers = {tuple(pair["layers"]): pair for pair in pairs}
    shown = [by_layers[two] for two in pairwise(trace.layers)]
    panels = {
        label: {SAME: _over_pairs(shown, name), ANOTHER: _over_pairs(shown, f"shifted_{name}")}
        for name, label in OVER_LAYERS.items()
    }
    higher = [pair["layers"][1] for pair in shown]
    without = [layer for layer in higher if layer not in trace.topk_layers]
    figure = figures.over_layers(
        higher, panels, controls=[ANOTHER], shaded=without if trace.topk_layers else []
    )
    figure.axes[-1].set_xlabel("layer, against the one before it")
    return _svg(figure, "Neurons of one layer against those of the one before it, by index")


def _over_pairs(pairs: Sequence[Mapping[str, Any]], name: str) -> Band:
    columns = {at: [pair[name][at] for pair in pairs] for at in ("q1", "median", "q3")}
    return _band(columns)


def _band(found: Mapping[str, Sequence[float | None]]) -> Band:
    return Band(*(_numbers(found[at]) for at in ("q1", "median", "q3")))


def _numbers(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _svg(figure, description: str) -> str:
    return figures.svg(figure, description, alone=True)
