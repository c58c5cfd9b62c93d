"""Record and measure one checkpoint after another; what is measured is not measured again.

OUT/checkpoints/0000000200.safetensors   what was measured of a checkpoint
OUT/checkpoints/over_layers.safetensors  what its last one shows over layers
OUT/recordings/...                       activations, as long as they are needed
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from apps.topk.checkpoint import Checkpoint
from apps.topk.corpus import progress
from apps.topk.neurons.corpus import Rows
from apps.topk.neurons.measures import Text
from apps.topk.neurons.settings import Settings
from apps.topk.tracing.measuring import (
    Arrays,
    array_name,
    compare_layers,
    measure,
    read_arrays,
    stacked,
    write_arrays,
)
from apps.topk.tracing.recorder import Recorder, topk_layers
from apps.topk.tracing.summary import Trace
from lingua_topk.analysis.recording import Recording
from lingua_topk.analysis.trace import NEVER, settled_at

# Raised when the same inputs begin to give other numbers.
FORMAT = 1
CHECKPOINTS, RECORDINGS, OVER_LAYERS = "checkpoints", "recordings", "over_layers"


@dataclass
class Work:
    """All checkpoints of a trace, and where it is kept.

    Attributes:
        checkpoints: of one run, by step; the last one is the final self of every neuron.
        rows: the tokens that all of them read.
        text: the same with its words and their vectors.
        settings: of semantic entropy.
        recorder: how the activations of a checkpoint are recorded.
        folder: OUT.
    """

    checkpoints: Sequence[Checkpoint]
    rows: Rows
    text: Text
    settings: Settings
    recorder: Recorder
    folder: Path

    def trace(self, settled: float) -> Trace:
        """Measure what has not been measured yet. settled: the overlap that counts as the same."""
        over_layers = self._over_layers()
        measured = [self._measured(self.checkpoints[-1])]
        with progress.bar("checkpoints", len(self.checkpoints), "checkpoint") as shown:
            shown.update()  # the last one
            for checkpoint in self.checkpoints[:-1]:
                measured.insert(-1, self._measured(checkpoint))
                shown.update()
        steps = [checkpoint.step for checkpoint in self.checkpoints]
        arrays = {"steps": np.array(steps, dtype=np.int64)} | stacked(measured) | over_layers
        for layer in self.recorder.layers:
            since = settled_at(arrays[array_name(layer, "overlap")], settled)
            arrays[array_name(layer, "settle_step")] = np.where(
                since == NEVER, NEVER, arrays["steps"][since]
            )
        has_topk = topk_layers(self.checkpoints[-1])
        return Trace(steps, list(self.recorder.layers), has_topk, arrays, self.rows.pieces)

    def clean_up(self) -> None:
        """Remove the recordings, which nothing needs any more."""
        shutil.rmtree(self.folder / RECORDINGS, ignore_errors=True)

    def inputs(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """JSON that is another when something else would be measured."""
        return {
            "format": FORMAT,
            "final": self.checkpoints[-1].state(),
            "recording": self._recording_inputs(checkpoint),
            "vectors": self.text.vectors.source,
            "vectors_sha256": _digest(self.text.vectors.vectors.tobytes()),
            "threshold": self.settings.threshold,
            "min_words": self.settings.min_words,
            "max_words": self.settings.max_words,
        }

    def _recording_inputs(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return {
            "checkpoint": checkpoint.state(),
            "corpus": self.rows.describe(),
            "corpus_sha256": self._corpus_digest,
            **self.recorder.describe(),
        }

    @cached_property
    def _corpus_digest(self) -> str:
        return _digest(self.rows.tokens.tobytes())

    def _measured(self, checkpoint: Checkpoint) -> Arrays:
        path = self.folder / CHECKPOINTS / f"{checkpoint.step:010d}.safetensors"
        inputs = self.inputs(checkpoint)
        arrays = read_arrays(path, inputs)
        if arrays is None:
            final = self._final
            is_final = checkpoint is self.checkpoints[-1]
            recording = final if is_final else self._record(checkpoint)
            arrays = measure(recording, final, self.text, self.settings)
            write_arrays(path, arrays, {"inputs": inputs})
            if not is_final:
                shutil.rmtree(recording.folder)
        return arrays

    def _over_layers(self) -> Arrays:
        path = self.folder / CHECKPOINTS / f"{OVER_LAYERS}.safetensors"
        inputs = self.inputs(self.checkpoints[-1])
        arrays = read_arrays(path, inputs)
        if arrays is None:
            arrays = compare_layers(self._final, self.text)
            write_arrays(path, arrays, {"inputs": inputs})
        return arrays

    @cached_property
    def _final(self) -> Recording:
        return self._record(self.checkpoints[-1])

    def _record(self, checkpoint: Checkpoint) -> Recording:
        inputs = self._recording_inputs(checkpoint)
        # A name of its own for every set of inputs, so that no recording of others is in the way.
        digest = _digest(json.dumps(inputs, sort_keys=True).encode())[:16]
        out = self.folder / RECORDINGS / f"{checkpoint.step:010d}-{digest}"
        place = list(self.checkpoints).index(checkpoint) + 1
        label = f"step {checkpoint.step} ({place} of {len(self.checkpoints)})"
        return self.recorder.record(checkpoint, self.rows.tokens, out, inputs, label)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
