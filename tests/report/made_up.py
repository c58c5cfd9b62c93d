"""A made-up analysis folder whose neurons are known, with the worst text a corpus can hold.

Layer 0 has TopK: neuron 7 fires on one token, 8 is dead, 9 fires on every hostile token, the
others on a few tokens each. Layer 2 has none, and values of both signs.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from apps.topk.neurons.comparison import compare_neurons, write_comparison
from apps.topk.neurons.folder import MODEL, write_analysis, write_layer
from apps.topk.neurons.measures import Text, measure_layer
from apps.topk.neurons.settings import Settings
from apps.topk.provenance import provenance, write_json, write_text
from apps.topk.tracing.measuring import write_arrays
from lingua_topk.analysis.record import Point, record
from lingua_topk.analysis.vectors import Vectors
from lingua_topk.analysis.words import words_of

HOSTILE = (
    "</script><script>alert(1)</script>", "<img src=x onerror=alert(2)>", "<!-- ", "\u202egnihtyna",
    "\0", "\x1b[31m", "&lt;b&gt;", "{{script}}", "\ufeff", "''\"><svg onload=alert(3)>",
)  # fmt: skip
BROKEN = (b"\xc3", b"\xed\xa0\x80")  # half a character, a lone surrogate
WORDS = (
    "the river bank flows past old stone house green field under cold morning sky where birds sing"
)
PIECES = [
    b"",  # bos
    *(f" {word}".encode() for word in WORDS.split()),
    b"\n", b"\t", b" ", b".", "é".encode(), "\u05e9\u05dc\u05d5\u05dd".encode(),
    *(text.encode() for text in HOSTILE), *BROKEN,
]  # fmt: skip
SPECIAL = {0: "bos"}
WIDTH = 150  # three chunks
ROWS, LENGTH = 14, 40
LAYERS = (0, 2)
ONE_TOKEN, DEAD, ON_HOSTILE = 7, 8, 9
RIVER = PIECES.index(b" river")
TRACE = {
    "annealed_at": 100, "corpus": {"tokens": 1234}, "settings": {"vectors": "others <b>"},
}  # fmt: skip
SETTINGS = Settings(min_words=3, contexts=3, context_tokens=12)


class Layer(nn.Module):
    """The value of each neuron on each token, whatever stands around it: [V, D]."""

    def __init__(self, values: np.ndarray):
        super().__init__()
        self.values = torch.from_numpy(values.astype(np.float32))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.values[tokens]


def values_of(draws: np.random.Generator, is_topk: bool) -> np.ndarray:
    values = draws.normal(0, 1, (len(PIECES), WIDTH))
    if not is_topk:
        return values
    values = np.where(draws.random(values.shape) < 0.15, np.abs(values) + 0.1, 0)
    values[:, [ONE_TOKEN, DEAD, ON_HOSTILE]] = 0
    values[RIVER, ONE_TOKEN] = 3.5
    values[PIECES.index(HOSTILE[0].encode()) :, ON_HOSTILE] = 2
    return values


def tokens_of(draws: np.random.Generator) -> np.ndarray:
    """Rows that begin with bos, every token among them, the hostile ones in row 0."""
    tokens = draws.integers(1, len(PIECES), (ROWS, LENGTH))
    tokens[0, 1 : len(PIECES)] = np.arange(1, len(PIECES))[: LENGTH - 1]
    tokens[:, 0] = 0
    return tokens.astype(np.int32)


def write(folder: Path, seed: int = 0) -> Path:
    """The folder of a whole analysis, with a trace."""
    draws = np.random.default_rng(seed)
    tokens = tokens_of(draws)
    modules = {0: Layer(values_of(draws, True)), 2: Layer(values_of(draws, False))}
    recording = record(
        lambda rows: [module(rows) for module in modules.values()],
        {0: Point(modules[0], True), 2: Point(modules[2], False, 8)},
        torch.from_numpy(tokens), row_length=LENGTH, n_rows=ROWS, out=folder / MODEL / "recording",
        batch_rows=4, inputs={}, model_name="made up", vocab_size=len(PIECES),
    )  # fmt: skip
    words = words_of(tokens, PIECES)
    vectors = draws.normal(0, 1, (len(words.words), 6)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    text = Text(tokens, words, Vectors(vectors, np.ones(len(words.words), bool), "made up"))
    for index in LAYERS:
        layer = recording.layer(index)
        measured = measure_layer(layer, text, text.shuffled(0), len(PIECES), SETTINGS)
        measured.arrays.update(next_tokens(draws))
        if index == 0:
            measured.words[ON_HOSTILE] = [(text, 2.0) for text in (*HOSTILE, "\ud800")]
        write_layer(folder / MODEL, layer, measured, "made up")
    write_comparison(folder, compare_neurons(folder))
    write_analysis(folder, described())
    write_trace(folder / "trace", draws)
    return folder


def next_tokens(draws: np.random.Generator) -> dict[str, np.ndarray]:
    found = {}
    for name, sign in (("promoted", 1), ("suppressed", -1)):
        found[name] = draws.integers(0, len(PIECES), (WIDTH, 10)).astype(np.int32)
        logits = sign * np.sort(draws.random((WIDTH, 10)))[:, ::-1]
        found[f"{name}_logits"] = np.ascontiguousarray(logits, dtype=np.float32)
    return found


def described() -> dict:
    """analysis.json, in a run whose name and corpus are hostile too."""
    return {
        "parts": [MODEL], "step": 300, "twin": None, "layers": list(LAYERS), "k": 8,
        "checkpoint": {
            "name": f"run {HOSTILE[0]}{HOSTILE[3]}", "dim": WIDTH, "n_layers": 3, "steps": 300,
            "parameters": 12345, "tokens": None,
            "topk": {"k": 20, "site": "residual", "layers": [0]},
        },
        "corpus": {"sources": {HOSTILE[1]: 3}, "rows": ROWS, "row_length": LENGTH,
                   "tokens": ROWS * LENGTH},
        "vectors": "made up", "settings": {"threshold": 0.5, "min_words": 3, "max_words": 100},
        "dtype": "fp32", "provenance": provenance(),
    }  # fmt: skip


def write_trace(folder: Path, draws: np.random.Generator) -> None:
    steps = [100, 200, 300]
    arrays = {"steps": np.array(steps), "over_layers.pairs": np.array([[0, 2]])}
    for index in LAYERS:
        for name in ("token_entropy", "semantic_entropy", "overlap"):
            arrays[f"layers.{index}.{name}"] = draws.random((3, WIDTH))
        arrays[f"layers.{index}.counts"] = draws.integers(1, 9, (3, WIDTH))
        arrays[f"layers.{index}.settle_step"] = draws.choice(steps, WIDTH)
        arrays[f"layers.{index}.top_tokens"] = draws.integers(
            0, len(PIECES), (3, WIDTH, 10), dtype=np.int32
        )
    for name in ("overlap", "correlation", "shifted_overlap", "shifted_correlation"):
        arrays[f"over_layers.{name}"] = draws.random((1, WIDTH))
    write_arrays(folder / "trace.safetensors", arrays, {"version": 1})
    drawing = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><script>alert(4)</script>'
    drawing += '<rect width="9" height="9" style="fill: #ff0000" onclick="alert(5)"/></svg>'
    write_text(folder / "settling.svg", drawing)
    write_json(folder / "trace.json", TRACE)
