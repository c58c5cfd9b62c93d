"""A model reads the rows of a corpus, and what fires in it is recorded."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apps.topk.corpus import progress
from apps.topk.inference import CAUSAL, hidden_states, visible, window_of
from lingua_topk.analysis.record import points_of, record
from lingua_topk.analysis.recording import Recording
from lingua_topk.nn import TopK


def reader_of(model: nn.Module):
    """What reads a batch of rows: a function of int64 [B, S] that runs all blocks of `model`."""
    device = next(model.parameters()).device
    sliding = window_of(model)

    @torch.inference_mode()
    def read(tokens: Tensor) -> None:
        tokens = tokens.to(device)
        positions = torch.arange(tokens.shape[1], device=device).expand_as(tokens)
        mask = CAUSAL if sliding is None else visible(positions, positions, sliding)
        hidden_states(model, tokens, positions, mask)

    return read


def record_model(
    model: nn.Module,
    tokens: np.ndarray,
    out: Path,
    *,
    layers: list[int],
    k: int | None,
    site: str | None = None,
    keep: int | None = None,
    selections: Mapping[int, TopK] | None = None,
    batch_rows: int,
    inputs: dict[str, Any],
    name: str,
    vocab_size: int,
    label: str,
) -> Recording:
    """The recording of `model` on rows of tokens, int32 [N, S], in the folder `out`.

    TopK layers keep their survivors, others the k values a token of largest magnitude, all where
    k is None. One that was stopped goes on, one that is finished is taken as it is; `inputs`
    tells whether it is of the same model and text. keep: so many values of every layer, of those
    with TopK too. site, selections: as in `points_of`. name: of the model, for the files; label:
    of the progress bar.
    """
    points = points_of(model, layers, k, site, selections)
    if keep is not None:
        points = {layer: replace(point, keep=keep) for layer, point in points.items()}
    with progress.bar(label, tokens.size, "tok") as shown:
        return record(
            reader_of(model), points, torch.from_numpy(tokens), row_length=tokens.shape[1],
            n_rows=len(tokens), out=out, batch_rows=batch_rows, inputs=inputs, model_name=name,
            vocab_size=vocab_size,
            on_progress=lambda rows: shown.update(rows * tokens.shape[1] - shown.n),
        )  # fmt: skip
