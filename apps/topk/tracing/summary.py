"""trace.json: how layers settle, what layers share, and the neurons that were asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apps.topk.tracing.measuring import Arrays, array_name
from lingua_topk.analysis.trace import NEVER

QUARTILES = {"q1": 25, "median": 50, "q3": 75}


@dataclass(frozen=True)
class Trace:
    """All that was measured.

    Attributes:
        steps: of the checkpoints, rising.
        layers: the recorded ones, rising.
        topk_layers: which of the model's layers have TopK.
        arrays: as trace.safetensors has them.
        pieces: what each token of the vocabulary spells, in UTF-8.
    """

    steps: list[int]
    layers: list[int]
    topk_layers: list[int]
    arrays: Arrays
    pieces: Sequence[bytes]

    def of(self, layer: int, name: str) -> np.ndarray:
        """An array of a layer: [C, D] or [C, D, n], of settle_step [D]."""
        return self.arrays[array_name(layer, name)]

    def settled_shares(self, layer: int) -> list[float | None]:
        """The share of a layer's neurons that have settled by each checkpoint.

        Of those that are alive in the end; None where there are none.
        """
        settle_step = self.of(layer, "settle_step")
        alive = settle_step[settle_step != NEVER]
        return [float((alive <= step).mean()) if len(alive) else None for step in self.steps]


def summary(trace: Trace) -> dict[str, Any]:
    """The distributions over neurons, JSON: by layer, and by pair of layers."""
    return {
        "layers": [layer_summary(trace, layer) for layer in trace.layers],
        "over_layers": _pairs(trace),
    }


def layer_summary(trace: Trace, layer: int) -> dict[str, Any]:
    """Quartiles at each checkpoint, and when the layer settles.

    Entropies are those of neurons that fire there, overlaps of those that fire in the end. All of
    the latter have settled by the last checkpoint, which is their final self.
    """
    counts, settle_step = trace.of(layer, "counts"), trace.of(layer, "settle_step")
    alive = counts > 0  # [C, D]
    ends_alive = np.broadcast_to(alive[-1], alive.shape)
    others_end_alive = np.roll(ends_alive, -(counts.shape[1] // 2), axis=1)
    semantic = trace.of(layer, "semantic_entropy")
    return {
        "layer": layer,
        "is_topk": layer in trace.topk_layers,
        "width": counts.shape[1],
        "dead": (~alive).sum(axis=1).tolist(),
        "token_entropy": quartiles(trace.of(layer, "token_entropy"), alive),
        "semantic_entropy": quartiles(semantic, np.isfinite(semantic)),
        "scored": np.isfinite(semantic).sum(axis=1).tolist(),
        "overlap": quartiles(trace.of(layer, "overlap"), ends_alive),
        "shifted_overlap": quartiles(trace.of(layer, "shifted_overlap"), others_end_alive),
        "settled": {
            "neurons": [int((settle_step == step).sum()) for step in trace.steps],
            "share": trace.settled_shares(layer),
            "never": int((settle_step == NEVER).sum()),
        },
    }


def quartiles(values: np.ndarray, taken: np.ndarray) -> dict[str, list[float | None]]:
    """q1, median, q3 of each row's values that are taken; None where none is.

    values: float [R, D]; taken: bool [R, D].
    """
    rows = [row[keep] for row, keep in zip(values, taken, strict=True)]
    return {
        name: [float(np.percentile(row, at)) if len(row) else None for row in rows]
        for name, at in QUARTILES.items()
    }


def _pairs(trace: Trace) -> dict[str, Any]:
    """What neurons of two layers share, of those that fire in both, and their baseline."""
    arrays = {name: trace.arrays[f"over_layers.{name}"] for name in _PAIR_ARRAYS}
    shift = int(trace.arrays["over_layers.shift"][0])
    alive = {layer: trace.of(layer, "counts")[-1] > 0 for layer in trace.layers}
    pairs = []
    for i, (lower, higher) in enumerate(trace.arrays["over_layers.pairs"].tolist()):
        both = {
            "": alive[lower] & alive[higher],
            "shifted_": alive[lower] & np.roll(alive[higher], -shift),
        }
        entry: dict[str, Any] = {"layers": [lower, higher], "neurons": int(both[""].sum())}
        for name, array in arrays.items():
            fire = both["shifted_" if name.startswith("shifted_") else ""]
            entry[name] = _quartiles_of(array[i], fire & np.isfinite(array[i]))
        pairs.append(entry)
    return {"shift": shift, "pairs": pairs}


_PAIR_ARRAYS = ("overlap", "correlation", "shifted_overlap", "shifted_correlation")


def _quartiles_of(values: np.ndarray, taken: np.ndarray) -> dict[str, float | None]:
    return {name: found[0] for name, found in quartiles(values[None], taken[None]).items()}


def neuron_summary(trace: Trace, layer: int, neuron: int) -> dict[str, Any]:
    """The whole trace of one neuron, JSON."""
    settle_step = int(trace.of(layer, "settle_step")[neuron])
    return {
        "neuron": f"{layer}:{neuron}",
        "layer": layer,
        "index": neuron,
        "settle_step": None if settle_step == NEVER else settle_step,
        "checkpoints": [
            {
                "step": step,
                "firings": int(trace.of(layer, "counts")[i, neuron]),
                "token_entropy": _number(trace.of(layer, "token_entropy")[i, neuron]),
                "semantic_entropy": _number(trace.of(layer, "semantic_entropy")[i, neuron]),
                "overlap": _number(trace.of(layer, "overlap")[i, neuron]),
                "top_tokens": _top_tokens(trace, layer, neuron, i),
            }
            for i, step in enumerate(trace.steps)
        ],
        "over_layers": _other_layers(trace, layer, neuron),
    }


def _top_tokens(trace: Trace, layer: int, neuron: int, checkpoint: int) -> list[dict[str, Any]]:
    ids = trace.of(layer, "top_tokens")[checkpoint, neuron].tolist()
    shares = trace.of(layer, "top_token_share")[checkpoint, neuron].tolist()
    return [
        {"token": token, "text": text_of(trace.pieces[token]), "share": share}
        for token, share in zip(ids, shares, strict=True)
        if token >= 0
    ]


def text_of(piece: bytes) -> str:
    """What a token spells; a part of a character as \\xe6 and the like."""
    return piece.decode("utf-8", "backslashreplace")


def _other_layers(trace: Trace, layer: int, neuron: int) -> list[dict[str, Any]]:
    """The neuron against that of the same index in each other layer, at the last checkpoint.

    And, as the baseline, against another one there: the index at a distance of `shift`.
    """
    shift = int(trace.arrays["over_layers.shift"][0])
    found = []
    for i, (lower, higher) in enumerate(trace.arrays["over_layers.pairs"].tolist()):
        if layer not in (lower, higher):
            continue
        entry: dict[str, Any] = {"layer": higher if layer == lower else lower}
        for name in _PAIR_ARRAYS:
            array = trace.arrays[f"over_layers.{name}"][i]  # [D], by index in the lower layer
            is_moved = name.startswith("shifted_") and layer == higher
            entry[name] = _number(array[(neuron - shift) % len(array) if is_moved else neuron])
        found.append(entry)
    return sorted(found, key=lambda one: one["layer"])


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
