"""A model's neurons against those of its twin and of the controls.

Two kinds of comparison. Of populations: all neurons of a layer that have a value, whatever they
fire like. And of pairs: each neuron of the model with one of the other model, in the same
layer, that fires about as often, so that a difference cannot come from firing rarely, which
alone lowers entropy (n firings give at most log2 n bits).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from apps.topk.neurons import comparison_text, folder
from apps.topk.neurons.comparison_text import TITLES, tables
from apps.topk.neurons.folder import MODEL, RANDOM, RANDOM_TWIN, TWIN, MeasuredLayer
from apps.topk.provenance import write_json, write_text
from lingua_topk.analysis import effects
from lingua_topk.analysis.effects import Estimate, Paired
from lingua_topk.errors import DataError
from lingua_topk.report import figures
from lingua_topk.report.figures import Band

__all__ = ["compare_neurons", "entropy_figure", "tables", "write_comparison"]

VERSION = 1
MEASURES = ("token_entropy", "token_entropy_count", "semantic_entropy", "mono_score",
            "firing_rate")  # fmt: skip
SHUFFLED = "shuffled"
PARTS = (MODEL, TWIN, RANDOM, RANDOM_TWIN)
POPULATIONS = (MODEL, TWIN, RANDOM, SHUFFLED)
DRAWN = {
    "token_entropy": "token entropy (bits)",
    "semantic_entropy": "semantic entropy (bits)",
    "mono_score": "MonoScore",
}
FILES = ("comparison.json", "comparison.md", "entropy.svg")


@dataclass(frozen=True)
class _Population:
    """One measure of neurons, with what is needed to compare them; NaN where not scored.

    Attributes:
        values, rates: float64 [n].
        counts: int64 [n], firings.
        layers: int64 [n], which layer each is in.
        indices: int64 [n], its number there: in every layer the same feature.
    """

    values: np.ndarray
    rates: np.ndarray
    counts: np.ndarray
    layers: np.ndarray
    indices: np.ndarray


def compare_neurons(out: Path, seed: int = 0, vectors: str = "") -> dict[str, Any]:
    """What comparison.json says, from the measures in an analysis folder.

    The twin and the random-weights control are compared with where they are there.

    Args:
        out: the folder, with model/layers and perhaps twin/layers and random/layers.
        seed: of the resampling.
        vectors: where those of the words are from, for the reader.

    Raises: DataError where there is no measured model, or where the parts do not fit.
    """
    parts = {name: folder.read_layers(out / name) for name in PARTS}
    if not parts[MODEL]:
        raise DataError(
            f"{out} holds no measured layers of a model: make them with python -m apps.topk.analyze"
        )
    parts = {name: layers for name, layers in parts.items() if layers}
    _check_alike(out, parts)
    topk = [layer.index for layer in parts[MODEL] if layer.is_topk]
    content = {
        "version": VERSION,
        "seed": seed,
        "vectors": vectors,
        "resamples": effects.RESAMPLES,
        "interval": effects.LEVEL,
        "caliper": effects.CALIPER,
        "min_items": effects.MIN_ITEMS,
        "n_tokens": parts[MODEL][0].n_tokens,
        "parts": list(parts),
        "layers": [
            {
                "layer": layer.index,
                "is_topk": layer.is_topk,
                "kept": _kept(parts, layer.index),
                "measures": _compared(parts, [layer.index], seed),
            }
            for layer in parts[MODEL]
        ],
        "pooled": {"layers": topk, "measures": _compared(parts, topk, seed)} if topk else None,
        "untrained": _untrained(parts, topk, seed) if topk else None,
    }
    return {**content, "conclusion": comparison_text.conclusion(content)}


def write_comparison(out: Path, content: Mapping[str, Any]) -> None:
    """Write comparison.json, comparison.md and entropy.svg, each whole or not at all."""
    drawing = figures.svg(entropy_figure(content), comparison_text.CAPTION, alone=True)
    write_text(out / "entropy.svg", drawing)
    write_text(out / "comparison.md", comparison_text.document(content))
    write_json(out / "comparison.json", content)


def entropy_figure(content: Mapping[str, Any]) -> figures.Figure:
    """Token entropy, semantic entropy and MonoScore over the layers, with all controls."""
    layers = content["layers"]
    panels = {
        label: {
            TITLES[name]: _band(layers, measure, name)
            for name in POPULATIONS
            if any(one["measures"][measure]["populations"][name] for one in layers)
        }
        for measure, label in DRAWN.items()
    }
    return figures.over_layers(
        [one["layer"] for one in layers],
        panels,
        controls=(TITLES[RANDOM], TITLES[SHUFFLED]),
        shaded=[one["layer"] for one in layers if not one["is_topk"]],
    )


def _check_alike(out: Path, parts: Mapping[str, Sequence[MeasuredLayer]]) -> None:
    """DataError where the parts were not measured on as many tokens: rates would not compare."""
    found = {layer.n_tokens for layers in parts.values() for layer in layers}
    if len(found) > 1:
        raise DataError(
            f"{out}: its parts were measured on different numbers of tokens"
            f" ({', '.join(map(str, sorted(found)))}): analyse them again together"
        )


def _kept(parts: Mapping[str, Sequence[MeasuredLayer]], index: int) -> dict[str, str]:
    """What was recorded of a layer; of the untrained twin it is what it is of the twin."""
    return {
        name: layer.kept
        for name, layers in parts.items()
        for layer in layers
        if layer.index == index and name != RANDOM_TWIN
    }


def _compared(
    parts: Mapping[str, Sequence[MeasuredLayer]], layers: Sequence[int], seed: int
) -> dict[str, Any]:
    """Every measure of the neurons of some layers together."""
    return {measure: _measure(parts, layers, measure, seed) for measure in MEASURES}


def _measure(
    parts: Mapping[str, Sequence[MeasuredLayer]], layers: Sequence[int], measure: str, seed: int
) -> dict[str, Any]:
    found = {name: _population(parts.get(name, ()), layers, measure)
             for name in (MODEL, TWIN, RANDOM)}  # fmt: skip
    found[SHUFFLED] = _population(parts[MODEL], layers, f"shuffled_{measure}")
    model = found[MODEL]
    matched: dict[str, Any] = {TWIN: None, RANDOM: None, SHUFFLED: None}
    if measure != "firing_rate":  # by which they are matched
        for name in (TWIN, RANDOM):
            matched[name] = _matched(model, found[name], seed)
        matched[SHUFFLED] = _paired_with_itself(model, found[SHUFFLED], seed)
    return {
        "populations": {name: _summary(one) for name, one in found.items()},
        "against_twin": _against(model, found[TWIN], seed),
        "matched": matched,
    }


def _untrained(
    parts: Mapping[str, Sequence[MeasuredLayer]], layers: Sequence[int], seed: int
) -> dict[str, Any] | None:
    """Token entropy of random weights with TopK against ones without: what the selection does by
    itself. None where one was not measured."""
    with_topk, without = (
        _population(parts.get(name, ()), layers, "token_entropy") for name in (RANDOM, RANDOM_TWIN)
    )
    return None if with_topk is None else _matched(with_topk, without, seed)


def _population(
    part: Sequence[MeasuredLayer], layers: Sequence[int], measure: str
) -> _Population | None:
    """None where it was not measured."""
    there = [one for one in part if one.index in layers and measure in one.arrays]
    if not there:
        return None
    return _Population(
        np.concatenate([one.arrays[measure].astype(np.float64) for one in there]),
        np.concatenate([one.arrays["firing_rate"].astype(np.float64) for one in there]),
        np.concatenate([one.arrays["counts"] for one in there]),
        np.concatenate([np.full(len(one.arrays["counts"]), one.index) for one in there]),
        np.concatenate([np.arange(len(one.arrays["counts"])) for one in there]),
    )


def _summary(one: _Population | None) -> dict[str, Any] | None:
    if one is None:
        return None
    is_scored = ~np.isnan(one.values)
    values = one.values[is_scored]
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]) if len(values) else [None] * 3
    return {
        "neurons": len(one.values),
        "scored": int(is_scored.sum()),
        "dead": int((one.counts == 0).sum()),
        "too_few": int((~is_scored & (one.counts > 0)).sum()),
        "median": None if middle is None else float(middle),
        "quartiles": None if low is None else [float(low), float(high)],
    }


def _against(model: _Population, other: _Population | None, seed: int) -> dict[str, Any] | None:
    if other is None:
        return None
    found = effects.two_sample(
        model.values, other.values, groups_a=model.indices, groups_b=other.indices, seed=seed
    )
    return {
        "n_model": found.n_a,
        "n_other": found.n_b,
        "median_difference": _estimate(found.median_difference),
        "cliffs_delta": _estimate(found.cliffs_delta),
        "reason": _too_few("neurons", min(found.n_a, found.n_b)),
    }


def _matched(model: _Population, other: _Population | None, seed: int) -> dict[str, Any] | None:
    """Pairs within each layer, of scored neurons; those of several layers are put together."""
    if other is None:
        return None
    pairs = [_pairs_in_layer(model, other, layer) for layer in np.unique(model.layers)]
    i, j = (np.concatenate(side) for side in zip(*pairs, strict=True))
    ratios = model.rates[i] / other.rates[j]
    return {
        **_paired(
            effects.paired(model.values[i], other.values[j], groups=model.indices[i], seed=seed)
        ),
        "unmatched_model": int((~np.isnan(model.values)).sum()) - len(i),
        "unmatched_other": int((~np.isnan(other.values)).sum()) - len(j),
        "rate_ratio": float(np.median(ratios)) if len(ratios) else None,
    }


def _pairs_in_layer(
    model: _Population, other: _Population, layer: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices into all neurons of both, int64 [p] each."""
    i = np.flatnonzero((model.layers == layer) & ~np.isnan(model.values))
    j = np.flatnonzero((other.layers == layer) & ~np.isnan(other.values))
    a, b = _match(model.rates[i].tobytes(), other.rates[j].tobytes())
    return i[a], j[b]


