"""What is measured of every neuron at one checkpoint, and in files that a later run reads."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from apps.topk.neurons.measures import Text
from apps.topk.neurons.settings import Settings
from apps.topk.provenance import write_bytes
from lingua_topk.analysis import neurons
from lingua_topk.analysis.recording import LayerRecording, Recording
from lingua_topk.analysis.semantics import semantic_measures
from lingua_topk.analysis.trace import OverLayers, TokenShares, over_layers, overlaps

TOP_TOKENS = 10
Arrays = dict[str, np.ndarray]


def measure(recording: Recording, final: Recording, text: Text, settings: Settings) -> Arrays:
    """Entropies, top tokens and the overlap with the final self, of every recorded layer.

    shifted_overlap is the baseline: the overlap with the final self of another neuron.
    By name, such as "layers.3.overlap": [D] each, top_tokens and top_token_share
    [D, TOP_TOKENS].
    """
    shares = TokenShares(text.tokens)
    found = {}
    for index in recording.layers:
        layer = recording.layer(index)
        arrays = _layer(layer, text, settings)
        last = final.layer(index)
        arrays["overlap"] = overlaps(layer, last, shares)
        arrays["shifted_overlap"] = overlaps(layer, last, shares, layer.width // 2)
        found |= {array_name(index, name): array for name, array in arrays.items()}
    return found


def array_name(layer: int, name: str) -> str:
    return f"layers.{layer}.{name}"


def _layer(layer: LayerRecording, text: Text, settings: Settings) -> Arrays:
    tokens = text.tokens.reshape(-1)
    parts: list[Arrays] = []
    for block in layer.blocks():
        mass = neurons.token_mass(block, tokens)
        ids, token_shares = neurons.top_tokens(mass, TOP_TOKENS)
        semantic = semantic_measures(
            block, text.words, text.vectors, threshold=settings.threshold,
            min_words=settings.min_words, max_words=settings.max_words,
        )  # fmt: skip
        parts.append({
            "counts": block.counts,
            "token_entropy": neurons.token_entropy(mass),
            "semantic_entropy": semantic.entropy,
            "top_tokens": ids,
            "top_token_share": token_shares,
        })  # fmt: skip
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def compare_layers(recording: Recording, text: Text) -> Arrays:
    """The neurons of the same index in all pairs of layers: see `OverLayers`.

    "over_layers.pairs" int64 [P, 2], "over_layers.shift" int64 [1], the others float64 [P, D].
    """
    layers = [recording.layer(index) for index in recording.layers]
    found: OverLayers = over_layers(layers, TokenShares(text.tokens))
    arrays = {
        "pairs": np.array(found.pairs, dtype=np.int64).reshape(-1, 2),
        "shift": np.array([found.shift], dtype=np.int64),
        "overlap": found.overlap,
        "correlation": found.correlation,
        "shifted_overlap": found.shifted_overlap,
        "shifted_correlation": found.shifted_correlation,
    }
    return {f"over_layers.{name}": array for name, array in arrays.items()}


def stacked(measured: Sequence[Arrays]) -> Arrays:
    """The arrays of all checkpoints with a first dimension for the checkpoints."""
    return {name: np.stack([one[name] for one in measured]) for name in measured[0]}


def write_arrays(path: Path, arrays: Arrays, metadata: Mapping[str, Any]) -> None:
    """A safetensors file, whole or not at all; values of `metadata` as JSON."""
    texts = {name: json.dumps(value, sort_keys=True) for name, value in metadata.items()}
    content = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    write_bytes(path, save(content, texts))


def read_arrays(path: Path, inputs: Mapping[str, Any]) -> Arrays | None:
    """What `write_arrays` wrote with these `inputs` in its metadata; None where it did not."""
    try:
        with safe_open(path, "numpy") as file:
            if json.loads((file.metadata() or {})["inputs"]) != json.loads(json.dumps(inputs)):
                return None
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, LookupError):
        return None
