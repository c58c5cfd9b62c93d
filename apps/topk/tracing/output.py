"""What a trace writes: trace.json, trace.safetensors and the figures; trace.json last.

trace.json          settings, how the layers settle, what they share, the neurons asked for
trace.safetensors   every neuron: "steps" int64 [C], and by layer, as "layers.3.overlap",
                    token_entropy, semantic_entropy (NaN: not scored), overlap float64 [C, D],
                    counts int64 [C, D], top_tokens int32 [C, D, 10] (-1: none) and
                    top_token_share float32 [C, D, 10], settle_step int64 [D] (-1: never).
                    Pairs of layers: "over_layers.pairs" int64 [P, 2], shift int64 [1], overlap,
                    correlation, shifted_overlap, shifted_correlation float64 [P, D]
*.svg               the figures
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.topk.provenance import provenance, write_json, write_text
from apps.topk.tracing.figures import drawings
from apps.topk.tracing.measuring import write_arrays
from apps.topk.tracing.recorder import topk_layers
from apps.topk.tracing.summary import Trace, neuron_summary, summary
from apps.topk.tracing.work import CHECKPOINTS, RECORDINGS, Work
from lingua_topk.errors import ConfigError

VERSION = 1
TRACE_NAME = "trace.json"
ARRAYS_NAME = "trace.safetensors"
FIGURES = ("settling", "overlap", "token_entropy", "semantic_entropy", "layers")


def check_folder(folder: Path) -> None:
    """ConfigError where `folder` cannot be written to, or holds something else than a trace."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ConfigError(
            f"out={str(folder)!r} cannot be written ({error.strerror}): give another folder"
        ) from None
    ours = {CHECKPOINTS, RECORDINGS, TRACE_NAME, ARRAYS_NAME, *(f"{one}.svg" for one in FIGURES)}
    others = sorted(name for name in names - ours if not name.startswith("."))
    if others:
        raise ConfigError(
            f"out={str(folder)!r} holds {others[0]}, which is no part of a trace: give a new folder"
        )
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"out={str(folder)!r} cannot be written to: give another folder")


def origin(work: Work, settled: float) -> dict[str, Any]:
    """What was traced, and how; JSON."""
    last, recorder, settings = work.checkpoints[-1], work.recorder, work.settings
    return {
        "run": str(last.folder.parent.parent),
        "model": last.describe(),
        "corpus": work.rows.describe(),
        "settings": {
            **recorder.describe(),
            "kept": f"the {recorder.k} largest by magnitude",
            "settled": settled,
            "vectors": work.text.vectors.source,
            "threshold": settings.threshold,
            "min_words": settings.min_words,
            "max_words": settings.max_words,
        },
        "steps": [one.step for one in work.checkpoints],
        "tokens": [one.tokens for one in work.checkpoints],
        "checkpoints": [str(one.folder) for one in work.checkpoints],
        "alphas": [recorder.alpha(one) for one in work.checkpoints],
        "annealed_at": _annealed_at(work),
        "topk_layers": topk_layers(last),
    }


def _annealed_at(work: Work) -> int | None:
    """The first step of training whose alpha is 0; None where there is no annealing."""
    last = work.checkpoints[-1]
    topk = last.model_args.topk
    if topk is None or not topk.anneal_ratio:
        return None
    # As `alpha_at` has it: 0.07 * 100 is a little above 7 in binary.
    return math.ceil(topk.anneal_ratio * last.params["steps"] - 1e-6)


def write(
    folder: Path, trace: Trace, wanted: Sequence[tuple[int, int]], about: dict[str, Any]
) -> None:
    """All files of a trace. wanted: layer and index of the neurons to write out."""
    (folder / TRACE_NAME).unlink(missing_ok=True)
    write_arrays(folder / ARRAYS_NAME, trace.arrays, {"version": VERSION, "steps": trace.steps})
    found = summary(trace)
    for name, svg in drawings(trace, found, about["annealed_at"]).items():
        write_text(folder / f"{name}.svg", svg)
    content = {
        "version": VERSION,
        **about,
        **found,
        "neurons": [neuron_summary(trace, layer, index) for layer, index in wanted],
        "provenance": provenance(),
    }
    write_json(folder / TRACE_NAME, content)