@lru_cache(maxsize=1024)
def _match(a: bytes, b: bytes) -> tuple[np.ndarray, np.ndarray]:
    """`match_rates` of float64 rates; several measures, and layers together, ask for the same."""
    return effects.match_rates(np.frombuffer(a), np.frombuffer(b))


def _paired_with_itself(
    model: _Population, shuffled: _Population | None, seed: int
) -> dict[str, Any] | None:
    if shuffled is None:
        return None
    return _paired(effects.paired(model.values, shuffled.values, groups=model.indices, seed=seed))


def _paired(found: Paired) -> dict[str, Any]:
    return {
        "pairs": found.n,
        "median_difference": _estimate(found.median_difference),
        "share_lower": found.share_lower,
        "share_higher": found.share_higher,
        "reason": _too_few("pairs", found.n),
    }


def _estimate(one: Estimate | None) -> dict[str, float] | None:
    return None if one is None else one._asdict()


def _too_few(what: str, n: int) -> str | None:
    if n >= effects.MIN_ITEMS:
        return None
    return f"too few {what} ({n}, {effects.MIN_ITEMS} are needed)"


def _band(layers: Sequence[Mapping[str, Any]], measure: str, name: str) -> Band:
    found = [one["measures"][measure]["populations"][name] for one in layers]
    rows = [
        (*(one["quartiles"] or (np.nan, np.nan)), one["median"]) if one else (np.nan,) * 3
        for one in found
    ]
    low, high, middle = np.array(rows, dtype=np.float64).T  # None becomes NaN
    return Band(low, middle, high)
