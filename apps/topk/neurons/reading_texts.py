"""A model reads texts that are given, and what fires on each token is noted."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apps.topk.neurons.page_data import strongest_firings
from apps.topk.neurons.reading import reader_of
from lingua_topk.analysis.record import Point, listening, points_of
from lingua_topk.errors import ConfigError
from lingua_topk.report.data import Firings, Text


def read_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    layers: Sequence[int],
    k: int | None,
    strongest: int,
    add_bos: bool,
) -> list[Text]:
    """What fires on each text, the `strongest` of each token and layer.

    layers, k: as the analysis had them. ConfigError for a text of no token, or of more than the
    model reads at once.
    """
    points = points_of(model, layers, k)
    read = reader_of(model)
    found = []
    for i, text in enumerate(texts):
        tokens = tokenizer.encode(text, add_bos=add_bos, add_eos=False)
        if not len(text) or not len(tokens):
            raise ConfigError("text='' holds no token: give a text")
        if len(tokens) > model.max_seqlen:
            raise ConfigError(
                f"text={text[:40]!r}... has {len(tokens)} tokens: give at most {model.max_seqlen},"
                " which the model reads at once"
            )
        ids = torch.tensor([tokens], dtype=torch.int64)
        firings = {
            layer: strongest_firings(one, strongest)
            for layer, one in _heard(read, points, ids).items()
        }
        found.append(Text(f"Given text {i + 1}", np.array(tokens, dtype=np.int64), firings))
    return found


def _heard(read, points: dict[int, Point], tokens: Tensor) -> dict[int, Firings]:
    """What is kept at the points when the model reads one row of tokens, int64 [1, S]."""
    with listening(points) as heard:
        read(tokens)
    found = {}
    for layer, (one,) in heard.items():
        kept = one.survivors
        positions = np.repeat(np.arange(len(kept.counts)), kept.counts)
        found[layer] = Firings(positions, kept.neurons, kept.values)
    return found
