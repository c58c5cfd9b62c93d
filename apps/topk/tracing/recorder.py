"""The activations of one checkpoint, kept alike in every layer and at every checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from apps.main.transformer import LMTransformer
from apps.topk.checkpoint import DTYPES, Checkpoint
from apps.topk.neurons.reading import record_model
from lingua_topk.analysis.recording import Recording


@dataclass(frozen=True)
class Recorder:
    """How checkpoints are recorded.

    Attributes:
        layers: which, rising.
        k: how many values a token are kept, those of largest magnitude, in TopK layers too: inside
            the annealing phase more than k survive there, and all checkpoints are to be
            measured alike.
        as_trained: whether such a checkpoint computes with the alpha that training had reached.
    """

    layers: Sequence[int]
    k: int
    as_trained: bool
    dtype: str
    device: torch.device
    batch_rows: int

    def describe(self) -> dict[str, Any]:
        """JSON that is another when something else would be recorded."""
        return {
            "layers": list(self.layers), "k": self.k, "as_trained": self.as_trained,
            "dtype": self.dtype,
        }  # fmt: skip

    def alpha(self, checkpoint: Checkpoint) -> float:
        """The annealing coefficient that a checkpoint is recorded with."""
        return checkpoint.alpha if self.as_trained else 0.0

    def record(
        self, checkpoint: Checkpoint, tokens: np.ndarray, out: Path, inputs: dict[str, Any],
        label: str,
    ) -> Recording:  # fmt: skip
        """The recording of a checkpoint on rows of tokens, int32 [N, S], in the folder `out`.

        One that was stopped goes on, one that is finished is taken as it is.
        """
        model = checkpoint.model(self.device, DTYPES[self.dtype], self.as_trained)
        return record_model(
            model,
            tokens,
            out,
            layers=list(self.layers),
            k=self.k,
            keep=self.k,
            batch_rows=self.batch_rows,
            inputs=inputs,
            name=str(checkpoint.folder),
            vocab_size=checkpoint.model_args.vocab_size,
            label=label,
        )


def topk_layers(checkpoint: Checkpoint) -> list[int]:
    """The layers that have TopK."""
    args = checkpoint.model_args
    return list(args.topk.topk_layers(args.n_layers)) if args.topk else []


def width_of(checkpoint: Checkpoint) -> int:
    """How many neurons a layer has, as `points_of` finds them."""
    args = checkpoint.model_args
    if args.topk is None or args.topk.site == "residual":
        return args.dim
    with torch.device("meta"):
        return LMTransformer(args).layers[0].feed_forward.w1.weight.shape[0]
